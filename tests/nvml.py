"""A module like nvidia-ml-py's, with one device or without a driver, for tests."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from accelrt.benchmarking import gpu_use
from accelrt.profiling import sampler


class NVMLError(Exception):
    """Of the driver."""


def driver(**more: Any) -> types.ModuleType:
    """A module like nvidia-ml-py's, with one device."""
    module = types.ModuleType("pynvml")
    energy = iter(range(1000, 100000, 3000))  # millijoules

    def unsupported(*_: Any) -> None:
        raise NVMLError("Not Supported")

    memory = types.SimpleNamespace(used=5 << 20, total=9 << 20)
    known = {
        "NVMLError": NVMLError, "NVML_CLOCK_SM": 1, "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 13000,
        "nvmlDeviceGetCount": lambda: 1, "nvmlDeviceGetHandleByIndex": lambda index: object(),
        "nvmlDeviceGetName": lambda handle: b"H200",
        "nvmlDeviceGetMemoryInfo": lambda handle: memory,
        "nvmlDeviceGetPowerUsage": lambda handle: 350_000,
        "nvmlDeviceGetClockInfo": unsupported,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: next(energy),
    }  # fmt: skip
    for name, item in {**known, **more}.items():
        setattr(module, name, item)
    return module


@pytest.fixture(name="gpu")
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver with one device, which takes 3 J in whatever is watched."""
    monkeypatch.setitem(sys.modules, "pynvml", driver())
    monkeypatch.setattr(sampler, "_handle", lambda pynvml, device: object())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu_use, "synchronise", lambda device: None)


def without_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-ml-py is there, a driver is not."""

    def fails() -> None:
        raise NVMLError("NVML Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", driver(nvmlInit=fails))
