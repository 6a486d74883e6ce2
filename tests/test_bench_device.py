"""benchmarks/device.sh and what it runs: a refusal without a GPU, and every path on the CPU."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "device"))

import device_models
import device_operators
import device_probe
import device_report
import device_timing

from accelrt import _C
from accelrt.planning import cost

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "device.sh"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only lose time in thread barriers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Attention and two others at trial sizes, as the file has it."""
    path = tmp_path_factory.mktemp("device") / "operators.json"
    device_operators.main([
        "--device", "cpu", "--size", "tiny", "--dtype", "fp32", "--compiler", "eager",
        "--only", "attention,linear,geglu", "--out", str(path),
    ])  # fmt: skip
    torch._dynamo.reset()
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("device") / "models.json"
    with pytest.MonkeyPatch.context() as patch:  # plans need no measured rates here
        patch.setattr(cost, "profile", lambda device, dtype: cost.Machine())
        device_models.main([
            "--device", "cpu", "--size", "tiny", "--dtype", "fp32", "--compiler", "eager",
            "--model", "dit", "--rounds", "1", "--out", str(path),
        ])  # fmt: skip
    torch._dynamo.reset()
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_operators_are_held_against_the_ceilings(operators: dict[str, Any]) -> None:
    top = operators["ceilings"]
    assert top["product"] == "256^3 float32"
    assert top["flops_per_second"] > 0 < top["bytes_per_second"]
    assert operators["not_reached"] == []
    rows = {(row["op"], row["size"]): row for row in operators["rows"]}
    assert len(rows) == 6
    attention = rows["attention", "2x16, 2x40"]
    assert set(attention["forms"]) >= {"ours", "eager", "flash", "math"}
    assert "compile" not in attention["forms"]
    assert "RuntimeError" in attention["left_out"]["cudnn"]  # the CPU has none, and that is said
    assert set(rows["geglu", "7x40"]["forms"]) == {"ours", "eager", "compile"}
    for row in rows.values():
        product = row["ceiling"] == "product"
        assert product == (row["op"] != "geglu")
        work = row["flops"] if product else row["moved_bytes"]
        limit = top["flops_per_second" if product else "bytes_per_second"]
        assert row["forms"]["ours"]["ours_over_it"] == 1.0
        for form in row["forms"].values():
            assert form["of_ceiling"] == pytest.approx(work / form["us"] * 1e6 / limit)
            assert not form["captured"]  # no graphs without a GPU


def test_own_products_are_a_form_of_builds_that_have_them(operators: dict[str, Any]) -> None:
    rows = [row for row in operators["rows"] if row["op"] in device_operators.WITH_PRODUCTS]
    if hasattr(_C, "set_cuda_products"):
        assert all("own products" in row["forms"] for row in rows)
    else:
        assert all("no products of its own" in row["left_out"]["own products"] for row in rows)


def test_own_products_are_chosen_for_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ["torch"]
    monkeypatch.setattr(device_timing, "_C", types.SimpleNamespace(
        cuda_products=lambda: chosen[-1], set_cuda_products=chosen.append,
    ))  # fmt: skip
    assert device_timing.with_own_products(lambda: chosen[-1])() == "own"
    assert chosen == ["torch", "own", "torch"]
    with pytest.raises(ZeroDivisionError):
        device_timing.with_own_products(lambda: 1 / 0)()
    assert chosen[-1] == "torch"


def test_seconds_that_are_spent_leave_the_rest_out() -> None:
    now = iter((0.0, 4.0, 11.0))
    budget = device_timing.Budget(10, clock=lambda: next(now))
    assert budget.left == 6.0
    assert budget.left == -1.0
    tiny = ("--device", "cpu", "--size", "tiny", "--seconds", "1e-9")
    found = device_operators.main([*tiny, "--only", "geglu"])
    assert found["rows"] == []
    assert found["not_reached"] == ["geglu, 7x40", "geglu, 7x40: compile"]
    assert device_models.main([*tiny, "--model", "dit", "--parts", "1"])["not_reached"] == [
        "dit: eager, accelrt, accelrt, own products"
    ]


