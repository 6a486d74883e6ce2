"""What the system says while a pipeline runs: the process' memory, and an NVIDIA GPU's state."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Sample:
    """One look at the system.

    Args:
        time: nanoseconds of the profile's clock.
        resident_bytes: of the process; ``None`` where the system does not tell.
        gpu_bytes: used on the device, by all processes.
        watts, megahertz: of the device, and of its processors.
    """

    time: int
    resident_bytes: int | None = None
    gpu_bytes: int | None = None
    watts: float | None = None
    megahertz: int | None = None


@dataclass
class Gpu:
    """What the driver says of one GPU.

    Args:
        note: why there is nothing; empty if there is.
        name: of the device.
        joules: that it took between the first sample and the last, ``None`` if it does not tell.
    """

    note: str = ""
    name: str = ""
    joules: float | None = None


@dataclass(frozen=True)
class Use:
    """What a GPU took, in the mean over a run; ``None`` where the device does not tell.

    Args:
        joules: of energy, per image or forward.
        watts, megahertz: mean power of the device, and mean clock of its processors.
        used_bytes: most memory in use on the device, of all processes.
    """

    joules: float | None = None
    watts: float | None = None
    megahertz: float | None = None
    used_bytes: int | None = None


@dataclass
class Samples:
    """All samples of a run."""

    samples: list[Sample] = field(default_factory=list)
    gpu: Gpu = field(default_factory=Gpu)

    def use(self, count: int) -> Use:
        """In short, with the energy of one of ``count`` images or forwards."""
        joules = self.gpu.joules
        watts = [one.watts for one in self.samples if one.watts is not None]
        clocks = [one.megahertz for one in self.samples if one.megahertz is not None]
        return Use(
            None if joules is None or not count else joules / count,
            statistics.fmean(watts) if watts else None,
            statistics.fmean(clocks) if clocks else None,
            max((one.gpu_bytes for one in self.samples if one.gpu_bytes), default=None),
        )


def mean_use(uses: Sequence[Use]) -> Use:
    """Of several runs: the mean of each value, and the most memory."""

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    return Use(
        mean([use.joules for use in uses]),
        mean([use.watts for use in uses]),
        mean([use.megahertz for use in uses]),
        max((use.used_bytes for use in uses if use.used_bytes is not None), default=None),
    )


class Sampler:
    """A thread that looks at the system now and then.

    Args:
        device: index of the CUDA device that the pipeline runs on; ``None`` for the CPU.
        interval: seconds between two looks.
    """

    def __init__(self, device: int | None, interval: float = 0.02) -> None:
        self.found = Samples()
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="accelrt profile", daemon=True)
        self._nvml: Any = None
        self._handle: Any = None
        self._energy: float | None = None
        self._open(device)

    def _open(self, device: int | None) -> None:
        gpu = self.found.gpu
        try:
            import pynvml
        except ImportError:
            gpu.note = "nvidia-ml-py is not installed: `pip install nvidia-ml-py`"
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            gpu.note = (
                f"no NVIDIA driver ({error}): memory, power and clocks of a GPU are not known"
            )
            return
        self._nvml = pynvml
        if device is None:
            gpu.note = "the pipeline runs on the CPU: no GPU is looked at"
            return
        try:
            self._handle = _handle(pynvml, device)
            name = pynvml.nvmlDeviceGetName(self._handle)
            gpu.name = name.decode() if isinstance(name, bytes) else str(name)
        except (pynvml.NVMLError, ValueError) as error:
            gpu.note = f"the driver does not show the device: {error}"

    def start(self) -> None:
        """Begin."""
        self._energy = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        self._look()
        self._thread.start()

    def stop(self) -> Samples:
        """End; everything that was seen."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._look()
        energy = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        if energy is not None and self._energy is not None:
            self.found.gpu.joules = (energy - self._energy) / 1e3
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml = self._handle = None
        return self.found

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._look()

    def _look(self) -> None:
        used = milliwatts = clock = None
        if self._handle is not None:
            memory = self._ask("nvmlDeviceGetMemoryInfo")
            used = None if memory is None else int(memory.used)
            milliwatts = self._ask("nvmlDeviceGetPowerUsage")
            clock = self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM)
        watts = None if milliwatts is None else milliwatts / 1e3
        now = time.perf_counter_ns()
        self.found.samples.append(Sample(now, _resident(), used, watts, clock))

    def _ask(self, name: str, *more: Any) -> Any:
        """What the driver answers; ``None`` where the device cannot tell."""
        if self._handle is None:
            return None
        try:
            return getattr(self._nvml, name)(self._handle, *more)
        except self._nvml.NVMLError:
            return None


def _handle(pynvml: Any, device: int) -> Any:
    """The driver's handle of torch's device: they may be numbered differently."""
    import torch

    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    if not uuid:
        return pynvml.nvmlDeviceGetHandleByIndex(device)
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")


def _resident() -> int | None:
    try:
        pages = int(_STATM.read_bytes().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
