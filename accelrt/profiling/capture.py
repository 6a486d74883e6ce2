"""``accelrt.profile``: a context manager, and what it holds afterwards."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from accelrt.files import write_text

from . import ceilings as rates
from . import nvtx
from .analysis import Analysis, Row, without_dropped
from .ops import OpRecorder, Recorded
from .sampler import Sampler, Samples
from .spans import CALL, STEP, Recorder

if TYPE_CHECKING:
    from rich.table import Table

_lock = threading.Lock()
_open: list[Profile] = []


class Profile:
    """What ran in a pipeline, by name: see :func:`profile`.

    Attributes:
        analysis: ranges and operators; after the block.
        samples: of the process' memory, and of the GPU.
        ceilings: rates of a large product and a large copy; ``None`` if they were not measured.
        blocks: of arenas: offset, bytes, times of birth and death.
        arena: time, bytes alive in the active arena, and its size.
        images: pictures or frames that the calls returned.
        threads: of torch on the CPU.
        device: ``"cpu"`` or ``"cuda"``.
    """

    def __init__(
        self, target: Any, *, ops_every: int = 20, ceilings: bool = True, nvtx: bool | None = None
    ) -> None:
        _check(target, ops_every)
        self._target = target
        self._every = ops_every
        self._measure = ceilings
        self._nvtx = nvtx
        self._analysis: Analysis | None = None
        self._stack = ExitStack()
        self.images = 0
        self.samples = Samples()
        self.ceilings: rates.Ceilings | None = None
        self.blocks: list[list[int]] = []
        self.arena: list[tuple[int, int, int]] = []
        self.threads = torch.get_num_threads()
        self.title = type(target).__name__
        device, self.dtype = _where(target)
        self.device = device.type
        self._index = None if device.type != "cuda" else device.index or 0

    @property
    def analysis(self) -> Analysis:
        """Ranges and operators.

        Raises:
            RuntimeError: the block has not been left.
        """
        if self._analysis is None:
            raise RuntimeError("the profile is still open, or was never opened: leave its block")
        return self._analysis

    # The block

    def __enter__(self) -> Profile:
        if self._analysis is not None:
            raise ValueError("this profile is over; open another with accelrt.profile")
        with _lock:
            if _open:
                raise ValueError(
                    f"a profile of {_open[0].title} is open; allowed: one at a time, leave it first"
                )
            _open.append(self)
        try:
            with ExitStack() as stack:
                stack.callback(_open.remove, self)
                self._begin(stack)
                self._stack = stack.pop_all()
        except BaseException:
            self._stack = ExitStack()
            raise
        return self

    def _begin(self, stack: ExitStack) -> None:
        from .hooks import attached

        ranges = nvtx.wanted(self._nvtx)
        under_nsight = nvtx.operators_wanted(self._nvtx)
        self._ops = None if under_nsight else OpRecorder(self._every, self.device == "cuda")
        self._recorder = Recorder(
            on_step=None if self._ops is None else self._ops.on_step,
            push=nvtx.push if ranges else None,
            pop=nvtx.pop if ranges else None,
        )
        sampler = Sampler(self._index)
        stack.callback(self._sampled, sampler)
        if self._ops is not None:
            stack.push(self._ended)
            self._ops.start()
        else:
            stack.push(self._ended)
            stack.enter_context(nvtx.captured())
        stack.enter_context(attached(self._recorder, self._target, self._returned))
        stack.callback(self._closed)
        sampler.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is None and self._measure:
            dtype = self.dtype if self.dtype.is_floating_point else torch.float32
            self.ceilings = rates.measure(self.device, dtype)

    def _closed(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self._recorder.end_loop()
        self._recorder.close_all()
        self._recorder.active = False

    def _ended(self, *_: object) -> None:
        """Stop torch's profiler, and put together what was written down."""
        recorder = self._recorder
        recorded = Recorded() if self._ops is None else self._ops.stop()
        spans, places = without_dropped(recorder.spans, recorder.dropped)
        slices = [(moment, index, places[span]) for moment, index, span in recorder.slices]
        self.blocks, self.arena = recorder.blocks, recorder.arena
        chosen: Callable[[int], bool] = (
            (lambda step: False) if self._ops is None else self._ops.chosen
        )
        self._analysis = Analysis(spans, recorded, slices, chosen)

    def _sampled(self, sampler: Sampler) -> None:
        self.samples = sampler.stop()

    def _returned(self, output: Any) -> None:
        for name in ("frames", "images"):
            value = getattr(output, name, None)
            if value is None and isinstance(output, tuple) and output:
                value = output[0]
            if value is None:
                continue
            video = name == "frames" and len(value) and hasattr(value[0], "__len__")
            self.images += sum(len(each) for each in value) if video else len(value)
            return

    # What it found

    @property
    def seconds(self) -> float:
        """Wall time of the calls."""
        return sum(span.end - span.begin for span in self.analysis.roots) / 1e9

    @property
    def steps(self) -> int:
        """Denoising steps that ran."""
        return sum(span.kind == STEP for span in self.analysis.spans)

    @property
    def calls(self) -> int:
        """Calls of the pipeline."""
        return sum(span.kind == CALL for span in self.analysis.spans)

    @property
    def coverage(self) -> float:
        """Share of the calls' wall time in a range that says more than the call and its step."""
        return self.analysis.coverage()

    @property
    def peak_bytes(self) -> int:
        """Most bytes of tensors made since the block began and alive at once."""
        return max((cpu + cuda for _, cpu, cuda in self.analysis.recorded.memory), default=0)

    @property
    def joules_per_image(self) -> float | None:
        """Energy of the GPU per picture or frame; ``None`` where the driver does not tell it."""
        joules = self.samples.gpu.joules
        return None if joules is None or not self.images else joules / self.images

    def rows(self, by: str = "group") -> list[Row]:
        """What everything took.

        Args:
            by: ``"step"``, ``"part"`` (of the pipeline's call), ``"component"``, ``"stage"``,
                ``"group"`` or ``"op"``.

        Returns:
            A row per name, the longest first; steps in their order.

        Raises:
            ValueError: another ``by``.
            RuntimeError: the block has not been left.
        """
        return self.analysis.rows(by)

    def table(self, by: str = "group", top: int = 20) -> Table:
        """:meth:`rows` for the terminal: ``rich.print(prof.table())``.

        Args:
            by: see :meth:`rows`.
            top: rows at most.

        Raises:
            ValueError: another ``by``, or ``top`` is below 1.
        """
        from .tables import table

        return table(self, by, top)

    def save(self, path: str | Path) -> Path:
        """Write a trace for Perfetto (ui.perfetto.dev) or chrome://tracing.

        Args:
            path: a ``.json`` file.

        Raises:
            ValueError: another kind of file.
            OSError: it cannot be written.
        """
        from .trace import trace

        target = Path(path)
        if target.suffix != ".json":
            raise ValueError(f"path is {path}; allowed: a .json file")
        write_text(target, json.dumps(trace(self), separators=(",", ":")))
        return target

    def html(self, path: str | Path) -> Path:
        """Write a page with pictures of time, memory and the roofline, and all tables.

        Args:
            path: a ``.html`` file; nothing else is needed to show it.

        Raises:
            ValueError: another kind of file.
            ImportError: matplotlib or jinja2 is missing.
            OSError: it cannot be written.
        """
        from .report import write_page

        target = Path(path)
        if target.suffix != ".html":
            raise ValueError(f"path is {path}; allowed: a .html file")
        write_page(self, target)
        return target

    def to_dict(self, top: int = 50) -> dict[str, Any]:
        """Everything but the single ranges, for JSON.

        Args:
            top: rows of each table, at most.
        """
        from .tables import as_dict

        return as_dict(self, top)


