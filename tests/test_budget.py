"""Memory budgets: planned, kept, refused; the predicted peak is the measured one."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
import zoo_pixart
import zoo_unet2d
from model_zoo import one_thread  # noqa: F401
from torch import Tensor
from typer.testing import CliRunner
from zoo_svd import run_svd, svd_inputs, svd_pipeline, tiny_svd_unet

import accelrt
from accelrt.cli.app import app
from accelrt.config import Config
from accelrt.groups import State
from accelrt.memory import track_peak
from accelrt.memory.arena import Arena
from accelrt.memory.sizes import parse_budget
from accelrt.planning import cost, search
from accelrt.planning.clone import meta_clone

MIB = 2**20
RUNGS = search.RUNGS
# For plans whose search is not the point: few ways to look at.
SHORT_SEARCH: dict[str, Any] = {"slice_mib": 0.02, "recompute": "never"}


@pytest.fixture(autouse=True)
def rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that do not depend on the machine, and look at few ways to cut.

    Of all of them is chosen where the predicted peak is measured.
    """
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cost, "profile", lambda device, dtype: cost.Machine())
    monkeypatch.setattr(search, "RUNGS", (8.0, 0.5, RUNGS[-1]))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (123, 123),
        ("4GiB", 4 * 2**30),
        ("3.5 GiB", 3.5 * 2**30),
        ("512 mib", 512 * MIB),
        ("2GB", 2e9),
        ("100b", 100),
        ("auto", "auto"),
        (" MIN ", "min"),
    ],
)
def test_sizes(text: Any, count: Any) -> None:
    assert parse_budget(text) == count


@pytest.mark.parametrize(
    "value", [0, -1, True, 1.5, "", "4", "4 Gi", "-4GiB", "0GiB", "much", None]
)
def test_wrong_sizes(value: Any) -> None:
    with pytest.raises(ValueError, match=r"memory_budget is .*; allowed: "):
        parse_budget(value)


def test_config_takes_a_budget() -> None:
    assert Config(memory_budget="4GiB").to_dict()["memory_budget"] == "4GiB"
    with pytest.raises(ValueError, match="memory_budget is 'x'"):
        accelrt.wrap(zoo.tiny_unet(), memory_budget="x")
    with pytest.raises(ValueError, match="recompute is 'maybe'; allowed: allow, never, always"):
        Config(recompute="maybe")


Run = Callable[[Any], Tensor]


def _run(inputs: dict[str, Any]) -> Run:
    return lambda model: model(**inputs).sample


