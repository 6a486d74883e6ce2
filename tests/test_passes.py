"""The inputs of a call, cut along the batch."""

from __future__ import annotations

from typing import Any

import model_zoo as zoo
import pytest
import torch
import zoo_pixart as pixart
from torch import Tensor

import accelrt
from accelrt.models.passes import split_inputs


def rows(count: int, width: int = 2) -> Tensor:
    return torch.arange(count * width).view(count, width)


def split(inputs: dict[str, Any], *args: Any, **options: Any) -> list[dict[str, Any]]:
    parts = split_inputs(inputs, *args, **options)
    assert not isinstance(parts, str), parts
    return parts


@pytest.mark.parametrize(("batch", "samples"), [(2, 1), (3, 2), (7, 3), (4, 2)])
def test_parts_join_to_the_whole(batch: int, samples: int) -> None:
    frames = 3
    inputs = {
        "sample": rows(batch),
        "frames": rows(batch * frames),
        "nested": {"a": (rows(batch), [rows(batch * frames), None])},
    }
    parts = split(inputs, batch, samples, frames=frames)
    assert [len(part["sample"]) for part in parts] == [
        min(samples, batch - start) for start in range(0, batch, samples)
    ]
    assert torch.equal(torch.cat([part["sample"] for part in parts]), inputs["sample"])
    assert torch.equal(torch.cat([part["frames"] for part in parts]), inputs["frames"])
    for part in parts:
        count = len(part["sample"])
        first, (second, nothing) = part["nested"]["a"]
        assert len(first) == count
        assert len(second) == len(part["frames"]) == frames * count
        assert nothing is None
        assert part["sample"]._base is not None  # a view, not a copy


def test_what_goes_to_every_part() -> None:
    inputs = {
        "timestep": torch.tensor(501),
        "one_row": rows(1),
        "scale": 0.5,
        "flag": True,
        "name": "x",
        "nothing": None,
        "size": [64, 64, 64],
        "kept": rows(5),
        "kept_object": object(),
        "sample": rows(2),
    }
    parts = split(inputs, 2, 1, keep=frozenset(("kept", "kept_object")))
    assert len(parts) == 2
    for part in parts:
        for name in set(inputs) - {"sample", "size"}:
            assert part[name] is inputs[name]
        assert part["size"] == [64, 64, 64]
    assert list(parts[0]) == list(inputs)


@pytest.mark.parametrize(("batch", "samples"), [(1, 1), (2, 2), (2, 5), (1, 3)])
def test_nothing_to_cut(batch: int, samples: int) -> None:
    inputs = {"sample": rows(batch), "odd": rows(9), "unknown": object()}
    parts = split(inputs, batch, samples)
    assert len(parts) == 1
    assert parts[0] is inputs


def test_samples_come_before_frames() -> None:
    """With one frame both readings agree; rows of samples are never taken for frames."""
    parts = split({"x": rows(2)}, 2, 1, frames=1)
    assert torch.equal(parts[1]["x"], rows(2)[1:])
    parts = split({"x": rows(4), "y": rows(16)}, 4, 2, frames=4)
    assert len(parts[0]["x"]) == 2
    assert len(parts[0]["y"]) == 8


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"x": rows(3)}, "x has 3 rows for 2 samples"),
    "nested": (
        {"added_cond_kwargs": {"x": rows(3)}},
        "added_cond_kwargs['x'] has 3 rows for 2 samples",
    ),
    "list": ({"x": [rows(2), rows(8)]}, "x[1] has 8 rows for 2 samples"),
    "empty": ({"x": rows(0)}, "x has 0 rows for 2 samples"),
    "object": ({"x": {"y": object()}}, "x['y'] is a object"),
    "per sample": ({"labels": [3, 4]}, "labels may have one item for each of 2 samples"),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons(case: str) -> None:
    inputs, reason = REASONS[case]
    assert split_inputs({"sample": rows(2), **inputs}, 2, 1, frames=3) == reason


@pytest.mark.parametrize("wrong", ["batch", "samples", "frames"])
def test_wrong_counts(wrong: str) -> None:
    counts = {"batch": 2, "samples": 1, "frames": 1, wrong: 0}
    with pytest.raises(ValueError, match=f"{wrong} is 0; allowed"):
        split_inputs({"sample": rows(2)}, **counts)


def _calls(model: Any, **others: Any) -> int:
    """Into how many calls one of three samples is cut."""
    inputs = {**pixart.inputs(3, 8, 12), "attention_mask": None, **others}
    config = accelrt.Config(samples_per_pass=2)
    return len(model.forward.family.parts(model, inputs, config))


WHOLE: dict[str, dict[str, Any]] = {
    "kwargs": {"cross_attention_kwargs": {"scale": 0.5}},
    "caption of another batch": {"encoder_hidden_states": zoo.normal(1, 6, 20)},
    "a mask per head": {"encoder_attention_mask": zoo.normal(6, 1, pixart.CAPTION_LENGTH)},
    "an unknown argument": {"added_cond_kwargs": {"resolution": object()}},
    "one timestep": {"timestep": torch.tensor([3])},
    "other channels": {"hidden_states": zoo.normal(3, 3, 8, 12)},
}


def test_a_transformer_in_passes() -> None:
    model = accelrt.wrap(pixart.tiny_pixart())
    assert _calls(model) == 2
    assert {name: _calls(model, **others) for name, others in WHOLE.items()} == dict.fromkeys(
        WHOLE, 1
    )


def test_a_watched_or_mixing_transformer_stays_whole() -> None:
    model = accelrt.wrap(pixart.tiny_pixart())
    for module in (model.proj_out, model.transformer_blocks[1], model.transformer_blocks[2].attn2):
        handle = module.register_forward_hook(lambda *_: None)
        assert _calls(model) == 1
        handle.remove()
    assert _calls(model) == 2
    attn = model.transformer_blocks[0].attn1
    attn.set_processor(lambda attn, x, *_, **__: x - x.mean(0))
    assert _calls(model) == 1


def test_dit_stays_whole_where_its_tokens_make_no_square() -> None:
    model = accelrt.wrap(zoo.tiny_dit())
    config = accelrt.Config(samples_per_pass=1)
    for shape, calls in (((2, 4, 8, 8), 2), ((2, 4, 8, 18), 2), ((2, 4, 8, 10), 1), ((4, 8, 8), 1)):
        inputs = {
            "hidden_states": zoo.normal(*shape),
            "timestep": torch.tensor([7]),
            "class_labels": torch.tensor([3, 1000]),
            "return_dict": False,
        }
        assert len(model.forward.family.parts(model, inputs, config)) == calls
