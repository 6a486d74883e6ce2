"""Profiles of pipelines: names, coverage, totals, and that nothing is left behind."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import accelrt
from accelrt.cli import scenarios
from accelrt.groups import slicing
from accelrt.memory import arena
from accelrt.profiling import Profile, spans
from accelrt.profiling.analysis import innermost
from accelrt.profiling.spans import COMPONENT, PART, STEP, Recorder
from accelrt.profiling.tables import cells
from accelrt.wrap import forwards


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call(pipe: Any, **overrides: Any) -> torch.Tensor:
    return zoo.run_animatediff(pipe, **{"num_inference_steps": 3, "output_type": "pt", **overrides})


def profiled(steps: int, frames: int, calls: int) -> list[Profile]:
    """Calls of the wrapped reference AnimateDiff, operators of the second step."""
    folder = scenarios.reference_folder()
    found = scenarios.reference_scenario("animatediff", folder, "fp32", "cpu", steps)
    pipe = found.pipe
    pipe.set_progress_bar_config(disable=True)
    accelrt.wrap(pipe)
    request = {
        **found.call,
        "prompt": "a handwritten seven",
        "num_frames": frames,
        "output_type": "np",
    }
    profiles = []
    with torch.random.fork_rng():
        pipe(**{**request, "num_inference_steps": 1})
        for _ in range(calls):
            with accelrt.profile(pipe, ceilings=False) as prof:
                pipe(**request)
            profiles.append(prof)
    return profiles


@pytest.fixture(scope="module")
def reference() -> Profile:
    """Three steps."""
    return profiled(3, 8, 1)[0]


@pytest.fixture(scope="module")
def tiny() -> Any:
    return zoo.animatediff_pipeline()


def test_names_cover_the_time_of_a_call() -> None:
    """The best of some: a thread that waits for the processor may do so anywhere."""
    assert max(found.coverage for found in profiled(10, 16, 3)) >= 0.97


def test_names_of_a_call(reference: Profile) -> None:
    assert (reference.calls, reference.steps, reference.images) == (1, 3, 8)
    assert [row.name for row in reference.rows("step") if row.name.startswith("step")] == [
        "step 0", "step 1", "step 2",
    ]  # fmt: skip
    parts = {row.name: row for row in reference.rows("part")}
    assert parts["steps"].calls == 3
    assert {"encode_prompt", "prepare_latents", "decode_latents", "postprocess_video"} <= set(parts)
    components = {row.name: row.calls for row in reference.rows("component")}
    assert components["unet"] == components["scheduler.step"] == 3
    assert {"text_encoder", "vae.decode", "vae.decoder"} <= set(components)
    stages = {row.name for row in reference.rows("stage")}
    assert {"unet.mid_block", "vae.decoder.mid_block", "text_encoder.encoder"} <= stages
    groups = {row.name: row for row in reference.rows("group")}
    group = groups["unet.mid_block/mid_block.resnets.0"]
    assert group.calls == 3
    assert group.recorded == 1
    assert group.flops > 0
    assert group.slices >= 3


def test_ranges_nest_and_operators_lie_in_theirs(reference: Profile) -> None:
    found = reference.analysis
    for span in found.spans:
        assert span.begin <= span.end
        if span.parent >= 0:
            outer = found.spans[span.parent]
            assert outer.begin <= span.begin
            assert span.end <= outer.end
    recorded = {found.spans[op.span].step for op in found.recorded.ops if op.span >= 0}
    assert recorded == {-1, 1}
    slack = 200_000  # between the two clocks, in nanoseconds
    outside = [
        op
        for op in found.recorded.ops
        if op.span >= 0
        and not found.spans[op.span].begin - slack < op.begin < found.spans[op.span].end + slack
    ]
    assert outside == []
    ours = {op.name for op in found.recorded.ops if op.name.startswith("accelrt::")}
    assert {"accelrt::group_norm_apply", "accelrt::temporal_attention"} <= ours


def test_trace(reference: Profile, tmp_path: Path) -> None:
    path = reference.save(tmp_path / "trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    ranges = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in ranges)
    names = {event["name"] for event in ranges}
    assert "step 1/unet.mid_block/mid_block.resnets.0" in names
    assert "step 1/unet.mid_block/mid_block.resnets.0/accelrt::group_norm_apply" in names
    assert "step 2/scheduler.step" in names
    counters = {event["name"] for event in events if event["ph"] == "C"}
    assert {"live tensors, MiB", "slice", "process, MiB"} <= counters
    with pytest.raises(ValueError, match=r"\.json"):
        reference.save(tmp_path / "trace.txt")


@pytest.mark.parametrize("width", [80, 200])
def test_names_and_numbers_are_whole_in_any_width(reference: Profile, width: int) -> None:
    table = reference.table("group", 5)
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    for row in reference.rows("group")[:5]:
        assert row.name[:25] in text
        _, total, share, *_ = cells(reference, row)
        assert total in text
        assert width == 80 or share in text  # in 80 columns another column may have that number
    assert ("share" in text.partition("Not shown")[0]) == (width == 200)
    caption = " ".join(text.split())
    assert ("Not shown in this width: self s, calls" in caption) == (width == 80)
    assert len(table.columns) == 10


def test_totals_are_consistent(reference: Profile) -> None:
    whole = sum(row.seconds for row in reference.rows("part"))
    assert 0.9 * reference.seconds <= whole <= reference.seconds
    for by in ("part", "component", "stage", "group"):
        for row in reference.rows(by):
            assert 0 <= row.self_seconds <= row.seconds * (1 + 1e-9)
    unet = next(row for row in reference.rows("component") if row.name == "unet")
    inside = [row for row in reference.rows("stage") if row.name.startswith("unet.")]
    assert sum(row.flops for row in inside) == pytest.approx(unet.flops)
    assert sum(row.flops for row in reference.rows("op")) == pytest.approx(
        sum(row.flops for row in reference.rows("part"))
    )


def test_flops_are_those_of_torch() -> None:
    model, inputs = zoo.tiny_unet(), zoo.unet_inputs(2, 3, 8, 8)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        with accelrt.profile(model, ceilings=False, ops_every=1) as prof:
            model(**inputs)
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    ours = {row.name: row.flops for row in prof.rows("op")}
    assert ours["aten::mm"] == counted["aten.mm"]
    assert ours["aten::addmm"] == counted["aten.addmm"]
    convolutions = sum(flops for name, flops in ours.items() if "conv" in name)
    assert convolutions == counted["aten.convolution"]
    attention = sum(flops for name, flops in ours.items() if "attention" in name)
    assert attention > 0  # torch counts none of it on the CPU
    row = next(row for row in prof.rows("component") if row.name == "UNetMotionModel")
    assert row.flops == counter.get_total_flops() + attention


def test_bytes_and_live_memory() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 32)).eval()
    x = torch.randn(100, 64)
    with torch.no_grad(), accelrt.profile(model, ceilings=False) as prof:
        model(x)
    rows = {row.name: row for row in prof.rows("op")}
    products = 4 * (100 * 64 + 64 * 256 + 256 + 100 * 256)
    products += 4 * (100 * 256 + 256 * 32 + 32 + 100 * 32)
    assert rows["aten::addmm"].bytes == products
    assert rows["aten::linear"].bytes == 0
    assert rows["aten::clamp_min"].bytes == 2 * 4 * 100 * 256
    assert prof.peak_bytes >= 2 * 4 * 100 * 256


def state_of(pipe: Any) -> tuple[Any, ...]:
    """Everything that a profile sets, for as long as it is open."""
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    modules = [module for part in parts for module in part.modules()]
    owners = [pipe, pipe.scheduler, pipe.video_processor, *modules]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    return (
        [sorted(vars(owner)) for owner in owners],
        hooks,
        type(pipe).__dict__.get("__call__"),
        [(forward.observer, forward.watcher) for _, forward in forwards(pipe)],
        slicing._on_slice,
        arena._on_block,
        torch.autograd._profiler_enabled(),  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("wrapped", [True, False])
def test_nothing_is_left_behind(tiny: Any, wrapped: bool) -> None:
    if wrapped:
        accelrt.wrap(tiny)
    try:
        truth = call(tiny)
        before = state_of(tiny)
        with accelrt.profile(tiny, ceilings=False) as prof:
            assert state_of(tiny) != before
            with pytest.raises(ValueError, match="one at a time"), accelrt.profile(tiny):
                pass
            ours = call(tiny)
        assert torch.equal(ours, truth)
        assert state_of(tiny) == before
        assert prof.steps == 3
        assert "unet.mid_block" in {row.name for row in prof.rows("stage")}
        groups = {row.name for row in prof.rows("group")}
        path = "mid_block.resnets.0" if wrapped else "decoder.mid_block"
        assert any(name.startswith("vae.decoder") and path in name for name in groups)
        assert all(row.slices == 0 for row in prof.rows("group")) is not wrapped
    finally:
        if wrapped:
            accelrt.unwrap(tiny)


def test_an_exception_leaves_nothing_behind(tiny: Any) -> None:
    def fails(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            raise KeyError("callback")
        return {}

    accelrt.wrap(tiny)
    try:
        before = state_of(tiny)
        with (
            pytest.raises(KeyError, match="callback"),
            accelrt.profile(tiny) as prof,
        ):
            call(tiny, callback_on_step_end=fails)
        assert state_of(tiny) == before
        assert prof.ceilings is None
        assert prof.steps == 2  # the third never began
        assert all(span.end >= span.begin > 0 for span in prof.analysis.spans)
        with accelrt.profile(tiny, ceilings=False) as again:
            call(tiny)
        assert again.steps == 3
    finally:
        accelrt.unwrap(tiny)


def test_unwrap_within_the_block(tiny: Any) -> None:
    before = state_of(tiny)
    accelrt.wrap(tiny, rehash="auto")
    with accelrt.profile(tiny, ceilings=False, ops_every=0) as prof:
        call(tiny)
        accelrt.unwrap(tiny)
        call(tiny)
    assert state_of(tiny) == before
    assert (prof.calls, prof.steps) == (2, 6)
    assert prof.analysis.recorded.ops == []
    assert all(row.utilisation(prof.ceilings) is None for row in prof.rows("group"))


def test_other_threads_pass_through(tiny: Any) -> None:
    results: list[torch.Tensor] = []
    with accelrt.profile(tiny, ceilings=False, ops_every=0) as prof:
        thread = threading.Thread(target=lambda: results.append(call(tiny)))
        thread.start()
        thread.join()
    assert len(results) == 1
    assert prof.analysis.spans == []
    assert prof.coverage == 0


def test_layout_of_the_arena() -> None:
    vae = accelrt.wrap(zoo.tiny_vae(), memory_budget="min")
    with torch.no_grad(), accelrt.profile(vae, ceilings=False, ops_every=0) as prof:
        vae.decode(zoo.normal(2, 4, 32, 32))
    slab = max(size for _, _, size in prof.arena)
    assert len(prof.blocks) >= 4
    assert all(offset >= 0 and offset + size <= slab for offset, size, _, _ in prof.blocks)
    for i, (offset, size, born, died) in enumerate(prof.blocks):
        for other, more, after, _ in prof.blocks[i + 1 :]:
            if born < after < died:
                assert other + more <= offset or offset + size <= other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops_every": -1}, "ops_every is -1; allowed: an integer >= 0"),
        ({"ops_every": True}, "ops_every is True"),
        ({"nvtx": True}, "nvtx is True; allowed only where torch has a CUDA device"),
    ],
)
def test_wrong_arguments(tiny: Any, arguments: Any, message: str) -> None:
    if torch.cuda.is_available() and "nvtx" in arguments:
        pytest.skip("there is CUDA here")
    before = state_of(tiny)
    with pytest.raises(ValueError, match=message), accelrt.profile(tiny, **arguments):
        pass
    assert state_of(tiny) == before


def test_one_profiler_at_a_time(tiny: Any) -> None:
    before = state_of(tiny)
    with torch.profiler.profile() as theirs:
        with pytest.raises(ValueError, match="torch's profiler runs already; leave it"):
            accelrt.profile(tiny, ceilings=False).__enter__()
        torch.zeros(3).add(1)
    assert any(event.key == "aten::add" for event in theirs.key_averages())
    assert state_of(tiny) == before
    with accelrt.profile(tiny, ceilings=False) as prof:
        call(tiny)
    assert prof.steps == 3


def test_wrong_questions(reference: Profile, tiny: Any) -> None:
    with pytest.raises(ValueError, match="int cannot be profiled"):
        accelrt.profile(3)
    with pytest.raises(RuntimeError, match="leave its block"):
        accelrt.profile(tiny).rows()
    with pytest.raises(ValueError, match="by is 'layer'; allowed: step, part"):
        reference.rows("layer")
    with pytest.raises(ValueError, match="top is 0; allowed: an integer >= 1"):
        reference.table(top=0)
    with pytest.raises(ValueError, match="open another"), reference:
        pass


# Steps


def names(recorder: Recorder) -> list[str]:
    return [
        span.name
        for index, span in enumerate(recorder.spans)
        if span.kind == STEP and index not in recorder.dropped
    ]


def run_step(recorder: Recorder) -> None:
    recorder.close(recorder.open(COMPONENT, "unet"))
    recorder.close(recorder.open(COMPONENT, "scheduler.step"))
    recorder.stepped()


def test_a_loop_that_is_shorter_than_the_schedule() -> None:
    """As image-to-image pipelines run it."""
    seen: list[int] = []
    recorder = Recorder(on_step=seen.append)
    whole = recorder.open(spans.CALL, "call")
    recorder.close(recorder.open(COMPONENT, "scheduler.set_timesteps"))
    recorder.begin_request(4)
    recorder.close(recorder.open(COMPONENT, "vae.encode"))
    recorder.close(recorder.open(COMPONENT, "scheduler.add_noise"))
    recorder.begin_loop()
    run_step(recorder)
    run_step(recorder)
    recorder.close(recorder.open(PART, "decode_latents"))
    recorder.end_loop()
    recorder.close(whole)
    assert names(recorder) == ["step 0", "step 1"]
    assert seen[-1] == -1
    decode = next(span for span in recorder.spans if span.name == "decode_latents")
    assert recorder.spans[decode.parent].kind == spans.CALL


def test_a_pipeline_without_a_progress_bar() -> None:
    recorder = Recorder()
    recorder.begin_request(2)
    run_step(recorder)
    run_step(recorder)
    recorder.close(recorder.open(COMPONENT, "unet"))  # of no step any more
    assert names(recorder) == ["step 0", "step 1"]
    assert recorder.spans[-1].step == -1


def test_innermost_range() -> None:
    ranges = [
        spans.Span("call", "a", -1, 10, 100),
        spans.Span("group", "b", 0, 20, 40),
        spans.Span("group", "c", 0, 40, 60),
    ]
    assert innermost(ranges, [5, 15, 30, 45, 80, 120]) == [-1, 0, 1, 2, 0, -1]