MODELS: dict[str, tuple[Callable[[], Any], Run]] = {
    "motion": (zoo.tiny_unet, _run(zoo.unet_inputs(2, 7, 32, 32))),
    "svd": (tiny_svd_unet, _run(svd_inputs(2, 7, 24, 32))),
    "unet2d": (zoo_unet2d.sd15, _run(zoo_unet2d.inputs(3, 32, 32))),
    "dit": (
        lambda: zoo.tiny_dit(32),
        _run(
            {
                "hidden_states": zoo.normal(4, 4, 32, 32),
                "timestep": torch.tensor([1, 2, 3, 4]),
                "class_labels": torch.tensor([1, 2, 3, 4]),
            }
        ),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_predicted_peak_is_the_measured_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the least memory, and within two budgets that are multiples of it."""
    monkeypatch.setattr(search, "RUNGS", RUNGS)
    build, run = MODELS[name]
    model = build()
    with torch.no_grad():
        stock = run(model)
    least = 0
    for multiple in (1, 21, 41):
        budget = "min" if multiple == 1 else multiple * least
        accelrt.wrap(model, memory_budget=budget)
        with torch.no_grad():
            for _ in range(2):  # the first run plans
                with track_peak() as memory:
                    result = run(model)
        planner = model.forward.planner
        plan = planner.plans[""]
        assert memory.peak_bytes == pytest.approx(plan.peak_bytes, rel=0.03)
        assert plan.peak_bytes <= plan.reserved_bytes
        if multiple == 1:
            least = plan.reserved_bytes
        else:
            assert plan.reserved_bytes <= budget
        (arena,) = planner.arenas
        assert arena.spills == arena.misplaced == 0
        assert arena.peak_bytes <= plan.slab_bytes
        assert zoo.relative_error(result, stock) < 1e-5
        accelrt.unwrap(model)


def test_a_loose_budget_is_the_fastest_plan() -> None:
    model = accelrt.wrap(zoo.tiny_unet(), memory_budget="1GiB")
    with torch.no_grad():
        model(**zoo.unet_inputs(2, 7, 16, 16))
    plan = model.forward.planner.plans[""]
    assert plan.samples_per_pass is None
    assert not plan.recompute_skips
    assert all(g.slice_mib is None and not g.bands and not g.recompute for g in plan.groups)


def test_recompute_never_is_kept() -> None:
    model = accelrt.wrap(zoo.tiny_unet(), memory_budget="min", recompute="never")
    with torch.no_grad():
        model(**zoo.unet_inputs(2, 7, 16, 16))
    plan = model.forward.planner.plans[""]
    assert not plan.recompute_skips
    assert not any(g.recompute for g in plan.groups)


class _Counts:
    """Counts operators that compute."""

    def __init__(self, model: Any) -> None:
        self.calls = 0
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_pre_hook(self._count)

    def _count(self, module: Any, args: Any) -> None:
        self.calls += args[0].device.type != "meta"


def test_a_budget_that_cannot_be_met_is_refused_before_any_work() -> None:
    model = zoo.tiny_unet()
    counts = _Counts(model)
    accelrt.wrap(model, memory_budget="100 KiB")
    refusal = pytest.raises(accelrt.BudgetError, match="cannot be met: the smallest is")
    with torch.no_grad(), refusal as refused:
        model(**zoo.unet_inputs(2, 7, 16, 16))
    assert counts.calls == 0
    error = refused.value
    assert error.budget_bytes == 100 * 2**10 < error.smallest_bytes
    assert error.binding
    accelrt.unwrap(model)
    accelrt.wrap(model, memory_budget=error.smallest_bytes)
    with torch.no_grad():
        model(**zoo.unet_inputs(2, 7, 16, 16))  # what the error names is enough


def test_weights_alone_are_refused_at_once() -> None:
    pipe = zoo.animatediff_pipeline()
    with pytest.raises(accelrt.BudgetError, match="the weights alone are"):
        accelrt.wrap(pipe, memory_budget="10 KiB")
    assert not accelrt.is_wrapped(pipe)


def test_a_decoder_that_does_not_fit_is_refused_before_the_first_step() -> None:
    pipe = zoo.animatediff_pipeline()
    size = {"height": 72, "width": 120, "num_frames": 4}
    least = accelrt.plan(pipe, **size, memory_budget="min")
    decoder, unet = (
        next(p for p in least.components if p.path == path) for path in ("vae.decoder", "unet")
    )
    assert unet.total_bytes < decoder.total_bytes  # the VAE of the tiny pipeline is the larger
    counts = _Counts(pipe.unet)
    accelrt.wrap(pipe, memory_budget=(unet.total_bytes + decoder.total_bytes) // 2)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(accelrt.BudgetError, match=r"vae\.decoder"):
            pipe.unet(**zoo.unet_inputs(2, 4, 9, 15))
    assert counts.calls == 0


def test_pipelines_keep_a_budget_and_stay_exact() -> None:
    pipe = svd_pipeline()
    with torch.no_grad():
        stock = run_svd(pipe)
        accelrt.wrap(pipe, memory_budget="min")
        result = run_svd(pipe)
    planner = pipe.unet.forward.planner
    assert set(planner.plans) == {"unet", "vae.encoder"}  # the latents are what is returned
    assert zoo.relative_error(result, stock) < 1e-4
    accelrt.unwrap(pipe)
    with torch.no_grad():
        assert torch.equal(run_svd(pipe), stock)


def test_forty_requests_of_changing_shapes_leave_reserved_memory_flat() -> None:
    model = accelrt.wrap(zoo.tiny_unet(), memory_budget="1MiB")
    planner: Any = model.forward.planner
    shapes = [(2, 3, 8, 8), (1, 5, 12, 16), (2, 2, 16, 8), (1, 7, 8, 8), (2, 4, 12, 12)]
    reserved: dict[int, set[int]] = {}
    for request in range(40):
        batch, frames, height, width = shapes[request % len(shapes)]
        with torch.no_grad():
            model(**zoo.unet_inputs(batch, frames, height, width))
        (arena,) = planner.arenas
        assert arena.live_bytes == 0
        reserved.setdefault(request % len(shapes), set()).add(arena.reserved_bytes)
        plan = planner.plans[""]
        assert arena.reserved_bytes == plan.slab_bytes
        assert plan.reserved_bytes <= MIB
    assert all(len(sizes) == 1 for sizes in reserved.values())
    assert arena.spills == arena.misplaced == 0
    accelrt.unwrap(model)
    assert arena.reserved_bytes == 0


def test_plans_of_sizes_long_gone_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelrt.planning.budget.KEPT_PLANS", 2)
    model = accelrt.wrap(zoo.tiny_dit(), memory_budget="64MiB")
    planner: Any = model.forward.planner
    with torch.no_grad():
        for batch in (1, 2, 3, 1, 2, 2):
            model(
                zoo.normal(batch, 4, 8, 8), torch.full((batch,), 500),
                class_labels=torch.arange(batch),
            )  # fmt: skip
            assert len(planner._planned) <= 2


def test_addresses_are_the_same_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelrt.wrap(zoo.tiny_unet(), memory_budget="min", slice_mib=0.02)
    inputs = zoo.unet_inputs(2, 7, 32, 32)
    addresses: list[int] = []
    empty = Arena.empty

    def recorded(self: Arena, *args: Any, **kwargs: Any) -> Tensor:
        tensor = empty(self, *args, **kwargs)
        addresses.append(tensor.data_ptr())
        return tensor

    with torch.no_grad():
        model(**inputs)
        monkeypatch.setattr(Arena, "empty", recorded)
        model(**inputs)
        first, addresses[:] = addresses[:], []
        model(**inputs)
    assert len(first) > 20
    assert first == addresses


def test_features_that_are_kept_are_never_overwritten() -> None:
    """Who keeps a tensor of the arena has it for good; the run spills, and says so."""

    class Keeper:
        def __init__(self) -> None:
            self.kept: list[tuple[Tensor, Tensor]] = []

        def enter(self, stage: Any, group: Any, state: State) -> None:
            pass

        def leave(self, stage: Any, group: Any, state: State) -> None:
            if state.hidden is not None:
                state.hold(state.hidden)
                self.kept.append((state.hidden, state.hidden.clone()))

    model = zoo.tiny_unet()
    inputs = zoo.unet_inputs(1, 7, 32, 32)
    with torch.no_grad():
        stock = model(**inputs).sample
        accelrt.wrap(model, memory_budget="min", **SHORT_SEARCH)
        model(**inputs)
        model.forward.observer = keeper = Keeper()
        with pytest.warns(UserWarning, match="found no room in the planned arena"):
            assert zoo.relative_error(model(**inputs).sample, stock) < 1e-5
        model.forward.observer = None
        assert all(torch.equal(kept, copy) for kept, copy in keeper.kept)
        planner: Any = model.forward.planner
        assert planner.exceeded() > 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**inputs)  # once


def test_two_threads_share_a_model() -> None:
    model = zoo.tiny_unet()
    inputs = [zoo.unet_inputs(1, frames, 16, 16) for frames in (3, 5)]
    with torch.no_grad():
        stock = [model(**one).sample for one in inputs]
        accelrt.wrap(model, memory_budget="min", **SHORT_SEARCH)
        results: dict[int, list[Tensor]] = {0: [], 1: []}

        def work(index: int) -> None:
            with torch.no_grad():
                for _ in range(4):
                    results[index].append(model(**inputs[index]).sample)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, outputs in results.items():
        assert len(outputs) == 4
        assert all(zoo.relative_error(out, stock[index]) < 1e-5 for out in outputs)


def test_changed_modules_are_planned_anew() -> None:
    model = accelrt.wrap(zoo.tiny_unet(), memory_budget="min", **SHORT_SEARCH)
    inputs = zoo.unet_inputs(1, 3, 16, 16)
    with torch.no_grad():
        model(**inputs)
        before = model.forward.planner.plans[""]
        handle = model.down_blocks[0].register_forward_hook(lambda *_: None)
        model(**inputs)
        after = model.forward.planner.plans[""]
        handle.remove()
    names = [{group.name for group in plan.groups} for plan in (before, after)]
    assert "down_blocks.0.resnets.0" in names[0]
    assert "down_blocks.0.resnets.0" not in names[1]
    assert "down_blocks.0" in names[1]


def test_a_double_has_no_weights_and_changes_nothing() -> None:
    model = accelrt.wrap(zoo.tiny_unet())
    keys = list(model.state_dict())
    double = meta_clone(model)
    assert list(double.state_dict()) == keys
    assert all(p.device.type == "meta" for p in double.parameters())
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert double.forward is not model.forward


def test_plan_of_a_pipeline_without_weights(tmp_path: Path) -> None:
    pipe = zoo.animatediff_pipeline()
    real = accelrt.plan(pipe, height=16, width=32, num_frames=3, memory_budget="min")
    for component in (pipe.unet, pipe.vae, pipe.motion_adapter):
        component.to("meta")
    plan = accelrt.plan(pipe, height=16, width=32, num_frames=3, memory_budget="min")
    assert plan.peak_bytes == real.peak_bytes
    assert {part.path for part in plan.components} == {"vae.decoder", "unet"}
    assert set(plan.stock) == {"vae.decoder", "unet"}
    assert plan.weights["unet"] > 0
    assert "peak" in str(plan)
    assert json.dumps(plan.to_dict())
    loose = accelrt.plan(pipe, height=16, width=32, num_frames=3, memory_budget="1GiB")
    assert loose.budget_bytes == 2**30 >= loose.peak_bytes


def test_plan_refuses_wrong_sizes() -> None:
    model = zoo.tiny_unet()
    with pytest.raises(ValueError, match="height is 17; allowed: positive multiples of 8"):
        accelrt.plan(model, height=17)
    with pytest.raises(ValueError, match="batch is 0"):
        accelrt.plan(model, batch=0)
    # Its forward takes the picture for a square.
    with pytest.raises(ValueError, match="does not run at this size, a latent of 8x16: shape"):
        accelrt.plan(zoo.tiny_dit(), height=64, width=128, memory_budget="min")
    with pytest.raises(accelrt.UnsupportedModelError):
        accelrt.plan(torch.nn.Linear(2, 2))


def test_plan_command(tmp_path: Path) -> None:
    runner = CliRunner()
    folder, picture = tmp_path / "unet", tmp_path / "plan.png"
    zoo.tiny_unet().save_config(folder)
    command = ["plan", "--model", str(folder), "--height", "64", "--width", "64", "--frames", "3"]
    shown = runner.invoke(app, [*command, "--budget", "min", "--groups", "--out", str(picture)])
    assert shown.exit_code == 0, shown.output
    assert "mid_block.resnets.0" in shown.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    as_json = runner.invoke(app, [*command, "--budget", "64MiB", "--json"])
    assert json.loads(as_json.output)["budget_bytes"] == 64 * MIB
    assert runner.invoke(app, [*command, "--budget", "1KiB"]).exit_code == 2
    assert runner.invoke(app, ["plan", "--model", "nothing"]).exit_code == 2


def test_plan_command_of_a_pipeline_folder(tmp_path: Path) -> None:
    pipe = zoo_unet2d.pipeline()
    pipe.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    command = ["plan", "--model", str(tmp_path), "--height", "64", "--width", "64", "--json"]
    result = CliRunner().invoke(app, [*command, "--budget", "min"])
    assert result.exit_code == 0, result.output
    parts = {part["path"] for part in json.loads(result.output)["components"]}
    assert parts == {"vae.decoder", "unet"}


def test_pixart_with_captions_keeps_a_budget() -> None:
    pipe = zoo_pixart.sigma_pipeline()
    with torch.no_grad():
        stock = zoo_pixart.run(pipe)
        accelrt.wrap(pipe, memory_budget="min")
        assert zoo.relative_error(zoo_pixart.run(pipe), stock) < 1e-4


@pytest.mark.parametrize("place", ["mid_block", "down_blocks.0.resnets.0", "conv_out"])
def test_hooks_see_whole_batches_and_no_meta_tensors(place: str) -> None:
    seen: list[str] = []

    def flip(module: Any, args: Any, output: Tensor) -> Tensor:
        seen.append(output.device.type)
        assert output.sum().item() != 0
        return output.flip(0)

    model = zoo.tiny_unet()
    model.get_submodule(place).register_forward_hook(flip)
    inputs = zoo.unet_inputs(2, 3, 8, 8)
    with torch.no_grad():
        stock = model(**inputs).sample
        accelrt.wrap(model, memory_budget="min")
        assert zoo.relative_error(model(**inputs).sample, stock) < 1e-5
    assert set(seen) == {"cpu"}


@pytest.mark.parametrize("place", ["conv_out", "conv_norm_out"])
def test_hooks_at_the_end_see_whole_batches_in_small_slices(place: str) -> None:
    model = zoo.tiny_unet()
    model.get_submodule(place).register_forward_hook(lambda module, args, output: output.flip(0))
    inputs = zoo.unet_inputs(2, 3, 8, 8)
    with torch.no_grad():
        stock = model(**inputs).sample
        accelrt.wrap(model, slice_mib=0.02)
        assert zoo.relative_error(model(**inputs).sample, stock) < 1e-5


def _leaf_offload(model: Any) -> None:
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def _block_offload(model: Any) -> None:
    cpu = torch.device("cpu")
    model.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )


def _accelerate_offload(model: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, torch.device("cpu"))


def _casting(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


@pytest.mark.parametrize("place", [_leaf_offload, _block_offload, _accelerate_offload, _casting])
def test_offloaded_and_cast_weights_are_planned(place: Callable[[Any], None]) -> None:
    model = zoo.tiny_unet()
    place(model)
    inputs = zoo.unet_inputs(2, 3, 8, 8)
    with torch.no_grad():
        stock = model(**inputs).sample
        accelrt.wrap(model, memory_budget="min", slice_mib=0.02, recompute="always")
        assert zoo.relative_error(model(**inputs).sample, stock) < 1e-5


def test_a_new_processor_is_planned_anew() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model = accelrt.wrap(zoo.tiny_unet(), memory_budget="min", **SHORT_SEARCH)
    inputs = zoo.unet_inputs(1, 3, 8, 8)
    with torch.no_grad():
        model(**inputs)
        first = model.forward.planner.plans[""]
        model(**inputs)
        assert model.forward.planner.plans[""] is first
        model.set_attn_processor(AttnProcessor())
        model(**inputs)
    assert model.forward.planner.plans[""] is not first


def test_a_refusal_stays_one() -> None:
    model = accelrt.wrap(zoo.tiny_unet(), memory_budget="100 KiB", **SHORT_SEARCH)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(accelrt.BudgetError):
            model(**zoo.unet_inputs(1, 3, 16, 16))


def test_always_recomputing_is_kept_under_a_budget() -> None:
    model = accelrt.wrap(zoo.tiny_unet(), memory_budget="1GiB", recompute="always")
    with torch.no_grad():
        model(**zoo.unet_inputs(1, 3, 8, 8))
    plan = model.forward.planner.plans[""]
    assert plan.recompute_skips
    assert all(group.recompute for group in plan.groups)


def test_plan_takes_the_budget_of_a_config() -> None:
    plan = accelrt.plan(zoo.tiny_unet(), config=Config(memory_budget="64MiB"))
    assert plan.budget_bytes == 64 * MIB


def test_what_a_plan_says_is_enough_for_a_wrap() -> None:
    pipe = zoo.animatediff_pipeline()
    plan = accelrt.plan(pipe, height=72, width=120, num_frames=4, memory_budget="min")
    accelrt.wrap(pipe, memory_budget=plan.peak_bytes)
    with torch.no_grad():
        pipe.unet(**zoo.unet_inputs(2, 4, 9, 15))


def test_calls_without_a_plan_say_so_once() -> None:
    model = accelrt.wrap(zoo.tiny_unet(), memory_budget="1GiB")
    inputs = zoo.unet_inputs(1, 2, 8, 8)
    with pytest.warns(UserWarning, match="runs without its memory budget: gradients are needed"):
        model(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)


def test_random_state_of_the_user_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    cost.profile(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.rand(3), expected)
