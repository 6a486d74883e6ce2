"""What ptxas made of every kernel: registers, spills, stack, shared memory; kept and compared.

``python benchmarks/ptxas.py`` compares the last build with CUDA kernels to the committed table;
``--save`` writes the table anew (`make ptxas` builds and does it). The build keeps what ptxas says
beside its objects (cmake/keep_ptxas_report.py).

A kernel is one instance of a template. Registers come in units of eight to a thread, so growth
within a unit costs nothing and is no finding; they are compared only with the compiler that the
table was made with. Spills are findings with any compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "ptxas.json"
PAGE = ROOT / "docs" / "kernels-ptxas.md"
REGENERATE = "make ptxas"
REGISTER_UNIT = 8  # what the hardware gives a thread, on all architectures of the build

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture.

    Args:
        registers: of a thread.
        spilled: bytes that a thread stores and loads because registers ran out.
        stack: bytes of a thread in local memory, those of called functions included.
        shared: bytes of a block that the compiler knows of.
    """

    registers: int
    spilled: int = 0
    stack: int = 0
    shared: int = 0


@dataclass
class Kernel:
    """One instance.

    Args:
        op: the folder that it lies in.
        usage: by architecture, e.g. ``"90a"``.
        dynamic: most bytes of shared memory that a launch asks for; ``None``: no constant.
    """

    op: str
    usage: dict[str, Usage] = field(default_factory=dict)
    dynamic: int | None = None


@dataclass
class Build:
    """All kernels of a build, or of the table.

    Args:
        nvcc: version of the compiler, or empty if the build does not tell.
        kernels: by readable name.
    """

    nvcc: str
    kernels: dict[str, Kernel] = field(default_factory=dict)

    @property
    def architectures(self) -> list[str]:
        """Those of any kernel, in the order of their numbers."""
        found = {arch for kernel in self.kernels.values() for arch in kernel.usage}
        return sorted(found, key=lambda arch: (int(re.sub(r"\D", "", arch)), arch))


def build_folder() -> Path | None:
    """``ACCELRT_BUILD_DIR``, or the folder of ``build/`` with the newest report."""
    chosen = os.environ.get("ACCELRT_BUILD_DIR")
    if chosen:
        return Path(chosen)
    newest = max((ROOT / "build").glob("**/*.ptxas.txt"), key=_changed, default=None)
    return None if newest is None else ROOT / "build" / newest.relative_to(ROOT / "build").parts[0]


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def reports(folder: Path | None) -> dict[str, Path]:
    """The report of each ``csrc/**/*.cu``; those of sources that are gone are left out."""
    found = {}
    for path in sorted(folder.rglob("*.ptxas.txt")) if folder is not None else ():
        source = str(path).rpartition(".dir/")[2].removesuffix(".o.ptxas.txt")
        if (ROOT / source).is_file():
            found[source] = path
    return found


def nvcc_of(folder: Path) -> str:
    """The compiler's version as CMake found it."""
    for path in sorted(folder.glob("CMakeFiles/*/CMakeCUDACompiler.cmake"), key=_changed):
        match = re.search(r'\(CMAKE_CUDA_COMPILER_VERSION "([^"]+)"\)', path.read_text())
        if match:
            return match[1]
    return ""


def read_build(folder: Path | None = None) -> Build:
    """The kernels of a build folder, by default :func:`build_folder`.

    Raises:
        FileNotFoundError: it holds no report.
    """
    folder = folder or build_folder()
    found = reports(folder)
    if folder is None or not found:
        raise FileNotFoundError(f"no .ptxas.txt in {folder or 'build/'}: build with nvcc first")
    build = Build(nvcc_of(folder))
    for source, path in found.items():
        for name, arch, usage in parse(path.read_text()):
            kernel = build.kernels.setdefault(name, Kernel(Path(source).parent.name))
            if arch in kernel.usage:
                raise ValueError(f"{path}: {name} is there twice for sm_{arch}")
            kernel.usage[arch] = usage
    return build


def parse(report: str) -> Iterable[tuple[str, str, Usage]]:
    """Readable name, architecture and usage of every kernel that ptxas tells of."""
    parts = _ENTRY.split(report)[1:]
    for mangled, arch, text in zip(*[iter(parts)] * 3, strict=True):
        memory = [[int(n) for n in found] for found in _MEMORY.findall(text)]
        # The first is the kernel; behind it come functions that were not inlined.
        frame = memory[0][0] if memory else 0
        yield (
            readable(mangled),
            arch,
            Usage(
                registers=_number(text, r"Used (\d+) registers"),
                spilled=sum(stores + loads for _, stores, loads in memory),
                stack=max(frame, _number(text, r"(\d+) bytes cumulative stack size")),
                shared=_number(text, r"(\d+) bytes smem"),
            ),
        )


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def demangle(name: str) -> str:
    """The C++ name of a symbol, by the C++ library that torch has loaded too."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    found = library.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if status.value:
        return name
    text = ctypes.string_at(found).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(found))
    return text


def readable(mangled: str) -> str:
    """A kernel's name with its template arguments, without namespaces and parameters."""
    name = demangle(mangled).removeprefix("void ").replace("accelrt::", "")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and not depth and not name.startswith("(anonymous namespace)", i):
            name = name[:i]
            break
    return name.replace("(anonymous namespace)::", "").replace(" >", ">")


