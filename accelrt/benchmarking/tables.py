"""The measurements as tables, once for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from accelrt.benchmarking.gpu_use import FormUse, GpuUse
from accelrt.benchmarking.results import Measurement, Quality, Times
from accelrt.memory.sizes import bytes_text
from accelrt.reporting.tables import error_text, seconds_text, share_text, use_text

TUNED = "[tuned malloc]"
COLUMNS = ("run", "seconds", "speed-up", "MFU", "peak", "process", "rel. L2")
GPU_COLUMNS = (*COLUMNS[:5], "allocated", "reserved", COLUMNS[6])


def columns(device: str) -> tuple[str, ...]:
    """Headings; a GPU's allocator replaces the process."""
    return GPU_COLUMNS if device == "cuda" else COLUMNS


def title(result: Measurement) -> str:
    """What was measured."""
    size = "" if result.size == "full" else f", {result.size}"
    return f"{result.title}, {result.detail}, {result.dtype}, {result.device}{size}"


def rows(result: Measurement) -> list[tuple[str, ...]]:
    """Cells under :func:`columns`: one row per form, then those with tuned malloc."""
    found: list[tuple[str, ...]] = []
    first = result.quality[0]
    for times, quality in zip(result.rates.times, result.quality, strict=True):
        peak = bytes_text(quality.peak_bytes)
        if quality is not first:
            peak += f" ({share_text(quality.peak_bytes, first.peak_bytes)})"
        found.append(
            (*_times(times), peak, *_system(times, quality, result), error_text(quality.error))
        )
    for times in result.tuned.times if result.tuned is not None else ():
        run, *cells = _times(times)
        empty = ("",) * (len(found[0]) - len(cells) - 1)
        found.append((f"{run} {TUNED}", *cells, *empty))
    return found


def _times(times: Times) -> tuple[str, ...]:
    return (
        times.run,
        seconds_text(times.median_seconds),
        f"{times.speedup:.2f}x",
        f"{times.utilisation:.2f}",
    )


def _system(times: Times, quality: Quality, result: Measurement) -> tuple[str, ...]:
    counts: tuple[int | None, ...] = (times.process_peak_bytes,)
    if result.device == "cuda":
        counts = (quality.gpu_allocated_bytes, quality.gpu_reserved_bytes)
    return tuple("-" if count is None else bytes_text(count) for count in counts)


def sentences(result: Measurement) -> list[str]:
    """What the table does not hold: sizes, the product, the switches, the rule, the groups."""
    rates = result.rates
    product = f"matrix product {rates.product_size}^3: {_tflops(rates.product_flops_per_second)}"
    if result.tuned is not None:
        product += f", with tuned malloc {_tflops(result.tuned.product_flops_per_second)}"
    counts = ", ".join(f"{count} {kind}" for kind, count in result.groups.items())
    ours, relation = result.quality[-1].error, "<=" if result.within else "ABOVE"
    lines = [
        f"{result.title}: {result.parameters / 1e6:.1f} M parameters "
        f"({bytes_text(result.weight_bytes)}), {result.flops / 1e12:.3g} TFLOP per forward; "
        f"{product}.",
        _timing(result),
        *(f"{run}: {text}." for run, text in result.switches.items()),
        f"Error against {result.truth}: {ours:.3e} {relation} {result.bound:.3e} "
        f"(1.1 * stock + 1e-6). Groups: {counts}.",
    ]
    lines.append(driver_text(result.gpu))
    if result.stock_reason:
        lines.append(f"The wrapped model ran the stock forward: {result.stock_reason}.")
    return lines


def driver_text(use: GpuUse) -> str:
    """What the driver said of each form of a model, as a sentence."""
    if use.note:
        return f"By the driver: {use.note}."
    told = (f"{form.run} {use_text(form.use, 'forward')}" for form in use.forms)
    return f"{use.device}, by its driver: " + "; ".join(told) + "."


def driver_markdown(use: GpuUse, each: str = "forward") -> str:
    """What the driver said of many forms, as a table of Markdown; or why it said nothing.

    Args:
        use: of all forms of a report.
        each: what the energy is of.
    """
    if use.note:
        return f"By the driver of the GPU: {use.note}.\n"
    head = ("run", f"J per {each}", "W", "MHz", "in use")
    lines = [f"{use.device}, by its driver:", "", "| " + " | ".join(head) + " |"]
    lines.append("|---|" + "---:|" * (len(head) - 1))
    lines += ["| " + " | ".join((form.run, *_driver_cells(form))) + " |" for form in use.forms]
    return "\n".join(lines) + "\n"


def _driver_cells(form: FormUse) -> tuple[str, ...]:
    use = form.use
    told = ((use.joules, ".3g"), (use.watts, ".0f"), (use.megahertz, ".0f"))
    return (
        *("-" if value is None else f"{value:{how}}" for value, how in told),
        "-" if use.used_bytes is None else bytes_text(use.used_bytes),
    )


def _timing(result: Measurement) -> str:
    """How often each form was timed."""
    once = [times.run for times in result.rates.times if times.page_faults is None]
    threads = f"{result.threads} thread{'s' if result.threads > 1 else ''}"
    where = threads if result.device == "cpu" else result.device
    if not result.repeats:
        return f"Times on {where}: of one forward each, the one whose memory was watched."
    text = f"Times on {where}: median of {result.repeats} rounds"
    if result.device == "cpu" and once:
        text += f"; {', '.join(once)}: of the one forward whose memory was watched"
    return f"{text}."


def _tflops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s"


def markdown(results: Sequence[Measurement]) -> str:
    """One table of all models, measured on one device, and the sentences of each."""
    head = ("model", *columns(results[0].device))
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in results:
        for i, cells in enumerate(rows(result)):
            lines.append("| " + " | ".join(("" if i else title(result), *cells)) + " |")
    for result in results:
        lines += ["", *(f"- {line}" for line in sentences(result))]
    return "\n".join(lines) + "\n"
