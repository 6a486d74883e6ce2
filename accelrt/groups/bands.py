"""One image in bands of rows: convolutions whose input and output never exist whole.

A 3x3 convolution reads one row above and one below. Rows therefore pass from top to bottom
through a chain of operators, each of which keeps the last two rows that it was given: no row
is computed twice within a pass, and what an operator emits lags one row behind its input.
So an output may be written over the input of the chain, or over any tensor in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accelrt import ops
from accelrt.config import Config

from .convolve import conv2d, convolve, serves, upsampler_conv
from .norms import GroupNormAct
from .recognise import has_plain_weights, is_plain, is_pointwise_conv, is_silu, plain_norm
from .slicing import slice_length, starts
from .spare import Spare
from .state import empty_images, nhwc

# With fewer rows the second band of a chain of three convolutions would not be like all others.
MIN_ROWS = 4


def rows_per_band(height: int, bytes_per_row: int, config: Config, device: torch.device) -> int:
    """Rows of a band, an even number; ``height`` if the image passes whole.

    Args:
        height: rows of the image.
        bytes_per_row: of the widest intermediate.
        config: gives ``bands`` and ``slice_mib``.
        device: where the group runs.
    """
    if not config.bands or height <= MIN_ROWS:
        return height
    rows = slice_length(height, None, bytes_per_row, config, device)
    return height if rows >= height else max(MIN_ROWS, rows - rows % 2)


def is_row_conv(module: object, dtype: torch.dtype | None) -> bool:
    """A plain 3x3 convolution that keeps the size of an image, of any dtype if ``None``."""
    return (
        is_plain(module, nn.Conv2d)
        and isinstance(module, nn.Conv2d)
        and module.kernel_size == (3, 3)
        and module.stride == (1, 1)
        and module.padding in ((1, 1), 1)
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and has_plain_weights(module, dtype)
    )


def upsampler_row_conv(module: Any, dtype: torch.dtype | None) -> nn.Conv2d | None:
    """The convolution of a plain ``Upsample2D`` if it can take rows, else ``None``."""
    conv: nn.Conv2d | None = upsampler_conv(module)
    return conv if is_row_conv(conv, dtype) else None


def resnet_bands_reason(block: Any, dtype: torch.dtype | None) -> str:
    """Why a ResNet block cannot take rows; empty if it can."""
    if block.upsample is not None or block.downsample is not None:
        return "a block that changes the size"
    for name in ("norm1", "norm2"):
        if not plain_norm(getattr(block, name), nn.GroupNorm, dtype):
            return f"{name} is not plain"
    if not is_silu(block.nonlinearity):
        return "the activation is not SiLU"
    for name in ("conv1", "conv2"):
        if not is_row_conv(getattr(block, name), dtype):
            return f"{name} is not a plain 3x3 convolution"
    shortcut = block.conv_shortcut
    if shortcut is not None and not is_pointwise_conv(shortcut, dtype):
        return "the shortcut is not a plain 1x1 convolution"
    return ""


def takes_rows(norm: GroupNormAct) -> bool:
    """A norm and activation that are one fused operator."""
    return norm.fused and (norm.silu or norm.act is None)


def emitted(start: int, stop: int, lag: int, height: int) -> tuple[int, int]:
    """The rows that leave a chain of ``lag`` convolutions when ``start`` to ``stop`` enter."""
    return max(0, start - lag), height if stop >= height else max(0, stop - lag)


class RowBuffer:
    """The last rows of one image ``[1, C, *, W]``.

    Args:
        like: gives dtype and device.
        channels, width: of a row.
        rows: capacity.
    """

    def __init__(self, like: Tensor, channels: int, width: int, rows: int) -> None:
        self.rows = empty_images(like, 1, channels, rows, width)
        self.filled = 0

    def window(self, count: int) -> Tensor:
        """Where the next ``count`` rows go."""
        start = self.filled
        self.filled = start + count
        return self.rows[:, :, start : start + count]

    def drop(self, count: int) -> None:
        """Forget the first ``count`` rows."""
        rest = self.rows[:, :, count : self.filled]
        self.filled -= count
        if self.filled > count:  # the rows overlap with where they go
            rest = rest.clone()
        self.rows[:, :, : self.filled].copy_(rest)


class ConvRows:
    """A 3x3 convolution that is given the rows of an image from top to bottom.

    Args:
        conv: a convolution for which :func:`is_row_conv` holds.
        like: gives dtype and device.
        width: of the image.
        rows: the most that are given at once.

    Attributes:
        spare: where the output goes that is to go nowhere else; a tensor of its own with
            ``None``, or if the library's convolution makes it.
    """

    def __init__(self, conv: Any, like: Tensor, width: int, rows: int) -> None:
        self.conv = conv
        self.buffer = RowBuffer(like, conv.in_channels, width, rows + 3)  # and two, and padding
        self.spare: Spare | None = None
        self.rewind()

    @property
    def most(self) -> int:
        """Elements of the largest band that is emitted."""
        _, _, rows, width = self.buffer.rows.shape
        return int(self.conv.out_channels * (rows - 2) * width)

    def rewind(self) -> None:
        """Begin an image: the row above it is padding."""
        self.buffer.filled = 0
        self.buffer.window(1).zero_()

    def window(self, count: int) -> Tensor:
        """Where the next ``count`` rows of the input go."""
        return self.buffer.window(count)

    def emit(self, last: bool, out: Tensor | None = None) -> Tensor:
        """The output rows that the input so far allows, ``[1, C', *, W]``.

        Args:
            last: the image ends here: the row below it is padding.
            out: where they go, channels-last; ``None``: valid until the next band.
        """
        buffer, conv = self.buffer, self.conv
        if last:
            buffer.window(1).zero_()
        rows = buffer.rows[:, :, : buffer.filled]
        if out is None and self.spare is not None and serves(rows, conv.weight, conv.groups):
            out = self.spare.images(1, conv.out_channels, rows.shape[2] - 2, rows.shape[3])
        y = conv2d(rows, conv.weight, conv.bias, padding=(0, 1), groups=conv.groups, out=out)
        if not last:
            buffer.drop(buffer.filled - 2)
        return y


class NearestRows:
    """Nearest-neighbour upsampling and its convolution, row by row.

    Args:
        conv: the convolution.
        like: the input ``[N, C, h, w]`` of which single images are given to :meth:`rewind`.
        size: of the output.
        rows: the most that are read at once.
    """

    def __init__(self, conv: Any, like: Tensor, size: tuple[int, int], rows: int) -> None:
        self.conv = ConvRows(conv, like, size[1], rows)
        self.height = size[0]
        self.source: Tensor | None = None
        h, w = like.shape[2:]
        self.index: tuple[Tensor, Tensor] | None = None
        if size != (2 * h, 2 * w):
            self.index = (_nearest(h, size[0], like)[:, None], _nearest(w, size[1], like))

    def rewind(self, image: Tensor) -> None:
        """Begin an image ``[1, C, h, w]``."""
        self.source = nhwc(image)[0]
        self.conv.rewind()

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Enter the rows ``start`` to ``stop`` of the enlarged image; what is emitted then.

        ``out`` is that of :meth:`ConvRows.emit`.
        """
        source = self.source
        assert source is not None
        window = nhwc(self.conv.window(stop - start))[0]
        if self.index is None:
            rows = source[start // 2 : stop // 2]
            window.view(rows.shape[0], 2, rows.shape[1], 2, -1).copy_(rows[:, None, :, None])
        else:
            of_row, of_column = self.index
            window.copy_(source[of_row[start:stop], of_column])
        return self.conv.emit(stop >= self.height, out)


def _nearest(length: int, target: int, like: Tensor) -> Tensor:
    """The index in ``length`` items of each of ``target``, as the interpolation chooses it."""
    index = torch.arange(length, device=like.device, dtype=torch.float32)
    return F.interpolate(index.view(1, 1, -1), size=target, mode="nearest").view(-1).long()


class NormRows:
    """GroupNorm and SiLU of one image whose statistics are collected from its rows.

    Args:
        norm: a plain GroupNorm.
        act: apply SiLU.
    """

    def __init__(self, norm: Any, *, act: bool = True) -> None:
        self.norm = norm
        self.act = act
        self.stats: Tensor | None = None
        self.add: Tensor | None = None
        self.scale: Tensor | None = None
        self.shift: Tensor | None = None

    def rewind(
        self, add: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> None:
        """Begin an image; the arguments are those of :class:`GroupNormAct`."""
        self.stats = None
        self.add, self.scale, self.shift = add, scale, shift

    def collect(self, x: Tensor, x2: Tensor | None = None) -> None:
        """Count some rows."""
        self.stats = ops.group_norm_stats(
            x, self.norm.num_groups, x2=x2, add=self.add,
            out=self.stats, accumulate=self.stats is not None,
        )  # fmt: skip

    def apply(self, x: Tensor, out: Tensor, x2: Tensor | None = None) -> None:
        """Normalise some rows into ``out``, when all have been counted."""
        assert self.stats is not None
        norm = self.norm
        ops.group_norm_apply(
            x, self.stats, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, x2=x2,
            add=self.add, scale=self.scale, shift=self.shift, silu=self.act, out=out,
        )  # fmt: skip


class BandedResnet:
    """A ResNet block on one image at a time, in bands of rows.

    The norms need two passes over the image before the last. The second pass keeps the
    output of the first convolution, or the third computes it again.

    Args:
        block: for which :func:`resnet_bands_reason` is empty.
        like: gives dtype and device.
        size: height and width.
        rows: of a band.
        nearest: makes the input from an image of lower resolution, in every pass.
    """

    def __init__(
        self,
        block: Any,
        like: Tensor,
        size: tuple[int, int],
        rows: int,
        nearest: NearestRows | None = None,
    ) -> None:
        self.block = block
        self.height, width = size
        self.rows = rows
        self.nearest = nearest
        self.norm1, self.norm2 = NormRows(block.norm1), NormRows(block.norm2)
        self.conv1 = ConvRows(block.conv1, like, width, rows + 1)
        self.conv2 = ConvRows(block.conv2, like, width, rows + 1)
        self._share_spares(like, (rows + 2) * width)

    def _share_spares(self, like: Tensor, pixels: int) -> None:
        """What one convolution emits is in the next one's rows before that emits.

        Only input and output of the block are there together.

        Args:
            like: gives dtype and device.
            pixels: of the largest band.
        """
        convs = [self.conv1, self.conv2] + ([] if self.nearest is None else [self.nearest.conv])
        first = Spare(like, max(conv.most for conv in convs))
        for conv in convs:
            conv.spare = first
        self.joined = Spare(like, self.block.conv1.in_channels * pixels)
        self.residual = Spare(like, self.conv2.most)
        if self.nearest is not None and self.block.conv_shortcut is None:
            self.conv2.spare = self.residual  # the first has the residual

    def __call__(
        self,
        x: Tensor,
        x2: Tensor | None,
        out: Tensor,
        hidden: Tensor | None,
        *,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> None:
        """Run the block on one image.

        Args:
            x: ``[1, C, H, W]``, or of lower resolution with ``nearest``.
            x2: ``[1, C2, H, W]``, joined along the channels, or ``None``.
            out: ``[1, C', H, W]``; may be the memory of ``x`` (without ``nearest``) or of
                ``x2``.
            hidden: where the output of the first convolution is kept; may be ``out`` unless
                that is the memory of ``x`` or ``x2``. ``None`` (not with ``nearest``)
                computes it again.
            add, scale, shift: ``[1, C']`` or ``None``, for the second norm.
        """
        self.norm1.rewind()
        self.norm2.rewind(add, scale, shift)
        self._first_statistics(x, x2)
        self._second_statistics(x, x2, hidden)
        self._output(x, x2, out, hidden)

    def _steps(self, like: Tensor) -> Iterator[tuple[int, int]]:
        """Start and stop of every band."""
        for start in starts(self.height, self.rows, like):
            yield start, min(start + self.rows, self.height)

    def _read(
        self, x: Tensor, x2: Tensor | None, start: int, stop: int
    ) -> tuple[Tensor, Tensor | None]:
        """The next rows of both sources."""
        if self.nearest is None:
            return x[:, :, start:stop], _rows(x2, start, stop)
        a, b = emitted(start, stop, 1, self.height)
        return self.nearest.read(start, stop), _rows(x2, a, b)

    def _first_statistics(self, x: Tensor, x2: Tensor | None) -> None:
        if self.nearest is None:
            self.norm1.collect(x, x2)
            return
        self.nearest.rewind(x)
        for start, stop in self._steps(x):
            xs, ys = self._read(x, x2, start, stop)
            self.norm1.collect(xs, ys)
            del xs, ys

    def _begin(self, x: Tensor) -> None:
        self.conv1.rewind()
        if self.nearest is not None:
            self.nearest.rewind(x)

    def _first_convolution(
        self, x: Tensor, x2: Tensor | None, start: int, stop: int, out: Tensor | None = None
    ) -> Tensor:
        """The rows that it emits when ``start`` to ``stop`` enter."""
        xs, ys = self._read(x, x2, start, stop)
        self.norm1.apply(xs, self.conv1.window(xs.shape[2]), ys)
        del xs, ys
        return self.conv1.emit(stop >= self.height, out)

    def _second_statistics(self, x: Tensor, x2: Tensor | None, hidden: Tensor | None) -> None:
        self._begin(x)
        lag = 1 if self.nearest is None else 2
        for start, stop in self._steps(x):
            kept = _rows(hidden, *emitted(start, stop, lag, self.height))
            self.norm2.collect(self._first_convolution(x, x2, start, stop, kept))

    def _output(self, x: Tensor, x2: Tensor | None, out: Tensor, hidden: Tensor | None) -> None:
        block, lag = self.block, 1 if hidden is not None else 2
        scale = 1.0 / block.output_scale_factor
        self._begin(x)
        self.conv2.rewind()
        for start, stop in self._steps(x):
            if hidden is None:
                rows = self._first_convolution(x, x2, start, stop)
            else:
                rows = hidden[:, :, start:stop]
            self.norm2.apply(rows, self.conv2.window(rows.shape[2]))
            del rows
            a, b = emitted(start, stop, lag, self.height)
            if self.nearest is None:
                xs, ys = x[:, :, a:b], _rows(x2, a, b)
            else:  # with the lag of one convolution, as the second
                xs, ys = self._read(x, x2, start, stop)
            residual = xs if ys is None else self._join(xs, ys)
            del xs, ys
            if block.conv_shortcut is not None:
                residual = convolve(block.conv_shortcut, residual, spare=self.residual)
            rows = self.conv2.emit(stop >= self.height)
            ops.residual_blend(nhwc(residual), nhwc(rows), scale=scale, out=nhwc(out[:, :, a:b]))
            del rows, residual

    def _join(self, x: Tensor, x2: Tensor) -> Tensor:
        """Rows of both sources, joined along the channels."""
        both = self.joined.images(1, x.shape[1] + x2.shape[1], *x.shape[2:])
        both[:, : x.shape[1]].copy_(x)
        both[:, x.shape[1] :].copy_(x2)
        return both


def _rows(x: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if x is None else x[:, :, start:stop]


def enlarge_in_bands(nearest: NearestRows, image: Tensor, out: Tensor, rows: int) -> None:
    """Upsample one image ``[1, C, h, w]`` into ``out`` ``[1, C', H, W]``."""
    nearest.rewind(image)
    height = nearest.height
    for start in starts(height, rows, image):
        stop = min(start + rows, height)
        a, b = emitted(start, stop, 1, height)
        nearest.read(start, stop, out[:, :, a:b])


def conv_in_bands(
    conv: ConvRows, norm: GroupNormAct | None, image: Tensor, out: Tensor, rows: int
) -> None:
    """Norm, activation and a convolution of one image ``[1, C, H, W]`` into ``out``."""
    height = image.shape[2]
    leaf: NormRows | None = None
    if norm is not None:
        leaf = NormRows(norm.norm, act=norm.silu)
        leaf.collect(image)
    conv.rewind()
    for start in starts(height, rows, image):
        stop = min(start + rows, height)
        window = conv.window(stop - start)
        if leaf is None:
            window.copy_(image[:, :, start:stop])
        else:
            leaf.apply(image[:, :, start:stop], window)
        a, b = emitted(start, stop, 1, height)
        out[:, :, a:b] = conv.emit(stop >= height)
