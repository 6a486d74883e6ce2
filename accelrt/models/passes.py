"""Cut one call of a model along its batch, into calls that run in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from accelrt.config import Config
from accelrt.groups.independence import together

# What says nothing about single samples, unless there is one of it per sample.
_SCALARS = (type(None), bool, int, float, str)


def split_inputs(
    inputs: dict[str, Any],
    batch: int,
    samples: int,
    *,
    frames: int = 1,
    keep: frozenset[str] = frozenset(),
) -> list[dict[str, Any]] | str:
    """The inputs of calls with at most ``samples`` samples each, or why that is not known.

    A tensor ``[B, ...]`` is sliced by samples, ``[B * frames, ...]`` by whole samples
    (``[B, ...]`` where both are true); one of no dimension or of one row goes to every
    call, and so do numbers, strings and ``None``. Lists, tuples and dicts are cut item by
    item. The parts are views. Whether the model treats samples alone, and what one row
    means to it, is for the caller to know.

    Args:
        inputs: the arguments of the call by name.
        batch: samples in the call, ``B``.
        samples: samples in a part; only the last part may have fewer.
        frames: frames per sample.
        keep: names of arguments that go to every call as they are.

    Returns:
        ``[inputs]`` itself if there is nothing to cut; else one dict per part; or a
        sentence such as ``"added_cond_kwargs['x'] has 3 rows for 2 samples"``.

    Raises:
        ValueError: ``batch``, ``samples`` or ``frames`` is below 1.
    """
    for name, value in (("batch", batch), ("samples", samples), ("frames", frames)):
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed: an integer >= 1")
    if samples >= batch:
        return [inputs]
    for name, value in inputs.items():
        reason = "" if name in keep else _reason(name, value, batch, frames)
        if reason:
            return reason
    parts = []
    for start in range(0, batch, samples):
        stop = min(start + samples, batch)
        parts.append(
            {
                name: value if name in keep else _part(value, start, stop, batch, frames)
                for name, value in inputs.items()
            }
        )
    return parts


def some_rows(
    inputs: dict[str, Any], batch: int, rows: Sequence[int], *, frames: int = 1
) -> dict[str, Any] | str:
    """The inputs of a call for some of its samples, or why that is not known.

    What belongs to samples is told as by :func:`split_inputs`; the rows are copied.

    Args:
        inputs: the arguments of the call by name.
        batch: samples in the call.
        rows: which of them, in order.
        frames: frames per sample.
    """
    if len(rows) == batch:
        return inputs
    for name, value in inputs.items():
        reason = _reason(name, value, batch, frames)
        if reason:
            return reason
    return {name: _chosen(value, rows, batch, frames) for name, value in inputs.items()}


def sample_passes(
    model: nn.Module, blocks: Iterable[nn.Module], inputs: dict[str, Any], config: Config
) -> list[dict[str, Any]]:
    """The calls of ``config.samples_per_pass`` samples that a transformer's call is cut into.

    The call stays whole if the samples may see each other, if somebody watches the
    children of the model, who would see more calls, or if an argument is of an unknown form.

    Args:
        model: the transformer.
        blocks: of the model.
        inputs: its arguments by name, ``hidden_states`` ``[B, C, H, W]`` among them.
        config: of the call.
    """
    samples, batch = config.samples_per_pass, inputs["hidden_states"].shape[0]
    if samples is None or samples >= batch or inputs.get("cross_attention_kwargs"):
        return [inputs]
    channels = getattr(model, "config", {}).get("in_channels")
    if inputs["hidden_states"].shape[1] != channels:
        return [inputs]  # the stock model names the whole shape in its error
    if any(child._forward_hooks or child._forward_pre_hooks for child in model.children()):
        return [inputs]
    if together(blocks, "samples"):
        return [inputs]
    parts = split_inputs(inputs, batch, samples)
    return [inputs] if isinstance(parts, str) else parts


def _reason(name: str, value: Any, batch: int, frames: int) -> str:
    """Why a value cannot be cut; empty if it can, or goes to every part."""
    if isinstance(value, _SCALARS):
        return ""
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] in (1, batch, batch * frames):
            return ""
        return f"{name} has {value.shape[0]} rows for {batch} samples"
    if type(value) is dict:
        items = [(f"{name}[{key!r}]", item) for key, item in value.items()]
    elif type(value) in (list, tuple):
        if len(value) == batch and any(isinstance(item, _SCALARS[1:]) for item in value):
            return f"{name} may have one item for each of {batch} samples"
        items = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    else:
        return f"{name} is a {type(value).__name__}"
    for label, item in items:
        reason = _reason(label, item, batch, frames)
        if reason:
            return reason
    return ""


def _part(value: Any, start: int, stop: int, batch: int, frames: int) -> Any:
    """The rows of the samples ``start`` to ``stop`` of a value without a reason."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] == 1:
            return value
        rows = 1 if value.shape[0] == batch else frames
        return value[start * rows : stop * rows]
    if isinstance(value, dict):
        return {key: _part(item, start, stop, batch, frames) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_part(item, start, stop, batch, frames) for item in value])
    return value


def _chosen(value: Any, rows: Sequence[int], batch: int, frames: int) -> Any:
    """Some samples' rows of a value without a reason."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] == 1:
            return value
        each = 1 if value.shape[0] == batch else frames
        index = torch.tensor(rows, device=value.device)
        if each > 1:
            index = (index[:, None] * each + torch.arange(each, device=value.device)).flatten()
        return value.index_select(0, index)
    if isinstance(value, dict):
        return {key: _chosen(item, rows, batch, frames) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_chosen(item, rows, batch, frames) for item in value])
    return value
