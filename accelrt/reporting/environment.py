"""What this build has, what the machine can run, and what follows from both.

Nothing here needs the extension, torch or diffusers to be in order: what is missing is
what there is to report.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from typing import Any

BUILD_HINT = "build it with `pip install .` in the source folder (docs: README.md)"

# Package on the index -> what it is for. Requirements come from accelrt's own metadata.
REQUIRED = {
    "torch": "tensors and the large matrix products",
    "diffusers": "the pipelines that are accelerated",
    "numpy": "pictures as arrays",
    "psutil": "what memory is free",
    "PyYAML": "config files in YAML",
    "rich": "tables and progress bars",
    "typer": "the command line",
}
OPTIONAL = {
    "transformers": "text encoders (AnimateDiff and all text-to-image pipelines)",
    "safetensors": "reading model weights",
    "accelerate": "loading with little memory, offload",
    "tensorboard": "the log of a training",
    "datasets": "training data that it saved",
    "pillow": "GIF and PNG of the demo",
    "matplotlib": "pictures of profiles, plans and schedules",
    "jinja2": "the HTML report",
    "scikit-learn": "training and measuring the reference models",
    "nvidia-ml-py": "driver and state of NVIDIA GPUs",
}
# CuPy and NVRTC that go with torch for CUDA 13 (the extra `cuda`), and with torch for CUDA 12.
CUPY = ("'accelrt[cuda]'", "cupy-cuda12x nvidia-cuda-nvrtc-cu12")


@dataclass(frozen=True)
class Package:
    """One package that accelrt uses.

    Args:
        name: on the package index.
        purpose: what it is for.
        required: accelrt does not work without it.
        version: installed version, or ``None``.
        requirement: what accelrt asks for, e.g. ``">=2.11"``; may be empty.
        fix: command that installs a fitting version; empty if there is one.
    """

    name: str
    purpose: str
    required: bool
    version: str | None
    requirement: str
    fix: str


@dataclass(frozen=True)
class Environment:
    """The findings of :func:`inspect_environment`.

    Args:
        usable: accelrt can accelerate pipelines here.
        build: of the extension: ``loaded``, ``error`` and the entries of its build info.
        machine: processor, memory, GPUs, torch and its devices.
        packages: installed or missing.
        statements: what follows, in plain sentences.
    """

    usable: bool
    build: dict[str, Any]
    machine: dict[str, Any]
    packages: tuple[Package, ...]
    statements: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def inspect_environment() -> Environment:
    """Look at the build, the machine and the packages; never raises for what is missing."""
    return conclude(inspect_build(), inspect_machine(), inspect_packages())


def conclude(
    build: dict[str, Any], machine: dict[str, Any], packages: tuple[Package, ...]
) -> Environment:
    """What follows from the findings; the last statement is the verdict."""
    found = _Findings()
    _conclude_build(build, found)
    if build["loaded"]:
        _conclude_devices(build, machine, found)
    for package in packages:
        if package.fix:
            state = f"{package.version} does not fit" if package.version else "is missing"
            line = f"{package.name} {state} ({package.purpose}): `{package.fix}`"
            (found.problems if package.required else found.remarks).append(line)
    usable = not found.problems
    verdict = "accelrt is usable here." if usable else "accelrt is not usable here."
    statements = (*found.problems, *found.remarks, verdict)
    return Environment(usable, build, machine, packages, statements)


def inspect_build() -> dict[str, Any]:
    """The extension: whether it loads, why not, and what it was built with."""
    info: dict[str, Any] = {
        "accelrt": installed_version("accelrt"),
        "loaded": False,
        "error": None,
    }
    try:
        importlib.import_module("torch")  # brings the libraries that the extension needs
        extension = importlib.import_module("accelrt._C")
        info.update(extension.build_info())
        info["best_isa"] = extension.best_isa()
    except Exception as error:
        info["error"] = f"{type(error).__name__}: {error}"
        return info
    info["loaded"] = True
    try:
        info["active_isa"] = extension.active_isa()
    except RuntimeError as error:
        info["active_isa"] = None
        info["error"] = str(error)
    return info


def inspect_machine() -> dict[str, Any]:
    """Processor, memory, GPUs of the driver, and torch with its devices."""
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }
    machine.update(_memory())
    machine["nvidia"] = _nvidia()
    machine["cupy"] = _cupy()
    machine["torch"] = _torch()
    return machine


def cuda_path(build: dict[str, Any], machine: dict[str, Any]) -> str:
    """Where the CUDA kernels of a build that loads come from, in a few words."""
    if build["cuda_kernels"] == "nvcc":
        return f"compiled by nvcc {build['cuda_compiler']} for sm {build['cuda_architectures']}"
    if build["cuda_kernels"] == "none":
        return "none: built with ACCELRT_RUNTIME_CUDA=0 and without nvcc"
    if machine["cupy"] is not None:
        return f"compiled at first use by NVRTC through CuPy {machine['cupy']}"
    return "none: this build compiles them at first use, through CuPy, which is missing"


def inspect_packages() -> tuple[Package, ...]:
    """Every package that accelrt uses, required ones first."""
    wanted = _requirements()
    found: list[Package] = []
    for table, required in ((REQUIRED, True), (OPTIONAL, False)):
        for name, purpose in table.items():
            requirement = wanted.get(_normal(name), "")
            version = installed_version(name)
            fits = version is not None and satisfies(version, requirement)
            fix = "" if fits else f"pip install '{name}{requirement}'"
            found.append(Package(name, purpose, required, version, requirement, fix))
    return tuple(found)


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, or ``None``."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def satisfies(version: str, requirement: str) -> bool:
    """Whether a version fits a requirement such as ``">=0.42,<0.43"``, by release numbers."""
    for clause in filter(None, requirement.split(",")):
        match = re.fullmatch(r"\s*(>=|<=|==|<|>)\s*([0-9.]+)\s*", clause)
        if match is None:
            continue
        have, want = _release(version), _release(match[2])
        width = max(len(have), len(want))
        a, b = (t + (0,) * (width - len(t)) for t in (have, want))
        if not {">=": a >= b, "<=": a <= b, "==": a == b, "<": a < b, ">": a > b}[match[1]]:
            return False
    return True


def code_for(capability: tuple[int, int], architectures: str) -> str | None:
    """How a build runs on a GPU.

    Args:
        capability: compute capability of the device, ``(major, minor)``.
        architectures: of the build, e.g. ``"80,90a,120"``; PTX is kept of the last, or
            where there are several from 100 on of the first of them.

    Returns:
        ``"binary"``, ``"ptx"`` (compiled by the driver at first use), or ``None``.
    """
    major, minor = capability
    ptx: tuple[int, int] | None = None
    generation: str | int | None = None
    for name in re.split(r"[,; ]+", architectures):
        match = re.fullmatch(r"(\d+)(\d)([a-z]?)", name)
        if match is None:
            continue
        known = (int(match[1]), int(match[2]))
        # Code of an 'a' architecture runs on exactly that one; other code also on later
        # minor versions of the same major one.
        if known == capability or (not match[3] and known[0] == major and known[1] <= minor):
            return "binary"
        # As CMakeLists.txt has it: the PTX of a generation is that of its first.
        of: str | int = name if match[3] else min(known[0], 10)
        if of != generation:
            generation = of
            ptx = None if match[3] else known
    return "ptx" if ptx is not None and ptx <= capability else None


def _conclude_build(build: dict[str, Any], found: _Findings) -> None:
    if not build["loaded"]:
        found.problems.append(f"The extension does not load ({build['error']}): {BUILD_HINT}.")
        return
    if build["active_isa"] is None:
        found.problems.append(f"{build['error']}. Unset ACCELRT_CPU_ISA or correct it.")
        return
    if build["active_isa"] == "amx":
        found.remarks.append(
            "The bfloat16 kernels of linear and attention use the tile registers of AMX. They were "
            "tested with the instructions emulated or trapped, never on such a processor: compare "
            "with ACCELRT_CPU_ISA=avx512bf16 if in doubt."
        )
    if build["active_isa"] == "amx_emulated":
        found.remarks.append(
            "ACCELRT_CPU_ISA=amx_emulated is for tests: linear and attention in bfloat16 emulate "
            f"tile registers, slowly; this processor runs {build['best_isa']}."
        )
    elif build["active_isa"] != build["best_isa"]:
        found.remarks.append(
            f"ACCELRT_CPU_ISA restricts the CPU kernels to {build['active_isa']}; this "
            f"processor runs {build['best_isa']}."
        )
    elif build["best_isa"] == "generic":
        found.remarks.append(
            "The CPU kernels run without vector instructions chosen by hand "
            "(this processor or build has neither AVX2 nor AVX-512)."
        )
    else:
        found.remarks.append(f"The CPU kernels run with {build['best_isa']}.")


def _conclude_devices(build: dict[str, Any], machine: dict[str, Any], found: _Findings) -> None:
    torch, gpus = machine["torch"], machine["nvidia"]["devices"]
    devices = torch.get("devices", [])
    kind = build["cuda_kernels"]
    found.remarks.append(f"CUDA kernels: {cuda_path(build, machine)}.")
    if kind == "none" and (devices or gpus):
        found.remarks.append(
            "There is a GPU, but this build has no CUDA kernels: rebuild with "
            "`ACCELRT_CUDA=1 pip install .` and nvcc on the PATH, or without "
            "ACCELRT_RUNTIME_CUDA=0."
        )
    elif torch.get("cuda") is None:
        found.remarks.append("torch is CPU only: the CPU kernels run.")
    elif not devices:
        found.remarks.append(
            f"torch has CUDA {torch['cuda']}, but it finds no GPU: the CPU kernels run."
        )
    elif kind == "runtime" and machine["cupy"] is None:
        found.remarks.append(
            "There is a GPU; its kernels need CuPy (or a build with nvcc on the PATH): "
            f"`pip install {CUPY[str(torch['cuda']).startswith('12.')]}`"
        )
    for index, device in enumerate(devices if kind == "nvcc" else ()):
        code = device["code"]
        name = f"GPU {index} ({device['name']}, sm {device['capability']})"
        if code == "binary":
            found.remarks.append(f"{name}: this build has code for it.")
        elif code == "ptx":
            found.remarks.append(f"{name}: runs from PTX, which the driver compiles at first use.")
        else:
            found.remarks.append(
                f"{name}: this build ({build['cuda_architectures']}) has no code for it; rebuild "
                f"with ACCELRT_CUDA_ARCHS={device['capability'].replace('.', '')}."
            )


def _torch() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:
        return {"version": None, "error": f"{type(error).__name__}: {error}", "devices": []}
    info: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "devices": [],
    }
    if not torch.cuda.is_available():
        return info
    architectures = ""
    try:
        architectures = importlib.import_module("accelrt._C").build_info()["cuda_architectures"]
    except Exception as error:
        info["build_error"] = str(error)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        info["devices"].append(
            {
                "name": properties.name,
                "capability": f"{capability[0]}.{capability[1]}",
                "memory_bytes": properties.total_memory,
                "code": code_for(capability, architectures or ""),
            }
        )
    return info


def _nvidia() -> dict[str, Any]:
    """The driver's own view, which does not depend on how torch was built."""
    info: dict[str, Any] = {"driver": None, "cuda": None, "devices": [], "note": ""}
    try:
        import pynvml
    except ImportError:
        info["note"] = "nvidia-ml-py is not installed"
        return info
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        info["note"] = f"no NVIDIA driver ({error})"
        return info
    try:
        info["driver"] = _text(pynvml.nvmlSystemGetDriverVersion())
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        info["cuda"] = f"{version // 1000}.{version % 1000 // 10}"
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = _text(pynvml.nvmlDeviceGetName(handle))
            info["devices"].append({"name": name, "memory_bytes": int(memory.total)})
    except pynvml.NVMLError as error:
        info["note"] = str(error)
    finally:
        pynvml.nvmlShutdown()
    return info


def _cupy() -> str | None:
    """The version of CuPy, whichever CUDA its package is for; it is not imported."""
    if importlib.util.find_spec("cupy") is None:
        return None
    names = importlib.metadata.packages_distributions().get("cupy", [])
    return next(filter(None, map(installed_version, names)), "of unknown version")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> dict[str, int | None]:
    """Total and available main memory in bytes, where the system tells."""
    values: dict[str, int] = {}
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            for line in lines:
                key, _, rest = line.partition(":")
                values[key] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        values.clear()
    if not values and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        values["MemTotal"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "memory_bytes": values.get("MemTotal"),
        "available_bytes": values.get("MemAvailable"),
    }


def _requirements() -> dict[str, str]:
    """Normalised package name -> version clauses, from accelrt's metadata."""
    try:
        lines = importlib.metadata.requires("accelrt") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    wanted: dict[str, str] = {}
    for line in lines:
        match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*([^;]*)", line)
        if match is not None:
            wanted[_normal(match[1])] = match[2].strip().strip("()").replace(" ", "")
    return wanted


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else (0,)