def compare(table: Build, build: Build) -> list[str]:
    """What a build has that the table does not allow, as sentences.

    Only architectures of both are compared; spills count on every one. With another compiler than
    the table's, registers, stack and shared memory are not compared.
    """
    common = [arch for arch in build.architectures if arch in table.architectures]
    same = bool(build.nvcc) and build.nvcc == table.nvcc
    found = []
    for name, kernel in build.kernels.items():
        known = table.kernels[name].usage if name in table.kernels else {}
        for arch, usage in kernel.usage.items():
            before = known.get(arch, Usage(0))
            if usage.spilled > before.spilled:
                found.append(f"{name}, sm_{arch}: spills {usage.spilled} bytes, {before.spilled} "
                             "in the table")  # fmt: skip
            if arch in known and same:
                found += [f"{name}, sm_{arch}: {text}" for text in _growth(before, usage)]
        missing = [arch for arch in common if arch in kernel.usage and arch not in known]
        if missing or (not common and not known):
            found.append(f"{name} is not in the table{_of(missing)}")
    for name, kernel in table.kernels.items():
        now = build.kernels[name].usage if name in build.kernels else {}
        gone = [arch for arch in common if arch in kernel.usage and arch not in now]
        if gone or (not common and not now):
            found.append(f"{name} is in the table but not in the build{_of(gone)}")
    return found


def _growth(before: Usage, now: Usage) -> Iterable[str]:
    if _units(now.registers) > _units(before.registers):
        yield (
            f"{now.registers} registers, {before.registers} in the table (tolerated: up to the "
            f"next multiple of {REGISTER_UNIT})"
        )
    for what in ("stack", "shared"):
        if getattr(now, what) > getattr(before, what):
            yield f"{getattr(now, what)} bytes of {what}, {getattr(before, what)} in the table"


