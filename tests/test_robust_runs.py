"""After whatever stops a run, the pipeline works as before, and unwraps bit for bit."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import feedback_common
import model_zoo as zoo
import psutil
import pytest
import torch
import zoo_svd
from model_zoo import one_thread  # noqa: F401
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo_pipelines import FAMILIES

import accelrt
from accelrt.planning import cost
from accelrt.planning.render import draw
from accelrt.profiling.figures import draw_timeline
from accelrt.reporting.environment import inspect_environment
from accelrt.reporting.media import write_pictures
from accelrt.reporting.page import write_page
from accelrt.reporting.tables import Exhibit
from accelrt.steps import Boundary, Interval, Rehash, Reuse, Taylor, Threshold, Verified

MIB = 2**20


@pytest.fixture(autouse=True)
def rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that do not depend on the machine."""
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cost, "profile", lambda device, dtype: cost.Machine())


class Failing(TorchDispatchMode):
    """Counts the operators that run, and raises in place of one of them."""

    def __init__(self, at: int | None = None, error: BaseException | None = None) -> None:
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.error is not None and self.count == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))


@dataclass
class Case:
    """A pipeline or model, its settings of ``wrap``, and its call.

    Args:
        target: not wrapped.
        settings: of ``wrap``.
        run: makes one request.
    """

    target: Any
    settings: dict[str, Any]
    run: Callable[[], Tensor]

    def modules(self) -> list[nn.Module]:
        """Of the pipeline; or the model."""
        if isinstance(self.target, nn.Module):
            return [self.target]
        return [m for m in self.target.components.values() if isinstance(m, nn.Module)]

    def weights(self) -> list[Tensor]:
        """Copies of all parameters and buffers."""
        return [value.clone() for m in self.modules() for value in m.state_dict().values()]

    def arenas(self) -> list[Any]:
        """Of the wrapped modules' plans."""
        forwards: list[Any] = [m.__dict__.get("forward") for m in self.modules()]
        planners = {id(f.planner): f.planner for f in forwards if f and f.planner}
        return [arena for planner in planners.values() for arena in planner.arenas]


