"""A feed-forward layer by slices of rows."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from accelrt import _C, reference
from accelrt.memory.arena import temporary
from accelrt.reference.block import FeedForwardWeights

from ._library import (
    check_cuda_built,
    check_shape,
    check_tensor,
    explain,
    fails,
    native,
    register_fake,
)

_OP = "feed_forward"
_ALIGNMENT = 64
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "geglu": 2, "geglu_tanh": 3}
_GEGLUS = (2, 3)


def feed_forward_scratch(
    x: Tensor, weights: FeedForwardWeights, *, rows: int | None = None, add: bool = True
) -> int:
    """Elements of the scratch with which :func:`feed_forward` makes slices of ``rows`` rows.

    Args:
        x: ``[M, K]``; its values are not looked at.
        weights: of the layer.
        rows: of a slice; by default as many as keep the hidden activations in the cache: a
            scratch of half the GPU's L2 cache, of 8 MiB on a CPU (64 for bfloat16 with AMX), or
            all rows if they need less.
        add: the result is added to a tensor (``add_to``).

    Raises:
        ValueError: ``rows`` is less than 1.
    """
    if rows is not None and rows < 1:
        raise fails(_OP, f"rows is {rows}; it must be at least 1")
    element = x.element_size()

    def size(count: int, columns: int) -> int:
        return -(-count * columns * element // _ALIGNMENT) * _ALIGNMENT

    def needed(count: int) -> int:
        sums = size(count, weights.out.weight.shape[0]) if add else 0
        return size(count, weights.hidden.weight.shape[0]) + sums

    whole = needed(max(x.shape[0], 1))
    if rows is not None:
        return min(needed(rows), whole) // element
    cache: int = _cache_bytes(x.device, x.dtype)
    return max(min(cache, whole), needed(1)) // element


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cache_bytes(device: torch.device, dtype: torch.dtype) -> int:
    cuda = device.type == "cuda"
    with torch.cuda.device(device) if cuda else contextlib.nullcontext():
        name = "bfloat16" if dtype == torch.bfloat16 else "float32"  # others as this
        return _C.feed_forward_cache_bytes(cuda, name)


def feed_forward(
    x: Tensor,
    weights: FeedForwardWeights,
    *,
    gate: Tensor | None = None,
    add_to: Tensor | None = None,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
) -> Tensor:
    """Two products with an activation between, the hidden activations existing for a slice.

    One call runs all slices. They are as long as ``scratch`` allows, of about equal length and,
    with a ``gate``, within one sample or of whole samples.

    Args:
        x: ``[M, K]`` with any row stride.
        weights: of the two layers, of the dtype and device of ``x``, with any row strides;
            ``activation`` may be ``"geglu_tanh"`` too.
        gate: ``[B, N]`` where ``B`` divides ``M``: sample ``b`` has the rows from ``b * M / B``.
            With ``add_to`` only; ``None`` is one.
        add_to: ``[M, N]`` with any row stride; ``gate`` times the result is added to it, and it
            is returned. Without ``out``.
        out: ``[M, N]`` with any row stride; overlaps no input.
        scratch: contiguous, of the dtype and device of ``x``, aligned to 64 bytes; see
            :func:`feed_forward_scratch`, by whose default it is allocated.

    Raises:
        ValueError: an argument does not fit; nothing has been written.
        RuntimeError: ``scratch`` is too small for a row.

    Source: the position-wise feed-forward network of arXiv 1706.03762, section 3.3; GEGLU of
    arXiv 2002.05202, section 2.
    """
    if weights.activation not in ACTIVATIONS:
        raise fails(_OP, f"activation is {weights.activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    if add_to is None and gate is not None:
        raise fails(_OP, "a gate needs add_to")
    if add_to is not None and out is not None:
        raise fails(_OP, "add_to excludes out")
    if x.dtype == torch.float64:
        return reference.feed_forward(x, weights, gate=gate, add_to=add_to, out=out)
    add = add_to is not None
    if add_to is not None:
        result = add_to
    else:
        result = temporary(x, x.shape[0], weights.out.weight.shape[0]) if out is None else out
    if scratch is None:
        scratch = temporary(x, feed_forward_scratch(x, weights, add=add))
    per_sample = 1 if gate is None else max(x.shape[0] // max(gate.shape[0], 1), 1)
    args = (
        x, *weights.hidden, *weights.out, ACTIVATIONS[weights.activation], gate, per_sample, add,
        result, scratch,
    )  # fmt: skip
    try:
        native.feed_forward(*args)
    except RuntimeError as error:
        explain(error, _fake, *args)
    return result


@register_fake(_OP)
def _fake(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    activation: int,
    gate: Tensor | None,
    rows_per_sample: int,
    add: bool,
    out: Tensor,
    scratch: Tensor,
) -> None:
    check_tensor(_OP, "x", x)
    for name, t in (("x", x), ("in_weight", in_weight), ("out_weight", out_weight)):
        if t.dim() != 2:
            raise fails(_OP, f"{name} has shape {tuple(t.shape)}; expected two dimensions")
    hidden, width = in_weight.shape[0], out_weight.shape[0]
    if activation in _GEGLUS and hidden % 2:
        raise fails(_OP, f"in_weight has {hidden} rows; geglu needs an even number")
    inner = hidden // 2 if activation in _GEGLUS else hidden
    expected = [
        ("in_weight", in_weight, (hidden, x.shape[1])),
        ("in_bias", in_bias, (hidden,)),
        ("out_weight", out_weight, (width, inner)),
        ("out_bias", out_bias, (width,)),
        ("out", out, (x.shape[0], width)),
    ]
    if gate is not None:
        if gate.dim() != 2 or gate.shape[0] * rows_per_sample != x.shape[0]:
            raise fails(
                _OP,
                f"gate has shape {tuple(gate.shape)}; its samples must divide {x.shape[0]} rows",
            )
        expected.append(("gate", gate, (gate.shape[0], width)))
    for name, given, shape in expected:
        if given is None:
            continue
        check_tensor(_OP, name, given, x)
        check_shape(_OP, name, given, shape)
        _check_last_stride(name, given)
    _check_last_stride("x", x)
    check_tensor(_OP, "scratch", scratch, x)
    if scratch.numel() and not scratch.is_contiguous():
        raise fails(_OP, "scratch is not contiguous")
    check_cuda_built(_OP, x)


def _check_last_stride(name: str, t: Tensor) -> None:
    if t.numel() and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise fails(_OP, f"the last stride of {name} is {t.stride(-1)}; it must be 1")
