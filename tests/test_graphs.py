"""CUDA graphs of single models, recorded on the CPU: what replays compute, and when they are."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import model_zoo as zoo
import pytest
import torch
import zoo_pixart
import zoo_unet2d
from graphs_common import MODELS, backends, call, dit_inputs, drawn, pair, report
from model_zoo import one_thread
from recording_backend import RecordingBackend
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import accelrt
from accelrt.steps.graphs import WARMING
from accelrt.wrap import forwards

__all__ = ["backends", "one_thread"]


@pytest.mark.parametrize("name", MODELS)
def test_replays_are_the_eager_forward_bit_for_bit(
    name: str, backends: list[RecordingBackend]
) -> None:
    build, inputs = MODELS[name]
    model, eager = pair(build)
    for draw in range(4):
        given = drawn(inputs(), draw)
        assert torch.equal(call(model, given), call(eager, given)), draw
    found = report(model)
    assert (found.captures, found.replays, found.eager) == (1, 3, {WARMING: 1})
    assert found.static_bytes > 0
    assert backends[0].events == ["warm-up", "capture", "replay", "replay", "replay"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MODELS)
def test_graphs_of_a_gpu_give_the_bits_of_the_eager_forward(name: str) -> None:
    build, inputs = MODELS[name]
    model, eager = (one.to("cuda") for one in pair(build))
    for draw in range(4):
        given = tree_map_only(Tensor, lambda t: t.to("cuda"), drawn(inputs(), draw))
        assert torch.equal(call(model, given), call(eager, given)), draw
    assert (report(model).captures, report(model).replays) == (1, 3)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("animatediff-small", torch.bfloat16),
        ("svd", torch.float16),
        ("unet2d", torch.bfloat16),
        ("dit", torch.float64),
        ("pixart", torch.float16),
    ],
    ids=str,
)
def test_in_every_dtype(name: str, dtype: torch.dtype, backends: list[RecordingBackend]) -> None:
    build, inputs = MODELS[name]
    model, eager = pair(build, dtype)
    for draw in range(3):
        given = zoo.to_dtype(drawn(inputs(), draw), dtype)
        assert torch.equal(call(model, given), call(eager, given))
    assert report(model).replays == 2


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("animatediff-small", {"frames_per_slice": 2, "pixels_per_slice": 5, "ff_rows": 7}),
        ("unet2d", {"samples_per_pass": 1}),
        ("unet2d-2", {"slice_mib": 0.02, "bands": True}),
        ("unet2d", {"recompute": "always"}),
        ("pixart", {"slice_mib": 0.001}),
        ("pixart", {"fuse": False}),
        ("pixart", {"inplace": False, "samples_per_pass": 1}),
    ],
    ids=str,
)
def test_however_the_call_is_cut(
    name: str, settings: dict[str, Any], backends: list[RecordingBackend]
) -> None:
    build, inputs = MODELS[name]
    model, eager = pair(build, **settings)
    for draw in range(3):
        given = drawn(inputs(), draw)
        assert torch.equal(call(model, given), call(eager, given))
    assert report(model).replays >= 2
    assert report(model).captures == 1  # parts of a call share it


@pytest.mark.parametrize(
    ("name", "kind"),
    [("animatediff-small", int), ("svd", float), ("unet2d", torch.tensor)],
    ids=["int", "float", "tensor"],
)
def test_a_timestep_that_is_a_number_is_no_part_of_the_graph(
    name: str, kind: Any, backends: list[RecordingBackend]
) -> None:
    build, inputs = MODELS[name]
    model, eager = pair(build)
    for step in (900, 700, 500):
        given = {**inputs(), "timestep": kind(step)}
        assert torch.equal(call(model, given), call(eager, given))
    assert (report(model).captures, report(model).replays) == (1, 2)


def test_residuals_of_a_controlnet_and_features_of_an_adapter(
    backends: list[RecordingBackend],
) -> None:
    model, eager = pair(zoo_unet2d.sd15)
    for draw in range(3):
        given = drawn(zoo_unet2d.inputs(2, 8, 8), draw)
        down = zoo_unet2d.residuals(zoo_unet2d.SKIPS)
        given["down_block_additional_residuals"] = [r.float() * (draw + 1) for r in down]
        given["mid_block_additional_residual"] = zoo.normal(2, 32, 2, 2, seed=draw)
        assert torch.equal(call(model, given), call(eager, given))
    for draw in range(3):
        given = drawn(zoo_unet2d.inputs(2, 8, 8), draw)
        features = zoo_unet2d.residuals(zoo_unet2d.ADAPTER)
        outputs = []
        for one in (model, eager):  # which empty the list
            again = [f.float() * (draw + 1) for f in features]
            outputs.append(call(one, {**given, "down_intrablock_additional_residuals": again}))
        assert torch.equal(*outputs)
    assert (report(model).captures, report(model).replays) == (2, 4)


def test_frames_that_stop_sharing_their_context(backends: list[RecordingBackend]) -> None:
    model, eager = pair(zoo.tiny_unet)
    shared, apart = zoo.unet_inputs(2, 3, 8, 8), zoo.unet_inputs(2, 3, 8, 8, per_frame_context=True)
    for draw, given in enumerate((shared, shared, apart, apart, shared, apart)):
        given = drawn(given, draw)
        assert torch.equal(call(model, given), call(eager, given))
    assert report(model).captures == 2  # what was decided from values is part of the form


def test_strided_expanded_and_inference_inputs(backends: list[RecordingBackend]) -> None:
    model, eager = pair(zoo.tiny_dit)
    for draw in range(3):
        given = drawn(dit_inputs(), draw)
        given["hidden_states"] = given["hidden_states"].to(memory_format=torch.channels_last)
        given["timestep"] = torch.tensor(5 + draw).expand(2)
        assert torch.equal(call(model, given), call(eager, given))
    assert report(model).replays == 2
    outputs = []
    for draw in range(4):
        with torch.inference_mode(draw % 2 == 0):
            given = drawn(dit_inputs(), draw)
            outputs.append((call(model, given), call(eager, given)))
    assert all(torch.equal(a, b) for a, b in outputs)
    assert report(model).captures == 2


def test_results_stay_what_they_were(backends: list[RecordingBackend]) -> None:
    model, eager = pair(zoo.tiny_dit)
    given = [drawn(dit_inputs(), draw) for draw in range(5)]
    outputs = [call(model, one) for one in given]
    assert all(torch.equal(a, call(eager, b)) for a, b in zip(outputs, given, strict=True))


def test_other_shapes_have_graphs_of_their_own(backends: list[RecordingBackend]) -> None:
    model, eager = pair(zoo.tiny_dit)
    for draw in range(3):
        for batch, side in ((2, 8), (1, 8), (2, 4), (3, 12)):
            given = drawn(dit_inputs(batch, side), draw)
            assert torch.equal(call(model, given), call(eager, given))
    assert (report(model).captures, report(model).replays) == (4, 8)


def test_all_graphs_of_a_wrap_are_of_one_pool(backends: list[RecordingBackend]) -> None:
    model, _ = pair(zoo.tiny_dit)
    for batch in (1, 2, 3):
        for _ in range(2):
            call(model, dit_inputs(batch))
    (backend,) = backends
    assert [len(graphs) for graphs in backend.graphs.values()] == [3]


def test_the_least_recently_used_goes_first(backends: list[RecordingBackend]) -> None:
    model, eager = pair(zoo.tiny_dit, max_cuda_graphs=2)
    forms = [dit_inputs(2, 8), dit_inputs(1, 8), dit_inputs(2, 4)]

    def run(*order: int) -> None:
        for form in order:
            assert torch.equal(call(model, forms[form]), call(eager, forms[form]))

    run(0, 0, 1, 1, 0, 2, 2)
    assert report(model).kept == 2
    assert report(model).dropped == {"more than are kept": 1}
    assert backends[0].resets == 1
    run(0)  # was used after 1, so it is still there
    assert report(model).captures == 3
    run(1, 1)
    assert report(model).captures == 4
    assert report(model).kept == 2


# Invalidation


def _freeu(model: Any) -> None:
    for block in model.up_blocks:
        block.s1, block.s2, block.b1, block.b2 = 0.9, 0.2, 1.2, 1.4


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.conv_out.weight.mul_(1.5)


def _replaced(model: Any) -> None:
    model.conv_out.weight.data = model.conv_out.weight.data * 1.5


def _loaded(model: Any) -> None:
    model.load_state_dict({k: v * 1.01 for k, v in model.state_dict().items()})


def _processor(model: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model.set_attn_processor(AttnProcessor())


def _module(model: Any) -> None:
    model.conv_out = zoo.randomise(nn.Conv2d(16, 4, 3, padding=1), seed=5)


def _scale(model: Any) -> None:
    model.up_blocks[-1].resnets[0].output_scale_factor = 1.25


CHANGES = [_freeu, _in_place, _replaced, _loaded, _processor, _module, _scale]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__[1:])
def test_a_changed_model_is_captured_anew(change: Any, backends: list[RecordingBackend]) -> None:
    model, eager = pair(zoo_unet2d.two_levels)
    for draw in range(3):
        given = drawn(zoo_unet2d.inputs(2, 8, 8), draw)
        assert torch.equal(call(model, given), call(eager, given))
    assert report(model).kept == 1
    for one in (model, eager):
        change(one)
    for draw in range(3):
        given = drawn(zoo_unet2d.inputs(2, 8, 8), draw)
        assert torch.equal(call(model, given), call(eager, given))
    assert sum(report(model).dropped.values()) == 1
    assert backends[0].resets == 1
    if change is not _freeu:  # which writes a number into a tensor: refused, and eager
        assert (report(model).captures, report(model).kept) == (2, 1)


def test_another_dtype(backends: list[RecordingBackend]) -> None:
    model, eager = pair(zoo.tiny_dit)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        eager.to(dtype)
        for draw in range(3):
            given = zoo.to_dtype(drawn(dit_inputs(), draw), dtype)
            assert torch.equal(call(model, given), call(eager, given))
    assert report(model).captures == 3
    assert report(model).dropped == {"weights changed": 2}


def test_another_config(backends: list[RecordingBackend]) -> None:
    model, eager = pair(zoo.tiny_dit)
    for _ in range(3):
        call(model, dit_inputs())
    ((_, forward),) = forwards(model)
    forward.config = forward.config.override(samples_per_pass=1)
    for draw in range(3):
        given = drawn(dit_inputs(), draw)
        assert zoo.relative_error(call(model, given), call(eager, given).double()) < 1e-5
    assert report(model).captures == 2


def test_a_switch_of_torch_is_part_of_the_form(
    backends: list[RecordingBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = pair(zoo.tiny_dit)
    for _ in range(2):
        call(model, dit_inputs())
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    for _ in range(2):
        call(model, dit_inputs())
    assert report(model).captures == 2
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        for _ in range(2):
            call(model, dit_inputs())
    finally:
        torch.set_float32_matmul_precision(before)
    assert report(model).captures == 3


# Threads


def test_a_call_beside_another_runs_without(
    backends: list[RecordingBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, eager = pair(zoo.tiny_dit)
    for _ in range(2):
        call(model, dit_inputs())
    (backend,) = backends
    inside, go_on = threading.Event(), threading.Event()
    replay = backend.replay

    def slow(graph: Any) -> None:
        inside.set()
        assert go_on.wait(60)
        replay(graph)

    monkeypatch.setattr(backend, "replay", slow)
    first, second = drawn(dit_inputs(), 1), drawn(dit_inputs(), 2)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(call(model, first)))
    thread.start()
    assert inside.wait(60)
    out = call(model, second)
    go_on.set()
    thread.join()
    assert torch.equal(out, call(eager, second))
    assert torch.equal(found[0], call(eager, first))
    assert report(model).eager["another thread's call was running"] == 1


def test_many_threads(backends: list[RecordingBackend]) -> None:
    model, eager = pair(zoo.tiny_dit)
    given = [[drawn(dit_inputs(1 + i % 2), 10 * i + j) for j in range(6)] for i in range(4)]
    wanted = [[call(eager, one) for one in some] for some in given]
    wrong: list[int] = []

    def work(index: int) -> None:
        for one, expected in zip(given[index], wanted[index], strict=True):
            if not torch.equal(call(model, one), expected):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    found = report(model)
    assert found.replays + sum(found.eager.values()) == 24


# The switch, and the end


def test_without_the_setting_there_are_none() -> None:
    model = accelrt.wrap(zoo.tiny_dit())
    call(model, dit_inputs())
    assert accelrt.summary(model).graphs == ()
    assert forwards(model)[0][1].graphs is None


def test_on_the_cpu_it_is_refused_or_has_no_effect() -> None:
    model = accelrt.wrap(zoo.tiny_dit(), cuda_graphs=True)
    with pytest.raises(ValueError, match="cuda_graphs is True, but the call is on cpu"):
        call(model, dit_inputs())
    accelrt.unwrap(model)
    accelrt.wrap(model, cuda_graphs="auto")
    for _ in range(3):
        call(model, dit_inputs())
    assert report(model).eager == {"the call was on cpu": 3}


@pytest.mark.parametrize(
    ("setting", "value"),
    [("cuda_graphs", "yes"), ("cuda_graphs", 1), ("max_cuda_graphs", 0), ("max_cuda_graphs", True)],
)
def test_wrong_settings(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{setting} is"):
        accelrt.Config(**{setting: value})


def test_unwrap_releases_everything(backends: list[RecordingBackend]) -> None:
    stock = zoo.tiny_dit()
    model = copy.deepcopy(stock)
    accelrt.wrap(model, cuda_graphs=True)
    for _ in range(3):
        call(model, dit_inputs())
    ((_, forward),) = forwards(model)
    assert forward.graphs is not None
    cache = forward.graphs.cache
    memory = [weakref.ref(s) for g in backends[0].graphs[0] for s in g.made.values()]
    assert memory
    accelrt.unwrap(model)
    gc.collect()
    assert backends[0].resets == 1
    assert not cache.entries
    assert cache.pool_bytes() == 0
    assert all(reference() is None for reference in memory)
    assert torch.equal(call(model, dit_inputs()), call(stock, dit_inputs()))


def test_a_model_with_graphs_dies_with_its_last_reference(
    backends: list[RecordingBackend],
) -> None:
    model, _ = pair(zoo.tiny_dit)
    for _ in range(3):
        call(model, dit_inputs())
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_copies_have_graphs_of_their_own(backends: list[RecordingBackend]) -> None:
    model, eager = pair(zoo.tiny_dit)
    for _ in range(3):
        call(model, dit_inputs())
    double = copy.deepcopy(model)
    with torch.no_grad():
        double.proj_out_2.bias.add_(1)
    for draw in range(3):
        given = drawn(dit_inputs(), draw)
        assert torch.equal(call(model, given), call(eager, given))
        call(double, given)
    assert report(double).captures == 1
    assert len(backends) == 2


def test_the_summary_says_what_it_holds(backends: list[RecordingBackend]) -> None:
    model, _ = pair(zoo_pixart.tiny_pixart)
    for _ in range(3):
        call(model, zoo_pixart.inputs(2, 8, 8))
    text = str(accelrt.summary(model))
    assert "CUDA graphs of the model: 1 kept, 1 captured, 2 replays; pool" in text
    plain = accelrt.summary(model).to_dict()["graphs"]
    assert plain[0]["replays"] == 2
    assert plain[0]["pool_bytes"] > 0
