"""The benchmark of whole forwards: its run, its limits, its roofline, its files."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "models"))

import forms
import forwards
import plot
import roofline
import summary
from forms import EAGER, FLOOR, FROZEN, OURS, TWICE, Made
from model_zoo import one_thread  # noqa: F401

import accelrt
from accelrt.benchmarking.budgets import plan_call, reserved_bytes
from accelrt.benchmarking.limits import OutOfTime, time_limit
from accelrt.benchmarking.measure import Form, weights_of
from accelrt.benchmarking.models import TINY
from accelrt.benchmarking.progress import Progress
from accelrt.wrap import forwards as wrapped_parts

TIMED = {"default": (EAGER, FROZEN, OURS, FLOOR), "tuned": (EAGER, OURS)}
TINY_DIT = forwards.Request("dit", "", size="tiny", rounds=1)


@pytest.fixture(scope="module")
def run() -> Iterator[Any]:
    """The script, whose parts run in this process; its name is that of others."""
    spec = importlib.util.spec_from_file_location(
        "models_run", Path(forms.__file__).with_name("run.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked = []

    def ask(command: Any, request: Any, progress: Progress, environment: Any) -> Any:
        asked.append((request["part"], "MALLOC_TRIM_THRESHOLD_" in environment))
        return json.loads(json.dumps(module.handle(dict(request), progress)))

    module.ask, module.asked = ask, asked
    before = torch.get_num_threads()
    yield module
    torch.set_num_threads(before)
    torch._dynamo.reset()


def call(run: Any, *arguments: str) -> None:
    fixed = ["--size", "tiny", "--compiler", "eager", "--model", "dit", "--threads", "1"]
    before, sys.argv = sys.argv, ["run.py", *fixed, *arguments]
    try:
        run.main()
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def results(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all parts; there was a file of something else in it."""
    folder: Path = tmp_path_factory.mktemp("models")
    (folder / "models-cpu.json").write_text('{"models": [{"name": "dit"}]}')
    call(run, "--part", "errors", "--part", "roofline", "--out", str(folder))
    for malloc, names in TIMED.items():
        wanted = [argument for name in names for argument in ("--form", name)]
        call(
            run, "--part", "times", "--malloc", malloc, "--rounds", "2", *wanted,
            "--out", str(folder),
        )  # fmt: skip
    return folder


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "models-cpu.json").read_text())
    return found


def test_every_form_is_measured(run: Any, results: Path) -> None:
    model = document(results)["models"]["dit"]
    assert run.asked[:4] == [
        ("errors", False), ("roofline", False), ("times", False), ("times", True),
    ]  # fmt: skip
    found = model["errors"]["forms"]
    assert tuple(found) == forms.NAMES
    assert summary.above(model) == []
    assert found[OURS]["peak_bytes"] < found[EAGER]["peak_bytes"]
    assert found[FLOOR]["peak_bytes"] < found[OURS]["peak_bytes"]
    assert found[FLOOR]["reserved_bytes"] < found[TWICE]["reserved_bytes"]
    assert found[TWICE]["reserved_bytes"] <= 2 * found[FLOOR]["reserved_bytes"]
    for malloc, names in TIMED.items():
        part = model["times"][malloc]
        assert [one["run"] for one in part["times"]] == list(names)
        assert all(len(one["seconds"]) == 2 for one in part["times"])
        assert part["times"][0]["speedup"] == 1.0
        assert part["left_out"] == {}
    text = (results / "models-cpu.md").read_text()
    assert "| DiT-XL/2, 128x128, bf16 | eager | " in text
    assert text.count("\n|  | ") == len(forms.NAMES) - 1
    assert "no form of accelrt is above it" in text