def profile(
    pipe_or_model: Any,
    *,
    ops_every: int = 20,
    ceilings: bool = True,
    nvtx: bool | None = None,
) -> Profile:
    """Write down what a pipeline does, by name, while a block runs.

    ::

        with accelrt.profile(pipe) as prof:
            pipe("a digit bouncing")
        rich.print(prof.table())
        prof.save("trace.json")  # ui.perfetto.dev

    Ranges are named step, stage, group and operator, for example
    ``step 3/unet.mid_block/mid_block.resnets.0/aten::convolution``; of a wrapped model those
    of its description, else its modules. Text encoders, VAE, scheduler and the pipeline's own
    methods have ranges too. Only calls in the thread that opened the block are seen. On CUDA the
    same names are NVTX ranges; under Nsight Systems (``nsys profile
    --capture-range=cudaProfilerApi``) operators are NVTX ranges as well, and only the block is
    captured.

    Args:
        pipe_or_model: a pipeline or model, wrapped or not. Nothing of it is changed for good.
        ops_every: of every so many steps, one has its operators recorded (the second, not the
            first); what is outside of the steps always has. 1: every step, which costs more;
            0: none at all. FLOPs, bytes and operators of other steps are taken to be the same.
        ceilings: measure, after the block, a 2048^3 product and a large copy, for utilisation
            and for what limits a group; takes about a second.
        nvtx: ``True``: as under Nsight Systems, without operators and kernels in the tables;
            ``False``: no NVTX ranges; ``None``: as it runs under Nsight Systems or not.

    Returns:
        A :class:`~accelrt.profiling.Profile`, to be entered once.

    Raises:
        ValueError: ``ops_every`` is below 0, there is nothing to profile, ``nvtx`` without
            CUDA, or (on entering) another profile is open.
    """
    return Profile(pipe_or_model, ops_every=ops_every, ceilings=ceilings, nvtx=nvtx)


def _check(target: Any, ops_every: Any) -> None:
    if isinstance(ops_every, bool) or not isinstance(ops_every, int) or ops_every < 0:
        raise ValueError(f"ops_every is {ops_every!r}; allowed: an integer >= 0")
    if not isinstance(target, nn.Module) and not hasattr(target, "components"):
        raise ValueError(
            f"{type(target).__name__} cannot be profiled; allowed: a diffusers pipeline, a model"
        )


def _where(target: Any) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the largest model."""
    parts = [target] if isinstance(target, nn.Module) else target.components.values()
    models = [part for part in parts if isinstance(part, nn.Module)]
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    if not sizes:
        return torch.device("cpu"), torch.float32
    first = next(models[sizes.index(max(sizes))].parameters(), torch.empty(0))
    device = torch.device(getattr(target, "_execution_device", first.device))
    return device, first.dtype
