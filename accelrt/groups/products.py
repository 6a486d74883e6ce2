"""Linear layers and attention: our kernels where they are the faster ones, torch's elsewhere.

Which they are is measured per processor and dtype and decided in the extension
(``own_linear_is_faster``, ``own_attention_is_faster``); on a GPU torch's are used, unless
``ACCELRT_CUDA_PRODUCTS`` asks for our attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accelrt import _C, ops
from accelrt.ops.attention import MAX_HEAD_DIM

from .recognise import has_plain_weights, is_plain_linear
from .slicing import current_probe
from .spare import Spare

#: Fewer rows do not make up for the panels of weights, which our kernel makes in every call.
FEWEST_ROWS = 32

#: As the extension names them.
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def linear_is_ours(dtype: torch.dtype, depth: int) -> bool:
    """Whether our kernel is the faster one on this processor for rows of ``depth`` elements."""
    name = DTYPE_NAMES.get(dtype)
    return name is not None and _C.own_linear_is_faster(name, depth)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _attention_is_ours(dtype: torch.dtype, head_dim: int, device_type: str) -> bool:
    name = DTYPE_NAMES.get(dtype)
    if name is None:
        return False
    if device_type == "cpu":
        return _C.own_attention_is_faster(name, head_dim)
    fits = dtype != torch.float32 and head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM
    return device_type == "cuda" and fits and _C.cuda_products() == "own"


def _device_type(x: Tensor) -> str:
    """Where it is, or is planned for: a dry run says for which device."""
    if x.device.type != "meta":
        return x.device.type
    probe = current_probe(x)
    return "cpu" if probe is None else probe.device_type


def runs_on_cpu(x: Tensor) -> bool:
    """Where it is, or is planned for."""
    return _device_type(x) == "cpu"


def _as_rows(x: Tensor) -> Tensor | None:
    """``[..., K]`` as ``[M, K]``, a view; ``None`` if the rows have no common stride."""
    if x.dim() == 2:
        rows = x
    elif x.is_contiguous():
        rows = x.view(-1, x.shape[-1])
    elif x.dim() == 3 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)):
        rows = x.flatten(0, 1)
    else:
        return None
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else None


def _has_rows(x: Tensor) -> bool:
    """Enough rows, with a common stride."""
    return x.numel() >= FEWEST_ROWS * x.shape[-1] and _as_rows(x) is not None


def is_ours(layer: nn.Module, x: Tensor) -> bool:
    """A plain linear layer that our kernel computes for the rows of ``x`` ``[..., K]``."""
    return (
        runs_on_cpu(x)
        and is_plain_linear(layer)
        and has_plain_weights(layer, x.dtype)
        and linear_is_ours(x.dtype, x.shape[-1])
        and layer.weight.is_contiguous()  # type: ignore[operator]
        and _has_rows(x)
    )


def project(layer: Any, x: Tensor, *, fuse: bool = True, spare: Spare | None = None) -> Tensor:
    """``layer(x)`` of a linear layer, for ``[..., K]``; as it came with ``fuse=False``.

    Our kernel writes to ``spare``, if there is one.
    """
    ours = fuse and is_ours(layer, x)
    y: Tensor = _own(x, layer.weight, layer.bias, spare) if ours else layer(x)
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` for ``[..., K]``, with plain weights in the dtype of ``x``."""
    ours = runs_on_cpu(x) and linear_is_ours(x.dtype, x.shape[-1])
    if ours and weight.is_contiguous() and _has_rows(x):
        return _own(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_into(out: Tensor, x: Tensor, layer: nn.Linear, columns: slice = slice(None)) -> None:
    """``out = layer(x)``, or some columns of it.

    Args:
        out: ``[s, columns]``.
        x: ``[s, D]``.
        layer: a plain one with weights of the dtype of ``x``.
        columns: of the output.
    """
    weight = layer.weight[columns]
    bias = None if layer.bias is None else layer.bias[columns]
    if is_ours(layer, x) and out.stride(-1) == 1:
        ops.linear(x, weight, bias, out=out)
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _own(x: Tensor, weight: Tensor, bias: Tensor | None, spare: Spare | None = None) -> Tensor:
    rows = _as_rows(x)
    assert rows is not None
    out = None if spare is None else spare.rows(rows.shape[0], weight.shape[0])
    return ops.linear(rows, weight, bias, out=out).view(*x.shape[:-1], weight.shape[0])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None,
    overwrite: bool = False,
) -> Tensor:
    """Scaled dot-product attention of heads that lie beside each other.

    Args:
        q: ``[n, S, H, D]``.
        k, v: ``[n, L, H, D]``.
        mask: ``[n or 1, H or 1, S or 1, L]``, added to the scores (or boolean), or ``None``.
        scale: of the scores; ``D ** -0.5`` if ``None``.
        overwrite: the result may take the place of ``q``.

    Returns:
        ``[n, S, H * D]``.
    """
    ours = _attention_is_ours(q.dtype, q.shape[-1], _device_type(q))
    if ours and _takes(q, k, v, mask):
        y = ops.attention(q, k, v, bias=mask, scale=scale, out=q if overwrite else None)
        return y.flatten(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return y.transpose(1, 2).flatten(2)


def _takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Dtypes and layouts that the kernel reads as they are."""
    tensors = [q, k, v]
    if mask is not None:
        if mask.dim() != 4:
            return False
        tensors.append(mask)
    return k.shape[1] > 0 and all(
        t.dtype == q.dtype and (t.stride(-1) == 1 or t.shape[-1] == 1) for t in tensors
    )