def test_the_roofline_holds_the_whole_forward(results: Path) -> None:
    model = document(results)["models"]["dit"]
    found = model["roofline"]
    groups = {point["name"]: point for point in found["groups"]}
    assert "blocks.2: transformer_blocks.2" in groups
    seconds = sum(point["seconds"] for point in found["groups"])
    assert seconds == pytest.approx(sum(point["seconds"] for point in found["operators"]))
    assert 0 < seconds <= found["seconds"]
    products = sum(p["flops"] for p in found["operators"])
    # What the wrapped model makes once for both samples is less than the stock model's.
    assert products == pytest.approx(model["flops"], rel=0.25)
    picture = (results / "models-cpu-dit.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_results_are_merged(run: Any, results: Path) -> None:
    before = document(results)["models"]["dit"]
    only = ("--part", "times", "--malloc", "default", "--form", EAGER, "--form", OURS)
    call(run, *only, "--rounds", "1", "--out", str(results))
    after = document(results)["models"]["dit"]
    assert [one["run"] for one in after["times"]["default"]["times"]] == [EAGER, OURS]
    assert len(after["times"]["default"]["times"][0]["seconds"]) == 1
    assert after["times"]["tuned"] == before["times"]["tuned"]
    assert after["errors"] == before["errors"]
    call(run, *only, "--rounds", "1", "--seed", "3", "--out", str(results))
    other = document(results)["models"]["dit"]  # of other weights: nothing of it is kept
    assert set(other["times"]) == {"default"}
    assert "errors" not in other


def test_a_part_that_fails_is_named_and_the_next_runs(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(request: Any, progress: Progress) -> Any:
        raise RuntimeError("killed")

    monkeypatch.setitem(run.PARTS, "errors", broken)
    with pytest.raises(SystemExit, match="dit: errors: killed"):
        call(
            run, "--part", "errors", "--part", "times", "--malloc", "default", "--form", EAGER,
            "--rounds", "1", "--out", str(tmp_path),
        )  # fmt: skip
    assert "default" in document(tmp_path)["models"]["dit"]["times"]


def test_forms_that_fail_are_left_out_with_the_reason() -> None:
    def endless(model: Any, inputs: Any) -> torch.Tensor:
        while True:
            with contextlib.suppress(Exception):  # as compilers do
                time.sleep(0.01)

    def broken(model: Any, inputs: Any) -> torch.Tensor:
        raise TypeError("no such kernel\nand more")

    made = {
        FROZEN: Made(Form(None, {}, endless)),
        OURS: Made(Form(None, {}, broken)),
        EAGER: Made(Form(None, {}, lambda model, inputs: torch.ones(1))),
    }
    limited = forwards.Limited(made, 0.1, Progress())
    found = [limited.call(name, "compiling", one.form) for name, one in list(made.items())]
    assert found == [None, None, torch.ones(1)]
    assert list(made) == [EAGER]
    assert limited.left_out == {
        FROZEN: "compiling: not done in 0.1 s",
        OURS: "compiling: TypeError: no such kernel",
    }
    assert limited.call(FROZEN, "again", lambda: pytest.fail("called")) is None
    model = {
        "title": "DiT", "detail": "", "dtype": "bf16", "flops": 1, "times": {
            "default": {"times": [], "left_out": limited.left_out, "threads": 1}
        },
    }  # fmt: skip
    assert f"| {FROZEN} | compiling: not done in 0.1 s | - |" in summary.markdown({"m": model})


def test_time_limit() -> None:
    with time_limit(60):
        pass
    with pytest.raises(OutOfTime, match=r"not done in 0\.05 s"), time_limit(0.05):
        time.sleep(30)
    time.sleep(0.1)  # nothing is left of either
    with pytest.raises(ValueError, match="seconds is 0; allowed: more than 0"), time_limit(0):
        pass


def test_an_error_above_the_bound() -> None:
    found = {name: {"error": 0.01, "peak_bytes": 1} for name in (EAGER, OURS, FLOOR)}
    assert summary.above({"errors": {"forms": found}}) == []
    found[OURS]["error"] = 0.0111
    found[FLOOR]["error"] = None
    assert summary.above({"errors": {"forms": found}}) == [OURS, FLOOR]


def test_what_operators_move() -> None:
    a, b = torch.ones(4, 6), torch.ones(6, 5)
    out, row = torch.empty(4, 5), torch.ones(5)
    with roofline.Recorder() as recorder:
        torch.mm(a, b, out=out)
        out.add_(row.expand(4, 5))
        out.view(2, 10)
    product, addition = recorder.operators["mm"], recorder.operators["add_"]
    assert (product.flops, product.bytes) == (2 * 4 * 6 * 5, 4 * (24 + 30 + 20))
    assert (addition.flops, addition.bytes) == (20, 4 * (20 + 20 + 5))
    assert recorder.operators["view"].bytes == recorder.operators["view"].flops == 0


def test_a_lookup_reads_what_it_writes() -> None:
    table = torch.ones(1000, 8)
    with roofline.Recorder() as recorder:
        torch.nn.functional.embedding(torch.tensor([3, 4]), table)
    assert recorder.operators["embedding"].bytes == 2 * 4 * 2 * 8


@pytest.mark.parametrize("intensities", [[], [200.0], [0.1, 3.0, 200.0]])
def test_the_roof_has_its_corner_between_its_ends(intensities: list[float]) -> None:
    per_byte, rates = plot.roof(intensities, 5e9, 50e9)
    assert per_byte == sorted(per_byte)
    assert per_byte[1] == 10.0
    assert rates == pytest.approx([per_byte[0] * 5, 50.0, 50.0])
    assert all(per_byte[0] < one < per_byte[2] for one in intensities)


def test_flops_are_those_of_the_counter() -> None:
    case = TINY["dit"]()
    form = forms.make(case, weights_of(case, TINY_DIT.settings), torch.bfloat16, [OURS])[OURS].form
    with FlopCounterMode(display=False) as counter:
        form()
    with roofline.Recorder() as recorder:
        form()
    counted = {str(op).rpartition(".")[2] for op in counter.get_flop_counts()["Global"]}
    points = [p for name, p in recorder.operators.items() if name.rpartition("::")[2] in counted]
    assert sum(p.flops for p in points) == counter.get_total_flops()


def test_peak_of_what_the_allocator_gives() -> None:
    def steps(model: Any, inputs: Any) -> torch.Tensor:
        first = torch.zeros(3 << 20, dtype=torch.uint8)
        second = torch.zeros(2 << 20, dtype=torch.uint8)
        del first
        return second + torch.zeros(1, dtype=torch.uint8)

    output, peak = forwards._profiled(Made(Form(None, {}, steps)))
    assert output.numel() == 2 << 20
    assert peak == pytest.approx(5 << 20, abs=4096)


def test_a_plan_is_known_before_the_forward() -> None:
    case = TINY["pixart-1024"]()
    model = weights_of(case, TINY_DIT.settings)
    wrapped = accelrt.wrap(model, memory_budget="min")
    with pytest.raises(ValueError, match="no plan"):
        reserved_bytes(wrapped)
    inputs = case.inputs(torch.bfloat16, "cpu")
    planned = plan_call(wrapped, inputs)
    (planner,) = (forward.planner for _, forward in wrapped_parts(wrapped))
    kept = dict(planner.plans)
    with torch.no_grad():
        case.run(wrapped, inputs)
    assert planner.plans == kept  # the call takes the plan
    assert all(planner.plans[path] is plan for path, plan in kept.items())
    assert reserved_bytes(wrapped) == planned > 0
