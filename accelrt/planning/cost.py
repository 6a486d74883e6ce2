"""What operators cost: a machine's rates, fitted by a short profile and kept in a file.

An operator takes ``overhead + flops / rate + bytes / bandwidth``. Weights count among the
bytes of every call, which is what makes short slices slow: a matrix product or a
convolution reads (and on the CPU reorders) its weights once per slice.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accelrt import ops

VERSION = 1


@dataclass(frozen=True)
class Machine:
    """Rates of a device for a dtype.

    Args:
        overhead: seconds per operator call.
        product_rate, convolution_rate, attention_rate: FLOP/s of large operators.
        bandwidth: bytes/s of elementwise operators, read and written together.
        weight_bandwidth, kernel_bandwidth: bytes/s at which the weights of matrix products
            and of convolutions pass through each call.
    """

    overhead: float = 5e-6
    product_rate: float = 2e11
    convolution_rate: float = 2e11
    attention_rate: float = 1e11
    bandwidth: float = 1e10
    weight_bandwidth: float = 1e10
    kernel_bandwidth: float = 3e9


_known: dict[tuple[Path, str], Machine] = {}


def cache_file() -> Path:
    """Where the rates of this machine are kept.

    ``ACCELRT_CACHE_DIR``, or ``accelrt`` in the user's cache folder.
    """
    named = os.environ.get("ACCELRT_CACHE_DIR")
    if named:
        return Path(named) / "machine.json"
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "accelrt" / "machine.json"


def machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """The rates of ``device`` for ``dtype``: from the cache file, or measured now (a second).

    A meta device, and one that is not there, has typical rates.
    """
    if device.type not in ("cpu", "cuda") or dtype == torch.float64:
        return Machine()
    if device.type == "cuda" and not torch.cuda.is_available():
        return Machine()
    path = cache_file()
    key = _key(device, dtype)
    if (path, key) not in _known:
        kept = _read(path)
        try:
            _known[path, key] = Machine(**kept[key])
        except (KeyError, TypeError):  # never measured, or by another version
            _known[path, key] = profile(device, dtype)
            _write(path, {**kept, key: asdict(_known[path, key])})
    return _known[path, key]


def _key(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()} {torch.get_num_threads()} threads"
    return f"v{VERSION} {name} torch {torch.__version__} {str(dtype).removeprefix('torch.')}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _write(path: Path, values: dict[str, Any]) -> None:
    """Replace the file at once, so that no reader sees half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError:
        return  # with a read-only home it is measured once per process


def profile(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure the rates: about a second on a CPU."""

    generator = torch.Generator(device).manual_seed(0)  # the user's own is left alone

    def tensor(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator).to(dtype)

    def image(n: int, channels: int, side: int) -> Tensor:
        return tensor(n, channels, side, side).contiguous(memory_format=torch.channels_last)

    with torch.no_grad():
        small = tensor(64)
        overhead = _seconds(lambda: ops.residual_blend(small, small, out=small), device)
        large, other = tensor(2**22), tensor(2**22)
        bandwidth = 3 * large.numel() * large.element_size() / _seconds(
            lambda: ops.residual_blend(large, other, out=large), device
        )  # fmt: skip
        rows, few, weight = tensor(4096, 1280), tensor(16, 1280), tensor(1280, 1280)
        whole = _seconds(lambda: F.linear(rows, weight), device)
        product_rate = 2 * rows.shape[0] * 1280**2 / max(whole - overhead, 1e-9)
        short = _seconds(lambda: F.linear(few, weight), device) - overhead
        short -= 2 * few.shape[0] * 1280**2 / product_rate
        weight_bandwidth = weight.numel() * weight.element_size() / max(short, 1e-7)
        wide, kernel = image(2, 320, 64), tensor(320, 320, 3, 3)
        whole = _seconds(lambda: F.conv2d(wide, kernel, padding=1), device)
        flops = 2 * 9 * 320**2 * wide.shape[0] * 64**2
        convolution_rate = flops / max(whole - overhead, 1e-9)
        tiny, kernel2 = image(1, 1280, 4), tensor(1280, 1280, 3, 3)
        short = _seconds(lambda: F.conv2d(tiny, kernel2, padding=1), device) - overhead
        short -= 2 * 9 * 1280**2 * 16 / convolution_rate
        kernel_bandwidth = kernel2.numel() * kernel2.element_size() / max(short, 1e-7)
        q = tensor(1, 8, 1024, 64)
        whole = _seconds(lambda: F.scaled_dot_product_attention(q, q, q), device)
        attention_rate = 4 * 8 * 1024**2 * 64 / max(whole - overhead, 1e-9)
    return Machine(
        overhead, product_rate, convolution_rate, attention_rate, bandwidth,
        weight_bandwidth, kernel_bandwidth,
    )  # fmt: skip


def _seconds(run: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    times = []
    for _ in range(rounds):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


# Operators that make a view, or memory without values.
_FREE = frozenset(
    (
        "view", "_unsafe_view", "permute", "transpose", "t", "expand", "slice", "select",
        "unsqueeze", "squeeze", "alias", "detach", "as_strided", "split", "unbind", "reshape",
        "empty", "empty_like", "empty_strided", "new_empty", "unflatten", "split_with_sizes",
        "_reshape_alias",
    )
)  # fmt: skip
_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "linear"))


def seconds_of(name: str, args: tuple[Any, ...], result: Any, rates: Machine) -> float:
    """The estimate for one operator call.

    Args:
        name: of the operator, without overload and namespace.
        args: its tensors, in order; others may stand between.
        result: what it returned.
        rates: of the machine.
    """
    if name in _FREE:
        return 0.0
    tensors = [a for a in args if isinstance(a, Tensor)]
    out = result if isinstance(result, Tensor) else None
    if name in ("convolution", "_convolution") and out is not None and len(tensors) > 1:
        weight = tensors[1]
        return rates.overhead + (
            2 * out.numel() * weight[0].numel() / rates.convolution_rate
            + weight.numel() * weight.element_size() / rates.kernel_bandwidth
            + _bytes((tensors[0], out)) / rates.bandwidth
        )
    if name in _PRODUCTS and len(tensors) > 1:
        product = out if out is not None else tensors[-1]
        a, b = tensors[-2:] if name in ("addmm", "baddbmm") else tensors[:2]
        return rates.overhead + (
            2 * product.numel() * a.shape[-1] / rates.product_rate
            + b.numel() * b.element_size() / rates.weight_bandwidth
            + _bytes((a, product)) / rates.bandwidth
        )
    outputs = [out] if out is not None else []
    return rates.overhead + _bytes((*tensors, *outputs)) / rates.bandwidth


def attention_seconds(q: Tensor, k: Tensor, rates: Machine) -> float:
    """The estimate for scaled dot-product attention of ``[B, H, S, D]`` with ``[B, H, L, D]``."""
    flops = 4 * q.numel() * k.shape[-2]
    return rates.overhead + flops / rates.attention_rate


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
