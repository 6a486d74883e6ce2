"""The loaded extension, and the checks that all operators share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from accelrt import _C

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

native = torch.ops.accelrt
build_info: dict[str, Any] = _C.build_info()


def fails(op: str, message: str) -> ValueError:
    """The error of a bad argument: names the operator first."""
    return ValueError(f"accelrt.ops.{op}: {message}")


def check_tensor(op: str, name: str, t: Tensor, like: Tensor | None = None) -> None:
    """dtype is supported and, given ``like``, dtype and device agree with it."""
    if t.dtype not in DTYPES:
        raise fails(op, f"{name} has dtype {t.dtype}; supported: float32, bfloat16, float16")
    if like is not None and (t.dtype != like.dtype or t.device != like.device):
        raise fails(
            op,
            f"{name} is {t.dtype} on {t.device}, but the first input is {like.dtype} "
            f"on {like.device}",
        )


def check_shape(op: str, name: str, t: Tensor, shape: Sequence[int]) -> None:
    """``t`` has exactly ``shape``."""
    if tuple(t.shape) != tuple(shape):
        raise fails(op, f"{name} has shape {tuple(t.shape)}; expected {tuple(shape)}")


def check_float_list(op: str, name: str, t: Tensor, like: Tensor, shape: Sequence[int]) -> None:
    """A small float32 tensor of statistics or weights, on the device of ``like``."""
    if t.dtype != torch.float32 or t.device != like.device:
        raise fails(op, f"{name} is {t.dtype} on {t.device}; expected float32 on {like.device}")
    check_shape(op, name, t, shape)


def check_cuda_built(op: str, t: Tensor) -> None:
    """A CUDA tensor needs kernels in the build: never a silent CPU path.

    Those of a build without nvcc are compiled at first use (:mod:`accelrt.ops._runtime_cuda`).
    """
    if t.device.type == "cuda" and build_info["cuda_kernels"] == "none":
        raise RuntimeError(
            f"accelrt.ops.{op}: the tensors are on {t.device}, but this build has no CUDA "
            "kernels. Rebuild with nvcc on the PATH, or without ACCELRT_RUNTIME_CUDA=0."
        )


def explain(error: RuntimeError, check: Callable[..., object], *args: Any) -> NoReturn:
    """Turn the kernel's refusal into the :class:`ValueError` of the Python checks.

    The kernels check their arguments before they write, so the Python checks, which know
    the arguments' names, run only when a call was refused (or traced: they are the shape
    functions). That halves the cost of a call on small tensors.
    """
    check(*args)
    raise error


def register_fake(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the shape function of ``accelrt::name`` (it writes to ``out``: no result)."""
    decorator: Callable[[Callable[..., None]], Callable[..., None]]
    decorator = torch.library.register_fake(f"accelrt::{name}")
    return decorator
