"""What a profile's trace, tables and page hold, number by number."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

import accelrt
from accelrt.planning import cost
from accelrt.profiling import Profile, tables
from accelrt.profiling.analysis import Analysis, Row
from accelrt.profiling.ceilings import Ceilings
from accelrt.profiling.figures import draw_timeline
from accelrt.profiling.ops import Kernel, Op, Recorded
from accelrt.profiling.sampler import Gpu, Sample, Samples
from accelrt.profiling.spans import Span
from accelrt.profiling.trace import MIB, trace

RATES = Ceilings(1e9, 1e8, 128, "float32")


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Profile]:
    """Three steps of DiT under a budget, slices of one sample."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELRT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(cost, "profile", lambda device, dtype: cost.Machine())
        pipe = accelrt.wrap(zoo.dit_pipeline(), memory_budget="min", samples_per_slice=1)
        call = {"class_labels": [3, 7], "num_inference_steps": 3, "output_type": "np"}
        pipe(**call, generator=torch.Generator().manual_seed(0))
        with accelrt.profile(pipe, ceilings=False) as prof:
            pipe(**call, generator=torch.Generator().manual_seed(0))
    prof.ceilings = RATES
    yield prof
    torch.set_num_threads(threads)


def played(device: str = "cpu") -> Profile:
    """Four seconds, two of them in a group."""
    spans = [
        Span("call", "call", -1, 0, 4 * 10**9),
        Span("group", "first", 0, 10**9, 3 * 10**9),
    ]
    kernel = Kernel("gemm", 2 * 10**9, 25 * 10**8, launched=15 * 10**8)
    prof = accelrt.profile(nn.Linear(2, 2))
    prof._analysis = Analysis(spans, Recorded(kernels=[kernel]), [], lambda step: True)
    prof.device, prof.ceilings = device, RATES
    return prof


# The trace


def counter(events: list[dict[str, Any]], name: str) -> list[tuple[float, dict[str, float]]]:
    """Times in microseconds and values of one counter."""
    return [(e["ts"], e["args"]) for e in events if e["ph"] == "C" and e["name"] == name]


def test_counters_of_a_trace(profile: Profile, tmp_path: Path) -> None:
    document = json.loads(profile.save(tmp_path / "trace.json").read_text())
    events = document["traceEvents"]
    origin = profile.analysis.spans[0].begin
    live = counter(events, "live tensors, MiB")
    assert [values["cpu"] for _, values in live] == [
        cpu / MIB for _, cpu, _ in profile.analysis.recorded.memory
    ]
    assert max(values["cpu"] for _, values in live) == profile.peak_bytes / MIB > 0
    places = counter(events, "arena, MiB")
    assert len(places) == len(profile.arena) > 0
    assert all(0 <= values["live"] <= values["slab"] for _, values in places)
    assert max(values["live"] for _, values in places) > 0
    slices = counter(events, "slice")
    for moment, index, _ in profile.analysis.slices:
        assert (pytest.approx((moment - origin) / 1e3), {"index": index}) in slices
    assert max(values["index"] for _, values in slices) >= 3
    resident = counter(events, "process, MiB")
    assert all(values["resident"] > 10 for _, values in resident)


def test_a_trace_of_a_gpu() -> None:
    prof = played("cuda")
    prof.samples = Samples([Sample(2000, 3 * MIB, 5 * MIB, 350.0, 1500)], Gpu("", "H200", 3.0))
    prof.analysis.recorded.memory.append((3000, MIB, 4 * MIB))
    events = trace(prof)["traceEvents"]
    for name, values in (
        ("GPU memory, MiB", {"value": 5.0}), ("GPU power, W", {"value": 350.0}),
        ("GPU clock, MHz", {"value": 1500}), ("process, MiB", {"resident": 3.0}),
    ):  # fmt: skip
        assert counter(events, name) == [(2.0, values)]
    assert counter(events, "live tensors, MiB") == [(3.0, {"cpu": 1.0, "cuda": 4.0})]
    (kernel,) = [event for event in events if event.get("cat") == "kernel"]
    assert (kernel["name"], kernel["ts"], kernel["dur"]) == ("first/gemm", 2e6, 5e5)


# Tables


