"""What a profile says of GPUs, NVTX and costs; its page and its command."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from nvml import driver, one_gpu, without_driver  # noqa: F401
from test_demo import Tags
from torch import nn
from typer.testing import CliRunner

import accelrt
from accelrt.benchmarking import gpu_use
from accelrt.benchmarking import tables as bench_tables
from accelrt.cli import app
from accelrt.profiling import ceilings, nvtx, ops, sampler
from accelrt.profiling.analysis import Analysis, Row
from accelrt.profiling.ceilings import Ceilings
from accelrt.profiling.cost import cost_of
from accelrt.profiling.spans import Span
from accelrt.profiling.tables import sentences
from accelrt.quality.compare import _Runner
from accelrt.reporting.tables import gpu_text


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "PRODUCT_ROWS", 128)
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1 << 20)


def tensor(*shape: int, dtype: str = "float") -> Any:
    return shape, dtype, None


def value(number: Any) -> Any:
    return (), "ScalarList" if isinstance(number, tuple) else "Scalar", number


MISSING = ((), "", None)


@pytest.mark.parametrize(
    ("name", "arguments", "flops", "moved"),
    [
        ("aten::mm", (tensor(3, 5), tensor(5, 7)), 210, 4 * (15 + 35 + 21)),
        ("aten::mm", (tensor(3, 5), tensor(5, 7), tensor(3, 7)), 210, 4 * (15 + 35 + 21)),
        (
            "aten::addmm",
            (tensor(7), tensor(3, 5), tensor(5, 7), value(1), value(1)),
            210,
            4 * (7 + 15 + 35 + 21),
        ),
        ("aten::add_", (tensor(9), tensor(9), value(1)), 0, 4 * 27),
        ("aten::copy_", (tensor(9), tensor(9), value(False)), 0, 4 * 18),
        ("aten::silu", (tensor(9, dtype="c10::BFloat16"),), 0, 2 * 18),
        ("aten::view", (tensor(9), value((3, 3))), 0, 0),
        (
            "aten::convolution",
            (
                tensor(2, 4, 9, 8),
                tensor(6, 2, 3, 3),
                tensor(6),
                value((2, 1)),
                value((1, 1)),
                value((1, 1)),
                value(False),
                value((0, 0)),
                value(2),
            ),
            2 * (2 * 6 * 5 * 8) * (2 * 3 * 3),
            4 * (2 * 4 * 9 * 8 + 6 * 2 * 9 + 6 + 2 * 6 * 5 * 8),
        ),
        (
            "aten::scaled_dot_product_attention",
            (tensor(1, 2, 5, 8), tensor(1, 2, 6, 8), tensor(1, 2, 6, 8)),
            2 * 2 * 5 * 6 * 16,
            4 * (80 + 96 + 96 + 80),
        ),
        (
            "accelrt::temporal_attention",
            (
                tensor(1, 3, 4, 8),
                tensor(1, 5, 4, 8),
                tensor(1, 5, 4, 8),
                value(2),
                value(0.5),
                tensor(1, 3, 4, 8),
            ),
            4 * 3 * 5 * 4 * 8,
            4 * (96 + 160 + 160 + 96),
        ),
        ("mine::mm", (tensor(3, 5), tensor(5, 7)), 0, 0),
    ],
)
def test_costs(name: str, arguments: Any, flops: int, moved: int) -> None:
    cost = cost_of(name, arguments)
    assert (cost.flops, cost.bytes) == (flops, moved)


def test_what_limits_a_group() -> None:
    rates = Ceilings(1e9, 1e8, 128, "float32")
    row = Row("g", calls=1, seconds=2.0, flops=1e9, bytes=1e7, recorded=1)
    assert row.utilisation(rates) == 0.5
    assert row.limit(rates) == ("products", 0.5)
    row.bytes = 1.6e8
    assert row.limit(rates) == ("memory", 0.8)
    row.flops, row.bytes = 1e6, 1e6
    kind, share = row.limit(rates) or ("", 0.0)
    assert (kind, share) == ("overhead", pytest.approx(0.995))
    row.device_seconds = 1e-2  # the GPU worked for a small part of the time
    assert row.limit(rates) == ("memory", 1.0)
    row.recorded = 0
    assert row.limit(rates) is None


# A GPU, played


class Event:
    """What torch's profiler has of one event."""

    def __init__(self, name: str, begin: int, length: int, **more: Any) -> None:
        self._known = {
            "name": name, "start_ns": begin, "duration_ns": length, "end_ns": begin + length,
            "device_type": torch.autograd.DeviceType.CPU, "start_thread_id": 1,
            "correlation_id": 0, "linked_correlation_id": 0, "shapes": [], "dtypes": [],
            "concrete_inputs": [], "nbytes": 0, "is_user_annotation": False, **more,
        }  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        return lambda: self._known[name]


