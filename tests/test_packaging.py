"""What an sdist and a wheel hold, without compiling, and that all say the same version."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

import accelrt
from accelrt.ops._compile import source_files

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def tracked(*patterns: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return set(listed.stdout.split())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Files of the sdist, and of the wheel but for the extension.

    What an earlier build has left beside the sources must not decide, so the egg-info is new.
    """
    folder = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder),
        "sdist", "--dist-dir", str(folder), "build_py", "--build-lib", str(folder / "lib"),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (archive,) = folder.glob("*.tar.gz")
    assert archive.name == f"accelrt-{PROJECT['version']}.tar.gz"
    with tarfile.open(archive) as tar:
        sdist = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    lib = folder / "lib"
    wheel = {str(path.relative_to(lib)) for path in lib.rglob("*") if path.is_file()}
    return sdist, wheel


def test_the_sdist_builds_and_documents(built: tuple[set[str], set[str]]) -> None:
    sdist, _ = built
    wanted = tracked("accelrt", "csrc", "bindings", "cmake", "examples/embed_cpp", "docs/*.md")
    single = {
        "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md",
        "CITATION.cff", "CONTRIBUTING.md",
    }  # fmt: skip
    assert len(wanted) > 200
    assert not (wanted | single) - sdist, sorted((wanted | single) - sdist)
    unwanted = [
        name for name in sdist
        if name.startswith(("tests/", "benchmarks/", "examples/reference_models", "build/"))
        or name.endswith((".so", ".pyc", ".safetensors"))
    ]  # fmt: skip
    assert not unwanted


def test_the_wheel_holds_the_package_whole(built: tuple[set[str], set[str]]) -> None:
    _, wheel = built
    sources = {
        f"accelrt/_csrc/{path.relative_to(ROOT / 'csrc').as_posix()}"
        for path in source_files(ROOT / "csrc")
    }
    assert {"accelrt/_csrc/kernels/geglu/geglu.cuh", "accelrt/_csrc/nvrtc/cstdint"} <= sources
    assert wheel == tracked("accelrt") | sources
    assert {"accelrt/py.typed", "accelrt/_C.pyi"} <= wheel
    assert any(name.endswith(".html.j2") for name in wheel)


def test_one_version_everywhere() -> None:
    version = PROJECT["version"]
    assert accelrt.__version__ == version
    cmake = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    assert re.search(r"project\(accelrt VERSION (\S+)", cmake)[1] == version  # type: ignore[index]
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", log, re.MULTILINE)[1] == version  # type: ignore[index]
    assert citation()["version"] == version


def citation() -> dict[str, object]:
    values = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def test_licence_and_citation() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    values = citation()
    assert values["license"] == PROJECT["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(values)
    papers = yaml.safe_dump(values["references"])
    assert "arXiv:2411.01171" in papers
    assert "arXiv:2501.13107" in papers
