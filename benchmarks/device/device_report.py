"""All that benchmarks/device.sh measured, as one JSON document and one Markdown page.

``python device_report.py WORK OUT`` reads the files of the sections in WORK, those that are there,
and writes OUT/device.json and OUT/device.md. No torch is needed; it runs after every section.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FILES = ("operators", "models")
OWN = "own products"
#: Forms of a model with one slice at a time, and with two.
OVERLAPS = (("accelrt", "accelrt, two slices"), ("accelrt, 8 MiB", "accelrt, 8 MiB, two slices"))
SDPA = ("flash", "efficient", "cudnn", "math")
ABSENT = "-"


def collect(work: Path) -> dict[str, Any]:
    """What the sections left, by the names of their files, and the sections themselves."""
    found: dict[str, Any] = {"sections": []}
    for name in FILES:
        path = work / f"{name}.json"
        if path.exists():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    sections = work / "sections.tsv"
    for line in sections.read_text(encoding="utf-8").splitlines() if sections.exists() else ():
        name, status, seconds, limit = line.split("\t")
        found["sections"].append(
            {"name": name, "status": status, "seconds": int(seconds), "limit": int(limit)}
        )
    return found


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown; the first column is text."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def number(value: float | None, digits: int = 3) -> str:
    """A few significant digits."""
    if value is None:
        return ABSENT
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def ceilings(document: Mapping[str, Any]) -> list[str]:
    """The machine and its two rates."""
    machine, top = document["machine"], document["ceilings"]
    known = [f"{key} {value}" for key, value in machine.items() if key != "name" and value]
    return [
        f"{machine['name']} ({', '.join(known)}).",
        "",
        f"Ceilings of this run: copy of {top['copy']} {top['bytes_per_second'] / 1e9:.4g} GB/s "
        f"(read and written), product {top['product']} {top['flops_per_second'] / 1e12:.4g} "
        "TFLOP/s.",
        "",
    ]


def rate(row: Mapping[str, Any], us: float) -> str:
    """What a form moves or computes in a second."""
    if row["ceiling"] == "copy":
        return f"{row['moved_bytes'] / us / 1e3:.4g} GB/s"
    return f"{row['flops'] / us / 1e6:.4g} TFLOP/s"


def operators(found: Mapping[str, Any]) -> list[str]:
    """A row per operator and size; a second table of attention."""
    document = found.get("operators")
    if document is None:
        return []
    head = ("operator", "ceiling", "us", "rate", "of ceiling", "eager/ours", "compile/ours",
            "own: us", "own: of ceiling", "torch/own")  # fmt: skip
    rows = []
    for row in document["rows"]:
        forms = row["forms"]
        ours, own = forms["ours"], forms.get(OWN)
        rows.append((
            f"{row['op']}, {row['size']}" + ("" if ours["captured"] else " *"), row["ceiling"],
            number(ours["us"]), rate(row, ours["us"]), f"{ours['of_ceiling']:.2f}",
            *(_ratio(forms, name) for name in ("eager", "compile")),
            *((ABSENT,) * 3 if own is None else (
                number(own["us"]), f"{own['of_ceiling']:.2f}", f"{1 / own['ours_over_it']:.2f}")),
        ))  # fmt: skip
    lines = ["## Operators", "", *table(head, rows)]
    lines += [
        "Microseconds of one call into preallocated memory, median; calls are in a CUDA graph but "
        "for those with a *. Ratios above 1 mean that ours is faster, of the last column: that our "
        "products are faster than torch's, in the same rounds.", "",
    ]  # fmt: skip
    attention = [row for row in document["rows"] if row["op"] == "attention"]
    if attention:
        lines += ["## Attention against each backend of SDPA", "", *_attention(attention)]
    return lines + _left_out(document)


def _attention(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def cell(one: Mapping[str, Any] | None) -> str:
        return ABSENT if one is None else f"{number(one['us'])} ({one['of_ceiling']:.2f})"

    names = ("ours", OWN, "eager", *SDPA)
    cells = [(row["size"], *(cell(row["forms"].get(name)) for name in names)) for row in rows]
    lines = table(("size", *names), cells)
    return [*lines, "Microseconds, and the share of the product's rate.", ""]


def _ratio(forms: Mapping[str, Any], name: str) -> str:
    return f"{forms[name]['ours_over_it']:.2f}" if name in forms else ABSENT


def _left_out(document: Mapping[str, Any]) -> list[str]:
    lines = []
    for row in document["rows"]:
        lines += [f"- {row['op']}, {row['size']}: no {name}: {why}"
                  for name, why in row["left_out"].items()]  # fmt: skip
    lines += [f"- not reached: {name}" for name in document["not_reached"]]
    return [*lines, ""] if lines else []


def models(found: Mapping[str, Any]) -> list[str]:
    """A row per model and form."""
    document = found.get("models")
    if document is None:
        return []
    head = ("model", "form", "ms", "over eager", "MFU", "allocated", "live", "error")
    rows, notes = [], []
    for model in document["models"]:
        title = f"{model['title']}, {model['detail']}, {model['dtype']}"
        for form, one in model["forms"].items():
            rows.append((title, form, *_form(model, form, one)))
            title = ""
        notes += [f"- {model['title']}: no {form}: {why}"
                  for form, why in model["left_out"].items()]  # fmt: skip
    notes += [f"- not reached: {text}" for text in document["not_reached"]]
    notes += [f"- ERROR ABOVE THE BOUND: {text}" for text in document["above_the_bound"]]
    legend = (
        "One forward, guidance batched, random weights. Milliseconds with launches, median; over "
        "eager within the rounds; MFU: FLOPs of the stock model at the rate of the product beside. "
        "Memory in MiB beside weights: given out by the CUDA allocator, and of live tensors. "
        "Error: relative L2."
    )
    lines = ["## Whole forwards", "", *table(head, rows), legend, ""]
    return lines + ([*notes, ""] if notes else []) + overlaps(document)


def overlaps(document: Mapping[str, Any]) -> list[str]:
    """A row per model and size of slices: two slices at a time against one."""
    rows = []
    for model in document["models"]:
        for part in model["parts"]:
            seconds = {run["run"]: run["seconds"] for run in part["times"]}
            for one, two in OVERLAPS:
                if one in seconds and two in seconds:
                    ratios = [a / b for a, b in zip(seconds[one], seconds[two], strict=True)]
                    times = (statistics.median(seconds[name]) * 1e3 for name in (one, two))
                    rows.append((
                        model["title"], one, *map(number, times),
                        f"{statistics.median(ratios):.3f}", f"{min(ratios):.3f}",
                        f"{max(ratios):.3f}",
                    ))  # fmt: skip
    if not rows:
        return []
    head = ("model", "form", "one slice: ms", "two: ms", "one/two", "least", "most")
    legend = "Above 1 the second stream helps: median, least and most of the rounds."
    return ["## Two slices at a time (`pipeline_slices`)", "", *table(head, rows), legend, ""]


def _form(model: Mapping[str, Any], name: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    timed = [run for part in model["parts"] for run in part["times"] if run["run"] == name]
    # The last part has the most forms in turn.
    run = timed[-1] if timed else None
    memory = (one["allocated_bytes"], one["live_bytes"])
    return (
        ABSENT if run is None else number(statistics.median(run["seconds"]) * 1e3),
        ABSENT if run is None else f"{run['speedup']:.2f}",
        ABSENT if run is None else f"{run['utilisation']:.2f}",
        *(ABSENT if size is None else f"{size / 2**20:.0f}" for size in memory),
        "not finite" if one["error"] is None else f"{one['error']:.2e}",
    )


def driver(found: Mapping[str, Any]) -> list[str]:
    """What the driver of the GPU said of operators and models, or once why it said nothing."""
    told = [found[name]["gpu"] for name in FILES if "gpu" in found.get(name, {})]
    notes = dict.fromkeys(gpu["note"] for gpu in told if gpu["note"])
    lines = [f"By the driver of the GPU: {note}." for note in notes]
    rows = []
    for form in (form for gpu in told for form in gpu["forms"]):
        use, used = form["use"], form["use"]["used_bytes"]
        measured = (number(use[name]) for name in ("joules", "watts", "megahertz"))
        rows.append((form["run"], *measured, ABSENT if used is None else f"{used / 2**20:.0f}"))
    if rows:
        lines += table(("run", "J", "W", "MHz", "MiB in use"), rows)
        lines += ["Joules of a call or forward, mean watts and clock, most memory in use.", ""]
    return ["## By the driver", "", *lines, ""] if lines else []


def markdown(found: Mapping[str, Any]) -> str:
    """The page."""
    lines = ["# On a device", ""]
    first = found.get("operators")
    lines += ceilings(first) if first is not None else []
    lines += operators(found) + models(found) + driver(found)
    rows = [(one["name"], one["status"], str(one["seconds"]), str(one["limit"]))
            for one in found["sections"]]  # fmt: skip
    lines += ["## Sections", "", *table(("section", "status", "seconds", "limit"), rows)]
    return "\n".join(lines)


def main() -> None:
    """Write both files."""
    work, out = (Path(argument) for argument in sys.argv[1:3])
    found = collect(work)
    for name, text in (
        ("device.json", json.dumps(found, indent=1) + "\n"), ("device.md", markdown(found))
    ):  # fmt: skip
        (out / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