def test_kernels_belong_to_the_range_that_launched_them() -> None:
    gpu = torch.autograd.DeviceType.CUDA
    events = [
        Event("mark", 900, 100),
        Event("aten::mm", 2000, 300, correlation_id=7),
        Event("cudaLaunchKernel", 2100, 50, correlation_id=70),
        Event("gemm", 5000, 4000, device_type=gpu, correlation_id=70, linked_correlation_id=7),
        Event("cudaLaunchKernel", 3100, 50, correlation_id=71),
        Event("copy", 9000, 500, device_type=gpu, correlation_id=71),
        Event("aten::mm", 2000, 10, start_thread_id=2),  # another thread's
        Event("[memory]", 2050, 0, nbytes=512, device_type=gpu),
        Event("[memory]", 2060, 0, nbytes=-256, device_type=gpu),
    ]
    found = ops.read(events, {"mark": 500}, {})  # the profile's clock is 500 behind
    assert [(op.name, op.begin, op.end) for op in found.ops] == [("aten::mm", 1500, 1800)]
    assert found.memory == [(1550, 0, 512), (1560, 0, 256)]
    whole = Analysis(
        [
            Span("component", "unet", -1, 1000, 3000),
            Span("group", "first", 0, 1400, 2000),
            Span("group", "second", 0, 2500, 2900),
        ],
        found,
        [],
        lambda step: True,
    )
    rows = {row.name.rsplit("/", 1)[-1]: row for row in whole.rows("group")}
    assert rows["first"].device_seconds == pytest.approx(4e-6)
    assert rows["second"].device_seconds == pytest.approx(5e-7)
    assert whole.rows("op")[0].device_seconds == pytest.approx(4e-6)


def test_clocks_are_compared_at_both_ends() -> None:
    """The profile's clock is at 100 when the other is at 1000, and runs twice as fast."""
    events = [
        Event("another profile's mark", 0, 1),
        Event("loose", 850, 100),
        Event("tight", 990, 10),
        Event("aten::mm", 1500, 200),
        Event("[memory]", 1600, 0, nbytes=8),
        Event("tight end", 1990, 10),
        Event("loose end", 2100, 100),
    ]
    begin = {"loose": 7, "tight": 100, "lost": 9}
    found = ops.read(events, begin, {"loose end": 4000, "tight end": 2100})
    assert [(op.begin, op.end) for op in found.ops] == [(1100, 1500)]
    assert found.memory == [(1300, 8, 0)]
    assert ops.read(events, {"lost": 9}, {}).ops == []


def test_nvtx_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    stack: list[str] = []
    pushed: list[str] = []
    calls: list[str] = []

    def push(name: str) -> None:
        stack.append(name)
        pushed.append(name)

    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        nvtx=types.SimpleNamespace(range_push=push, range_pop=stack.pop),
        cudart=lambda: types.SimpleNamespace(
            cudaProfilerStart=lambda: calls.append("start"),
            cudaProfilerStop=lambda: calls.append("stop"),
        ),
    )
    monkeypatch.setattr(nvtx, "_cuda", cuda)

    @contextmanager
    def emit_nvtx() -> Iterator[None]:
        calls.append("operators")
        yield
        calls.append("no operators")

    monkeypatch.setattr(nvtx, "_profiler", types.SimpleNamespace(emit_nvtx=emit_nvtx))
    pipe = accelrt.wrap(zoo.animatediff_pipeline())
    with accelrt.profile(pipe, nvtx=True, ceilings=False) as prof:
        assert calls == ["start", "operators"]
        zoo.run_animatediff(pipe, num_inference_steps=2)
    assert calls == ["start", "operators", "no operators", "stop"]
    assert stack == []
    assert "step 1/unet.mid_block/mid_block.resnets.0" in pushed
    assert prof.analysis.recorded.ops == []
    assert "Operators were not recorded." in sentences(prof)
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    assert nvtx.operators_wanted(None)
    assert not nvtx.wanted(False)


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", driver())
    monkeypatch.setattr(sampler, "_handle", lambda pynvml, device: object())
    looking = sampler.Sampler(0)
    looking.start()
    found = looking.stop()
    assert found.gpu == sampler.Gpu("", "H200", 3.0)
    first = found.samples[0]
    assert (first.gpu_bytes, first.watts, first.megahertz) == (5 << 20, 350.0, None)
    prof = accelrt.profile(nn.Linear(2, 2))
    prof.samples, prof.images = found, 4
    assert prof.joules_per_image == 0.75


