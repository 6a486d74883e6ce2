"""What the reports of the benchmarks say of a GPU: energy, power, clock and memory; or why not."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from model_zoo import one_thread  # noqa: F401
from nvml import one_gpu, without_driver  # noqa: F401
from test_bench_feedback import STEPS, untrained

from accelrt.benchmarking import gpu_use
from accelrt.benchmarking.gpu_use import DriverWatch, FormUse, GpuUse
from accelrt.benchmarking.tables import driver_markdown
from accelrt.benchmarking.tuned import ENVIRONMENT
from accelrt.profiling.sampler import Sampler, Use

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = ("cases", "run", "report", "measure", "table", "forms", "summary", "conftest")
MISSING = "no NVIDIA driver (NVML Shared Library Not Found)"

# Without a driver see test_bench_feedback.py and test_bench_device.py.
ASKED = pytest.mark.parametrize("told", ["driver"], indirect=True)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def load() -> Iterator[Any]:
    """Loads a script with the modules beside it, whose names are those of others' too."""
    known = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    before = list(sys.path)

    def script(path: str) -> ModuleType:
        file = BENCHMARKS / path
        sys.path[:] = [str(file.parent), str(BENCHMARKS / "steps"), *before]
        for name in NAMES:
            sys.modules.pop(name, None)
        spec = importlib.util.spec_from_file_location(f"bench_{file.parent.name}_{file.stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    yield script
    sys.path[:] = before
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(known)


@pytest.fixture(params=["driver", "none"])
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a driver tells; what runs on the CPU is taken for work on its device."""
    repeat = DriverWatch.repeat

    def once(
        self: DriverWatch, run: str, forward: Any, seconds: float = 0.0, forwards: int = 1
    ) -> None:
        repeat(self, run, forward, 0.0, forwards)

    monkeypatch.setattr(DriverWatch, "repeat", once)
    monkeypatch.setattr(gpu_use, "Sampler", lambda index: Sampler(0))
    if request.param == "driver":
        request.getfixturevalue("gpu")
    else:
        without_driver(monkeypatch)
    return bool(request.param == "driver")


def check(told: bool, document: dict[str, Any], page: str, *runs: str) -> None:
    """Both files of a report, with these runs where a driver tells of them."""
    found = GpuUse.from_dict(document["gpu"])
    document.pop("environment", None)  # what `accelrt doctor` says
    assert json.dumps(document).count(MISSING) == page.count(MISSING) == (0 if told else 1)
    assert found.note.startswith("" if told else MISSING)
    assert [form.run for form in found.forms] == (list(runs) if told else [])
    for form in found.forms:
        assert form.forwards > 0
        joules = 3.0 / form.forwards
        assert form.use == Use(joules, 350.0, None, 5 << 20)
        assert f"| {form.run} | {joules:.3g} | 350 | - | 5" in page
    if told:
        assert found.device == "H200"


def test_parts_of_one_name_are_put_together(told: bool) -> None:
    watch = DriverWatch("cpu")
    calls: list[int] = []
    watch.repeat("ours", functools.partial(calls.append, 1), forwards=4)
    for _ in range(2):
        with watch.watch("picture", 2):
            pass
    with pytest.raises(RuntimeError, match="broken"), watch.watch("broken", 1):
        raise RuntimeError("broken")
    found = watch.found
    assert GpuUse.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    if not told:
        assert (calls, found.forms) == ([], ())
        assert driver_markdown(found).startswith(f"By the driver of the GPU: {MISSING}")
        return
    assert calls == [1]
    assert [(form.run, form.forwards, form.use.joules) for form in found.forms] == [
        ("ours", 4, 0.75), ("picture", 4, 1.5)
    ]  # fmt: skip
    whole = GpuUse("", "H200", (FormUse("a", 1, 1.0, Use(None, None, 1500.0, None)),))
    assert driver_markdown(whole, "call").splitlines()[2:] == [
        "| run | J per call | W | MHz | in use |", "|---|---:|---:|---:|---:|",
        "| a | - | - | 1500 | - |",
    ]  # fmt: skip


def test_operators(told: bool, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    conftest, bench = load("conftest.py"), load("ops/test_bench_ops.py")
    from cases import Case, geglu

    options = {"--bench-device": "cpu", "--bench-compile": False, "--bench-save": True}
    config: Any = SimpleNamespace(stash={}, getoption=options.get)
    conftest.pytest_configure(config)
    monkeypatch.setattr(conftest, "HERE", tmp_path)
    monkeypatch.setattr(bench, "interleave", functools.partial(bench.interleave, rounds=1))
    monkeypatch.setattr(bench, "copies_for_cold_cache", lambda count: 1)
    rows: Any = config.stash[conftest._ROWS]
    bench.test_op(
        Case("geglu", "7x40", "memory", geglu(7, 40)), "fp32",
        SimpleNamespace(pedantic=lambda *_, **__: None, extra_info={}), config, rows,
        config.stash[conftest._DRIVER],
    )  # fmt: skip
    shown: list[str] = []
    reporter = SimpleNamespace(write_sep=lambda *_: None, write_line=shown.append)
    conftest.pytest_terminal_summary(reporter, config)
    document = json.loads((tmp_path / "results" / "ops-cpu.json").read_text())
    page = (tmp_path / "results" / "ops-cpu.md").read_text()
    assert page == shown[0]
    check(told, document, page, "geglu, 7x40, fp32: ours", "geglu, 7x40, fp32: eager")


@pytest.mark.parametrize("name", ["levels", "of_models"])
def test_operators_of_the_cpu(
    told: bool, load: Any, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = load(f"ops/{name}.py")
    monkeypatch.setattr(script, "CASES", [])
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--save", "--threads", "1"])
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=""))
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    script.main()
    (written,) = tmp_path.glob("*.json")
    check(told, json.loads(written.read_text()), written.with_suffix(".md").read_text())


def test_blocks(told: bool, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load("blocks/run.py")
    from cases import Case

    monkeypatch.setattr(script, "CASES", [Case("tiny", 1, 4, 2, 8)])
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "PRODUCT_SIZE", {"cpu": 16})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=b""))
    arguments = ("--save", "--device", "cpu", "--rounds", "1", "--seconds", "0", "--threads", "1")
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    script.main()
    document = json.loads((tmp_path / "blocks-cpu.json").read_text())
    page = (tmp_path / "blocks-cpu.md").read_text()
    check(told, document, page, "tiny: ours", "tiny: eager", "tiny: compiled")


def test_models(told: bool, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load("models/run.py")
    monkeypatch.setattr(script, "measure", lambda *_: [])
    arguments = ("--model", "dit", "--part", "errors", "--size", "tiny", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    script.main()
    document = json.loads((tmp_path / "models-cpu.json").read_text())
    check(told, document, (tmp_path / "models-cpu.md").read_text())


@pytest.mark.parametrize("name", ["budgets", "full_size"])
def test_memory(
    told: bool, load: Any, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    script = load(f"memory/{name}.py")
    target = tmp_path / "memory.json"
    monkeypatch.setattr(script, "TARGET", target)
    case = next(iter(script.CASES))
    monkeypatch.setattr(script, "CASES", {case: script.CASES[case]})
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--save"])
    row = {"model": case, "detail": "", "case": case, "reserved_bytes": {"floor": 1}}
    row |= {"slowdown": dict.fromkeys(getattr(script, "VARIANTS", ()), 1.0)}
    row |= dict.fromkeys(getattr(script, "COLUMNS", ()), 1.0)
    if name == "budgets":
        monkeypatch.setattr(script, "measure", lambda *_: row)
    else:  # a file of before the driver was asked
        target.write_text(json.dumps([row]))
        monkeypatch.setattr(script, "row_of", lambda _: row)
    for _ in range(2):  # what is there is read again
        script.main()
        document = json.loads(target.read_text())
        assert [one["case"] for one in document["rows"]] == [case]
        check(told, document, capsys.readouterr().out)


def test_profiles(told: bool, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load("profiling/run.py")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    ways = dict.fromkeys(("none", "profile"), lambda: script.Call(1.0, 1.0))
    monkeypatch.setattr(script, "forms", lambda *_: ways)
    monkeypatch.setattr(sys, "argv", ["run.py", "--model", "dit", "--rounds", "1", "--save"])
    script.main()
    document = json.loads((tmp_path / "profiling-cpu.json").read_text())
    check(told, document, (tmp_path / "profiling-cpu.md").read_text())


def test_steps(told: bool, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load("steps/run.py")
    table = script.table_of("dit", 2, samples=2, batch=2, patterns=["reuse*"], quiet=True)
    report = sys.modules["report"]
    monkeypatch.setattr(report, "plot", lambda *_: None)
    for steps in (2, 3):  # without a driver both tables say the same, once
        paths = report.write(tmp_path, "dit", {}, dataclasses.replace(table, steps=steps))
    document = json.loads(paths[0].read_text())
    runs = [result.name for result in table.results]
    check(told, document["tables"][0], paths[1].read_text(), *runs)
    assert all(form.forwards == 2 for form in table.gpu.forms)


@ASKED
def test_feedback(told: bool, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load("feedback/run.py")
    module = untrained(script.contenders.pipeline("dit"))
    table = script.table_of(
        "dit", module, steps=STEPS, reference_steps=STEPS + 1, samples=2, batch=2, resamples=1,
        families={},
    )  # fmt: skip
    monkeypatch.setattr(sys.modules["table"], "plot", lambda *_: None)
    paths = script.write(tmp_path, table)
    runs = [line.name for line in table.lines]
    check(told, json.loads(paths[0].read_text()), paths[1].read_text(), *runs)


@ASKED
def test_a_device(told: bool, load: Any, tmp_path: Path) -> None:
    models, operators = load("device/device_models.py"), load("device/device_operators.py")
    report = load("device/device_report.py")
    tiny = ("--device", "cpu", "--size", "tiny", "--dtype", "fp32", "--compiler", "eager")
    operators.main([*tiny, "--only", "geglu", "--out", str(tmp_path / "operators.json")])
    one = ("--model", "dit", "--parts", "1", "--rounds", "1")
    models.main([*tiny, *one, "--out", str(tmp_path / "models.json")])
    torch._dynamo.reset()
    found = report.collect(tmp_path)
    page = report.markdown(found)
    geglu = ("geglu, 7x40: ours", "geglu, 7x40: eager", "geglu, 7x40: compile")
    check(told, found["operators"], page, *geglu)
    (dit,) = found["models"]["models"]
    assert {"eager", "accelrt"} <= set(dit["forms"])
    check(told, found["models"], page, *(f"DiT-XL/2: {name}" for name in dit["forms"]))
