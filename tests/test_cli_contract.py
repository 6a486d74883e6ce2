"""What all commands promise: exit codes, pure JSON, refusals before work, completion, a page."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import docs_pages
import model_zoo as zoo
import pytest
import torch
import typer
from model_zoo import one_thread  # noqa: F401
from typer.testing import CliRunner

from accelrt.cli import app, errors
from accelrt.cli.app import FINDINGS
from accelrt.cli.common import check_file, check_folder, print_json
from accelrt.config import Config
from accelrt.models.forward import Forward
from accelrt.planning import cost
from accelrt.profiling import ceilings

PAGE = docs_pages.ROOT / "docs" / "cli.md"
COMMANDS = ("doctor", "demo", "plan", "profile", "bench", "calibrate", "compare", "distill")
MODELS = docs_pages.ROOT / "examples" / "reference_models"


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small measurements, rates that do not depend on the machine, and no traceback of before."""
    monkeypatch.setattr(errors, "_debug", False)
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cost, "profile", lambda device, dtype: cost.Machine())
    monkeypatch.setattr(ceilings, "PRODUCT_ROWS", 128)
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "dit"
    zoo.dit_pipeline().save_pretrained(place)
    return place


def run(*words: object, **more: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words], **more)


def said(result: Any) -> str:
    """The error output, in one line."""
    return " ".join(result.stderr.split())


def strict(text: str) -> Any:
    """JSON as every parser takes it: Python's own also reads NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def table(heading: str) -> dict[str, str]:
    """First cell to last cell of the first table below a heading of the page."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    rows = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert rows is not None
    cells = [line.strip("| ").split(" | ", 1) for line in rows[0].splitlines()[2:]]
    return {first.strip("`"): last for first, last in cells}


# JSON


def calls(name: str, folder: Path, out: Path) -> list[object]:
    small = ["--threads", 1]
    return {
        "doctor": ["doctor"],
        "demo": ["demo", "--model", folder, "--steps", 2, "--repeats", 1, "--out", out, *small],
        "plan": ["plan", "--model", folder, "--budget", "1GiB"],
        "profile": ["profile", "--model", folder, "--steps", 2, "--out", out, *small],
        "bench": ["bench", "--model", "dit", "--size", "tiny", "--repeats", 1, "--no-switches",
                  "--no-tuned-malloc", *small],
        "calibrate": ["calibrate", "--model", folder, "--steps", 4, "--runs", 1, "--seeds", 1,
                      "--out", out, *small],
        "compare": ["compare", "--model", folder, "--steps", 2, *small],
        "distill": ["distill", "--model", MODELS / "dit", "--out", out, "--config",
                    out.parent / "training.yaml", "--device", "cpu", *small],
    }[name]  # fmt: skip


