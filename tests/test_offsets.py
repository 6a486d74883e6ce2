"""The offset planner: living buffers never overlap, the bound is right, easy cases are optimal."""

from __future__ import annotations

import random

import pytest

from accelrt import _C

Life = tuple[int, int, int]


def plan(lives: list[Life], alignment: int = 1) -> _C.OffsetPlan:
    sizes, firsts, lasts = ([life[i] for life in lives] for i in range(3))
    return _C.plan_offsets(sizes, firsts, lasts, alignment)


def check(lives: list[Life], alignment: int) -> _C.OffsetPlan:
    """Every property of a plan, the slow way."""
    result = plan(lives, alignment)
    sizes = [-(-size // alignment) * alignment for size, _, _ in lives]
    spans = list(zip(result.offsets, sizes, lives, strict=True))
    for i, (offset, size, (_, first, last)) in enumerate(spans):
        assert offset >= 0
        assert offset % alignment == 0
        for other, other_size, (_, other_first, other_last) in spans[:i]:
            if first <= other_last and other_first <= last:
                assert offset + size <= other or other + other_size <= offset
    steps = {first for _, first, _ in lives}
    bound = max(
        sum(size for size, (_, first, last) in zip(sizes, lives, strict=True) if first <= s <= last)
        for s in steps
    )
    assert result.bound_bytes == bound
    assert result.slab_bytes == max(offset + size for offset, size, _ in spans)
    assert result.slab_bytes >= bound
    assert result.fragmentation == pytest.approx(result.slab_bytes / bound - 1)
    return result


@pytest.mark.parametrize("seed", range(200))
def test_random_lives(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 60)
    longest = draw.choice([0, 3, 20])
    lives = []
    for _ in range(count):
        first = draw.randrange(2 * count)
        size = draw.randint(1, 1000) if seed % 2 else draw.choice([64, 512, 4096])
        lives.append((size, first, first + draw.randint(0, longest)))
    result = check(lives, draw.choice([1, 64, 512]))
    assert result.fragmentation < 0.35


def test_lives_apart_share_one_place() -> None:
    assert plan([(10, 0, 0), (10, 1, 3), (7, 4, 4)]).offsets == [0, 0, 0]


def test_the_last_step_counts_as_alive() -> None:
    assert plan([(10, 0, 1), (10, 1, 2)]).slab_bytes == 20


def test_a_chain_of_layers_needs_two_places() -> None:
    """Each layer's output lives while the next one reads it."""
    result = check([(100, i, i + 1) for i in range(50)], 1)
    assert (result.slab_bytes, result.bound_bytes) == (200, 200)


def test_skips_of_a_unet_are_packed_without_a_gap() -> None:
    """Nested lives, halving sizes, with a scratch buffer in every step."""
    depth = 8
    lives: list[Life] = [(2 ** (20 - i), i, 2 * depth - i) for i in range(depth)]
    lives += [(2**12, step, step) for step in range(2 * depth + 1)]
    assert check(lives, 512).fragmentation == 0


def test_the_smallest_gap_that_fits_is_taken() -> None:
    """Gaps of 30 and 12 bytes are left between three long-lived buffers; 10 goes into 12."""
    lives = [(100, 0, 9), (30, 0, 4), (90, 0, 9), (12, 0, 4), (80, 0, 9), (10, 5, 9), (29, 5, 9)]
    assert check(lives, 1).slab_bytes == 312


def test_no_buffers() -> None:
    result = plan([])
    assert (result.offsets, result.slab_bytes, result.bound_bytes) == ([], 0, 0)
    assert result.fragmentation == 0


def test_the_result_is_read_only_and_repeatable() -> None:
    lives = [(i % 7 + 1, i, i + i % 5) for i in range(40)]
    first, second = plan(lives), plan(lives)
    assert first.offsets == second.offsets
    with pytest.raises(AttributeError):
        first.slab_bytes = 1  # type: ignore[misc]


def test_thousands_of_buffers() -> None:
    draw = random.Random(0)
    lives = [(draw.randint(1, 2**30), i, i + draw.randint(0, 30)) for i in range(3000)]
    result = plan(lives, 512)
    assert result.fragmentation < 0.2


@pytest.mark.parametrize(
    ("life", "alignment", "named"),
    [
        ((0, 0, 0), 64, r"sizes\[1\] is 0"),
        ((-5, 0, 0), 64, r"sizes\[1\] is -5"),
        ((1, -1, 0), 64, r"firsts\[1\] is -1"),
        ((1, 3, 2), 64, r"lasts\[1\] is 2, before firsts\[1\], 3"),
        ((2**63 - 1, 0, 0), 64, rf"sizes\[1\] is {2**63 - 1}; aligned to 64 it overflows"),
        ((2**63 - 64, 0, 0), 64, rf"overflows 64 bits at sizes\[1\], {2**63 - 64}"),
        ((1, 0, 0), 0, "alignment is 0"),
        ((1, 0, 0), -8, "alignment is -8"),
    ],
)
def test_bad_values_are_named(life: Life, alignment: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan([(8, 0, 0), life], alignment)


def test_lists_of_different_lengths() -> None:
    with pytest.raises(ValueError, match="2 sizes, 1 firsts and 2 lasts"):
        _C.plan_offsets([1, 2], [0], [0, 1], 64)