@pytest.mark.usefixtures("gpu")
def test_a_bench_asks_the_driver() -> None:
    calls: list[str] = []
    forms = {name: functools.partial(calls.append, name) for name in ("stock", "accelrt")}
    found = gpu_use.gpu_use(forms, "cuda", seconds=0.01)
    assert (found.note, found.device) == ("", "H200")
    assert [form.run for form in found.forms] == ["stock", "accelrt"]
    for form in found.forms:
        assert form.forwards == calls.count(form.run) > 0
        assert form.seconds >= 0.01
        assert form.use == sampler.Use(3.0 / form.forwards, 350.0, None, 5 << 20)
    sentence = bench_tables.driver_text(found)
    assert sentence.startswith("H200, by its driver: stock ")
    assert "J per forward, 350 W, 5.0 MiB in use; accelrt " in sentence
    assert "MHz" not in sentence

    def fails() -> None:
        raise RuntimeError("broken")

    threads = threading.active_count()
    with pytest.raises(RuntimeError, match="broken"):
        gpu_use.gpu_use({"stock": fails}, "cuda")
    assert threading.active_count() == threads
    calls.clear()
    assert "the pipeline runs on the CPU" in gpu_use.gpu_use(forms, "cpu").note
    assert calls == []


@pytest.mark.usefixtures("gpu")
def test_a_comparison_knows_the_energy_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"class_labels": [3, 77, 5], "num_inference_steps": 2}
    pipe = zoo.dit_pipeline()
    assert "runs on the CPU" in _Runner(pipe, call, 0, None).gpu_note
    monkeypatch.setattr(_Runner, "_sampler", lambda self: sampler.Sampler(0))
    found = accelrt.quality.compare(pipe, call, repeats=1)
    assert found.gpu_note == found.to_dict()["gpu_note"] == ""
    for side in (found.stock, found.accelrt):
        assert side.gpu == sampler.Use(1.0, 350.0, None, 5 << 20)
    assert found.to_dict()["accelrt"]["gpu"]["joules_per_image"] == 1.0
    on_cpu = dataclasses.replace(found, gpu_note="no GPU is looked at")
    assert gpu_text(on_cpu) == ""
    assert "no GPU is" in gpu_text(dataclasses.replace(on_cpu, device="cuda:0"))
    assert gpu_text(found) == (
        "stock 1 J per image, 350 W, 5.0 MiB in use; accelrt 1 J per image, 350 W, 5.0 MiB in use."
    )


def test_without_a_driver_a_profile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    without_driver(monkeypatch)
    assert "no NVIDIA driver (NVML Shared Library" in sampler.Sampler(0).stop().gpu.note
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in sampler.Sampler(0).stop().gpu.note
    monkeypatch.setitem(sys.modules, "pynvml", driver())
    assert "runs on the CPU" in sampler.Sampler(None).stop().gpu.note


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "dit"
    zoo.dit_pipeline().save_pretrained(place)
    return place


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["profile", *map(str, words)])


def test_command(folder: Path, tmp_path: Path) -> None:
    done = run("--model", folder, "--steps", 3, "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["steps"], found["images"]) == (3, 4)
    assert 0 < found["coverage"] <= 1
    assert {row["name"] for row in found["rows"]["step"]} >= {"step 0", "step 2"}
    group = next(row for row in found["rows"]["group"] if "transformer.blocks.1" in row["name"])
    assert group["utilisation"] > 0
    assert group["limit"] in ("products", "memory", "overhead")
    page = Path(found["report"]).read_text()
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.seen.count("img") == page.count("data:image/png;base64,") == 4
    assert "transformer.blocks.1" in page
    assert json.loads(Path(found["trace"]).read_text())["otherData"]["device"] == "cpu"


def test_command_prints_a_table(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = run(
        "--model", folder, "--steps", 2, "--out", tmp_path, "--stock", "--by", "op", "--top", 3,
        "--no-warm",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "aten::" in done.stdout
    assert "more" in done.stdout
    assert f"written: {tmp_path / 'trace.json'}" in done.stdout


def test_command_refuses(folder: Path, tmp_path: Path) -> None:
    done = run("--model", folder, "--stock", "--budget", "min", "--out", tmp_path / "new")
    assert done.exit_code == 2
    assert "--stock" in done.output
    assert not (tmp_path / "new").exists()
    done = run("--model", "animatediff", "--prompt", "x", "--out", tmp_path / "new")
    assert done.exit_code == 2
    assert "--prompt, --frames and --image" in done.output