def test_self_and_total_and_what_stands_for_all_steps() -> None:
    """Two steps, of whose operators those of the second were recorded."""
    second = 10**9
    spans = [Span("call", "call", -1, 0, 10 * second)]
    for step, (begin, end) in enumerate(((0, 4), (4, 9))):
        first = len(spans)
        spans += [
            Span("step", f"step {step}", 0, begin * second, end * second, step),
            Span("component", "unet", first, (begin + 1) * second, (end - 1) * second, step),
            Span("stage", "mid", first + 1, (begin + 1) * second, (end - 1) * second, step),
            Span("group", "first", first + 2, (begin + 1) * second, (end - 1) * second, step),
        ]
    ops = [
        Op("aten::linear", 6 * second, 7 * second),
        Op("aten::mm", 6 * second, 6 * second + second // 4, parent=0, flops=100, bytes=10),
    ]
    slices = [(2 * second, 0, 4), (6 * second, 0, 8)]
    found = Analysis(spans, Recorded(ops=ops), slices, lambda step: step == 1)
    (group,) = found.rows("group")
    assert group.name == "unet.mid/first"
    assert (group.calls, group.recorded, group.seconds, group.slices) == (2, 1, 5.0, 2)
    assert group.self_seconds == pytest.approx(5 * 2 / 3)  # an operator takes a third of it
    assert (group.flops, group.bytes) == (200, 20)
    (steps,) = found.rows("part")
    assert (steps.name, steps.calls, steps.seconds) == ("steps", 2, 9.0)
    assert steps.self_seconds == pytest.approx(9 * 2 / 5)
    assert [row.seconds for row in found.rows("step")] == [4.0, 5.0]
    rows = {row.name: row for row in found.rows("op")}
    linear, product = rows["aten::linear"], rows["aten::mm"]
    assert (linear.calls, linear.seconds, linear.self_seconds) == (2, 2.0, 1.5)
    assert (product.calls, product.seconds, product.flops) == (2, 0.5, 200)


def test_cells_of_a_table() -> None:
    row = Row(
        "g", calls=2, seconds=2.0, self_seconds=0.5, flops=8e8, bytes=3 * 2**20, slices=6,
        recorded=1,
    )  # fmt: skip
    prof = played()
    found = dict(zip(tables.heads(prof, "group"), tables.cells(prof, row), strict=True))
    assert found == {
        "group": "g", "total s": "2", "share": "50.0 %", "self s": "0.5", "calls": "2",
        "GFLOP": "0.8", "moved": "3.0 MiB", "utilisation": "0.40", "slices": "3",
        "limit": "products 40 %",
    }  # fmt: skip
    row.device_seconds = 1.0
    prof = played("cuda")
    found = dict(zip(tables.heads(prof, "op"), tables.cells(prof, row), strict=True))
    assert (found["op"], found["GPU s"], found["utilisation"]) == ("g", "1", "0.80")
    row.recorded = 0
    assert tables.cells(prof, row)[5:] == ("2", "-", "-", "-", "3", "-")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_headings_are_whole_in_every_width(profile: Profile, device: str) -> None:
    prof = copy.copy(profile)
    prof.device = device
    table = prof.table("group", 3)
    heads = tables.heads(prof, "group")
    for width in range(70, 140):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(table)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= width
        line = next(line for line in text.splitlines() if "utilisation" in line)
        shown = set(re.split(r" {2,}", line.strip()))
        left_out = " ".join(text.split()).partition("Not shown in this width: ")[2]
        assert shown | set(left_out.rstrip(".").split(", ")) - {""} == set(heads), width
        assert not shown & set(left_out.rstrip(".").split(", "))


# The page


@pytest.fixture
def figures(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[Any]]:
    """The axes of the pictures of a page, by their titles."""
    seen: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: seen.append(self))
    page = profile.html(tmp_path / "report.html").read_text()
    titles = ("Timeline", "Steps", "Memory", "Roofline")
    assert page.count("<img ") == len(seen) == len(titles)
    places = [page.index(f"<h2>{title}</h2>") for title in titles]
    assert places == sorted(places)
    return {title: figure.axes for title, figure in zip(titles, seen, strict=True)}