def test_whole_forwards_keep_the_rule(models: dict[str, Any]) -> None:
    (dit,) = models["models"]
    assert models["not_reached"] == models["above_the_bound"] == []
    forms = dit["forms"]
    assert set(forms) >= {
        "eager", "accelrt", "accelrt, least memory", "accelrt, CUDA graphs", "compile"
    }  # fmt: skip
    assert forms["accelrt, least memory"]["live_bytes"] < forms["eager"]["live_bytes"]
    assert forms["compile"]["live_bytes"] is forms["accelrt, CUDA graphs"]["live_bytes"] is None
    assert [[run["run"] for run in part["times"]] for part in dit["parts"]][1] == [
        "eager", "accelrt, least memory"
    ]  # fmt: skip


def test_the_page_has_every_form(
    operators: dict[str, Any], models: dict[str, Any], tmp_path: Path
) -> None:
    for name, document in (("operators", operators), ("models", models)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    (tmp_path / "sections.tsv").write_text("build\tpassed\t60\t150\ntests\tfailed\t3\t100\n")
    page = device_report.markdown(device_report.collect(tmp_path))
    assert "Ceilings of this run: copy of 1 MiB" in page
    assert "product 256^3 float32" in page
    assert operators["gpu"]["note"] == models["gpu"]["note"] != ""  # why there is nothing
    assert page.count(operators["gpu"]["note"]) == page.count("By the driver of the GPU") == 1
    assert "| geglu, 7x40 * | copy |" in page
    assert "| size | ours | own products | eager | flash | efficient | cudnn | math |" in page
    assert "| DiT-XL/2, 128x128, fp32 | eager |" in page
    assert "|  | accelrt, least memory |" in page
    assert "no cudnn: RuntimeError" in page
    overlaps = page[page.index("## Two slices at a time") :].splitlines()
    assert [line.split("|")[2].strip() for line in overlaps[2:6]] == [
        "form", "---:", "accelrt", "accelrt, 8 MiB"
    ]  # fmt: skip
    assert "| tests | failed | 3 | 100 |" in page
    lines = page.splitlines()
    widths = [
        (lines[i].count("|"), lines[i - 1].count("|"))
        for i in range(1, len(lines))
        if lines[i].startswith("|") and lines[i - 1].startswith("|")
    ]
    assert widths
    assert all(a == b for a, b in widths)
    assert device_report.markdown({"sections": []}).startswith("# On a device")


@pytest.mark.parametrize(
    ("version", "cuda", "available", "reason"),
    [
        ("2.13.0+cpu", None, False, "torch 2.13.0+cpu is built without CUDA"),
        ("2.13.0+cu130", "13.0", False, "torch 2.13.0+cu130 finds no GPU"),
        ("2.9.1+cu128", "12.8", True, "torch is 2.9.1+cu128; needed: 2.11 or later"),
        ("2.11.0+cu130", "13.0", True, ""),
    ],
)
def test_the_probe_says_what_is_missing(
    version: str, cuda: str | None, available: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(
        __version__=version, version=types.SimpleNamespace(cuda=cuda),
        cuda=types.SimpleNamespace(
            is_available=lambda: available, get_device_capability=lambda: (9, 0)
        ),
    ))  # fmt: skip
    architecture, reasons = device_probe.about_torch()
    assert architecture == ("90a" if available else "")
    assert [text.startswith(reason) for text in reasons] == ([True] if reason else [])


def test_the_probe_names_packages_and_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(device_probe.MODULES, "no_such_module", "no-such-package")
    monkeypatch.setattr(shutil, "which", lambda name: None if "nvcc" in name else name)
    assert device_probe.about_tools() == [
        "missing here: pip install 'no-such-package'", "nvcc is not found (PATH, CUDACXX)"
    ]  # fmt: skip
    assert [device_probe.architecture(*c) for c in ((8, 0), (9, 0), (12, 0))] == [
        "80", "90a", "120"
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_script_refuses_a_machine_without_a_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, tmp_path / "out"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert "is built without CUDA" in done.stderr or "finds no GPU" in done.stderr
    assert done.stderr.endswith("this machine is not fit for it; nothing was built\n")
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def _chosen(expression: str, name: str) -> bool:
    """What ``pytest -k`` does."""
    words = re.sub(r"\b(?!and\b|or\b|not\b)\w+", lambda word: str(word[0] in name), expression)
    return bool(eval(words))


def _tests(path: Path) -> Iterator[tuple[str, bool, bool]]:
    """Of a file: names of the tests, which want a GPU, which want the simulator."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        on_devices = "all_devices" in marks
        skips = any("skipif(not torch.cuda.is_available()" in mark for mark in marks)
        skips |= "skip('no CUDA device')" in ast.unparse(node)
        fixtures = {argument.arg for argument in node.args.args}
        simulated = bool(fixtures & {"sim_dir", "launches", "names", "program"})
        name = f"{path.name}::{node.name}" + ("[cuda]" if on_devices else "")
        yield name, on_devices or skips, simulated


def test_the_script_runs_all_that_wants_a_gpu_and_no_simulator() -> None:
    script = SCRIPT.read_text()
    (seconds,) = re.findall(r"TOTAL:-(\d+)", script)
    assert int(seconds) < 9 * 60
    (expression,) = re.findall(r'chosen="(.+)"', script)
    patterns = set(re.findall(r"(?<= )tests/test_\S+\.py", script))
    root = SCRIPT.parents[1]
    files = {path for pattern in patterns for path in root.glob(pattern)}
    wanted = 0
    for path in sorted((root / "tests").glob("test_*.py")):
        for name, on_a_gpu, simulated in _tests(path):
            runs = path in files and _chosen(expression, name)
            assert not (on_a_gpu and not runs), f"{name} wants a GPU and is left out"
            assert not (simulated and runs), f"{name} would build the simulator"
            wanted += on_a_gpu
    assert wanted > 30


# Stands for a machine with a GPU: what the script starts, and how it deals with what comes back.
PYTHON = """\
#!/usr/bin/env bash
case "$*" in
  *device_probe.py*) echo 90a ;;
  *device_report.py*) exec "{real}" "$@" ;;
  *"import xdist"*) exit 1 ;;
  *"import os, torch"* | *cmakedir*) echo /nowhere ;;
  *device_operators.py*) echo "operators $*"; cp "{operators}" "${{@: -1}}" ;;
  *device_models.py*) echo "models $*"; sleep 60 ;;
  *pytest*) echo "1 failed"; exit 1 ;;
  *"accelrt bench"*) echo "bench $*" ;;