def case(name: str) -> Case:
    if name == "budget":
        model, inputs = zoo.tiny_unet(), zoo.unet_inputs(2, 3, 8, 8)

        @torch.no_grad()
        def run() -> Tensor:
            result: Tensor = model(**inputs).sample
            return result

        return Case(model, {"memory_budget": "1MiB"}, run)
    if name == "svd, budget":
        # The whole pipeline: the denoiser and the video decoder share one arena.
        svd = zoo_svd.svd_pipeline()

        def video() -> Tensor:
            return zoo_svd.run_svd(
                svd, num_frames=2, num_inference_steps=2, output_type="pt",
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip

        return Case(svd, {"memory_budget": "32MiB"}, video)
    if name == "feedback":
        pipe = feedback_common.pipeline("dit")
        module = feedback_common.module_for(pipe)
        return Case(pipe, {"feedback": module}, lambda: feedback_common.run("dit", pipe))
    pipe, dit = FAMILIES["dit"].pipe(), FAMILIES["dit"]
    rehash = Rehash(Verified(0.5, warmup_steps=1), Taylor(1))
    return Case(pipe, {"rehash": rehash}, lambda: dit.run(pipe, num_inference_steps=6))


@pytest.mark.parametrize("name", ["budget", "svd, budget", "verified", "feedback"])
def test_a_run_that_fails_anywhere(name: str) -> None:
    """Out of memory, an interrupt and a wrong value inside an operator, early and late."""
    this = case(name)
    stock, weights = this.run(), this.weights()
    accelrt.wrap(this.target, **this.settings)
    expected = this.run()
    with Failing() as mode:
        assert torch.equal(this.run(), expected)
    errors = (torch.OutOfMemoryError("injected"), KeyboardInterrupt(), ValueError("injected"))
    for error, share in zip(errors, (0.93, 0.55, 0.12), strict=True):
        with pytest.raises(type(error)) as caught, Failing(int(share * mode.count), error):
            this.run()
        assert caught.value is error
        # The error is still held, and with it what its frames hold.
        assert torch.equal(this.run(), expected)
        assert caught.value is error
    del caught, error, errors
    gc.collect()
    assert torch.equal(this.run(), expected)
    found = this.arenas()
    assert bool(found) == ("budget" in name)
    assert all(arena.live_bytes == 0 and arena.busy.acquire(blocking=False) for arena in found)
    for arena in found:
        arena.busy.release()
    accelrt.unwrap(this.target)
    assert torch.equal(this.run(), stock)
    assert all(map(torch.equal, this.weights(), weights))


@pytest.mark.parametrize("name", ["budget", "verified"])
def test_a_stage_that_raises(name: str) -> None:
    """A module of the model fails as long as it is broken."""
    this = case(name)
    stock = this.run()
    accelrt.wrap(this.target, **this.settings)
    expected = this.run()
    denoiser = this.modules()[0] if name == "budget" else this.target.transformer
    inner = [m for m in denoiser.modules() if isinstance(m, nn.Linear)][-2]

    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    handle = inner.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        this.run()
    handle.remove()
    assert torch.equal(this.run(), expected)
    accelrt.unwrap(this.target)
    assert torch.equal(this.run(), stock)


@pytest.mark.parametrize("name", ["verified", "feedback"])
def test_an_interrupt_in_a_step(name: str) -> None:
    """Inside the scheduler's step, between the calls of the model."""
    this = case(name)
    stock = this.run()
    scheduler = this.target.scheduler
    step, taken = scheduler.step, [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        taken[0] += 1
        if taken[0] == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    scheduler.step = interrupted
    accelrt.wrap(this.target, **this.settings)
    with pytest.raises(KeyboardInterrupt):
        this.run()
    expected = this.run()
    assert torch.equal(this.run(), expected)
    accelrt.unwrap(this.target)
    assert scheduler.step is interrupted
    del scheduler.step
    assert torch.equal(this.run(), stock)
    accelrt.wrap(this.target, **this.settings)
    assert torch.equal(this.run(), expected)


def test_a_full_disk_does_not_stop_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The measured rates of the machine cannot be kept."""
    model, inputs = zoo.tiny_dit(), {
        "hidden_states": zoo.normal(2, 4, 8, 8, seed=1), "timestep": torch.tensor([3, 9]),
        "class_labels": torch.tensor([1, 2]),
    }  # fmt: skip
    measured: list[torch.dtype] = []

    def profile(device: torch.device, dtype: torch.dtype) -> cost.Machine:
        measured.append(dtype)
        return cost.Machine()

    stock = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        stock(self, content[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cost, "profile", profile)
    monkeypatch.setattr(Path, "write_bytes", full)
    with torch.no_grad():
        expected = model(**inputs).sample
        accelrt.wrap(model, memory_budget="1MiB")
        first = model(**inputs).sample
        assert torch.equal(model(**inputs).sample, first)
        accelrt.unwrap(model)
        assert torch.equal(model(**inputs).sample, expected)
    assert measured == [torch.float32]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_a_report_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Trace, pages, pictures and schedule of before stay whole; the pipeline does not notice."""
    folder, this = tmp_path / "out", case("verified")
    folder.mkdir()
    pipe, stock = this.target, this.run()
    accelrt.wrap(pipe, **this.settings)
    expected = this.run()
    with accelrt.profile(pipe, ceilings=False) as prof:
        assert torch.equal(this.run(), expected)
    compared = accelrt.quality.compare(
        FAMILIES["dit"].pipe(), {"class_labels": [3], "num_inference_steps": 2}, repeats=1
    )
    plan = accelrt.plan(zoo.tiny_dit(), memory_budget="min")
    environment = inspect_environment()
    exhibit = Exhibit("DiT", "1 image", compared, folder / "pictures.png")
    writes: dict[str, Callable[[], Any]] = {
        "trace.json": lambda: prof.save(folder / "trace.json"),
        "report.html": lambda: prof.html(folder / "report.html"),
        "timeline.svg": lambda: draw_timeline(prof, folder / "timeline.svg"),
        "schedule.json": lambda: this.settings["rehash"].save(folder / "schedule.json"),
        "pictures.png": lambda: write_pictures(compared, folder, "pictures"),
        "demo.html": lambda: write_page(folder / "demo.html", [exhibit], environment, "demo"),
        "plan.png": lambda: draw(plan, folder / "plan.png"),
    }
    for write in writes.values():
        write()
    assert (folder / "timeline.svg").read_bytes().startswith(b"<?xml")
    before = {name: (folder / name).read_bytes() for name in writes}
    plain = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        plain(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        for name, write in writes.items():
            with pytest.raises(OSError, match=f"No space left on device: '{folder / name}'"):
                write()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert torch.equal(this.run(), expected)
    prof.save(folder / "trace.json")
    accelrt.unwrap(pipe)
    assert torch.equal(this.run(), stock)


def test_eight_threads_with_a_pipeline_each() -> None:
    """Each gets what it gets alone."""
    rehashes = [
        None, Rehash(Interval(2), Taylor(1)), Rehash(Interval(3), Reuse(), Boundary("out")),
        Rehash(Threshold(0.3), Taylor(2)),
    ]  # fmt: skip
    cases = []
    for index in range(8):
        pipe = FAMILIES["dit"].pipe()
        settings = {"rehash": rehashes[index % 4]} if index < 4 else {"memory_budget": "64MiB"}
        accelrt.wrap(pipe, **settings)
        cases.append((pipe, [index, 2 * index + 1]))

    def request(index: int) -> Tensor:
        pipe, labels = cases[index]
        generator = torch.Generator().manual_seed(index)
        return FAMILIES["dit"].run(
            pipe, class_labels=labels, generator=generator, num_inference_steps=5
        )

    alone = [request(index) for index in range(8)]
    together: list[Any] = [None] * 8
    barrier = threading.Barrier(8)

    def work(index: int) -> None:
        barrier.wait()
        together[index] = request(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for index in range(8):
        assert together[index] is not None, f"thread {index} failed"
        assert torch.equal(together[index], alone[index]), f"thread {index}"
        accelrt.unwrap(cases[index][0])


FORKED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
import accelrt, accelrt.ops
import model_zoo as zoo
torch.set_num_threads(2)
reader, writer = os.pipe()
child = os.fork()
model = accelrt.wrap(zoo.tiny_dit(), rehash="auto")
with torch.no_grad():
    for time in (900, 600, 300, 0):
        x = zoo.normal(2, 4, 8, 8, seed=1)
        y = model(x, torch.tensor([time, time]), class_labels=torch.tensor([1, 2])).sample
accelrt.unwrap(model)
digits = y.double().numpy().tobytes()
if child == 0:
    os.write(writer, digits)
    os._exit(0)
os.close(writer)
with os.fdopen(reader, "rb") as pipe:
    assert pipe.read() == digits
assert os.waitpid(child, 0)[1] == 0
print("both")
"""


def test_fork_after_import() -> None:
    """A server that forks its workers: parent and child both run."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(Path(__file__).parent)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == "both", done.stderr[-3000:]


@pytest.mark.parametrize(
    "settings",
    [{"rehash": Rehash(Interval(2, warmup_steps=1), Taylor(1))}, {"memory_budget": "64MiB"}],
    ids=["rehash", "budget"],
)
def test_five_hundred_requests_of_changing_shapes_keep_nothing(settings: dict[str, Any]) -> None:
    """Neither tensors nor other objects, nor memory of the process, grow with requests."""
    model = zoo.tiny_dit()
    accelrt.wrap(model, **settings)
    process = psutil.Process()
    counts: list[tuple[int, int]] = []
    with torch.no_grad():
        for request in range(500):
            batch = 1 + request * 7 % 11
            times = torch.tensor(900 - 100 * (request % 5))
            model(
                zoo.normal(batch, 4, 8, 8), times.expand(batch),
                class_labels=torch.full((batch,), request % 10),
            )  # fmt: skip
            if request in (109, 499):  # both at the end of a round of batches and times
                gc.collect()
                objects = gc.get_objects()
                tensors = sum(type(each) is Tensor for each in objects)
                counts.append((tensors, len(objects)))
                del objects
            if request == 109:
                resident = process.memory_info().rss
    (early_tensors, early), (late_tensors, late) = counts
    assert late_tensors <= early_tensors + 5
    assert late <= early + 200
    assert process.memory_info().rss - resident < 8 * MIB
    accelrt.unwrap(model)
