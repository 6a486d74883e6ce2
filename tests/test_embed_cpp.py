"""The core as a C++ library: installed, found by another project, and as exact as from Python."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "embed_cpp"
PAGE = (EXAMPLE / "README.md").read_text(encoding="utf-8")


def run(*command: str | Path) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def commands() -> list[list[str]]:
    """Of the example's page, in the order in which it gives them."""
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines() if line and line[0] != "#"]


def run_page(number: int, places: dict[str, Path], *more: str) -> None:
    """Run a command of the page, with other folders in place of its own."""
    words = commands()[number]
    for name, path in places.items():
        assert any(word == name or word.endswith(f"=$PWD/{name}") for word in words), (name, words)
        there = str(path)
        words = [there if w == name else w.replace(f"$PWD/{name}", there) for w in words]
    run(*words, *more)


def core_build() -> Path:
    """A configured build: the extension's, whose objects are there, or one of the core alone."""
    named = os.environ.get("ACCELRT_BUILD_DIR")
    candidates = [Path(named)] if named else sorted((ROOT / "build").glob("*"))
    for build in candidates:
        if (build / "libaccelrt_core.a").exists() and (build / "build.ninja").exists():
            return build
    build = ROOT / "build" / "core"
    run_page(0, {"build/core": build, ".": ROOT}, "-G", "Ninja")
    return build


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``cmake --install`` has put headers, library and package."""
    prefix = tmp_path_factory.mktemp("prefix")
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build" / ".core-lock"):
        build = core_build()
        run("cmake", "--build", build, "--target", "accelrt_core", "-j", "2")
        run_page(2, {"build/core": build, "build/prefix": prefix})
    return prefix


@pytest.fixture(scope="module")
def program(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, built from a copy of its folder alone, so that nothing of the tree is found."""
    folder = tmp_path_factory.mktemp("embed")
    source = folder / "source"
    source.mkdir()
    for name in ("CMakeLists.txt", "main.cpp", "safetensors.h", "safetensors.cpp"):
        (source / name).write_bytes((EXAMPLE / name).read_bytes())
    build = folder / "build"
    places = {"examples/embed_cpp": source, "build/embed": build, "build/prefix": prefix}
    run_page(3, places, "-G", "Ninja")
    run_page(4, {"build/embed": build}, "-j", "2")
    return build / "embed_cpp"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    sys.path.insert(0, str(EXAMPLE))
    try:
        import make_inputs
    finally:
        sys.path.remove(str(EXAMPLE))
    paths = {}
    for dtype in ("float32", "bfloat16"):
        model = make_inputs.load(make_inputs.MODEL, getattr(torch, dtype))
        made = make_inputs.inputs(model, samples=3)
        paths[dtype] = folder / f"{dtype}.safetensors"
        save_file(made["tensors"], paths[dtype], metadata=made["metadata"])
    return paths


def call(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_headers_are_complete_and_only_those(prefix: Path) -> None:
    names = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file()}
    wanted = {
        f"include/accelrt/{path.relative_to(ROOT / 'csrc')}"
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".h", ".cuh") or path.parent.name == "nvrtc"
    }
    wanted = {name.replace("accelrt/include/", "accelrt/") for name in wanted}
    assert {name for name in names if name.startswith("include/")} == wanted
    others = {Path(name).name for name in names - wanted}
    package = {"accelrt-config.cmake", "accelrt-config-version.cmake", "accelrt-targets.cmake"}
    assert package | {"libaccelrt_core.a"} <= others
    for path in prefix.rglob("*.h"):
        assert not re.search(r"#include [<\"](torch|ATen|c10|Python)", path.read_text()), path.name
    for path in prefix.rglob("*.cmake"):
        assert str(ROOT) not in path.read_text(), f"{path.name} names the source tree"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_are_exact(program: Path, inputs: dict[str, Path], dtype: str) -> None:
    for threads in ("1", "2"):
        done = call(program, inputs[dtype], threads)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{dtype}, " in done.stdout
        assert done.stdout.rstrip().endswith(": exact")


def test_the_page_shows_a_project_of_ones_own(prefix: Path, tmp_path: Path) -> None:
    """Its lines of CMake, and every header of its table."""
    (lines,) = re.findall(r"```cmake\n(.*?)```", PAGE, re.DOTALL)
    table = PAGE.split("| header | what it has |")[1].split("\n\n")[0]
    headers = re.findall(r"`([a-z_/]+\.h)`", table)
    assert {"blocks/transformer_block.h", "runtime/arena.h", "accelrt/check.h"} <= set(headers)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(server LANGUAGES CXX)\n"
        f"add_executable(server server.cpp)\n{lines}"
    )
    includes = "".join(f'#include "{header}"\n' for header in headers)
    (tmp_path / "server.cpp").write_text(
        f"{includes}int main() {{\n  accelrt::KernelProducts products;\n"
        "  const auto plan = accelrt::plan_offsets({{64, 0, 1}, {32, 1, 2}}, 64);\n"
        "  return plan.slab_bytes == 128 ? 0 : 1;\n}\n"
    )
    build = tmp_path / "build"
    run("cmake", "-S", tmp_path, "-B", build, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", build)
    run(build / "server")


def test_another_output_is_noticed(program: Path, inputs: dict[str, Path], tmp_path: Path) -> None:
    with safe_open(inputs["float32"], "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    tensors["blocks.5.attn1.to_v.bias"][7] += 1e-2
    save_file(tensors, tmp_path / "other.safetensors", metadata=metadata)
    done = call(program, tmp_path / "other.safetensors")
    assert done.returncode == 1
    assert "NOT exact" in done.stdout


def test_bad_files_and_arguments_are_named(
    program: Path, inputs: dict[str, Path], tmp_path: Path
) -> None:
    whole = inputs["float32"].read_bytes()
    header = int.from_bytes(whole[:8], "little")
    cases = {
        "empty": (b"", "no safetensors file"),
        "short": (whole[:-100], "the bytes of"),
        "cut header": (whole[: header // 2], "is no safetensors file, or is cut off"),
        "no JSON": (whole[:8] + b"x" * header + whole[8 + header :], "expected '{'"),
        "shape": (whole.replace(b'"shape":[96]', b'"shape":[95]', 1), "the bytes of"),
        "dtype": (whole.replace(b'"F32"', b'"I32"', 1), "allowed: F32, BF16, F16"),
        "name": (whole.replace(b'"input"', b'"unput"', 1), "holds no tensor input"),
        "heads": (whole.replace(b'"heads":"3"', b'"heads":"5"', 1), "the 5 heads"),
    }
    for name, (content, message) in cases.items():
        assert content != whole, name
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        done = call(program, path)
        assert done.returncode == 2, name
        assert message in done.stderr, (name, done.stderr)
    assert "cannot be read" in call(program, tmp_path / "none").stderr
    assert "THREADS is '0'; allowed" in call(program, inputs["float32"], "0").stderr
    assert "usage" in call(program).stderr