def _units(registers: int) -> int:
    return -(-registers // REGISTER_UNIT)


def _of(architectures: list[str]) -> str:
    return " of " + ", ".join(f"sm_{arch}" for arch in architectures) if architectures else ""


def dynamic_shared(build: Build) -> None:
    """Fill in what launches ask for: 0, or the constant of the kernel's Traits.

    A launcher sets ``shared_bytes`` to ``Traits::kSharedBytes`` (or ``kSharedFloats``) where it is
    a constant. The constants are asked of the headers themselves, compiled for the host.
    """
    for op in sorted({kernel.op for kernel in build.kernels.values()}):
        folder = ROOT / "csrc" / "kernels" / op
        mine = {name: kernel for name, kernel in build.kernels.items() if kernel.op == op}
        without = _without_shared(folder)
        for name, kernel in mine.items():
            kernel.dynamic = 0 if name.partition("<")[0] in without else None
        asked = {name: traits_of(name) for name in mine if mine[name].dynamic is None}
        asked = {name: traits for name, traits in asked.items() if traits}
        for name, value in zip(asked, _constants(folder, asked.values()), strict=True):
            mine[name].dynamic = value


def _without_shared(folder: Path) -> set[str]:
    """Kernels whose code does not name ``shared_memory()``, if no other function does either."""
    text = "".join(path.read_text() for path in sorted(folder.glob("*.cu*")))
    bodies = {}
    for match in re.finditer(r"__global__[^{;]*?(\w+)\s*\([^(){;]*\)\s*\{", text):
        depth, at = 1, match.end()
        while depth and at < len(text):
            depth += (text[at] == "{") - (text[at] == "}")
            at += 1
        bodies[match[1]] = text[match.end() : at]
    uses = {name: body.count("shared_memory()") for name, body in bodies.items()}
    if sum(uses.values()) < text.count("shared_memory()"):
        return set()
    return {name for name, count in uses.items() if not count}


def traits_of(name: str) -> str:
    """The first template argument of a readable name if it is a Traits struct; else empty."""
    _, _, inner = name.removesuffix(">").partition("<")
    return inner if re.match(r"\w*Traits<.*>$", inner) else ""


def _constants(folder: Path, traits: Collection[str]) -> list[int | None]:
    if not traits:
        return []
    headers = "".join(f'#include "{path}"\n' for path in sorted(folder.glob("*.cuh")))
    source = f"""{headers}
using namespace accelrt;
template <typename T> long long shared() {{
  if constexpr (requires {{ T::kSharedBytes; }}) return T::kSharedBytes;
  else if constexpr (requires {{ T::kSharedFloats; }}) return T::kSharedFloats * 4ll;
  else return -1;
}}
int main() {{ {"".join(f'std::printf("%lld ", shared<{name}>());' for name in traits)} }}
"""
    include = [ROOT / "csrc", ROOT / "csrc" / "include", ROOT / "tests" / "cpp"]
    with tempfile.TemporaryDirectory() as place:
        code, program = Path(place) / "shared.cpp", Path(place) / "shared"
        code.write_text(source)
        command = [os.environ.get("CXX", "g++"), "-std=c++20", "-O0", "-DACCELRT_HOST_SIM"]
        command += [*(f"-I{path}" for path in include), str(code), "-o", str(program), "-pthread"]
        subprocess.run(command, check=True)
        text = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return [None if int(number) < 0 else int(number) for number in text.split()]


def to_json(build: Build) -> str:
    """The table; a line per kernel, so that a change reads well as a difference.

    Usage is ``[registers, spilled bytes, stack, static shared memory]`` by architecture.
    """
    rows = []
    for name, kernel in sorted(build.kernels.items(), key=lambda item: (item[1].op, item[0])):
        usage = {
            arch: [one.registers, one.spilled, one.stack, one.shared]
            for arch in build.architectures
            if (one := kernel.usage.get(arch)) is not None
        }
        row = {"op": kernel.op, "kernel": name, "dynamic_shared": kernel.dynamic, "usage": usage}
        rows.append(json.dumps(row))
    head = {"nvcc": build.nvcc, "architectures": build.architectures}
    lines = ",\n".join(rows)
    return f'{json.dumps(head)[:-1]}, "kernels": [\n{lines}\n]}}\n'


def from_json(text: str) -> Build:
    """The inverse of :func:`to_json`."""
    values: dict[str, Any] = json.loads(text)
    build = Build(values["nvcc"])
    for row in values["kernels"]:
        usage = {arch: Usage(*numbers) for arch, numbers in row["usage"].items()}
        build.kernels[row["kernel"]] = Kernel(row["op"], usage, row["dynamic_shared"])
    return build


def markdown(build: Build) -> str:
    """The page of the documentation."""
    architectures = build.architectures
    spilling = sum(any(u.spilled for u in k.usage.values()) for k in build.kernels.values())
    most = max(u.registers for k in build.kernels.values() for u in k.usage.values())
    lines = [
        "# Kernels as compiled",
        "",
        f"What ptxas of nvcc {build.nvcc} says of the {len(build.kernels)} kernels: "
        f"{spilling or 'none'} of them spill{'s' if spilling == 1 else ''}, the most registers of "
        f"a thread are {most}. It is compiler output; nothing was measured on a GPU. "
        f"`{REGENERATE}` writes this page, and the tests compare it with the build: an instance "
        "that is new or gone, a spill, and, with the same compiler, registers beyond the next "
        f"multiple of {REGISTER_UNIT}, stack or shared memory beyond the table are failures.",
        "",
        "Registers of a thread by architecture; `+n st` are bytes of stack, `+n sp` spilled ones. "
        "Shared memory of a block in bytes: static, and what a launch adds at most (`sizes`: no "
        "constant of the kernel).",
    ]
    head = ("kernel", "static", "launch", *(f"sm_{arch}" for arch in architectures))
    by_op: dict[str, list[str]] = {}
    for name, kernel in build.kernels.items():
        by_op.setdefault(kernel.op, []).append(name)
    for op, names in sorted(by_op.items()):
        lines += ["", f"## {op}", "", "| " + " | ".join(head) + " |"]
        lines.append("|---|" + "---:|" * (len(head) - 1))
        for name in sorted(names):
            kernel = build.kernels[name]
            shared = " to ".join(map(str, sorted({u.shared for u in kernel.usage.values()})))
            launch = "sizes" if kernel.dynamic is None else str(kernel.dynamic)
            cells = [_cell(kernel.usage, arch) for arch in architectures]
            lines.append("| " + " | ".join((f"`{name}`", shared, launch, *cells)) + " |")
    return "\n".join(lines) + "\n"


def _cell(usage: Mapping[str, Usage], arch: str) -> str:
    one = usage.get(arch)
    if one is None:
        return "-"
    more = ((one.stack, "st"), (one.spilled, "sp"))
    return str(one.registers) + "".join(f" +{n} {what}" for n, what in more if n)


def main() -> None:
    """Compare, or save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="write the table and its page")
    parser.add_argument(
        "--build", type=Path, metavar="FOLDER", help="default: the newest of build/"
    )
    options = parser.parse_args()
    build = read_build(options.build)
    if options.save:
        known = from_json(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else Build("")
        lost = [arch for arch in known.architectures if arch not in build.architectures]
        if lost:
            sys.exit(f"the build has no code for sm {', '.join(lost)}, which the table has; build "
                     "for all architectures (ACCELRT_CUDA_ARCHS unset)")  # fmt: skip
        dynamic_shared(build)
        TABLE.write_text(to_json(build), encoding="utf-8")
        PAGE.write_text(markdown(build), encoding="utf-8")
        print(f"{len(build.kernels)} kernels for sm {', '.join(build.architectures)}: "
              f"{TABLE.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")  # fmt: skip
        return
    found = compare(from_json(TABLE.read_text(encoding="utf-8")), build)
    if found:
        sys.exit("\n".join((*found, f"If that is meant: {REGENERATE}")))


if __name__ == "__main__":
    main()
