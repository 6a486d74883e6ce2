"""Totals of a profile: which range an operator is of, and what a range took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .ceilings import Ceilings
from .ops import Recorded
from .spans import CALL, COMPONENT, GROUP, PART, STAGE, STEP, Span, path_of

KINDS = ("step", "part", "component", "stage", "group", "op")
#: A range is said to be limited by a ceiling if that alone explains this share of its time.
EXPLAINED = 0.25
PRODUCTS, MEMORY, OVERHEAD = "products", "memory", "overhead"


@dataclass
class Row:
    """What all ranges of one name took.

    Operators are recorded at some steps; FLOPs, bytes and the times of operators are those of
    the recorded calls, times all calls over recorded ones.

    Args:
        name: path without the step; of an operator its name.
        calls: how many.
        seconds: in total.
        self_seconds: outside of any smaller range or operator.
        device_seconds: of the kernels launched in it; 0 on the CPU.
        flops, bytes: of its operators.
        slices: that it ran in.
        recorded: calls whose operators were recorded.
    """

    name: str
    calls: int = 0
    seconds: float = 0.0
    self_seconds: float = 0.0
    device_seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    slices: int = 0
    recorded: int = 0

    def utilisation(self, ceilings: Ceilings | None) -> float | None:
        """FLOP/s over those of the large product."""
        if ceilings is None or not self.recorded or not self._worked:
            return None
        return self.flops / self._worked / ceilings.flops_per_second

    @property
    def _worked(self) -> float:
        return self.device_seconds or self.seconds

    def limit(self, ceilings: Ceilings | None) -> tuple[str, float] | None:
        """What limits it, and the share of its time that this explains.

        ``"products"``: at the rate of the large product, its products alone take most of its
        time; ``"memory"``: its bytes do, at the rate of the copy; ``"overhead"``: neither
        explains a quarter of it. Then it is Python, the dispatch of small operators, or a slow
        operator. ``None`` if it is not known.
        """
        if ceilings is None or not self.recorded or not self._worked:
            return None
        products = self.flops / ceilings.flops_per_second / self._worked
        memory = self.bytes / ceilings.bytes_per_second / self._worked
        share = max(products, memory)
        if share < EXPLAINED:
            return OVERHEAD, 1 - share
        return (PRODUCTS, products) if products >= memory else (MEMORY, memory)


@dataclass
class Analysis:
    """A profile's ranges with what they took.

    Args:
        spans: without those that were dropped.
        recorded: operators and kernels; their ``span`` is set.
        slices: time, index and span of every slice.
        chosen: whether the operators of a step were recorded.
        paths: of the spans.
    """

    spans: list[Span]
    recorded: Recorded
    slices: list[tuple[int, int, int]]
    chosen: Callable[[int], bool]
    paths: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.paths = [path_of(self.spans, index) for index in range(len(self.spans))]
        self._attribute()
        self._total()

    def _attribute(self) -> None:
        """Set the innermost range of every operator and kernel."""
        ops = self.recorded.ops
        outer = [op for op in ops if op.parent < 0]
        places = innermost(self.spans, [(op.begin + op.end) // 2 for op in outer])
        for op, place in zip(outer, places, strict=True):
            op.span = place
        for op in ops:  # parents come first
            if op.parent >= 0:
                op.span = ops[op.parent].span
        kernels = sorted(self.recorded.kernels, key=lambda kernel: kernel.launched)
        for kernel, place in zip(
            kernels, innermost(self.spans, [kernel.launched for kernel in kernels]), strict=True
        ):
            kernel.span = ops[kernel.op].span if kernel.op >= 0 else place

    def _total(self) -> None:
        """Sum FLOPs, bytes, slices and times up the ranges."""
        count = len(self.spans)
        self._flops, self._bytes, self._device = [0] * count, [0] * count, [0] * count
        self._slices, self._inside = [0] * count, [0] * count
        for op in self.recorded.ops:
            if op.span >= 0:
                self._flops[op.span] += op.flops
                self._bytes[op.span] += op.bytes
                if op.parent < 0:
                    self._inside[op.span] += op.end - op.begin
        for kernel in self.recorded.kernels:
            if kernel.span >= 0:
                self._device[kernel.span] += kernel.end - kernel.begin
        for _, _, place in self.slices:
            if place >= 0:
                self._slices[place] += 1
        for index in range(count - 1, -1, -1):
            span = self.spans[index]
            if span.parent >= 0:
                for values in (self._flops, self._bytes, self._device, self._slices):
                    values[span.parent] += values[index]
                self._inside[span.parent] += span.end - span.begin

    def is_recorded(self, index: int) -> bool:
        """Whether the operators of a range were recorded."""
        step = self.spans[index].step
        return self.chosen(step) if step >= 0 else self.chosen_outside

    @property
    def chosen_outside(self) -> bool:
        """Whether operators outside of the steps were recorded."""
        return bool(self.recorded.ops)

    def rows(self, by: str) -> list[Row]:
        """One row per name, the longest first; steps in order.

        Raises:
            ValueError: ``by`` is none of :data:`KINDS`.
        """
        if by not in KINDS:
            raise ValueError(f"by is {by!r}; allowed: {', '.join(KINDS)}")
        if by == "op":
            return self._op_rows()
        names: dict[str, list[int]] = {}
        for index, span in enumerate(self.spans):
            name = self._name(index, span, by)
            if name:
                names.setdefault(name, []).append(index)
        rows = [self._row(name, places) for name, places in names.items()]
        return rows if by == "step" else sorted(rows, key=lambda row: -row.seconds)

    def _name(self, index: int, span: Span, by: str) -> str:
        """The row that a range belongs to; empty for none."""
        if by in ("step", "part"):
            outermost = span.parent < 0 or self.spans[span.parent].kind == CALL
            if not outermost or span.kind == CALL:
                return ""
            return "steps" if by == "part" and span.kind == STEP else span.name
        if span.kind != {"component": COMPONENT, "stage": STAGE, "group": GROUP}[by]:
            return ""
        names = self.paths[index].split("/")
        if span.kind == COMPONENT:
            return names[-1]
        return "/".join(names[-2:] if span.kind == GROUP else names[-1:])

    def _row(self, name: str, places: Sequence[int]) -> Row:
        spans = self.spans
        row = Row(name, calls=len(places))
        known = [index for index in places if self.is_recorded(index)]
        row.recorded = len(known)
        row.seconds = sum(spans[i].end - spans[i].begin for i in places) / 1e9
        row.device_seconds = sum(self._device[i] for i in places) / 1e9
        row.slices = sum(self._slices[i] for i in places)
        looked = known or list(places)
        total = sum(spans[i].end - spans[i].begin for i in looked)
        inside = sum(self._inside[i] for i in looked)
        row.self_seconds = row.seconds * max(0, total - inside) / total if total else 0.0
        if known:
            scale = len(places) / len(known)
            row.flops = scale * sum(self._flops[i] for i in known)
            row.bytes = scale * sum(self._bytes[i] for i in known)
        return row

    def _op_rows(self) -> list[Row]:
        ops = self.recorded.ops
        own = [op.end - op.begin for op in ops]
        for op in ops:
            if op.parent >= 0:
                own[op.parent] -= op.end - op.begin
        weights = self._weights()
        rows: dict[str, Row] = {}
        counts: dict[str, float] = {}
        for op, nanoseconds in zip(ops, own, strict=True):
            weight = weights.get(self._key(op.span), 1.0)
            row = rows.setdefault(op.name, Row(op.name))
            counts[op.name] = counts.get(op.name, 0.0) + weight
            row.recorded += 1
            row.seconds += weight * (op.end - op.begin) / 1e9
            row.self_seconds += weight * max(0, nanoseconds) / 1e9
            row.device_seconds += weight * op.device_ns / 1e9
            row.flops += weight * op.flops
            row.bytes += weight * op.bytes
        for name, row in rows.items():
            row.calls = round(counts[name])
        return sorted(rows.values(), key=lambda row: -row.self_seconds)

    def _key(self, index: int) -> str:
        """The path of a range without the number of its step."""
        if index < 0:
            return ""
        head, _, rest = self.paths[index].partition("/")
        return f"step/{rest}" if self.spans[index].step >= 0 else f"{head}/{rest}"

    def _weights(self) -> dict[str, float]:
        """Calls of ranges over recorded ones."""
        calls: dict[str, list[int]] = {}
        for index in range(len(self.spans)):
            count = calls.setdefault(self._key(index), [0, 0])
            count[0] += 1
            count[1] += self.is_recorded(index)
        return {key: all_ / known for key, (all_, known) in calls.items() if known}

    @property
    def roots(self) -> list[Span]:
        """The calls of the pipeline, or the outermost ranges where there is none."""
        calls = [span for span in self.spans if span.kind == CALL]
        return calls or [span for span in self.spans if span.parent < 0]

    def coverage(self) -> float:
        """Share of the calls' time in a range that says more than the call and its step."""
        calls = [span for span in self.spans if span.kind == CALL]
        if not calls:
            return 1.0 if self.spans else 0.0
        parts = [(s.begin, s.end) for s in self.spans if s.kind not in (CALL, STEP)]
        parts += [(op.begin, op.end) for op in self.recorded.ops if op.parent < 0 and op.span >= 0]
        covered, until = 0, 0
        for begin, end in sorted(parts):
            covered += max(0, end - max(begin, until))
            until = max(until, end)
        return min(1.0, covered / max(1, sum(span.end - span.begin for span in calls)))


def innermost(spans: Sequence[Span], times: Sequence[int]) -> list[int]:
    """The innermost range at each of some times, which ascend; -1 for none."""
    found, stack, following = [], list[int](), 0
    for moment in times:
        while following < len(spans) and spans[following].begin <= moment:
            while stack and spans[stack[-1]].end <= spans[following].begin:
                stack.pop()
            stack.append(following)
            following += 1
        while stack and spans[stack[-1]].end < moment:
            stack.pop()
        found.append(stack[-1] if stack else -1)
    return found


def without_dropped(spans: Sequence[Span], dropped: set[int]) -> tuple[list[Span], dict[int, int]]:
    """The ranges without some, whose insides move up; and the new index of each."""
    places = {-1: -1}
    kept: list[Span] = []
    for index, span in enumerate(spans):
        if index in dropped:
            places[index] = places[span.parent]
            continue
        places[index] = len(kept)
        span.parent = places[span.parent]
        kept.append(span)
    return kept, places


__all__ = ["CALL", "KINDS", "PART", "Analysis", "Row", "innermost", "without_dropped"]
