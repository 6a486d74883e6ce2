"""What operators cost: a machine's rates, fitted by a short profile and kept in a file.

An operator takes ``overhead + flops / rate + bytes / bandwidth``. Short slices are slow: a
matrix product reads its weights once per slice, so that its rate depends on the number of
rows and is measured for several; where other weights have passed since, they come from
memory again and not from the cache. A convolution also reorders them on the CPU, which
counts as bytes of its kernel. The views that cut a slice out take time as well.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accelrt import ops
from accelrt.files import write_text
from accelrt.groups.convolve import conv2d
from accelrt.groups.products import attention, linear

VERSION = 6

#: Pairs of rows and FLOP/s, by rows.
Rates = tuple[tuple[int, float], ...]
PRODUCT_ROWS = (1, 4, 16, 32, 64, 128, 256, 512, 1024)
ATTENTION_ROWS = (8, 32, 128, 1024)
#: Rows with which the weights of a product are measured as they come from memory, and of how many
#: bytes together they are at least: more than most caches.
COLD_ROWS, COLD_BYTES = 64, 2**28


@dataclass(frozen=True)
class Machine:
    """Rates of a device for a dtype.

    Args:
        overhead, product_overhead, view_overhead: seconds per call of an elementwise
            operator, of a matrix product and of a view.
        product_rates: FLOP/s of matrix products by the number of rows, results written and
            weights read from the cache included.
        weight_bandwidth: bytes/s of weights that come from memory instead: what they take longer.
        cache_bytes: of weights that stay in the cache until they are read again.
        convolution_rate: FLOP/s of large convolutions.
        attention_rates: FLOP/s of attention by the number of queries.
        bandwidth: bytes/s of elementwise operators, read and written together.
        norm_bandwidth: the same of norms.
        kernel_bandwidth: bytes/s at which the weights of convolutions pass through each call.
        device_type: of the device: ``"cpu"`` or ``"cuda"``.
    """

    overhead: float = 4e-6
    product_overhead: float = 1e-5
    view_overhead: float = 1e-6
    product_rates: Rates = (
        (1, 2.6e10), (4, 9e10), (16, 1.4e11), (32, 1.65e11), (64, 1.75e11), (128, 1.9e11),
        (256, 2e11),
    )  # fmt: skip
    weight_bandwidth: float = 4e10
    cache_bytes: int = 2**24
    convolution_rate: float = 2e11
    attention_rates: Rates = ((8, 4e10), (32, 5e10), (128, 6e10), (1024, 7e10))
    bandwidth: float = 3e10
    norm_bandwidth: float = 5e9
    kernel_bandwidth: float = 3e9
    device_type: str = "cpu"


def rate_at(rates: Rates, rows: int) -> float:
    """FLOP/s for ``rows``, between the pairs in proportion on logarithmic scales.

    Fewer rows than in the first pair take its time; more than in the last have its rate.
    """
    fewest, rate = rates[0]
    if rows <= fewest:
        return rate * max(rows, 1) / fewest
    for more, faster in rates[1:]:
        if rows <= more:
            share = math.log(rows / fewest) / math.log(more / fewest)
            return float(rate * (faster / rate) ** share)
        fewest, rate = more, faster
    return rate


#: A measurement takes this many runs, and this long if they are short.
LEAST_RUNS, MOST_RUNS, ENOUGH_SECONDS = 2, 50, 0.05

_known: dict[tuple[Path, str], Machine] = {}
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # of Linux


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
    if device.type not in ("cpu", "cuda"):
        return Machine()
    if dtype == torch.float64 or (device.type == "cuda" and not torch.cuda.is_available()):
        return Machine(device_type=device.type)
    path = cache_file()
    key = _key(device, dtype)
    if (path, key) not in _known:
        kept = _read(path)
        try:
            _known[path, key] = _from_file(kept[key])
        except (KeyError, TypeError, ValueError):  # never measured, or by another version
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
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _from_file(values: dict[str, Any]) -> Machine:
    """JSON has lists in place of pairs.

    Raises:
        ValueError, TypeError, KeyError: these are no rates; they are measured anew.
    """
    for name in ("product_rates", "attention_rates"):
        values = {**values, name: tuple((int(r), float(f)) for r, f in values[name])}
    made = Machine(**values)
    pairs = (*made.product_rates, *made.attention_rates)
    single = (v for name, v in values.items() if name != "device_type" and type(v) is not tuple)
    if made.device_type not in ("cpu", "cuda") or not pairs:
        raise ValueError(f"no rates: {values}")
    if not all(0 < float(v) < math.inf for v in (*single, *itertools.chain(*pairs))):
        raise ValueError(f"no rates: {values}")
    return made


def _write(path: Path, values: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(values, indent=1) + "\n")
    except OSError:
        return  # with a read-only home it is measured once per process


def profile(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure the rates: a second or two on a CPU."""

    generator = torch.Generator(device).manual_seed(0)  # the user's own is left alone

    def tensor(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator).to(dtype)

    def image(n: int, channels: int, side: int) -> Tensor:
        return tensor(n, channels, side, side).contiguous(memory_format=torch.channels_last)

    def seconds(run: Callable[[], Any]) -> float:
        return _seconds(run, device)

    def size(*tensors: Tensor) -> int:
        return _bytes(tensors)

    with torch.no_grad():
        small, table = tensor(64), tensor(8, 64)
        overhead = seconds(lambda: ops.residual_blend(small, small, out=small))
        view_overhead = _per_call(lambda: table[2:4], device)
        product_overhead = seconds(lambda: linear(table, table, None))
        large, other = tensor(2**22), tensor(2**22)
        whole = seconds(lambda: ops.residual_blend(large, other, out=large))
        bandwidth = 3 * size(large) / whole
        tokens, scale = tensor(1, 512, 1280), tensor(1, 1280)
        norm, bias = tensor(1280), tensor(1280)
        whole = seconds(lambda: ops.layer_norm_modulate(tokens, norm, bias, scale=scale))
        norm_bandwidth = 2 * size(tokens) / max(whole - overhead, 1e-9)
        rows, weight = tensor(PRODUCT_ROWS[-1], 1280), tensor(5120, 1280)
        # More rows are never slower than fewer: a long run that seems so was interrupted.
        product_rates: list[tuple[int, float]] = []
        for count in PRODUCT_ROWS:
            whole = seconds(lambda some=rows[:count]: linear(some, weight, None))  # type: ignore[misc]
            rate = 2 * count * weight.numel() / max(whole - product_overhead, 1e-9)
            product_rates.append((count, max([rate, *(r for _, r in product_rates)])))
        weight_bandwidth = _weight_bandwidth(rows[:COLD_ROWS], weight, seconds)
        wide, kernel = image(1, 320, 32), tensor(320, 320, 3, 3)
        whole = seconds(lambda: conv2d(wide, kernel, None, padding=(1, 1)))
        flops = 2 * 9 * 320**2 * 32**2
        convolution_rate = flops / max(whole - overhead, 1e-9)
        tiny, kernel2 = image(1, 1280, 4), tensor(1280, 1280, 3, 3)
        short = seconds(lambda: conv2d(tiny, kernel2, None, padding=(1, 1))) - overhead
        short -= 2 * 9 * 1280**2 * 16 / convolution_rate
        kernel_bandwidth = size(kernel2) / max(short, 1e-7)
        q = tensor(1, ATTENTION_ROWS[-1], 8, 64)
        attention_rates: list[tuple[int, float]] = []
        for count in ATTENTION_ROWS:
            whole = seconds(
                lambda some=q[:, :count]: attention(some, q, q, None, scale=None)  # type: ignore[misc]
            )
            rate = 4 * 8 * count * q.shape[1] * 64 / max(whole - overhead, 1e-9)
            attention_rates.append((count, max([rate, *(r for _, r in attention_rates)])))
    return Machine(
        overhead, product_overhead, view_overhead, tuple(product_rates), weight_bandwidth,
        _cache_bytes(device), convolution_rate, tuple(attention_rates), bandwidth, norm_bandwidth,
        kernel_bandwidth, device.type,
    )  # fmt: skip


