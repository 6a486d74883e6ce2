"""The site is whole without being built: pages, links, names; and blocks that are no Python."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import docs_pages
import model_zoo as zoo
import pytest
import yaml
from test_packaging import tomllib

import accelrt
from accelrt import Config
from accelrt.files import parse_yaml

ROOT, DOCS = docs_pages.ROOT, docs_pages.ROOT / "docs"
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]  # fmt: skip


def files_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [file for each in inner for file in files_of(each)]


# The site


def test_the_navigation_holds_every_page_once() -> None:
    there = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert sorted(files_of(SITE["nav"])) == there


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_snippets_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for snippet in re.findall(r'^--8<-- "([^"]+)"', text, re.MULTILINE):
        assert (ROOT / snippet).is_file(), snippet
    for target in re.findall(r"\]\(([^)\s]+)\)", docs_pages.FENCE.sub("", text)):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def directives() -> dict[str, str]:
    """What the pages of the API show, with its options."""
    found: dict[str, str] = {}
    for page in sorted((DOCS / "api").glob("*.md")):
        for block in re.split(r"^::: ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            name, _, options = block.partition("\n")
            found[name.strip()] = options
    return found


@pytest.mark.parametrize("name", directives())
def test_what_the_api_shows_is_there(name: str) -> None:
    module, attribute = name, ""
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, attribute = module.rpartition(".")
    assert not attribute or hasattr(found, attribute)
    assert (getattr(found, attribute) if attribute else found).__doc__


def packages() -> list[str]:
    """The public packages, as the hook that checks the built site has them."""
    tree = ast.parse((DOCS / "hooks" / "complete.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES":
            return list(ast.literal_eval(node.value))
    raise AssertionError("the hook has no PACKAGES")


@pytest.mark.parametrize("package", packages())
def test_every_public_name_is_on_a_page(package: str) -> None:
    """A name that is a module's too is taken for that, and needs an entry of its own."""
    shown = directives()
    names = [name for name in importlib.import_module(package).__all__ if name[0] != "_"]
    listed = re.search(r"members: \[([^]]*)\]", shown[package])
    members = listed[1].split(", ") if listed else names
    folder = ROOT / Path(*package.split("."))
    for name in names:
        if (folder / f"{name}.py").exists():
            assert f"{package}.{name}.{name}" in shown
        else:
            assert name in members


# Contributing


def test_the_ladder_names_files_that_there_are() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ladder = text.split("## From an idea to a kernel\n")[1].split("\n## ")[0]
    rungs = re.findall(r"^(\d+)\. \*\*(.+?)\.\*\*", ladder, re.MULTILINE)
    assert [name for _, name in rungs] == [
        "Reference", "Operator", "CPU kernel", "CUDA kernel in the simulator", "CUDA", "Group",
        "Benchmark",
    ]  # fmt: skip
    assert [int(number) for number, _ in rungs] == list(range(1, 8))
    folders = ("accelrt/", "benchmarks/", "bindings/", "csrc/", "docs/", "tests/")
    named = [path for path in re.findall(r"`([^`\s]+)`", text) if path.startswith(folders)]
    assert len(named) >= 15
    for path in named:
        pattern = path.rstrip("/").replace("<op>", "attention")
        assert list(ROOT.glob(pattern)), path


# Blocks that are no Python


def blocks() -> list[tuple[Path, re.Match[str]]]:
    return [
        (page, fence)
        for page in PAGES
        for fence in docs_pages.FENCE.finditer(page.read_text(encoding="utf-8"))
    ]


def test_every_block_is_of_a_kind_that_is_tried() -> None:
    """Python runs, text is what it prints; cmake builds in test_embed_cpp.py."""
    assert {fence["kind"] for _, fence in blocks()} <= {"", "sh", "python", "text", "yaml", "cmake"}
    for page, fence in blocks():
        if fence["kind"] == "python":
            assert page in docs_pages.pages(), f"nothing runs the blocks of {page}"
        if fence["kind"] == "cmake":
            assert page == ROOT / "examples" / "embed_cpp" / "README.md"


def test_settings_on_the_pages_are_settings() -> None:
    texts = [fence["code"] for _, fence in blocks() if fence["kind"] == "yaml"]
    assert texts
    for text in texts:
        assert Config.from_dict(parse_yaml(text)) != Config()


def shell_lines() -> list[tuple[str, str]]:
    found = []
    for page, fence in blocks():
        if fence["kind"] in ("", "sh"):
            text = re.sub(r"^case .*?^esac$", "", fence["code"], flags=re.MULTILINE | re.DOTALL)
            lines = (re.split(r" +#|^#| \| ", line)[0].strip() for line in text.splitlines())
            found += [(page.relative_to(ROOT).as_posix(), line) for line in lines if line]
    return found


@pytest.mark.parametrize(("page", "line"), shell_lines())
def test_commands_on_the_pages_are_there(page: str, line: str) -> None:
    """Those of accelrt are parsed in test_cli_contract.py."""
    program, *words = shlex.split(line)
    if program == "make":
        targets = re.search(r"^\.PHONY:((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M)
        assert targets is not None
        assert words[0] in targets[1].split()
    elif program == "python":
        script = (ROOT / words[0]).read_text(encoding="utf-8")
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in script, option
    elif program == "pip":
        extra = re.fullmatch(r"install (?:\.|accelrt\[(\w+)\])", " ".join(words))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert extra is not None
        assert extra[1] is None or extra[1] in project["optional-dependencies"]
    elif page == "examples/embed_cpp/README.md":
        assert program in ("cmake", "build/embed/embed_cpp")  # test_embed_cpp.py
    else:
        assert program in ("accelrt", "nsys", "accelerate")


@pytest.mark.parametrize(("code", "said"), [(0, "use it"), (1, "below 40 dB"), (3, "no answer")])
def test_the_script_that_asks(code: int, said: str) -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```sh\n(accelrt [^`]*?^case.*?)```", text, re.MULTILINE | re.DOTALL)
    stand_in = f"accelrt() {{ return {code}; }}\n"
    done = subprocess.run(["bash", "-c", stand_in + script], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (said, "")


def test_the_line_that_reads_a_plan() -> None:
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"--json \| python -c '([^']+)'", text)
    plan = accelrt.plan(zoo.tiny_dit(), memory_budget="min")
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(plan.to_dict()), capture_output=True,
        text=True,
    )  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == (str(plan.peak_bytes), "")
