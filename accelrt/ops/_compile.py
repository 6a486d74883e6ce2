"""CUDA kernels compiled at run time: their sources, NVRTC, and a cache on disk.

Nothing here needs a GPU. ``nvrtc`` is ``cupy.cuda.nvrtc``, or what has its functions.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelrt.files import write_bytes

# Everything that a kernel may include, below the folder of the sources.
PATTERNS = ("include/accelrt/*.h", "kernels/*/*.h", "kernels/*/*.cuh", "nvrtc/*")
INCLUDES = (".", "include", "nvrtc")
OPTIONS = ("-std=c++20", "-default-device")


@dataclass(frozen=True)
class Compiled:
    """Machine code or PTX of one kernel.

    Args:
        function: the kernel's name in it.
        image: what ``cuModuleLoadData`` takes.
    """

    function: str
    image: bytes


def source_folder() -> Path:
    """Where the kernels' sources are: in the package, or beside it in a source tree.

    Raises:
        RuntimeError: in neither.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_csrc", package.parent / "csrc"):
        if (folder / "kernels").is_dir():
            return folder
    raise RuntimeError(
        f"the sources of the CUDA kernels are neither in {package / '_csrc'} nor in "
        f"{package.parent / 'csrc'}: install accelrt again"
    )


def source_files(folder: Path) -> list[Path]:
    """The files that a kernel may include, in a fixed order."""
    return sorted(path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file())


def sources_digest(folder: Path) -> str:
    """A hash of all of them: a change of any may change every kernel."""
    digest = hashlib.sha256()
    for path in source_files(folder):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def target_for(nvrtc: Any, capability: tuple[int, int]) -> str:
    """``sm_90`` (machine code) or, of a GPU newer than the compiler, ``compute_90`` (PTX).

    Args:
        nvrtc: the compiler.
        capability: compute capability of the GPU, ``(major, minor)``.

    Raises:
        RuntimeError: the GPU is older than all that the compiler knows.
    """
    wanted = 10 * capability[0] + capability[1]
    known = [arch for arch in nvrtc.getSupportedArchs() if arch <= wanted]
    if not known:
        raise RuntimeError(
            f"NVRTC {version_of(nvrtc)} compiles for compute capability "
            f"{min(nvrtc.getSupportedArchs()) / 10} and later; this GPU has {wanted / 10}"
        )
    return f"sm_{wanted}" if wanted in known else f"compute_{max(known)}"


def version_of(nvrtc: Any) -> str:
    """E.g. ``"13.0"``."""
    return ".".join(map(str, nvrtc.getVersion()))


def compile_kernels(
    nvrtc: Any, root: Path, folder: str, kernels: Sequence[str], target: str
) -> tuple[bytes, dict[str, str]]:
    """Compile kernels of one folder.

    Args:
        nvrtc: the compiler.
        root: the folder of all sources.
        folder: within it, of the headers that define the kernels, e.g. ``"kernels/geglu"``.
        kernels: as expressions of namespace ``accelrt``.
        target: ``sm_*`` for machine code, ``compute_*`` for PTX.

    Returns:
        the image, and the name in it of each kernel.

    Raises:
        RuntimeError: they do not compile; with the compiler's messages.
    """
    headers = sorted(path.relative_to(root).as_posix() for path in (root / folder).glob("*.cuh"))
    text = "".join(f'#include "{header}"\n' for header in headers) + "using namespace accelrt;\n"
    program = nvrtc.createProgram(text, f"{Path(folder).name}.cu", (), ())
    try:
        for kernel in kernels:
            nvrtc.addNameExpression(program, kernel)
        includes = [f"-I{root / name}" for name in INCLUDES]
        try:
            nvrtc.compileProgram(program, (*OPTIONS, *includes, f"--gpu-architecture={target}"))
        except Exception as error:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(
                f"NVRTC {version_of(nvrtc)} does not compile {folder} for {target} "
                f"({error}):\n{log}"
            ) from error
        machine_code = target.startswith("sm_")
        image = nvrtc.getCUBIN(program) if machine_code else nvrtc.getPTX(program)
        names = {kernel: nvrtc.getLoweredName(program, kernel) for kernel in kernels}
    finally:
        nvrtc.destroyProgram(program)
    return image if isinstance(image, bytes) else image.encode(), names


def cache_folder() -> Path:
    """``$ACCELRT_CACHE_DIR/kernels``; without it, below the user's cache folder."""
    chosen = os.environ.get("ACCELRT_CACHE_DIR")
    if chosen:
        return Path(chosen) / "kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "accelrt" / "kernels"


class KernelCache:
    """Compiled kernels on disk, by everything that their code depends on.

    A file is written whole or not at all and carries a checksum; one that is damaged is made
    again. Where nothing can be written, kernels are compiled by every process.

    Args:
        folder: where the files are.
        sources: the hash of the sources (:func:`sources_digest`).
        compiler: the version of NVRTC.
    """

    def __init__(self, folder: Path, sources: str, compiler: str) -> None:
        self._folder = folder
        self._common = (sources, compiler, *OPTIONS)
        self._warned = False

    def path(self, folder: str, kernel: str, target: str) -> Path:
        """The file of a kernel."""
        key = "\0".join((*self._common, folder, kernel, target))
        name = f"{Path(folder).name}-{target}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
        return self._folder / name

    def load(self, path: Path) -> Compiled | None:
        """The kernel of a file, or ``None`` if there is no whole one."""
        try:
            checksum, function, image = path.read_bytes().split(b"\n", 2)
        except (OSError, ValueError):
            return None
        if hashlib.sha256(function + image).hexdigest().encode() != checksum:
            return None
        return Compiled(function.decode(), image)

    def store(self, path: Path, compiled: Compiled) -> None:
        """Keep a kernel; warns once if that fails."""
        function = compiled.function.encode()
        checksum = hashlib.sha256(function + compiled.image).hexdigest().encode()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_bytes(path, b"\n".join((checksum, function, compiled.image)))
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"compiled CUDA kernels cannot be kept in {self._folder} ({error}): every "
                    "process compiles them. ACCELRT_CACHE_DIR chooses another folder.",
                    RuntimeWarning,
                    stacklevel=2,
                )
