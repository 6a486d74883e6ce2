"""A profile in the Trace Event format, which Perfetto and chrome://tracing show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .capture import Profile

PROCESS, HOST, GPU = 1, 1, 2
MIB = 2**20


def trace(profile: Profile) -> dict[str, Any]:
    """Ranges and operators by their paths, kernels, and counters.

    Counters: tensors made in the block and alive, what is alive in the arena and its size, the
    index of the slice at work, the memory of the process, and the GPU's memory, power and clock.

    Returns:
        A dict for ``json.dump``; times are microseconds since the first range.
    """
    analysis = profile.analysis
    spans, paths = analysis.spans, analysis.paths
    origin = spans[0].begin if spans else 0

    def at(moment: int) -> float:
        return (moment - origin) / 1e3

    events: list[dict[str, Any]] = [
        _named("process_name", f"accelrt: {profile.title}"),
        _named("thread_name", "pipeline", HOST),
    ]
    for span, path in zip(spans, paths, strict=True):
        events.append(_range(path or span.name, span.kind, at(span.begin), at(span.end), HOST))
    for op in analysis.recorded.ops:
        around = paths[op.span] if op.span >= 0 else ""
        name = f"{around}/{op.name}" if around else op.name
        event = _range(name, "op", at(op.begin), at(op.end), HOST)
        if op.flops or op.bytes:
            event["args"] = {"flops": op.flops, "bytes": op.bytes}
        events.append(event)
    if analysis.recorded.kernels:
        events.append(_named("thread_name", "GPU", GPU))
    for kernel in analysis.recorded.kernels:
        around = paths[kernel.span] if kernel.span >= 0 else ""
        name = f"{around}/{kernel.name}" if around else kernel.name
        events.append(_range(name, "kernel", at(kernel.begin), at(kernel.end), GPU))
    for moment, cpu, cuda in analysis.recorded.memory:
        sizes = {"cpu": cpu / MIB, "cuda": cuda / MIB} if cuda else {"cpu": cpu / MIB}
        events.append(_counter("live tensors, MiB", at(moment), sizes))
    for moment, live, slab in profile.arena:
        values = {"live": live / MIB, "slab": slab / MIB}
        events.append(_counter("arena, MiB", at(moment), values))
    for moment, index, place in analysis.slices:
        events.append(_counter("slice", at(moment), {"index": index}))
        if index == 0 and place >= 0:
            events.append(_counter("slice", at(spans[place].end), {"index": 0}))
    for sample in profile.samples.samples:
        if sample.resident_bytes is not None:
            resident = {"resident": sample.resident_bytes / MIB}
            events.append(_counter("process, MiB", at(sample.time), resident))
        for label, value in (
            ("GPU memory, MiB", None if sample.gpu_bytes is None else sample.gpu_bytes / MIB),
            ("GPU power, W", sample.watts),
            ("GPU clock, MHz", sample.megahertz),
        ):
            if value is not None:
                events.append(_counter(label, at(sample.time), {"value": value}))
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "target": profile.title,
            "device": profile.device,
            "threads": profile.threads,
            "coverage": profile.coverage,
        },
    }


def _range(name: str, kind: str, begin: float, end: float, thread: int) -> dict[str, Any]:
    return {
        "ph": "X", "name": name, "cat": kind, "ts": begin, "dur": max(0.0, end - begin),
        "pid": PROCESS, "tid": thread,
    }  # fmt: skip


def _counter(name: str, moment: float, values: dict[str, float]) -> dict[str, Any]:
    return {"ph": "C", "name": name, "ts": moment, "pid": PROCESS, "tid": HOST, "args": values}


def _named(what: str, name: str, thread: int = HOST) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": PROCESS, "tid": thread, "args": {"name": name}}
