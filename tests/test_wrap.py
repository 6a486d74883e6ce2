"""Promises of wrap, unwrap and is_wrapped."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from model_zoo import one_thread  # noqa: F401
from torch import nn

import accelrt
from accelrt.models.unet_motion import UNetMotion

BUILD = {"unet": zoo.tiny_unet, "dit": zoo.tiny_dit, "vae": zoo.tiny_vae}


def call(name: str, model: Any, **options: Any) -> Any:
    with torch.no_grad():
        if name == "unet":
            return model(**zoo.unet_inputs(1, 2, 8, 8), **options)
        if name == "dit":
            x = zoo.normal(1, 4, 8, 8)
            labels = torch.tensor([3])
            return model(x, timestep=torch.tensor([5]), class_labels=labels, **options)
        return model.decode(zoo.normal(1, 4, 8, 8), **options)


def module_dicts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every module's own attributes, without the registries that hold the children."""
    hidden = ("_modules", "_parameters", "_buffers")
    return {
        name: {key: id(value) for key, value in module.__dict__.items() if key not in hidden}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", BUILD)
def test_nothing_is_left_after_unwrap(name: str) -> None:
    model = BUILD[name]()
    attributes, keys = module_dicts(model), list(model.state_dict())
    before = call(name, model).sample
    assert accelrt.wrap(model) is model
    assert accelrt.is_wrapped(model)
    call(name, model)
    assert accelrt.unwrap(model) is model
    assert not accelrt.is_wrapped(model)
    assert module_dicts(model) == attributes
    assert list(model.state_dict()) == keys
    assert torch.equal(call(name, model).sample, before)


@pytest.mark.parametrize("name", BUILD)
def test_class_signature_parameters_and_return_types_stay(name: str) -> None:
    model = BUILD[name]()
    target = model.decoder if name == "vae" else model
    before = (
        type(model),
        inspect.signature(target.forward),
        [(key, id(value)) for key, value in model.named_parameters()],
        [key for key, _ in model.named_buffers()],
        [key for key, _ in model.named_modules()],
        list(model.state_dict()),
    )
    accelrt.wrap(model)
    during = (
        type(model),
        inspect.signature(target.forward),
        [(key, id(value)) for key, value in model.named_parameters()],
        [key for key, _ in model.named_buffers()],
        [key for key, _ in model.named_modules()],
        list(model.state_dict()),
    )
    assert during == before
    assert target.forward.__name__ == "forward"
    assert target.forward.__doc__ == type(target).forward.__doc__


@pytest.mark.parametrize("name", BUILD)
def test_return_dict(name: str) -> None:
    model = BUILD[name]()
    with_dict, as_tuple = call(name, model), call(name, model, return_dict=False)
    accelrt.wrap(model)
    assert type(call(name, model)) is type(with_dict)
    result = call(name, model, return_dict=False)
    assert type(result) is type(as_tuple) is tuple
    assert len(result) == len(as_tuple)
    assert result[0].shape == as_tuple[0].shape
    assert result[0].stride() == as_tuple[0].stride()


def test_positional_arguments_and_scalar_timestep() -> None:
    model = zoo.tiny_unet()
    inputs = zoo.unet_inputs(1, 2, 8, 8)
    arguments = (inputs["sample"], 301, inputs["encoder_hidden_states"])
    with torch.no_grad():
        before = model(*arguments).sample
        after = accelrt.wrap(model)(*arguments).sample
    assert zoo.relative_error(after, before.double()) < 1e-5


def test_missing_argument_raises_what_stock_raises() -> None:
    model = zoo.tiny_unet()
    with pytest.raises(TypeError) as stock:
        model(zoo.normal(1, 4, 2, 8, 8))
    accelrt.wrap(model)
    with pytest.raises(TypeError) as ours:
        model(zoo.normal(1, 4, 2, 8, 8))
    assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize("name", BUILD)
def test_twice_raises(name: str) -> None:
    model = accelrt.wrap(BUILD[name]())
    with pytest.raises(ValueError, match="wrapped already"):
        accelrt.wrap(model)
    assert accelrt.is_wrapped(model)
    accelrt.unwrap(model)
    with pytest.raises(ValueError, match="not wrapped"):
        accelrt.unwrap(model)


def test_unsupported() -> None:
    with pytest.raises(accelrt.UnsupportedModelError, match=r"Linear.*AutoencoderKL.*UNetMotion"):
        accelrt.wrap(nn.Linear(2, 2))
    with pytest.raises(accelrt.UnsupportedModelError, match="int"):
        accelrt.wrap(3)
    assert not accelrt.is_wrapped(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear is not wrapped"):
        accelrt.unwrap(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear is not wrapped"):
        accelrt.summary(nn.Linear(2, 2))


def test_a_subclass_is_not_taken_for_its_class() -> None:
    class Mine(type(zoo.tiny_dit())):  # type: ignore[misc]
        pass

    model = zoo.tiny_dit()
    model.__class__ = Mine
    with pytest.raises(accelrt.UnsupportedModelError, match="Mine"):
        accelrt.wrap(model)


def test_bad_settings_leave_the_model_alone() -> None:
    model = zoo.tiny_dit()
    attributes = module_dicts(model)
    with pytest.raises(ValueError, match="unknown setting speed"):
        accelrt.wrap(model, speed=3)
    with pytest.raises(ValueError, match="ff_rows is 0"):
        accelrt.wrap(model, ff_rows=0)
    with pytest.raises(ValueError, match="config is dict"):
        accelrt.wrap(model, config={"ff_rows": 3})
    assert module_dicts(model) == attributes


def test_overrides_go_over_the_config() -> None:
    model = zoo.tiny_unet()
    accelrt.wrap(model, config=accelrt.Config(frames_per_slice=3, ff_rows=9), frames_per_slice=2)
    config = model.forward.config
    assert (config.frames_per_slice, config.ff_rows) == (2, 9)


def test_a_failed_wrap_rolls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = zoo.animatediff_pipeline()
    attributes = [module_dicts(m) for m in (pipe.unet, pipe.vae)]

    def broken(self: Any, model: Any, config: Any) -> Any:
        raise KeyboardInterrupt

    # The VAE comes first and is already swapped when the UNet fails.
    order = [name for name, part in pipe.components.items() if isinstance(part, nn.Module)]
    assert order.index("vae") < order.index("unet")
    monkeypatch.setattr(UNetMotion, "stages", broken)
    with pytest.raises(KeyboardInterrupt):
        accelrt.wrap(pipe)
    assert not accelrt.is_wrapped(pipe)
    assert [module_dicts(m) for m in (pipe.unet, pipe.vae)] == attributes


@pytest.mark.parametrize("name", BUILD)
def test_a_copy_runs_its_own_weights(name: str) -> None:
    model = accelrt.wrap(BUILD[name]())
    twin = copy.deepcopy(model)
    assert accelrt.is_wrapped(twin)
    before = call(name, model).sample
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert torch.equal(call(name, model).sample, before)
    ours = call(name, twin).sample
    accelrt.unwrap(twin)
    assert zoo.relative_error(ours, call(name, twin).sample.double()) < 1e-4
    assert accelrt.is_wrapped(model)


@pytest.mark.parametrize("name", BUILD)
def test_pickle(name: str) -> None:
    model = BUILD[name]()
    before = call(name, model).sample
    accelrt.wrap(model)
    with pytest.raises(pickle.PicklingError, match="unwrap"):
        pickle.dumps(model)
    accelrt.unwrap(model)
    assert torch.equal(call(name, pickle.loads(pickle.dumps(model))).sample, before)
    assert torch.equal(call(name, copy.deepcopy(model)).sample, before)


def test_a_wrapped_model_is_freed_without_the_collector() -> None:
    model = accelrt.wrap(zoo.tiny_dit())
    call("dit", model)
    reference = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_to_after_wrap() -> None:
    model = accelrt.wrap(zoo.tiny_unet())
    model.to(torch.float64)
    inputs = zoo.to_dtype(zoo.unet_inputs(1, 2, 8, 8), torch.float64)
    with torch.no_grad():
        ours = model(**inputs).sample
        theirs = accelrt.unwrap(model)(**inputs).sample
    assert ours.dtype == torch.float64
    assert zoo.relative_error(ours, theirs) < 1e-13


def test_save_pretrained_writes_the_stock_files(tmp_path: Path) -> None:
    for build, folder in ((zoo.animatediff_pipeline, "video"), (zoo.dit_pipeline, "image")):
        pipe = build()
        pipe.save_pretrained(tmp_path / folder / "stock")
        accelrt.wrap(pipe).save_pretrained(tmp_path / folder / "wrapped")
        stock = sorted((tmp_path / folder / "stock").rglob("*"))
        for path in stock:
            other = Path(str(path).replace("stock", "wrapped"))
            assert path.is_dir() or path.read_bytes() == other.read_bytes()
        assert len(stock) == len(list((tmp_path / folder / "wrapped").rglob("*")))


def test_pipeline_components() -> None:
    pipe = zoo.animatediff_pipeline()
    parts = dict(pipe.components)
    accelrt.wrap(pipe)
    assert all(pipe.components[name] is part for name, part in parts.items())
    assert accelrt.is_wrapped(pipe)
    assert accelrt.is_wrapped(pipe.unet)
    assert accelrt.is_wrapped(pipe.vae)
    pipe.register_modules(text_encoder=nn.Linear(2, 2))
    summary = accelrt.summary(pipe)
    assert summary.to_dict()["unsupported"] == {
        "text_encoder": "Linear",
        "motion_adapter": "MotionAdapter",
    }
    assert "not wrapped: text_encoder (Linear)" in str(summary)
    accelrt.unwrap(pipe.vae)
    assert accelrt.is_wrapped(pipe)
    accelrt.unwrap(pipe)
    assert not accelrt.is_wrapped(pipe)
    assert accelrt.is_wrapped(accelrt.wrap(zoo.dit_pipeline()).transformer)


def test_gradients_run_the_stock_forward() -> None:
    model = zoo.tiny_dit()
    arguments = {"timestep": torch.tensor([5]), "class_labels": torch.tensor([3])}
    x = zoo.normal(1, 4, 8, 8)
    before = model(x, **arguments).sample
    accelrt.wrap(model)
    after = model(x, **arguments).sample
    assert torch.equal(before, after)
    after.sum().backward()
    assert model.proj_out_2.weight.grad is not None
    summary = accelrt.summary(model)
    assert summary.to_dict()["stock"] == {"": "gradients are needed"}
    assert "gradients are needed" in str(summary)
    model.requires_grad_(False)
    assert not model(x, **arguments).sample.requires_grad
    assert not accelrt.summary(model).stock


def test_active_dropout_runs_the_stock_forward() -> None:
    model = accelrt.wrap(zoo.tiny_dit()).train()
    call("dit", model)
    assert accelrt.summary(model).stock == {"": "dropout is active"}
    model.eval()
    call("dit", model)
    assert not accelrt.summary(model).stock


def test_an_empty_batch_raises_what_stock_raises() -> None:
    vae = zoo.tiny_vae()
    empty = torch.empty(0, 4, 8, 8)
    with torch.no_grad(), pytest.raises(RuntimeError) as stock:
        vae.decode(empty)
    accelrt.wrap(vae)
    with torch.no_grad(), pytest.raises(RuntimeError) as ours:
        vae.decode(empty)
    assert str(ours.value) == str(stock.value)
    assert accelrt.summary(vae).stock == {"decoder": "sample is empty"}


def test_autocast_runs_the_stock_forward() -> None:
    model = accelrt.wrap(zoo.tiny_dit())
    with torch.autocast("cpu", torch.bfloat16):
        call("dit", model)
    assert accelrt.summary(model).stock == {"": "autocast is active"}
