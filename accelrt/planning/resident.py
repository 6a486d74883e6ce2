"""What is on a device beside the activations: weights, and the library's workspace."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from accelrt import _C
from accelrt.groups.convolve import conv_is_ours
from accelrt.groups.products import linear_is_ours
from accelrt.memory.tracker import storage_bytes

# What a convolution of ours takes: csrc/kernels/conv2d/conv2d.h, whose kConv2dTileBytes and
# kConv2dPackBytes these are. Each thread has a tile of the input and what waits beside it; with
# tile registers (conv2d_tiles.cpp) a tile is up to twice as large, and the threads share packed
# weights, in panels of so many output channels.
TILE_BYTES = 3 * 2**20
BESIDE_TILE_BYTES = 640 * 2**10
PACK_BYTES = 16 * 2**20
PANEL_CHANNELS = 32
TILE_ISAS = ("amx", "amx_emulated")

# What a linear layer of ours takes with tile registers: csrc/kernels/linear/linear.h, and constants
# of linear_tiles.cpp. The threads share the rows or the packed weights; each has some panels, or a
# chunk of the rows, and sums.
LINEAR_ROWS_BYTES = 8 * 2**20
LINEAR_PACK_BYTES = 16 * 2**20
LINEAR_CHUNK_BYTES = 5 * 2**18
LINEAR_CHUNK_ROWS = 256  # at least
LINEAR_FEW_ROWS = 512  # that are one chunk
LINEAR_PANELS = 8
LINEAR_FEWEST_PIECES = 8  # of a product whose pieces have several panels
LINEAR_SUMS_BYTES = 512 * 2**10


def free_bytes(device: torch.device) -> int:
    """Memory that new tensors on ``device`` can take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + held)
    import psutil

    return int(psutil.virtual_memory().available)


def workspace_bytes(model: nn.Module, device: torch.device, budget_bytes: int = 0) -> int:
    """What is taken beside weights and activations, in operators and between them.

    On the CPU oneDNN holds the weights of the running product a second time, in its own
    order. Those of a convolution torch has copied to channels last before, and as much again
    may lie free in the heap until a run looks at it; our convolution has a tile per thread
    instead, and with tile registers some packed weights, as has our linear layer. One part in
    a hundred of the budget is left to the heap, which does not return every page that is free.
    """
    if device.type == "cuda":
        return 0  # in the device's own pools, which torch reserves once
    largest = max(map(_taken_bytes, model.parameters()), default=0)
    return largest + budget_bytes // 100


def product_bytes(model: nn.Module, device: torch.device) -> int:
    """What products of ``model`` take and free again on the CPU, mostly the largest weights.

    A run that gives this back after every one of them gets it anew, page by page, for the next.
    """
    if device.type == "cuda":
        return 0
    products = (weight for weight in model.parameters() if weight.dim() <= 2)
    return max(map(_taken_bytes, products), default=0)


def _taken_bytes(weight: Tensor) -> int:
    """What a product with ``weight`` takes on the CPU beside its input and output."""
    size = weight.numel() * weight.element_size()
    tiles = weight.dtype == torch.bfloat16 and _C.active_isa() in TILE_ISAS
    if weight.dim() <= 2:
        # Few rows are the library's in any case.
        ours = tiles and weight.dim() == 2 and linear_is_ours(weight.dtype, weight.shape[1])
        return max(size, _linear_on_tiles(weight)) if ours else size
    if not conv_is_ours(weight.dtype):
        return 4 * size
    tile, packed = TILE_BYTES + BESIDE_TILE_BYTES, 0
    if tiles:
        tile, packed = 2 * TILE_BYTES + 2 * BESIDE_TILE_BYTES, _packed(weight, PACK_BYTES)
    return torch.get_num_threads() * tile + packed


def _panels(weight: Tensor) -> tuple[int, int]:
    """How many panels the weights ``[O, C, *]`` make, and the bytes of one.

    The input channels of a panel are padded to as many as a tile takes, which are 32 too.
    """
    outputs, inputs, *kernel = weight.shape
    depth = max(1, -(-inputs // PANEL_CHANNELS)) * PANEL_CHANNELS
    panel = prod(kernel) * depth * PANEL_CHANNELS * weight.element_size()
    return -(-outputs // PANEL_CHANNELS), panel


def _packed(weight: Tensor, most: int) -> int:
    """Bytes of the packed weights that are there at a time: whole panels, at least one."""
    panels, panel = _panels(weight)
    return max(1, min(most // panel, panels)) * panel


def _linear_on_tiles(weight: Tensor) -> int:
    """What our linear layer takes with tile registers, whatever the number of rows."""
    panels, panel = _panels(weight)
    row = panel // PANEL_CHANNELS + PANEL_CHANNELS * weight.element_size()  # a line more at most
    # All rows are one chunk if that is few and yet more than the threads share.
    few = row * LINEAR_FEW_ROWS > LINEAR_ROWS_BYTES
    chunk = max(LINEAR_CHUNK_BYTES, row * (LINEAR_FEW_ROWS if few else LINEAR_CHUNK_ROWS))
    together = max(1, min(LINEAR_PANELS, (panels - 1) // (LINEAR_FEWEST_PIECES - 1)))
    each = max(chunk, together * panel) + LINEAR_SUMS_BYTES
    shared = max(LINEAR_ROWS_BYTES, _packed(weight, LINEAR_PACK_BYTES))
    return shared + torch.get_num_threads() * each


def resident_bytes(
    modules: Iterable[nn.Module], device: torch.device, running: nn.Module | None = None
) -> int:
    """Bytes of the weights that are on ``device`` while one of the modules runs.

    Args:
        modules: of a pipeline.
        device: weights elsewhere do not count, unless a hook brings them.
        running: the module that runs, or a part of one; ``None`` while none does.
    """
    kept: list[Tensor] = []
    streamed = 0
    for module in modules:
        groups = _offload_groups(module)
        if groups:
            # One group runs while the next is on its way.
            streamed = max(streamed, sum(sorted(groups)[-2:]))
            continue
        weights = [*module.parameters(), *module.buffers()]
        comes = running is not None and any(part is running for part in module.modules())
        if _is_offloaded(module):
            kept += weights if comes else []
        else:
            kept += [tensor for tensor in weights if tensor.device.type == device.type]
    return storage_bytes(kept) + streamed


def _is_offloaded(module: nn.Module) -> bool:
    """A hook of accelerate brings the weights when the module runs, and takes them away after."""
    hooks = (part.__dict__.get("_hf_hook") for part in module.modules())
    return any(
        getattr(one, "offload", False) or type(one).__name__ == "CpuOffload"
        for hook in hooks
        if hook is not None
        for one in getattr(hook, "hooks", (hook,))
    )


def _offload_groups(module: nn.Module) -> list[int]:
    """Bytes of the groups of diffusers' group offloading; empty without it."""
    groups: dict[int, Any] = {}
    for part in module.modules():
        registry = part.__dict__.get("_diffusers_hook")
        hook = None if registry is None else registry.hooks.get("group_offloading")
        if hook is not None:
            groups[id(hook.group)] = hook.group
    return [_group_bytes(group) for group in groups.values()]


def _group_bytes(group: Any) -> int:
    tensors = [*(group.parameters or ()), *(group.buffers or ())]
    for module in group.modules:
        tensors += [*module.parameters(), *module.buffers()]
    return storage_bytes(tensors)