TRAINING = (
    "outer: 2\nstands_for: 4\nsubsteps: 1\npool: 4\nbatch: 4\nwarmup: 1\nsteps: 1\n"
    "validation_samples: 2\nlog_every: 1\ntensorboard: false\n"
)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_standard_output_is_the_documented_json(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the settings of a file reach whatever is wrapped."""
    (tmp_path / "training.yaml").write_text(TRAINING)
    (tmp_path / "settings.yaml").write_text("ff_rows: 777\n")
    rows: set[int | None] = set()
    made = Forward.__init__

    def make(self: Forward, module: Any, family: Any, config: Config, *more: Any) -> None:
        rows.add(config.ff_rows)
        made(self, module, family, config, *more)

    monkeypatch.setattr(Forward, "__init__", make)
    words = calls(name, folder, tmp_path / "out")
    configured = name not in ("doctor", "distill")
    words += ["--config", tmp_path / "settings.yaml"] if configured else []
    result = run(*words, "--json")
    assert rows == ({777} if configured else set())
    # What takes a while is seen to go on, on the error output, to the end.
    if name == "bench":
        assert re.findall(r"^dit: (\w+)", result.stderr, re.MULTILINE)[0] == "count"
    elif name not in ("doctor", "plan"):
        ((done, total),) = re.findall(r" (\d+)/(\d+) +\d:\d\d:\d\d ", result.stderr)
        assert done == total
    assert result.exit_code in ((0, 1) if name in FINDINGS else (0,)), result.output
    found = strict(result.stdout)
    documented = re.split(r"; with|, and of", table("JSON")[name])[0]
    optional = {"gamma"} if name == "calibrate" else set()
    assert set(found) - optional == set(re.findall(r"`(\w+)`", documented))


def test_values_that_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("inf"), (float("nan"), 1.5)], "b": None})
    assert strict(capsys.readouterr().out) == {"a": ["inf", ["nan", 1.5]], "b": None}


# Exit codes


def test_every_command_documents_its_exit_codes() -> None:
    assert sorted(table("Exit codes")) == ["0", "1", "130", "141", "2", "3"]
    text = " ".join(run("--help", env={"COLUMNS": "200"}).stdout.split())
    for name in COMMANDS:
        help_text = " ".join(run(name, "--help", env={"COLUMNS": "200"}).stdout.split())
        sentence = help_text.split("Exit codes: ")[1]
        for code in ("0 ", "2 ", "3 ", "130 "):
            assert code in sentence, name
        assert (
            ("1 " + FINDINGS[name][:20] in sentence) if name in FINDINGS else "; 1 " not in sentence
        )
        assert "--json" in help_text
    assert "130 interrupted" in text
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` | " in page.split("What 1 says")[1] for name in FINDINGS)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 3, "error: out of memory: CUDA out of"),
        (MemoryError(), 3, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "`accelrt plan` shows"),
        (RuntimeError("a bug"), 3, "RuntimeError: a bug"),
        (AssertionError("a bug"), 3, "Traceback"),
        (ValueError("a wrong value"), 2, "error: a wrong value"),
        (OSError(28, "No space left on device"), 2, "No space left"),
        (ImportError("no such package"), 2, "`accelrt doctor` lists"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_goes_wrong_has_a_code_of_its_own(
    error: BaseException, code: int, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 is an answer: a failure must not be taken for it. With --debug the codes are the same."""

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("diffusers.DiTPipeline.__call__", fails)
    monkeypatch.setattr("accelrt.cli.scenarios.load_pipeline", fails)
    for debug in ((), ("--debug",)):
        result = run(*debug, "compare", "--model", folder, "--json")
        assert result.exit_code == code, result.output
        assert message in said(result)
        assert result.stdout == ""
        assert ("Traceback" in result.stderr) == (
            code != 130 and (bool(debug) or "bug" in str(error))
        )


def test_a_reader_that_has_gone_gets_no_answer() -> None:
    """Neither a traceback, nor 1, as Typer has it."""
    done = subprocess.Popen(
        [sys.executable, "-m", "accelrt", "doctor"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.stdout is not None
    done.stdout.close()
    _, words = done.communicate()
    assert (done.returncode, words) == (141, "")


# Refusals


def bad(folder: Path) -> list[tuple[str, str]]:
    """Wrong words, and what the one line must say; ``{}`` is a folder with wrong files."""
    models = [
        (f"{name} --model {{}}/{wrong} --out {{}}/new", message)
        for name in ("demo", "profile", "calibrate", "distill", "compare")
        for wrong, message in (
            ("gone", "neither a folder nor a hub id"),
            ("empty", "no model_index.json"),
            ("broken", "broken"),
            ("unknown", "NoSuchPipeline"),
        )
    ]
    configs = [
        (f"{name} --model {folder} --config {{}}/{wrong}", message)
        for name in ("demo", "plan", "profile", "calibrate", "compare", "distill")
        for wrong, message in (
            ("gone.yaml", "gone.yaml"), ("list.yaml", "list.yaml"), ("open.yaml", "open.yaml"),
            ("key.yaml", "slice_of_bread"), ("binary.yaml", "binary.yaml"), ("empty", "empty"),
        )
        if name == "plan" or wrong in ("gone.yaml", "key.yaml")
    ]  # fmt: skip
    outs = [
        (f"{name} --model {folder} --out {{}}/file", "allowed: a folder")
        for name in ("demo", "profile", "calibrate", "compare", "distill")
    ]
    return [
        *models, *configs, *outs,
        ("bench --model dit --size tiny --config {}/key.yaml", "slice_of_bread"),
        ("bench --memory --model svd --size tiny --config {}/key.yaml", "slice_of_bread"),
        ("bench --memory --model svd --size tiny --budget much", "memory_budget is 'much'"),
        ("bench --model dit --size tiny --out {}/file/x.json", "file"),
        ("bench --model nope", "nope"),
        ("plan --model {}/gone", "allowed: animatediff, svd"),
        ("plan --model {}/empty", "holds neither a pipeline nor a model"),
        ("plan --model {}/broken", "broken"),
        ("plan --model {}/unknown", "names no model"),
        (f"plan --model {folder} --out {{}}/plan.txt", "allowed: a .png or .svg file"),
        (f"plan --model {folder} --out {{}}/file/plan.png", "file"),
        (f"plan --model {folder} --budget 1KiB", "smallest"),
        (f"plan --model {folder} --budget much", "memory_budget is 'much'"),
        (f"profile --model {folder} --budget 1KiB --threads 1 --out {{}}/p", "cannot be met"),
        (f"profile --model {folder} --budget much --out {{}}/new", "memory_budget is 'much'"),
        (f"compare --model {folder} --rehash {{}}/gone.json", "gone.json"),
        (f"compare --model {folder} --rehash {{}}/list.yaml", "list.yaml"),
        (f"compare --model {folder} --feedback {{}}/empty", "config.json"),
        (f"compare --model {folder} --frames 3 --steps 2", "num_frames"),
        (f"calibrate --model {folder} --psnr 40 --speedup 2", "do not go together"),
        (f"distill --model {folder} --out {{}}/new --data {{}}/gone", "--data is"),
        (f"distill --model {folder} --out {{}}/new --prompts {{}}/gone", "gone"),
    ]  # fmt: skip


def test_what_is_wrong_is_named_before_any_work(folder: Path, tmp_path: Path) -> None:
    for name, content in (
        ("file", b"x"), ("list.yaml", b"- 1"), ("open.yaml", b"a: [1"),
        ("key.yaml", b"slice_of_bread: 3"), ("binary.yaml", b"\xff\xfe\x00"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
    for name, index in (("empty", None), ("broken", "{"), ("unknown", "NoSuchPipeline")):
        (tmp_path / name).mkdir()
        if index is not None:
            text = index if index == "{" else json.dumps({"_class_name": index})
            (tmp_path / name / "model_index.json").write_text(text)
    wrong = []
    for line, message in bad(folder):
        words = line.format(*[tmp_path] * line.count("{}")).split()
        if words[0] == "distill" and "--out" not in words:
            words += ["--out", str(tmp_path / "new")]
        result = run(*words, "--json")
        held = (
            result.exit_code == 2 and message in said(result)
            and "Traceback" not in result.stderr and result.stdout == ""
        )  # fmt: skip
        if not held:
            wrong.append((line, result.exit_code, result.stdout[-200:], said(result)[-300:]))
    assert not wrong, "\n".join(map(str, wrong))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "packages"),
    [("plan", "matplotlib"), ("calibrate", "matplotlib"), ("profile", "matplotlib jinja2")],
)
def test_packages_for_results_are_missed_before_any_work(
    name: str, packages: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def without(module: str, *more: Any) -> Any:
        return None if module in packages.split() else find(module, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setattr("accelrt.cli.scenarios.load_pipeline", None)
    monkeypatch.setattr("accelrt.cli.plan._target", None)
    out = tmp_path / ("plan.png" if name == "plan" else "out")
    result = run(name, "--model", folder, "--out", out, "--json")
    assert result.exit_code == 2, result.output
    assert f"pip install {packages}" in said(result)
    assert not list(tmp_path.glob("*.png"))
    assert not out.exists()


def test_places_for_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_folder(tmp_path / "a" / "b")
    check_file(tmp_path / "a" / "x.json", (".json",))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    (tmp_path / "x.json").mkdir()
    cases: list[tuple[Callable[[], None], str]] = [
        (lambda: check_folder(tmp_path / "file"), "a file; allowed: a folder"),
        (lambda: check_folder(tmp_path / "file" / "a"), "file is a file; allowed: a folder"),
        (lambda: check_file(tmp_path / "x.txt", (".json",)), "allowed: a .json file"),
        (lambda: check_file(tmp_path / "x.json", (".json",)), "allowed: a .json file"),
    ]
    for check, message in cases:
        with pytest.raises(ValueError, match=message):
            check()
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        check_folder(tmp_path / "new")


# Completion


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("pro", {"profile"}, {"plan"}),
        ("plan --mo", {"--model"}, {"--budget"}),
        ("plan --model an", {"animatediff"}, {"svd"}),
        ("plan --budget ", {"auto", "min"}, set()),
        ("compare --rehash au", {"auto"}, set()),
        ("bench --dtype ", {"bf16", "fp16", "fp32"}, set()),
        ("profile --by st", {"step", "stage"}, {"group"}),
    ],
)
def test_completion(line: str, offered: set[str], not_offered: set[str]) -> None:
    words = f"accelrt {line}"
    index = len(words.split()) - (not words.endswith(" "))
    env = {
        "_ACCELRT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(index),
    }  # fmt: skip
    found = set(run(env=env, prog_name="accelrt").stdout.split())
    assert offered <= found
    assert not not_offered & found


def test_completion_is_installed_by_an_option() -> None:
    text = run("--help").stdout
    assert "--install-completion" in text
    assert "--show-completion" in text


# Pages


def command_lines() -> list[tuple[str, str]]:
    """The lines with a command in the shell blocks of the README and the guides."""
    found = []
    pages = [docs_pages.ROOT / "README.md", *sorted((docs_pages.ROOT / "docs").glob("*.md"))]
    for page in pages:
        for block in docs_pages.FENCE.finditer(page.read_text(encoding="utf-8")):
            if block["kind"] not in ("", "sh", "bash"):
                continue
            for line in block["code"].splitlines():
                words = re.split(r" #| \| ", line)[0]
                if re.match(r"(nsys .* )?accelrt ", words):
                    found.append((page.name, re.sub(r"^nsys .*? accelrt", "accelrt", words)))
    return found


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_commands_of_the_pages_parse(page: str, line: str) -> None:
    """Options and choices that there are; what is in brackets may be left out."""
    words = shlex.split(line.replace("[", "").replace("]", ""))[1:]
    group = typer.main.get_command(app)
    if words[0].startswith("-") or words[0].isupper():
        assert words[0] in ("COMMAND", "--install-completion", "--show-completion", "--debug")
        return
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    with suppress(typer.Exit):
        command.make_context(words[0], words[1:])


def test_every_command_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {line.split()[1] for page, line in command_lines() if page == PAGE.name} >= set(COMMANDS)
    assert set(table("JSON")) == set(COMMANDS)
    for words in re.findall(r"`(--[a-z-]+)", text):
        assert any(
            words in parameter.opts + parameter.secondary_opts
            for command in typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
            for parameter in command.params
        ), words  # fmt: skip


@pytest.mark.parametrize("budget", ["1GiB", "min"])
def test_the_picture_of_a_plan_shows_its_curves(
    budget: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget a hundred times the memory would press them to the ground."""
    seen: list[Any] = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda self, *_, **__: seen.append(self)
    )
    result = run("plan", "--model", folder, "--budget", budget, "--out", tmp_path / "plan.png")
    assert result.exit_code == 0, result.output
    for axis in seen[0].axes:
        labels = [text.get_text() for text in axis.get_legend().get_texts()]
        assert labels[:2] == ["stock", "accelrt"]
        highest = max(line.get_ydata().max() for line in axis.get_lines()[:2])
        assert axis.get_ylim()[1] < 2 * highest
        if budget == "1GiB":
            assert "the budget leaves" in axis.get_title(loc="left")
            assert "budget" not in labels