def _cache_bytes(device: torch.device) -> int:
    """Half of the last cache: activations pass through it too, and so do other processes."""
    if device.type == "cuda":
        size = int(torch.cuda.get_device_properties(device).L2_cache_size)
    else:
        size = max(map(_size_of_cache, _CACHES.glob("index*")), default=0)
    return size // 2 if size > 0 else Machine.cache_bytes


def _size_of_cache(folder: Path) -> int:
    """Bytes, or 0 where the system does not say."""
    try:
        found = re.fullmatch(r"(\d+)K", (folder / "size").read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        return 0
    return int(found[1]) * 1024 if found else 0


def _weight_bandwidth(
    rows: Tensor, weight: Tensor, seconds: Callable[[Callable[[], Any]], float]
) -> float:
    """Bytes of weights over what they take longer from memory than from the cache."""
    weights = [weight.clone() for _ in range(-(-COLD_BYTES // _bytes((weight,))))]

    def each() -> None:
        for one in weights:
            linear(rows, one, None)

    again = seconds(lambda: linear(rows, weight, None))
    longer = seconds(each) / len(weights) - again
    return _bytes((weight,)) / max(longer, 1e-3 * again)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The fastest of some runs: what else the machine does only ever adds."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter  # of the thread: without others

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    times: list[float] = []
    while len(times) < LEAST_RUNS or (sum(times) < ENOUGH_SECONDS and len(times) < MOST_RUNS):
        wait()
        begin = clock()
        run()
        wait()
        times.append(clock() - begin)
    return min(times)


def _per_call(run: Callable[[], Any], device: torch.device, calls: int = 100) -> float:
    """Seconds of a call that is too short for the clock."""

    def many() -> None:
        for _ in range(calls):
            run()

    return _seconds(many, device) / calls


# Operators that make a view, or memory without values.
_VIEWS = frozenset(
    (
        "view", "_unsafe_view", "permute", "transpose", "t", "expand", "slice", "select",
        "unsqueeze", "squeeze", "alias", "detach", "as_strided", "split", "unbind", "reshape",
        "empty", "empty_like", "empty_strided", "new_empty", "unflatten", "split_with_sizes",
        "_reshape_alias",
    )
)  # fmt: skip
_NORMS = frozenset(
    (
        "layer_norm_modulate", "gate_residual_layer_norm_modulate", "native_layer_norm",
        "layer_norm", "group_norm_stats", "group_norm_apply", "native_group_norm", "group_norm",
    )
)  # fmt: skip
_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "linear", "block_projection"))
# The library's and ours: [.., M, K] and a weight [N, K] come first.
_ROWS_AND_WEIGHT = frozenset(("linear", "block_projection"))
_CONVOLUTIONS = frozenset(("convolution", "_convolution", "conv2d"))
_WEIGHT_SECOND = _ROWS_AND_WEIGHT | _CONVOLUTIONS | {"mm"}


def seconds_of(name: str, args: tuple[Any, ...], result: Any, rates: Machine) -> float:
    """The estimate for one operator call.

    Args:
        name: of the operator, without overload and namespace.
        args: its tensors, in order; others may stand between.
        result: what it returned.
        rates: of the machine.
    """
    if name in _VIEWS:
        return rates.view_overhead
    tensors = [a for a in args if isinstance(a, Tensor)]
    out = result if isinstance(result, Tensor) else None
    if name == "conv2d" and len(tensors) > 2:  # ours: the output comes last
        out = tensors[-1]
    if name in _CONVOLUTIONS and out is not None and len(tensors) > 1:
        weight = tensors[1]
        return rates.overhead + (
            2 * out.numel() * weight[0].numel() / rates.convolution_rate
            + weight.numel() * weight.element_size() / rates.kernel_bandwidth
            + _bytes((tensors[0], out)) / rates.bandwidth
        )
    if name == "attention" and len(tensors) > 2:  # ours: [B, S, H, D]
        return attention_seconds(tensors[0].transpose(1, 2), tensors[1].transpose(1, 2), rates)
    if name in _ROWS_AND_WEIGHT and len(tensors) > 1:
        rows = tensors[0].numel() // max(tensors[0].shape[-1], 1)
        flops = 2 * rows * tensors[1].numel()
        return rates.product_overhead + flops / rate_at(rates.product_rates, rows)
    if name in _PRODUCTS and len(tensors) > 1:
        product = out if out is not None else tensors[-1]
        a = tensors[1 if name in ("addmm", "baddbmm") else 0]
        flops = 2 * product.numel() * a.shape[-1]
        return rates.product_overhead + flops / rate_at(rates.product_rates, a.shape[-2])
    outputs = [out] if out is not None else []
    bandwidth = rates.norm_bandwidth if name in _NORMS else rates.bandwidth
    return rates.overhead + _bytes((*tensors, *outputs)) / bandwidth


class Weights:
    """The weights that products have read, in order: the last of them are in the cache."""

    def __init__(self) -> None:
        self._read = 0  # bytes
        self._when: dict[tuple[int, int, int], int] = {}

    def seconds(self, weights: Sequence[Tensor], rates: Machine, times: int = 1) -> float:
        """What products take longer because of weights that come from memory.

        Args:
            weights: one after the other.
            rates: of the machine.
            times: so often.
        """
        size = _bytes(weights)
        again = size if size > rates.cache_bytes else 0  # each has gone when its turn comes again
        return self._missed(weights, rates) + max(times - 1, 0) * again / rates.weight_bandwidth

    def _missed(self, weights: Sequence[Tensor], rates: Machine) -> float:
        missed = 0
        for weight in weights:
            place = int(weight.storage_offset())
            key = (weight.untyped_storage()._cdata, place, weight.numel())
            size = _bytes((weight,))
            self._read += size
            before = self._when.get(key)
            if before is None or self._read - before > rates.cache_bytes:
                missed += size
            self._when[key] = self._read
        return missed / rates.weight_bandwidth


def weights_of(name: str, args: tuple[Any, ...]) -> list[Tensor]:
    """The weight among the arguments of a product; none for other operators.

    Args:
        name, args: as for :func:`seconds_of`.
    """
    place = 2 if name == "addmm" else 1 if name in _WEIGHT_SECOND else None
    tensors = [a for a in args if isinstance(a, Tensor)]
    return [] if place is None else tensors[place : place + 1]


def attention_seconds(q: Tensor, k: Tensor, rates: Machine) -> float:
    """The estimate for scaled dot-product attention of ``[B, H, S, D]`` with ``[B, H, L, D]``."""
    flops = 4 * q.numel() * k.shape[-2]
    return rates.overhead + flops / rate_at(rates.attention_rates, q.shape[-2])


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
