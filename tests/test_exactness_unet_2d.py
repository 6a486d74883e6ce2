"""Stable Diffusion's UNet, wrapped: exact with everything that its forward accepts."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import model_zoo as zoo
import pytest
import torch
import zoo_unet2d as models
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from model_zoo import one_thread  # noqa: F401
from torch import Tensor, nn

import accelrt
from accelrt.groups.attention import CrossAttention

# Model, inputs, draws: an image of a few hundred values has rounding errors that differ by
# a tenth from draw to draw, so the error of small cases is taken over several.
CASES: dict[str, tuple[Callable[[], Any], Callable[[int], dict[str, Any]], int]] = {
    "sd15-b1-8x8": (models.sd15, functools.partial(models.inputs, 1, 8, 8), 8),
    "sd15-b2-9x15": (models.sd15, functools.partial(models.inputs, 2, 9, 15), 3),
    "sd15-b1-36x60": (models.sd15, functools.partial(models.inputs, 1, 36, 60), 1),
    "sd2-b1-9x15": (models.sd2, functools.partial(models.inputs, 1, 9, 15), 4),
    "sd2-b2-8x8": (models.sd2, functools.partial(models.inputs, 2, 8, 8), 4),
    "sdxl-b2-36x60": (models.sdxl, functools.partial(models.sdxl_inputs, 2, 36, 60), 1),
    "sdxl-b2-9x15": (models.sdxl, functools.partial(models.sdxl_inputs, 2, 9, 15), 3),
    "sdxl-b3-8x8": (models.sdxl, functools.partial(models.sdxl_inputs, 3, 8, 8), 4),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "smallest": {"frames_per_slice": 1, "ff_rows": 5},
    "middle": {"frames_per_slice": 2, "ff_rows": 64},
    "not-in-place": {"frames_per_slice": 2, "ff_rows": 64, "inplace": False},
    "unfused": {"frames_per_slice": 1, "ff_rows": 64, "fuse": False},
}
# Groups that are single operators, which nothing could fuse.
USUAL = ("time_embedding", "samplers")


def _matrix() -> list[tuple[str, str, str]]:
    """Every case meets every dtype; every config meets every dtype and most cases."""
    matrix = []
    for i, case in enumerate(CASES):
        for j, dtype in enumerate(("float64", "float32", "bfloat16", "float16")):
            if "36x60" in case:  # thousands of pixels: the smallest slices take too long
                matrix.append((case, dtype, ("defaults", "middle")[(i + j) % 2]))
            else:
                configs = [list(CONFIGS)[(i + j + k) % 5] for k in (0, 2)]
                matrix += [(case, dtype, config) for config in configs]
    return matrix


@functools.cache
def _model(build: Callable[[], Any]) -> Any:
    return build()


def _call(model: Any, inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> Tensor:
    with torch.no_grad():
        return model(**zoo.to_dtype(inputs, dtype)).sample


def _draws(case: str, model: Any, dtype: torch.dtype) -> Tensor:
    """The outputs for all draws of a case, one after the other."""
    _, inputs, draws = CASES[case]
    return torch.cat([_call(model, inputs(draw), dtype) for draw in range(draws)])


@functools.cache
def _stock(case: str, name: str) -> tuple[Tensor, float]:
    """The float64 stock output of a case, and the error of the stock model in a dtype."""
    dtype = getattr(torch, name)
    result = _draws(case, zoo.clone(_model(CASES[case][0]), dtype), dtype)
    if name == "float64":
        return result, 0.0
    truth, _ = _stock(case, "float64")
    return truth, zoo.relative_error(result, truth)


@pytest.mark.parametrize(("case", "dtype", "config"), _matrix())
def test_sizes_and_dtypes(case: str, dtype: str, config: str) -> None:
    truth, stock = _stock(case, dtype)
    target = getattr(torch, dtype)
    model = accelrt.wrap(zoo.clone(_model(CASES[case][0]), target), **CONFIGS[config])
    result = _draws(case, model, target)
    assert not accelrt.summary(model).stock
    assert result.shape == truth.shape
    error = zoo.relative_error(result, truth)
    if dtype == "float64":
        assert error < 1e-13
    else:
        zoo.assert_rule(error, stock)


def check(model: Any, inputs: Callable[[], dict[str, Any]], **config: Any) -> dict[str, Any]:
    """Stock and wrapped agree in float64 and unwrapping restores every bit.

    Args:
        model: in float64.
        inputs: makes the inputs anew; the model may empty lists in them.
        config: besides slices of one image.

    Returns:
        Status and reason of every group, without those that are single operators.
    """
    before = _call(model, inputs())
    accelrt.wrap(model, **{"frames_per_slice": 1, "ff_rows": 7, **config})
    after = _call(model, inputs())
    summary = accelrt.summary(model)
    assert not summary.stock
    assert zoo.relative_error(after, before) < 1e-13
    assert torch.equal(_call(accelrt.unwrap(model), inputs()), before)
    return {
        row.group: (row.status, row.reason)
        for row in summary.rows
        if not any(part in row.group for part in USUAL)
    }


def untouched(result: dict[str, Any]) -> set[str]:
    return {name for name, (kind, _) in result.items() if kind == "untouched"}


def changes(model: Any, options: dict[str, Any], plain: dict[str, Any]) -> bool:
    """The options matter: a check on what did nothing would be empty."""
    return zoo.relative_error(_call(model, options), _call(model, plain)) > 1e-3


@pytest.fixture
def unet() -> Any:
    return zoo.clone(_model(models.sd15), torch.float64)


@pytest.mark.parametrize("name", models.EMBEDDINGS)
def test_embeddings(name: str) -> None:
    build, given = models.EMBEDDINGS[name]
    result = check(build().double(), lambda: {**models.inputs(2, 8, 8), **given})
    assert {kind for kind, _ in result.values()} == {"fused"}


@pytest.mark.parametrize("name", models.BLOCKS)
def test_options_of_blocks(name: str) -> None:
    assert not untouched(check(models.BLOCKS[name]().double(), lambda: models.inputs(2, 9, 7)))


@pytest.mark.parametrize("name", models.OTHER_BLOCKS)
def test_blocks_of_other_classes_run_as_they_came(name: str) -> None:
    build, names = models.OTHER_BLOCKS[name]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]]).double()
    result = check(
        build().double(), lambda: {**models.inputs(2, 8, 8), "encoder_attention_mask": mask}
    )
    assert untouched(result) == names
    assert all("is not a known class" in result[block][1] for block in names)


def test_missing_embeddings_raise_what_stock_raises() -> None:
    for name, message in (("class-table", "class_labels should be"), ("added-image", "image_emb")):
        model = accelrt.wrap(models.EMBEDDINGS[name][0]())
        given = {"added_cond_kwargs": {}} if name == "added-image" else {}
        with pytest.raises(ValueError, match=message):
            model(**models.inputs(2, 8, 8), **given)


def test_controlnet_residuals(unet: Any) -> None:
    down = tuple(models.residuals(models.SKIPS))
    (mid,) = models.residuals([(32, 2)])
    kept = [r.clone() for r in (*down, mid)]
    plain = models.inputs(2, 8, 8)
    given = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    assert changes(unet, {**plain, **given}, plain)
    assert not untouched(check(unet, lambda: {**plain, **given}))
    only_mid = {**plain, "mid_block_additional_residual": mid}  # stock ignores it
    check(unet, lambda: only_mid)
    assert not changes(unet, only_mid, plain)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*down, mid), strict=True))


@pytest.mark.parametrize("kind", ["t2i", "t2i-xl", "legacy", "with-controlnet", "stock-blocks"])
def test_t2i_adapters(unet: Any, kind: str) -> None:
    plain = models.inputs(2, 8, 8)
    down, (mid,) = tuple(models.residuals(models.SKIPS)), models.residuals([(32, 2)])
    controlnet = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    def inputs() -> dict[str, Any]:
        shapes = (*models.ADAPTER, (32, 2)) if kind == "t2i-xl" else models.ADAPTER
        features = models.residuals(shapes)
        name = "down_intrablock_additional_residuals"
        if kind == "legacy":
            name = "down_block_additional_residuals"
        more = controlnet if kind == "with-controlnet" else {}
        return {**plain, **more, name: features}

    assert changes(unet, inputs(), plain)
    hooked = ("down_blocks.0", "down_blocks.2") if kind == "stock-blocks" else ()
    for name in hooked:
        unet.get_submodule(name).register_forward_hook(lambda *_: None)
    assert untouched(check(unet, inputs)) == set(hooked)


def test_t2i_features_are_taken_as_stock_takes_them(unet: Any) -> None:
    """The caller's list is emptied, the tensors in it are not written to."""
    accelrt.wrap(unet)
    features = models.residuals((*models.ADAPTER, (32, 4)))
    kept = [(f, f.clone()) for f in features]
    call = functools.partial(unet, **zoo.to_dtype(models.inputs(2, 8, 8), torch.float64))
    with torch.no_grad():
        call(down_intrablock_additional_residuals=features)
    assert len(features) == 1  # of no shape that the middle has
    assert all(torch.equal(a, b) for a, b in kept)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FutureWarning, match="T2I"):
            call(down_block_additional_residuals=models.residuals(models.ADAPTER))


