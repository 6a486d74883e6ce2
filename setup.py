"""Thin: finds torch's folder, lets CMake build the extension, adds the kernels' sources."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
# What a GPU machine without nvcc compiles at first use; below csrc/ (accelrt/ops/_compile.py).
DEVICE_SOURCES = ("include/accelrt/*.h", "kernels/*/*.h", "kernels/*/*.cuh", "nvrtc/*")


def torch_dir() -> Path | None:
    """torch's package folder: importable, or (in an isolated build) of the target environment.

    Only headers and libraries are needed, so an isolated build does not install torch again.
    """
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    for key in ("platlib", "purelib"):
        candidate = Path(sysconfig.get_path(key)) / "torch"
        if (candidate / "version.py").exists():
            return candidate
    return None


def cmake_program() -> str:
    """CMake of the Python package if it is there (the system's may not know a new nvcc)."""
    if importlib.util.find_spec("cmake") is None:
        return "cmake"
    from cmake import CMAKE_BIN_DIR

    return str(Path(CMAKE_BIN_DIR) / "cmake")


class BuildPy(build_py):
    """Python files, and the sources of the CUDA kernels as ``accelrt/_csrc``."""

    def run(self) -> None:
        """Copy them; an editable install finds ``csrc`` beside the package."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "accelrt" / "_csrc"
        shutil.rmtree(target, ignore_errors=True)  # of an older build
        for pattern in DEVICE_SOURCES:
            for path in sorted((ROOT / "csrc").glob(pattern)):
                copy = target / path.relative_to(ROOT / "csrc")
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


class CMakeBuild(build_ext):
    """Configure and build the `_C` target, into the place where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        """Build the one extension there is."""
        import pybind11

        torch = torch_dir()
        if torch is None:
            raise RuntimeError(
                "torch is not installed in this environment. Install it first "
                "(accelrt needs torch >= 2.11), then `pip install .` again."
            )
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(os.environ.get("ACCELRT_BUILD_DIR", Path(self.build_temp).resolve()))
        build.mkdir(parents=True, exist_ok=True)
        cmake = cmake_program()
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DACCELRT_PYTHON=ON",
            f"-DACCELRT_TORCH_DIR={torch}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
        ]  # fmt: skip
        passed_on = ("ACCELRT_CUDA", "ACCELRT_CUDA_ARCHS", "ACCELRT_RUNTIME_CUDA")
        configure += [f"-D{name}={os.environ[name]}" for name in passed_on if os.environ.get(name)]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "--target", "_C", "-j", jobs], check=True)


setup(
    ext_modules=[Extension("accelrt._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
    setup_requires=[] if torch_dir() is not None else ["torch>=2.11"],
)
