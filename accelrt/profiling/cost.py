"""FLOPs and bytes of an operator call, from the shapes that torch's profiler records."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from accelrt.ops._flops import attention_flops, block_flops, convolution_flops, product_flops

Shape = tuple[int, ...]
#: Shape, dtype by name, and value if it is no tensor.
Argument = tuple[Shape, str, Any]

_SIZES = {
    "float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "long": 8,
    "int": 4, "short": 2, "short int": 2, "signed char": 1, "unsigned char": 1, "bool": 1,
    "c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1, "c10::complex<float>": 8,
}  # fmt: skip

#: Operators that touch no data.
_VIEWS = frozenset(
    (
        "alias", "as_strided", "as_strided_", "chunk", "detach", "empty", "empty_like",
        "empty_strided", "expand", "expand_as", "flatten", "is_nonzero", "item", "lift_fresh",
        "movedim", "narrow", "new_empty", "new_empty_strided", "numpy_T", "permute",
        "resize_", "resolve_conj", "resolve_neg", "result_type", "select", "set_", "size", "slice",
        "split", "split_with_sizes", "squeeze", "squeeze_", "swapaxes", "swapdims", "t",
        "transpose", "unbind", "unflatten", "unfold", "unsafe_chunk", "unsafe_split", "unsqueeze",
        "unsqueeze_", "view", "view_as", "_local_scalar_dense", "_nnpack_available",
        "_reshape_alias", "_unsafe_view",
    )
)  # fmt: skip
_TENSOR_TYPES = ("Tensor", "Optional[Tensor]")
_OVERWRITES = frozenset(("copy_", "fill_", "zero_", "normal_", "uniform_"))
_CREATED = frozenset(("zeros", "ones", "full", "arange", "zeros_like", "ones_like", "randn"))
#: Where convolutions have their stride, padding and dilation.
_CONVOLUTIONS = {
    **dict.fromkeys(("convolution", "_convolution", "conv1d", "conv2d", "conv3d"), (3, 4, 5)),
    **dict.fromkeys(("thnn_conv2d", "_slow_conv2d_forward", "slow_conv3d_forward"), (4, 5, None)),
    "mkldnn_convolution": (4, 3, 5),
    "cudnn_convolution": (3, 2, 4),
    "slow_conv_dilated2d": (4, 5, 6),
}


@dataclass(frozen=True)
class Cost:
    """What one call needs.

    Args:
        flops: of its matrix products, a multiplication and an addition being two.
        bytes: of the tensors that it reads and writes.
    """

    flops: int = 0
    bytes: int = 0


@functools.lru_cache(maxsize=8192)
def cost_of(name: str, arguments: tuple[Argument, ...]) -> Cost:
    """What a call needs.

    Args:
        name: with its namespace.
        arguments: as recorded; a missing tensor has no shape and no dtype.
    """
    space, _, plain = name.partition("::")
    if plain in _VIEWS or space not in ("aten", "accelrt", "mkldnn") or not arguments:
        return Cost()
    sizes = [_bytes(argument) for argument in arguments]
    written = _written(name, tuple(_is_tensor(argument) for argument in arguments))
    moved = sum(sizes)
    if plain.endswith("_") and plain not in _OVERWRITES:  # what is written was read as well
        moved += sum(sizes[i] for i in written)
    if not written and plain not in _CREATED:
        moved += _output_bytes(plain, arguments, sizes)
    return Cost(_flops(space, plain, arguments), moved)


def _bytes(argument: Argument) -> int:
    shape, dtype, value = argument
    if dtype == "TensorList":  # their dtype is not recorded; single precision is assumed
        return 4 * sum(map(math.prod, value))
    return math.prod(shape) * _SIZES.get(dtype, 0)


def _is_tensor(argument: Argument) -> bool | None:
    """``None`` for an argument that is not there."""
    _, dtype, _ = argument
    return None if not dtype else dtype in _SIZES


@functools.lru_cache(maxsize=1024)
def _written(name: str, tensors: tuple[bool | None, ...]) -> tuple[int, ...]:
    """Which arguments an operator writes, where the overloads that take them agree on that.

    Args:
        name: with its namespace.
        tensors: which arguments are; see :func:`_is_tensor`.
    """
    space, _, plain = name.partition("::")
    packet = getattr(getattr(torch.ops, space), plain, None)
    found = set()
    for overload in packet.overloads() if packet is not None else ():
        arguments = getattr(packet, overload)._schema.arguments
        fits = len(arguments) == len(tensors) and all(
            is_tensor is None or is_tensor == (str(argument.type) in _TENSOR_TYPES)
            for argument, is_tensor in zip(arguments, tensors, strict=True)
        )
        if fits:
            found.add(
                tuple(
                    i
                    for i, argument in enumerate(arguments)
                    if argument.alias_info is not None and argument.alias_info.is_write
                )
            )
    return found.pop() if len(found) == 1 else ()


def _output_bytes(plain: str, arguments: tuple[Argument, ...], sizes: list[int]) -> int:
    """Bytes of a result that the operator makes itself; by its formula, or like its largest."""
    shapes = [shape for shape, _, _ in arguments]
    width = _SIZES.get(arguments[0][1], 0)
    if plain in ("mm", "bmm") and len(shapes) > 1 and shapes[0] and shapes[1]:
        return math.prod(shapes[0][:-1]) * shapes[1][-1] * width
    if plain in ("addmm", "baddbmm") and len(shapes) > 2 and shapes[1] and shapes[2]:
        return math.prod(shapes[1][:-1]) * shapes[2][-1] * width
    if plain == "linear" and len(shapes) > 1 and shapes[0] and shapes[1]:
        return math.prod(shapes[0][:-1]) * shapes[1][0] * width
    if plain in _CONVOLUTIONS:
        out = _convolved(plain, arguments)
        return max(sizes) if out is None else math.prod(out) * width
    if "attention" in plain:
        return sizes[0]
    if plain == "cat":
        return sum(sizes)
    if plain in ("sum", "mean", "any", "all", "max", "min", "equal"):
        return 0
    return max(sizes)


def _flops(space: str, plain: str, arguments: tuple[Argument, ...]) -> int:
    shapes: list[Any] = [shape if dtype in _SIZES else None for shape, dtype, _ in arguments]
    if space == "accelrt":
        if plain == "transformer_block":
            return block_flops(*shapes)
        if plain == "attention":
            return attention_flops(*shapes)
        if plain in ("linear", "block_projection"):
            return product_flops(*shapes)
        if plain == "conv2d":
            return convolution_flops(*shapes)
        if plain == "temporal_attention":
            return int(4 * math.prod(shapes[0]) * shapes[1][1])
        return 0
    if plain == "linear" and shapes[0] and shapes[1]:
        return int(2 * math.prod(shapes[0]) * shapes[1][0])
    if plain in ("mm", "bmm") and shapes[0] and shapes[1]:
        return int(2 * math.prod(shapes[0]) * shapes[1][-1])
    if plain in ("addmm", "baddbmm") and shapes[1] and shapes[2]:
        return int(2 * math.prod(shapes[1]) * shapes[2][-1])
    if plain in _CONVOLUTIONS:
        out = _convolved(plain, arguments)
        if out is not None:
            return int(2 * math.prod(out) * math.prod(shapes[1][1:]))
    if "scaled_dot_product" in plain and len(shapes) > 2 and shapes[0] and shapes[1] and shapes[2]:
        query, key, value = shapes[:3]
        return int(2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))
    return 0


def _convolved(plain: str, arguments: tuple[Argument, ...]) -> Shape | None:
    """Shape of the output of a convolution that is not transposed; ``None`` if not known."""
    (x, _, _), (weight, _, _) = arguments[:2]
    sides = len(x) - 2
    if len(weight) != len(x) or sides < 1:
        return None
    if plain in ("convolution", "_convolution") and arguments[6][2] is True:
        return None
    settings: list[tuple[int, ...]] = []
    for place in _CONVOLUTIONS[plain]:
        value = (1,) if place is None or place >= len(arguments) else arguments[place][2]
        if not isinstance(value, tuple) or len(value) not in (1, sides):
            return None
        settings.append(value if len(value) == sides else value * sides)
    lengths = [
        (length + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for length, kernel, stride, padding, dilation in zip(
            x[2:], weight[2:], *settings, strict=True
        )
    ]
    return (x[0], weight[0], *lengths)
