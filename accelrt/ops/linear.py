"""A product of rows with a weight matrix, with what follows it."""

from __future__ import annotations

import torch
from torch import Tensor

from accelrt import reference
from accelrt.memory.arena import temporary

from ._library import (
    check_cuda_built,
    check_shape,
    check_tensor,
    explain,
    fails,
    native,
    register_fake,
)

_OP = "linear"
_ACTIVATIONS = {None: 0, "gelu": 1, "gelu_tanh": 2, "geglu": 4, "geglu_tanh": 5}
_GATED_RESIDUAL = 3
_GEGLUS = (4, 5)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    gate: Tensor | None = None,
    add_to: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``x @ weight.T + bias``, then an activation, or a gated sum.

    Nothing is rounded in between. On the CPU the weights pass through a panel in the cache;
    no copy of them is kept. On CUDA the library's product runs, and what follows it after; with
    ``ACCELRT_CUDA_PRODUCTS=own`` one kernel of ours does both for bfloat16 and float16, where
    ``K`` is a multiple of 8 and the rows are aligned to 16 bytes.

    Args:
        x: ``[M, K]`` with any row stride.
        weight: ``[N, K]`` with any row stride; ``[2 N, K]`` with a GEGLU: values, then gates.
        bias: as long as ``weight``, or ``None``.
        activation: ``None``, ``"gelu"``, ``"gelu_tanh"``, ``"geglu"`` (``value * gelu(gate)``) or
            ``"geglu_tanh"``.
        gate: ``[B, N]`` where ``B`` divides ``M``: sample ``b`` has the rows from ``b * M / B``.
            With ``add_to`` only; ``None`` is one.
        add_to: ``[M, N]`` with any row stride; ``gate`` times the product is added to it, and
            it is returned. Without ``activation`` and ``out``.
        out: ``[M, N]`` with any row stride; overlaps no input.

    Raises:
        ValueError: an argument does not fit; nothing has been written.
    """
    if activation not in _ACTIVATIONS:
        raise fails(
            _OP, f"activation is {activation!r}; allowed: {', '.join(map(repr, _ACTIVATIONS))}"
        )
    if add_to is None and gate is not None:
        raise fails(_OP, "a gate needs add_to")
    if add_to is not None and (activation is not None or out is not None):
        raise fails(_OP, "add_to excludes activation and out")
    if x.dtype == torch.float64:
        return reference.linear(
            x, weight, bias, activation=activation, gate=gate, add_to=add_to, out=out
        )
    if add_to is not None:
        result, epilogue = add_to, _GATED_RESIDUAL
    else:
        epilogue = _ACTIVATIONS[activation]
        if out is None:
            out = temporary(x, x.shape[0], _columns(weight, epilogue))
        result = out
    per_sample = 1 if gate is None else max(x.shape[0] // max(gate.shape[0], 1), 1)
    args = (x, weight, bias, epilogue, gate, per_sample, result)
    try:
        native.linear(*args)
    except RuntimeError as error:
        explain(error, _fake, *args)
    return result


def _columns(weight: Tensor, epilogue: int) -> int:
    """Columns of the result."""
    return weight.shape[0] // 2 if epilogue in _GEGLUS else weight.shape[0]


@register_fake(_OP)
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epilogue: int,
    gate: Tensor | None,
    rows_per_sample: int,
    out: Tensor,
) -> None:
    check_tensor(_OP, "x", x)
    if x.dim() != 2 or weight.dim() != 2:
        raise fails(
            _OP,
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected [M, K] "
            "and [N, K]",
        )
    rows, columns = x.shape[0], _columns(weight, epilogue)
    check_tensor(_OP, "weight", weight, x)
    if epilogue in _GEGLUS and weight.shape[0] % 2:
        raise fails(_OP, f"weight has {weight.shape[0]} rows; geglu needs an even number")
    check_shape(_OP, "weight", weight, (weight.shape[0], x.shape[1]))
    check_tensor(_OP, "out", out, x)
    check_shape(_OP, "out", out, (rows, columns))
    given = [("x", x), ("weight", weight), ("out", out)]
    if bias is not None:
        check_tensor(_OP, "bias", bias, x)
        check_shape(_OP, "bias", bias, weight.shape[:1])
        given.append(("bias", bias))
    if gate is not None:
        check_tensor(_OP, "gate", gate, x)
        if gate.dim() != 2 or gate.shape[0] * rows_per_sample != rows:
            raise fails(
                _OP, f"gate has shape {tuple(gate.shape)}; its samples must divide {rows} rows"
            )
        check_shape(_OP, "gate", gate, (gate.shape[0], columns))
        given.append(("gate", gate))
    for name, t in given:
        if t.numel() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise fails(_OP, f"the last stride of {name} is {t.stride(-1)}; it must be 1")
    check_cuda_built(_OP, x)