esac
"""


def test_the_script_keeps_its_seconds_and_tells_what_failed(
    operators: dict[str, Any], tmp_path: Path
) -> None:
    tree, tools, out = tmp_path / "tree", tmp_path / "bin", tmp_path / "out"
    (tree / "benchmarks" / "device").mkdir(parents=True)
    tools.mkdir()
    shutil.copy(SCRIPT, tree / "benchmarks")
    shutil.copy(device_report.__file__, tree / "benchmarks" / "device")
    saved = tmp_path / "operators.json"
    saved.write_text(json.dumps(operators))
    programs = {
        "python": PYTHON.format(real=sys.executable, operators=saved),
        "cmake": '#!/usr/bin/env bash\necho "cmake $*"\n',
    }
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "python", "TOTAL": "6",
        "SECTIONS": "build tests exactness operators models sanitizer",
    }  # fmt: skip
    environment.pop("ACCELRT_CUDA_ARCHS", None)
    done = subprocess.run(
        [tree / "benchmarks" / "device.sh", out], capture_output=True, text=True, timeout=60,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads((out / "device.json").read_text())
    assert {one["name"]: one["status"] for one in found["sections"]} == {
        "build": "passed", "tests": "failed", "exactness": "passed", "operators": "passed",
        "models": "out of time", "sanitizer": "left out: no time",
    }  # fmt: skip
    assert found["operators"] == operators
    assert "-DACCELRT_CUDA_ARCHS=90a" in (out / "build.log").read_text()
    assert (out / "exactness.log").read_text().count("--device cuda") == 2
    assert "--device cuda --seconds" in (out / "operators.log").read_text()
    assert "== tests" in done.stdout
    assert "1 failed" in done.stdout
    assert "| models | out of time |" in done.stdout  # the page is printed
