"""The peak tracker against known patterns of allocation."""

from __future__ import annotations

import model_zoo as zoo
import pytest
import torch
from model_zoo import one_thread  # noqa: F401

import accelrt
from accelrt import ops
from accelrt.memory import storage_bytes, track_peak, weight_bytes

KIB = 1024


def kib(n: int, device: str = "cpu") -> torch.Tensor:
    return torch.empty(n * KIB, dtype=torch.uint8, device=device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_and_live(device: str) -> None:
    with track_peak() as memory:
        a = kib(4, device)
        b = kib(2, device)
        del a
        c = kib(1, device)
        assert memory.live_bytes == 3 * KIB
        assert memory.peak_bytes == 6 * KIB
        del b, c
        assert memory.live_bytes == 0
    assert memory.peak_bytes == 6 * KIB
    assert memory.existing_bytes == 0


def test_views_and_in_place_operations_cost_nothing() -> None:
    with track_peak() as memory:
        a = kib(4)
        view = a.view(2, -1)[1:, ::2].t()
        a.add_(1)
        torch.add(a, a, out=a)
        assert memory.live_bytes == 4 * KIB
        del a
        assert memory.live_bytes == 4 * KIB  # the view keeps the storage
        del view
        assert memory.live_bytes == 0
    assert memory.peak_bytes == 4 * KIB


def test_what_existed_before_is_apart() -> None:
    weight = torch.ones(1024)
    with track_peak() as memory:
        y = weight * 2
        assert memory.existing_bytes == 4 * KIB
        assert memory.live_bytes == 4 * KIB
        del y
    assert memory.peak_bytes == 4 * KIB


def test_existing_tensors_can_be_announced() -> None:
    weight = torch.ones(1024)
    with track_peak() as memory:
        memory.existing([weight, weight[:10]])
        weight.add_(1)
    assert (memory.existing_bytes, memory.peak_bytes) == (4 * KIB, 0)


def test_resize_in_place() -> None:
    with track_peak() as memory:
        a = kib(1)
        a.resize_(3 * KIB)
        assert memory.live_bytes == 3 * KIB
        del a
        assert memory.live_bytes == 0


def test_timeline_marks_and_reset() -> None:
    with track_peak(record=True) as memory:
        memory.mark("first")
        a = kib(4)
        del a
        memory.mark("second")
        memory.reset_peak()
        b = kib(1)
    assert memory.timeline == [("first", 4 * KIB), ("second", KIB)]
    assert (memory.peak_bytes, memory.peak_label) == (KIB, "second")
    del b
    assert memory.live_bytes == KIB  # nothing changes once the context is closed


def test_our_operators_with_out() -> None:
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    with track_peak() as memory:
        out = torch.empty_like(x)
        stats = ops.group_norm_stats(x, 4)
        ops.group_norm_apply(x, stats, 4, out=out)
        expected = storage_bytes([out, stats])
        assert memory.live_bytes == expected
        ops.residual_blend(x, out, out=out)
        ops.silu(out, out=out)
        assert memory.live_bytes == expected
    assert memory.existing_bytes == x.numel() * 4


def test_weight_bytes_counts_shared_storages_once() -> None:
    layer = torch.nn.Linear(8, 8)
    assert weight_bytes(layer, layer) == (64 + 8) * 4


def test_an_exception_closes_the_context() -> None:
    def fail() -> None:
        with track_peak() as memory:
            kib(1)
            assert memory.peak_bytes == KIB
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with track_peak() as memory:
        kib(2)
    assert memory.peak_bytes == 2 * KIB


def test_sliced_groups_lower_the_peak() -> None:
    """Stock, wrapped whole, and wrapped in slices: the peak of live activations falls."""
    unet = zoo.tiny_unet().to(torch.bfloat16)
    inputs = zoo.to_dtype(zoo.unet_inputs(1, 7, 16, 24), torch.bfloat16)

    def peak() -> int:
        with torch.no_grad(), track_peak() as memory:
            unet(**inputs)
        return memory.peak_bytes

    stock = peak()
    accelrt.wrap(unet, slice_mib=1e5)
    whole = peak()
    accelrt.unwrap(unet)
    accelrt.wrap(unet, frames_per_slice=1, pixels_per_slice=32, ff_rows=64)
    sliced = peak()
    assert whole < stock
    assert sliced < 0.6 * whole


def test_as_an_observer_the_tracker_labels_groups() -> None:
    unet = accelrt.wrap(zoo.tiny_unet())
    with torch.no_grad(), track_peak(record=True) as memory:
        unet.forward.observer = memory
        unet(**zoo.unet_inputs(1, 2, 8, 8))
    labels = {label for label, _ in memory.timeline}
    assert "mid_block.motion_modules.0" in labels
    assert memory.peak_label in labels


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_tensors_count_by_their_parts(layout: torch.layout) -> None:
    dense = torch.eye(64)
    with track_peak() as tracker:
        kept = dense.to_sparse(layout=layout)
        # At least 64 values of 4 bytes and as many indices of 8.
        assert tracker.live_bytes >= 64 * (4 + 8)
        del kept
    assert tracker.live_bytes == 0


def test_opaque_tensors_pass() -> None:
    with track_peak() as tracker:
        opaque = torch.ones(8, 8).to_mkldnn()
        assert opaque.to_dense().sum() == 64
    assert tracker.peak_bytes > 0
