"""Where an accelrt forward stands under the roofline: its groups and its operators.

FLOPs are those of torch's FLOP counter (products, convolutions, attention, and the fused
operators with products in them); an operator without any counts one per value of its
largest tensor; its height under the slanted roof is its share of the copy bandwidth, however
they are counted.
Bytes are what an operator must read and write once: its tensors, weights included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import forms
from forwards import Request
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from accelrt.benchmarking.flops import copy_bytes, matrix_product, product_size
from accelrt.benchmarking.measure import DTYPES, weights_of
from accelrt.benchmarking.models import SIZES
from accelrt.benchmarking.progress import Progress
from accelrt.benchmarking.timing import calls_per_round, interleave
from accelrt.wrap import forwards

COPY_BYTES = {"full": 256 << 20, "tiny": 1 << 20}
CEILING_SECONDS = {"full": 0.5, "tiny": 0.01}
#: They read as much of their source as they write.
GATHERS = ("aten::embedding", "aten::index_select", "aten::gather", "aten::index")
OUTSIDE = "outside of the groups"


@dataclass
class Point:
    """A group or an operator.

    Args:
        name: of the group, or of the operator.
        kind: class of the group; of an operator the same as the name.
        calls: of operators.
        flops, bytes, seconds: of all of them.
    """

    name: str
    kind: str
    calls: int = 0
    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add(self, flops: int, moved: int, seconds: float) -> None:
        """One call of an operator."""
        self.calls += 1
        self.flops += flops
        self.bytes += moved
        self.seconds += seconds


class Recorder(TorchDispatchMode):
    """Times every operator, and sums it up by operator and by group.

    An operator on the CPU is done when it returns. It is an observer of
    :mod:`accelrt.models` too, which tells it the groups.
    """

    def __init__(self) -> None:
        super().__init__()
        self.groups: dict[str, Point] = {}
        self.operators: dict[str, Point] = {}
        self._group = (OUTSIDE, OUTSIDE)

    def enter(self, stage: Any, group: Any, state: Any) -> None:
        """A group begins."""
        self._group = (f"{stage.name}: {group.name}", type(group).__name__.removesuffix("Group"))

    def leave(self, stage: Any, group: Any, state: Any) -> None:
        """It is done."""
        self._group = (OUTSIDE, OUTSIDE)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        began = time.perf_counter()
        result = func(*args, **kwargs)
        seconds = time.perf_counter() - began
        moved = moved_bytes(func, args, kwargs, result)
        flops = operator_flops(func, args, kwargs, result) if moved else 0
        name = func._schema.name.removeprefix("aten::").lstrip("_")
        for table, key, kind in ((self.groups, *self._group), (self.operators, name, name)):
            table.setdefault(key, Point(key, kind)).add(flops, moved, seconds)
        return result


def operator_flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """As torch's counter has it; else one per value of the largest tensor."""
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=result))
    return max((t.numel() for t, _, _ in _operands(func, args, kwargs, result)), default=0)


def moved_bytes(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that an operator reads and writes; views and new memory move nothing."""
    if func.is_view or func._schema.name.removeprefix("aten::").startswith(("empty", "new_empty")):
        return 0
    if func._schema.name in GATHERS:
        return 2 * _bytes(result)
    return sum(
        _bytes(tensor) * (reads + writes)
        for tensor, reads, writes in _operands(func, args, kwargs, result)
    )


def _operands(
    func: Any, args: Any, kwargs: Any, result: Any
) -> Iterator[tuple[Tensor, bool, bool]]:
    """Tensors, and whether they are read and written."""
    written = set()
    schema = func._schema.arguments
    named = {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
    for argument in schema:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        reads = not (writes and argument.name.startswith("out"))
        for leaf in tree_leaves(named.get(argument.name)):
            if isinstance(leaf, Tensor):
                yield leaf, reads, writes
                if writes:
                    written.add(id(leaf))
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and id(leaf) not in written:
            yield leaf, False, True


def _bytes(tensor: Tensor) -> int:
    """Of its values in memory; those that it repeats count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


def roofline(request: Request, progress: Progress) -> dict[str, Any]:
    """One accelrt forward by groups and operators, and the two ceilings."""
    case, settings = SIZES[request.size][request.model](), request.settings
    dtype = DTYPES[settings.dtype]
    progress.call("weights")
    model = weights_of(case, settings)
    made = forms.make(case, model, dtype, [forms.OURS], request.compiler)[forms.OURS]
    copy, moved = copy_bytes(COPY_BYTES[request.size], "cpu")
    product, flops = matrix_product(product_size("cpu", request.size), dtype, "cpu")
    thunks = {"copy": [copy], "product": [product]}
    calls = {
        name: calls_per_round(one, "cpu", CEILING_SECONDS[request.size])
        for name, one in thunks.items()
    }
    progress.call("warm-up")
    made.form()
    ceilings = [interleave(thunks, rounds=2, calls=calls)]
    progress.call("operators")
    recorder = Recorder()
    for _, forward in forwards(made.form.model):
        forward.observer = recorder
    began = time.perf_counter()
    with recorder:
        made.form()
    seconds = time.perf_counter() - began
    ceilings.append(interleave(thunks, rounds=2, calls=calls))

    def fastest(name: str) -> float:
        return min(s for timings in ceilings for s in timings[name].rounds)

    return {
        "seconds": seconds,
        "copy_bytes_per_second": moved / fastest("copy"),
        "product_flops_per_second": flops / fastest("product"),
        "groups": [asdict(p) for p in recorder.groups.values() if p.seconds],
        "operators": [asdict(p) for p in recorder.operators.values() if p.seconds],
    }