def test_the_picture_of_memory(profile: Profile, figures: dict[str, list[Any]]) -> None:
    """Live tensors and what is alive in the arena over time; beneath, what lies where in it."""
    over_time, layout = figures["Memory"]
    lines = {line.get_label(): line.get_ydata() for line in over_time.get_lines()}
    assert max(lines["tensors, CPU"]) == profile.peak_bytes / MIB
    assert list(lines["alive in the arena"]) == [live / MIB for _, live, _ in profile.arena]
    assert "arena's layout" in layout.get_title(loc="left")
    (blocks,) = layout.collections
    boxes = [path.get_extents() for path in blocks.get_paths()]
    calls = [span for span in profile.analysis.spans if span.kind == "component"]
    given = [sum(c.begin <= born < c.end for _, _, born, _ in profile.blocks) for c in calls]
    assert len(boxes) == max(given) > 0
    known = {(offset / MIB, (offset + size) / MIB) for offset, size, _, _ in profile.blocks}
    assert all((box.y0, box.y1) in known and box.width > 0 for box in boxes)


def test_the_picture_of_steps(profile: Profile, figures: dict[str, list[Any]]) -> None:
    """A column per step and part of the call, made of stages."""
    (axis,) = figures["Steps"]
    columns = [label.get_text() for label in axis.get_xticklabels()]
    assert {"step 0", "step 1", "step 2", "vae.decode"} <= set(columns)
    heights: dict[str, list[float]] = {}
    for bars in axis.containers:
        heights[bars.get_label()] = [bar.get_height() for bar in bars]
    rows = {row.name: row for row in profile.rows("stage")}
    for name in ("transformer.blocks.0", "transformer.blocks.1"):
        assert sum(heights[name]) == pytest.approx(1e3 * rows[name].seconds)
        assert [height > 0 for height in heights[name]] == [c.startswith("step") for c in columns]


def test_the_roofline_says_what_limits_each_group(
    profile: Profile, figures: dict[str, list[Any]]
) -> None:
    (axis,) = figures["Roofline"]
    rows = [row for row in profile.rows("group") if row.flops and row.bytes]
    expected: dict[str, set[tuple[float, float]]] = {}
    for row in rows:
        limit = row.limit(RATES)
        assert limit is not None
        place = (row.flops / row.bytes, row.flops / row.seconds / 1e9)
        expected.setdefault(f"limited by {limit[0]}", set()).add(place)
    drawn = {
        points.get_label(): {tuple(map(float, place)) for place in points.get_offsets()}
        for points in axis.collections
    }
    assert drawn == expected
    assert {text.get_text() for text in axis.get_legend().get_texts()} == set(expected)
    (roof,) = axis.get_lines()
    assert max(roof.get_ydata()) == RATES.flops_per_second / 1e9
    assert list(roof.get_xdata())[1] == RATES.flops_per_second / RATES.bytes_per_second
    names = {row.name.rsplit("/", 1)[-1] for row in rows}
    texts = {text.get_text() for text in axis.texts} - {"128^3 product ", "  copy"}
    assert texts
    assert texts <= names


def test_the_timeline_shows_calls_steps_and_stages(
    profile: Profile, figures: dict[str, list[Any]]
) -> None:
    (axis,) = figures["Timeline"]
    levels = sorted({round(bar.get_y() + bar.get_height() / 2) for bar in axis.patches})
    assert levels == list(range(len(levels)))
    assert len(levels) >= 5  # call, step, model, stage, group
    texts = {text.get_text() for text in axis.texts}
    assert {"step 1", "call of DiTPipeline"} <= texts
    assert axis.get_xlim()[1] == pytest.approx(1e3 * profile.seconds, rel=0.01)


def test_the_page_holds_the_numbers(profile: Profile, tmp_path: Path) -> None:
    page = profile.html(tmp_path / "report.html").read_text()
    for by in ("part", "stage", "group", "op", "step"):
        assert f"<summary>By {by}</summary>" in page
        for cell in tables.cells(profile, profile.rows(by)[0]):
            assert f"<td>{cell}</td>" in page
    assert "http" not in page  # nothing is loaded from elsewhere


def test_a_block_in_which_nothing_ran(tmp_path: Path) -> None:
    with accelrt.profile(nn.Linear(2, 2)) as prof:
        pass
    sentence = "Nothing of Linear ran in the block and in the thread that opened it."
    assert prof.table().caption.startswith(sentence)
    assert sentence in prof.html(tmp_path / "report.html").read_text()
    assert json.loads(prof.save(tmp_path / "trace.json").read_text())["traceEvents"]
    assert prof.to_dict()["steps"] == 0
    with pytest.raises(ValueError, match="nothing ran in the block"):
        draw_timeline(prof, tmp_path / "timeline.png")
