"""The measurements as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from forms import EAGER, FLOOR, FROZEN, NAMES, OURS, TWICE

from accelrt.benchmarking.gpu_use import GpuUse
from accelrt.benchmarking.results import error_bound
from accelrt.benchmarking.tables import driver_markdown
from accelrt.memory.sizes import bytes_text
from accelrt.reporting.tables import error_text, seconds_text, share_text

MALLOCS = ("default", "tuned")
RATES = ("seconds", "over eager", "over freezing", "MFU")
COLUMNS = (
    "model", "form", *RATES, *(f"{name}, tuned" for name in RATES), "peak", "process", "rel. L2",
)  # fmt: skip
ABSENT = "-"
LEGEND = (
    "One forward, guidance batched, random weights. Seconds: median of the rounds, in which all "
    "forms took turns; over eager and over freezing: their time over the form's, within the "
    "rounds; MFU: FLOPs of the stock model at the rate of a matrix product of the same rounds; "
    "tuned: in a process whose malloc keeps freed memory. Peak: tensors alive at once, weights "
    "apart (of compiled forms: what the allocator gave out); process: growth of the resident "
    "memory during a forward. Error against the stock model in float32."
)


def page(document: Mapping[str, Any]) -> str:
    """Everything: the models, and what the driver of a GPU said."""
    text = markdown(document["models"])
    if "gpu" in document:  # older documents were written without asking
        text += "\n" + driver_markdown(GpuUse.from_dict(document["gpu"]))
    return text


def markdown(models: Mapping[str, Any]) -> str:
    """One table of all models, and the sentences of each."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for model in models.values():
        for i, cells in enumerate(rows(model)):
            title = "" if i else f"{model['title']}, {model['detail']}, {model['dtype']}"
            lines.append("| " + " | ".join((title, *cells)) + " |")
    lines += ["", LEGEND]
    for model in models.values():
        lines += ["", *(f"- {line}" for line in sentences(model))]
    return "\n".join(lines) + "\n"


def rows(model: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells after the model's: one row per form that was asked for."""
    parts = [model.get("times", {}).get(malloc, {}) for malloc in MALLOCS]
    errors = model.get("errors", {})
    asked = {run["run"] for part in parts for run in part.get("times", ())}
    asked |= {name for part in (*parts, errors) for name in part.get("left_out", ())}
    asked |= set(errors.get("forms", ()))
    return [
        (name, *(cell for part in parts for cell in _rates(part, name)), *_quality(errors, name))
        for name in NAMES
        if name in asked
    ]


def _rates(part: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Seconds, ratios within the rounds, utilisation; or why there are none."""
    found = {run["run"]: run for run in part.get("times", ())}
    if name not in found:
        return (part.get("left_out", {}).get(name, ABSENT), *(ABSENT,) * (len(RATES) - 1))
    run = found[name]
    return (
        seconds_text(statistics.median(run["seconds"])),
        *(_over(found.get(base), run) for base in (EAGER, FROZEN)),
        f"{run['utilisation']:.2f}",
    )


def _over(base: Mapping[str, Any] | None, run: Mapping[str, Any]) -> str:
    """Time of the base over that of the run, median of the rounds."""
    if base is None:
        return ABSENT
    pairs = zip(base["seconds"], run["seconds"], strict=True)
    return f"{statistics.median(a / b for a, b in pairs):.2f}"


def _quality(errors: Mapping[str, Any], name: str) -> tuple[str, ...]:
    found = errors.get("forms", {})
    if name not in found:
        return (ABSENT,) * 3
    one = found[name]
    peak = bytes_text(one["peak_bytes"])
    if name != EAGER and EAGER in found:
        peak += f" ({share_text(one['peak_bytes'], found[EAGER]['peak_bytes'])})"
    process = one["process_bytes"]
    error = "not finite" if one["error"] is None else error_text(one["error"])
    return peak, ABSENT if process is None else bytes_text(process), error


def above(model: Mapping[str, Any]) -> list[str]:
    """Forms of accelrt whose error is above 1.1 times eager's and 1e-6."""
    found = model.get("errors", {}).get("forms", {})
    if EAGER not in found:
        return []
    stock = found[EAGER]["error"]
    return [
        name
        for name in (OURS, TWICE, FLOOR)
        if name in found
        and (found[name]["error"] is None or found[name]["error"] > error_bound(stock))
    ]


def sentences(model: Mapping[str, Any]) -> list[str]:
    """What the table does not hold: sizes, the product, rounds, plans, the rule."""
    title, errors = f"{model['title']}, {model['detail']}", model.get("errors")
    head = f"{title}: {model['flops'] / 1e12:.3g} TFLOP per forward"
    if errors:
        weights = bytes_text(errors["weight_bytes"])
        head += f", {errors['parameters'] / 1e6:.1f} M parameters ({weights})"
    lines = [f"{head}."]
    for malloc in MALLOCS:
        part = model.get("times", {}).get(malloc)
        if part and part["times"]:
            size, rate = part["product_size"], part["product_flops_per_second"] / 1e12
            lines.append(
                f"Times with {malloc} malloc: median of {len(part['times'][0]['seconds'])} rounds, "
                f"{_threads(part['threads'])}; matrix product {size}^3: {rate:.3g} TFLOP/s."
            )
    if not errors:
        return lines
    found = errors["forms"]
    plans = [
        f"{name} reserves {bytes_text(one['reserved_bytes'])}"
        for name, one in found.items()
        if one["reserved_bytes"] is not None
    ]
    lines += [f"Plans: {', '.join(plans)}."] if plans else []
    first = [
        f"{name} {seconds_text(one['first_call_seconds'])} s"
        for name, one in found.items()
        if one["first_call_seconds"] is not None
    ]
    lines += [f"First call, compilation included: {', '.join(first)}."] if first else []
    if EAGER in found and found[EAGER]["error"] is not None:
        bound, worse = error_bound(found[EAGER]["error"]), above(model)
        verdict = f"ABOVE it: {', '.join(worse)}" if worse else "no form of accelrt is above it"
        lines.append(f"Error bound against {errors['truth']}: {bound:.3e} (1.1 * eager + 1e-6); "
                     f"{verdict}.")  # fmt: skip
    lines += [f"{name} has no error: {why}." for name, why in errors["left_out"].items()]
    return lines


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
