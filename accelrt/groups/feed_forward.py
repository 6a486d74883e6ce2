"""Feed-forward layers, sliced along tokens, added into the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from accelrt import ops
from accelrt.config import Config

from .products import is_ours, project, runs_on_cpu
from .recognise import (
    is_inactive_dropout,
    is_plain,
    is_plain_linear,
    is_row_wise,
)
from .slicing import independent, slice_length

Add = Callable[[Tensor, Tensor, Tensor], None]

#: Shorter slices of the library's products, which pack the weights for each, take more time.
FEWEST_ROWS = 512


def feed_forward_reason(module: nn.Module) -> str:
    """Why the layer must be called whole on its input; empty if it is recognised."""
    if not is_plain(module, FeedForward):
        return f"{type(module).__name__} is not a plain FeedForward"
    net: Any = module.net
    if len(net) < 3 or not all(is_inactive_dropout(m) for m in (net[1], *net[3:])):
        return "dropout is active"
    if not is_row_wise(net[2]) or not is_row_wise(getattr(net[0], "proj", None)):
        return "projections of an unknown kind"
    return ""


def activation_remark(module: nn.Module) -> str:
    """What a summary says of an activation without a fused operator."""
    first: Any = module.net[0]  # type: ignore[index]
    if is_plain(first, GEGLU, GELU):
        return ""
    return f"feed-forward activation {type(first).__name__} runs as it came"


def _epilogue(first: Any) -> str | None:
    """The activation of a plain layer in front, as :func:`accelrt.ops.linear` names it."""
    if is_plain(first, GEGLU):
        return "geglu"
    if is_plain(first, GELU):
        return "gelu_tanh" if first.approximate == "tanh" else "gelu"
    return None


class FeedForwardRunner:
    """``residual += gate * ff(x)``, the hidden activation existing for one slice only.

    Args:
        module: the feed-forward layer.
        config: ``ff_rows`` and ``fuse``.
    """

    def __init__(self, module: nn.Module, config: Config) -> None:
        self.module = module
        self.config = config
        self.known = not feed_forward_reason(module)
        self.rows: int | None = None
        if not self.known:
            return
        net: Any = module.net
        self.out = net[2]
        self.first: Any = net[0]
        self.epilogue = _epilogue(net[0]) if config.fuse else None
        self.hidden = self._activation(net[0], net[2]) if config.fuse else net[0]
        self.has_gates = config.fuse and is_plain(net[0], GEGLU)
        self.width = int(getattr(net[0].proj, "out_features", 0) or 0)

    @staticmethod
    def _activation(first: Any, out: Any) -> Callable[[Tensor], Tensor]:
        """``x`` to the activated hidden state for ``out``, fused where the class is known."""
        if is_plain(first, GEGLU):
            over = is_plain_linear(first.proj) and is_plain_linear(out)

            def gated(x: Tensor) -> Tensor:
                h = first.proj(x)
                # The library's 16-bit product on the CPU copies rows that lie apart.
                apart = over and (h.dtype == torch.float32 or not runs_on_cpu(h))
                return ops.geglu(h, out=h[..., : h.shape[-1] // 2] if apart else None)

            return gated
        if is_plain(first, GELU):
            run = ops.gelu_tanh if first.approximate == "tanh" else ops.gelu
            if is_plain_linear(first.proj):

                def overwrite(x: Tensor) -> Tensor:
                    h = first.proj(x)
                    return run(h, out=h)

                return overwrite
            return lambda x: run(first.proj(x))
        return first  # type: ignore[no-any-return]

    def rows_of(self, x: Tensor, *, gates_apart: bool = False) -> int:
        """Tokens of ``[B, S, D]`` that pass at once.

        Args:
            x: the input; its values are not looked at.
            gates_apart: the first product makes values and gates, which our kernel joins before
                it writes them, and the second one a tensor: fewer tokens take as much memory.
        """
        batch, length, channels = x.shape
        total, wanted, size = batch * length, self.config.ff_rows, x.element_size()
        widest = max(self.width, channels)
        rows = slice_length(total, wanted, widest * size, self.config, x.device)
        if gates_apart and wanted is None and runs_on_cpu(x):
            held = 2 * (widest + channels) * size  # of which ours would have half
            fewer = slice_length(total, None, held, self.config, x.device)
            rows = max(fewer, min(rows, FEWEST_ROWS))
        self.rows = rows
        return rows

    def _pieces(self, x: Tensor, gates_apart: bool) -> Iterator[tuple[slice, slice]]:
        """Slices of samples and of tokens whose rows are contiguous in memory."""
        batch, length, _ = x.shape
        rows = self.rows_of(x, gates_apart=gates_apart)
        if rows >= length:
            step = rows // length
            for start in independent(batch, step, x, self.config, self.module):
                yield slice(start, start + step), slice(None)
            return
        for sample in independent(batch, 1, x, self.config, self.module):
            for start in independent(length, rows, x, self.config, self.module):
                yield slice(sample, sample + 1), slice(start, start + rows)

    def __call__(
        self, x: Tensor, residual: Tensor, gate: Tensor | None = None, add: Add | None = None
    ) -> None:
        """Add to ``residual`` in place.

        Args:
            x: ``[B, S, D]``, the normed input.
            residual: ``[B, S, D]``.
            gate: ``[B, D]`` or ``None`` (one).
            add: called with ``ff(x)``, ``residual`` and ``x`` of each slice in place of
                the sum, which it must perform; ``x`` is no longer needed. Without a gate.
        """
        if not self.known:
            y = self.module(x)
            self._add(y, residual, gate) if add is None else add(y, residual, x)
            return
        if gate is None and x.is_contiguous() and residual.is_contiguous():
            x, residual = x.view(1, -1, x.shape[-1]), residual.view(1, -1, residual.shape[-1])
        ours = self._is_ours(x, residual, gate)
        for samples, rows in self._pieces(x, self.has_gates and not ours):
            if ours:
                gates = None if gate is None else gate[samples]
                self._own(x[samples, rows], residual[samples, rows], gates, add)
                continue
            y = self._second(self.hidden(x[samples, rows]))
            if add is None:
                self._add(y, residual[samples, rows], None if gate is None else gate[samples])
            else:
                add(y, residual[samples, rows], x[samples, rows])
            del y  # not beside the next hidden activation

    def _second(self, hidden: Tensor) -> Tensor:
        """The second product of ``[b, s, F]``, whose rows lie apart if they are over a GEGLU."""
        y: Tensor
        if hidden.is_contiguous():
            y = self.out(hidden)
        else:  # of three dimensions, torch would add the bias in another tensor
            y = self.out(hidden.flatten(0, 1)).view(*hidden.shape[:-1], -1)
        return y

    def _is_ours(self, x: Tensor, residual: Tensor, gate: Tensor | None) -> bool:
        """The first product is our kernel's, with the activation as epilogue."""
        written = residual.is_contiguous() or residual.shape[0] == 1  # slices have common strides
        gates = gate is None or (gate.dtype == x.dtype and gate.stride(-1) == 1)
        return (
            self.epilogue is not None
            and written
            and gates
            and residual.dtype == x.dtype
            and residual.stride(-1) == 1
            and is_ours(self.first.proj, x)
        )

    def _own(self, x: Tensor, residual: Tensor, gate: Tensor | None, add: Add | None) -> None:
        """A slice ``[b, s, D]`` of samples or of tokens, whose rows lie one after the other."""
        proj, out = self.first.proj, self.out
        rows = x.flatten(0, 1)
        hidden = ops.linear(rows, proj.weight, proj.bias, activation=self.epilogue)
        if add is None and is_ours(out, hidden):
            target = residual.view(-1, residual.shape[-1])
            ops.linear(hidden, out.weight, out.bias, gate=gate, add_to=target)
            return
        y = project(out, hidden).view_as(residual)
        del hidden
        if add is None:
            self._add(y, residual, gate)
        else:
            add(y, residual, x)

    def _add(self, y: Tensor, residual: Tensor, gate: Tensor | None) -> None:
        if gate is not None:
            residual.addcmul_(gate[:, None, :], y)
        elif self.config.fuse:
            ops.residual_blend(residual, y, out=residual)
        else:
            residual.add_(y)