def _masks(kind: str) -> tuple[Any, dict[str, Tensor]]:
    """A model and masks; those of the self-attention must fit all its levels."""
    keys = (zoo.normal(2, 64, seed=60) > 0).double()
    context = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]]).double()
    if kind == "encoder":
        return models.sd15(), {"encoder_attention_mask": context.bool()}
    model = models.two_levels(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    if kind == "self":
        return model, {"attention_mask": keys}
    if kind == "per-query":
        keys = (zoo.normal(2, 64, 64, seed=61) > 0).double()
    return model, {"attention_mask": keys, "encoder_attention_mask": context}


@pytest.mark.parametrize("processor", ["AttnProcessor2_0", "AttnProcessor", "SlicedAttnProcessor"])
@pytest.mark.parametrize("kind", ["encoder", "self", "both"])
def test_masks(kind: str, processor: str) -> None:
    model, masks = _masks(kind)
    model = model.double()
    if processor == "AttnProcessor":
        model.set_default_attn_processor()
    elif processor == "SlicedAttnProcessor":
        model.set_attention_slice(1)
    plain = models.inputs(2, 8, 8)
    assert changes(model, {**plain, **masks}, plain)
    result = check(model, lambda: {**plain, **masks})
    known = processor != "SlicedAttnProcessor"
    assert result["mid_block.attentions.0"][0] == ("fused" if known else "sliced")
    assert not untouched(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["encoder", "both"])
def test_masks_in_low_precision(kind: str, dtype: torch.dtype) -> None:
    model, masks = _masks(kind)

    def draws(model: Any, kind: torch.dtype) -> Tensor:
        inputs = (models.inputs(2, 8, 8, draw) for draw in range(4))
        return torch.cat([_call(model, {**given, **masks}, kind) for given in inputs])

    truth = draws(zoo.clone(model, torch.float64), torch.float64)
    model = model.to(dtype)
    stock = zoo.relative_error(draws(model, dtype), truth)
    accelrt.wrap(model, frames_per_slice=1)
    zoo.assert_rule(zoo.relative_error(draws(model, dtype), truth), stock)


@pytest.mark.parametrize("shared", [False, True])
def test_cross_attention_of_frames_with_masks(shared: bool) -> None:
    """Frames of a sample may share keys and values and still have masks of their own."""
    attn = zoo.randomise(Attention(16, cross_attention_dim=8, heads=2, dim_head=8)).double()
    x, rows = zoo.normal(6, 7, 16).double(), zoo.normal(2, 5, 8, seed=2).double()
    bias = ((zoo.normal(6, 5, seed=3) < 0).double() * -10000.0).unsqueeze(1)
    full = rows.repeat_interleave(3, 0)
    cross = CrossAttention(attn, full, rows if shared else None, 3, bias)
    with torch.no_grad():
        expected = attn(x, encoder_hidden_states=full, attention_mask=bias)
        for start, stop in ((0, 6), (0, 3), (2, 4), (5, 6)):
            result = cross(x[start:stop], start, stop)
            assert zoo.relative_error(result, expected[start:stop]) < 1e-13


def test_masks_that_cannot_be_sliced_run_as_they_came() -> None:
    """A mask per query has four dimensions once the model has made a bias of it."""
    model, masks = _masks("per-query")
    result = check(model.double(), lambda: {**models.inputs(2, 8, 8), **masks})
    assert untouched(result) == {n for n in result if "attentions" in n}
    assert "the attention mask (2, 1, 64, 64)" in result["mid_block.attentions.0"][1]


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_ip_adapters(unet: Any, older: bool, masks: bool) -> None:
    models.add_ip_adapters(unet, older=older)
    unet.double()
    plain = models.inputs(2, 8, 8)
    given = {**plain, "added_cond_kwargs": models.pictures(2)}
    if masks:
        areas = [torch.zeros(1, n, 64, 64).double() for n in (1, 2)]
        for area in areas:
            area[:, :, 20:, :40] = 1
        given["cross_attention_kwargs"] = {"ip_adapter_masks": areas}
        given["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 0, 0]] * 2).double()
    result = check(unet, lambda: given)
    kind, reason = result["mid_block.attentions.0"]
    assert kind == "sliced"
    assert "attn2: processor IPAdapterAttnProcessor" in reason
    assert not untouched(result)


def test_ip_adapter_masks_per_image_run_as_they_came(unet: Any) -> None:
    """A mask for every image of the batch could not be told from one for all adapters."""
    models.add_ip_adapters(unet)
    unet.double()
    given = {
        **models.inputs(2, 8, 8),
        "added_cond_kwargs": models.pictures(2),
        "cross_attention_kwargs": {
            "ip_adapter_masks": [torch.ones(2, n, 64, 64).double() for n in (1, 2)]
        },
    }
    result = check(unet, lambda: given)
    assert "cross_attention_kwargs['ip_adapter_masks']" in result["mid_block.attentions.0"][1]


class Scaled:
    """A processor with an argument of its own."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(
        self, attn: Any, hidden_states: Tensor, *args: Any, strength: Any = 1.0, **kwargs: Any
    ) -> Tensor:
        return strength * self.inner(attn, hidden_states, *args, **kwargs)


def test_cross_attention_kwargs(unet: Any) -> None:
    plain = models.inputs(3, 8, 8)
    unet.set_attn_processor({n: Scaled(p) for n, p in unet.attn_processors.items()})
    given = {**plain, "cross_attention_kwargs": {"strength": 0.5}}
    assert changes(unet, given, plain)
    result = check(unet, lambda: given)
    assert not untouched(result)
    assert "Scaled may mix images" in result["mid_block.attentions.0"][1]
    strengths = torch.tensor([0.5, 1.0, 2.0]).double().view(3, 1, 1)
    given = {**plain, "cross_attention_kwargs": {"strength": strengths}}
    result = check(unet, lambda: given)
    assert "['strength'] holds a tensor" in result["mid_block.attentions.0"][1]


def test_plain_processors_ignore_cross_attention_kwargs(unet: Any) -> None:
    given = {**models.inputs(2, 8, 8), "cross_attention_kwargs": {"strength": 0.5}}
    assert check(unet, lambda: given)["mid_block.attentions.0"] == ("fused", "")


def test_gligen_runs_as_it_came() -> None:
    model = models.two_levels(attention_type="gated").double()
    for name, parameter in model.named_parameters():
        if "alpha" in name:
            nn.init.constant_(parameter, 0.7)
    boxes = {
        "boxes": torch.rand(2, 3, 4).double(),
        "positive_embeddings": zoo.normal(2, 3, zoo.CONTEXT_WIDTH, seed=70).double(),
        "masks": torch.tensor([[1.0, 1, 0], [1, 0, 0]]).double(),
    }
    plain = models.inputs(2, 8, 8)
    given = {**plain, "cross_attention_kwargs": {"gligen": boxes}}
    assert changes(model, given, plain)
    assert not untouched(check(model, lambda: plain))
    assert "GLIGEN" in check(model, lambda: given)["mid_block.attentions.0"][1]


def test_freeu_and_odd_sizes(unet: Any) -> None:
    plain = models.inputs(2, 9, 15)
    before = _call(unet, plain)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert zoo.relative_error(_call(unet, plain), before) > 1e-3
    assert not untouched(check(unet, lambda: plain))


def test_lora_scale(unet: Any) -> None:
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    unet.double()
    plain = models.inputs(2, 8, 8)
    given = {**plain, "cross_attention_kwargs": {"scale": 0.3}}
    assert changes(unet, given, plain)
    assert not untouched(check(unet, lambda: given))


def test_tuples_and_signature(unet: Any) -> None:
    inputs = zoo.to_dtype(models.inputs(2, 8, 8), torch.float64)
    with torch.no_grad():
        (before,) = unet(*inputs.values(), return_dict=False)
        accelrt.wrap(unet)
        (after,) = unet(*inputs.values(), return_dict=False)
        assert type(unet(**inputs)).__name__ == "UNet2DConditionOutput"
    assert zoo.relative_error(after, before) < 1e-13


def test_samples_that_are_no_images_run_the_stock_forward(unet: Any) -> None:
    accelrt.wrap(unet)
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError, IndexError)):
        unet(torch.zeros(2, 4, 8).double(), 3, torch.zeros(2, 5, 24).double())
    assert "sample has 3 dimensions" in next(iter(accelrt.summary(unet).stock.values()))


def test_every_group_is_fused_at_the_stock_configuration() -> None:
    with torch.device("meta"):
        model = UNet2DConditionModel(cross_attention_dim=768).eval()
    for row in accelrt.summary(accelrt.wrap(model)).rows:
        usual = ("embed", "samplers")
        assert row.status == "fused" or any(part in row.group for part in usual), row


_TRUTH: dict[int, Tensor] = {}


def _pipeline_draws(pipe: Any, images: int) -> Tensor:
    """The latents of four images after four guided steps, ``images`` at a time."""
    starts = zoo.normal(4, 4, 9, 15, seed=6).to(pipe.unet.dtype).split(images)
    runs = [models.run(pipe, latents=start, num_images_per_prompt=images) for start in starts]
    return torch.cat(runs)


@pytest.mark.parametrize(
    ("dtype", "images"), [(torch.float32, 2), (torch.bfloat16, 1), (torch.float16, 2)]
)
def test_pipeline(dtype: torch.dtype, images: int) -> None:
    if images not in _TRUTH:
        _TRUTH[images] = _pipeline_draws(models.pipeline(torch.float64), images)
    truth = _TRUTH[images]
    pipe = models.pipeline(dtype)
    before = _pipeline_draws(pipe, images)
    accelrt.wrap(pipe, frames_per_slice=1, ff_rows=64)
    wrapped = _pipeline_draws(pipe, images)
    assert not torch.equal(wrapped, before)  # it did run differently
    accelrt.unwrap(pipe)
    start = zoo.normal(4, 4, 9, 15, seed=6).to(dtype)[:images]
    after = models.run(pipe, latents=start, num_images_per_prompt=images)
    assert torch.equal(after, before[:images])
    zoo.assert_rule(zoo.relative_error(wrapped, truth), zoo.relative_error(before, truth))


def test_pipeline_callbacks_see_and_change_tensors() -> None:
    """Guidance is switched off at the third step, as callbacks do."""

    def callback(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> Any:
        assert set(values) == {"latents", "prompt_embeds"}
        if step == 1:
            pipeline._guidance_scale = 0.0
            values["prompt_embeds"] = values["prompt_embeds"].chunk(2)[-1]
        return values

    pipe = models.pipeline(torch.float64)
    names = ["latents", "prompt_embeds"]
    run = functools.partial(
        models.run, pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names
    )
    before = run()
    assert zoo.relative_error(before, models.run(pipe)) > 1e-3
    accelrt.wrap(pipe, frames_per_slice=1)
    assert zoo.relative_error(run(), before) < 1e-12


def test_pipeline_decodes_images() -> None:
    pipe = models.pipeline()
    before = models.run(pipe, output_type="pt")
    after = models.run(accelrt.wrap(pipe), output_type="pt")
    assert zoo.relative_error(after, before.double()) < 1e-4
