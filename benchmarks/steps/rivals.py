"""Caches of others, switched on and off on a stock pipeline.

- diffusers' own: FirstBlockCache, MagCache, TaylorSeer, Pyramid Attention Broadcast, FasterCache,
  SeaCache (``diffusers.hooks``);
- cache-dit (DBCache, and DBCache with TaylorSeer);
- DeepCache.

The last two come with ``pip install --group rivals``. A model that a rival cannot serve gets no
row but a reason. None of the reference models has diffusers' ``CacheMixin`` (and so no
``enable_cache``); the hooks are applied by the functions that ``enable_cache`` calls.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import hooks
from diffusers.models.cache_utils import CacheMixin
from measure import Row
from tasks import VIDEO

from accelrt.quality.observe import patched

Switch = Callable[[Any, int], Any]
CALIBRATION_SEED = 10_000


@dataclass(frozen=True)
class Rival:
    """A rival with its settings.

    Args:
        name: as the table shows it.
        switch: a context manager ``switch(pipe, steps)``.
        supports: ``supports(model, pipe)`` is None, or the reason why it cannot serve the model.
    """

    name: str
    switch: Switch
    supports: Callable[[str, Any], str | None]

    def row(self, steps: int) -> Row:
        """Its row at ``steps`` denoising steps."""
        return Row(self.name, "rival", steps, lambda pipe: self._switched(pipe, steps))

    @contextmanager
    def _switched(self, pipe: Any, steps: int) -> Iterator[None]:
        with restored(pipe), self.switch(pipe, steps):
            yield


def denoiser_of(pipe: Any) -> torch.nn.Module:
    """The model that runs once per step."""
    model: torch.nn.Module = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return model


@contextmanager
def restored(pipe: Any) -> Iterator[None]:
    """Afterwards the pipeline is what it was, whatever hooks were left on it.

    Some rivals leave attributes, submodules or a patched class behind when switched off.
    """
    kind, modules = type(pipe), list(denoiser_of(pipe).modules())
    call = kind.__dict__["__call__"]
    class_names = set(kind.__dict__)
    own = dict(pipe.__dict__)
    kept = [(module, dict(module.__dict__), dict(module._modules)) for module in modules]
    try:
        yield
    finally:
        for name in set(kind.__dict__) - class_names:
            delattr(kind, name)
        kind.__call__ = call
        _replace(pipe.__dict__, own)
        for module, attributes, children in kept:
            _replace(module.__dict__, attributes)
            _replace(module._modules, children)


def _replace(target: dict[str, Any], content: dict[str, Any]) -> None:
    target.clear()
    target.update(content)


class _Position:
    """Where the denoising loop is: hooks want a timestep that runs from 1000 down to 0.

    Real timesteps are not on that scale for every scheduler (Euler with continuous timesteps),
    so the share of steps still to do is used.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.step = -1

    def timestep(self) -> float:
        """1000 at the first step."""
        return 1000.0 * (1 - self.step / self.scheduler.num_inference_steps)


@contextmanager
def _hooked(pipe: Any, apply: Callable[[torch.nn.Module, _Position], None]) -> Iterator[None]:
    """Hooks of diffusers, which forget what they know when a run begins."""
    model, scheduler = denoiser_of(pipe), pipe.scheduler
    position = _Position(scheduler)
    set_timesteps, scale = scheduler.set_timesteps, scheduler.scale_model_input

    contexts = ExitStack()

    def begin(*args: Any, **kwargs: Any) -> Any:
        position.step = -1
        CacheMixin._reset_stateful_cache(model)
        # A reset drops the context too.
        contexts.enter_context(CacheMixin.cache_context(model, "guided"))
        return set_timesteps(*args, **kwargs)

    def next_step(*args: Any, **kwargs: Any) -> Any:
        position.step += 1
        return scale(*args, **kwargs)

    apply(model, position)
    with ExitStack() as stack:
        stack.enter_context(patched(scheduler, "set_timesteps", begin))
        stack.enter_context(patched(scheduler, "scale_model_input", next_step))
        stack.enter_context(contexts)
        yield


def _no_block_list(model: str, pipe: Any) -> str | None:
    if hasattr(denoiser_of(pipe), "transformer_blocks"):
        return None
    return "needs one list of transformer blocks; a UNet has none"


def first_block_cache(threshold: float) -> Rival:
    """diffusers FirstBlockCache."""

    def switch(pipe: Any, steps: int) -> Any:
        config = hooks.FirstBlockCacheConfig(threshold=threshold)
        return _hooked(pipe, lambda model, _: hooks.apply_first_block_cache(model, config))

    return Rival(f"FirstBlockCache {threshold:g}", switch, _no_block_list)


def mag_cache(threshold: float) -> Rival:
    """diffusers MagCache, with the magnitude ratios of this model as it calibrates them."""

    def switch(pipe: Any, steps: int) -> Any:
        config = hooks.MagCacheConfig(
            threshold=threshold, num_inference_steps=steps, mag_ratios=_mag_ratios(pipe, steps)
        )
        return _hooked(pipe, lambda model, _: hooks.apply_mag_cache(model, config))

    return Rival(f"MagCache {threshold:g}", switch, _no_block_list)


_RATIOS: dict[tuple[str, int], list[float]] = {}


def _mag_ratios(pipe: Any, steps: int) -> list[float]:
    """Ratios of one run of ten pictures whose noise no measured run has."""
    import tasks

    model = "pixart" if type(pipe).__name__.startswith("PixArt") else "dit"
    key = (model, steps)
    if key not in _RATIOS:
        # One step more than there are: at the last one the hook would drop what it found.
        config = hooks.MagCacheConfig(calibrate=True, num_inference_steps=steps + 1)
        batch = tasks.make(model, 10, seed=CALIBRATION_SEED).batches[0]
        with restored(pipe), _hooked(pipe, lambda m, _: hooks.apply_mag_cache(m, config)):
            tasks.call(pipe, batch, steps)
            block = denoiser_of(pipe).transformer_blocks[-1]
            hook: Any = block._diffusers_hook.get_hook("mag_cache_block_hook")
            _RATIOS[key] = list(hook.state_manager.get_state().calibration_ratios)
    return _RATIOS[key]


def taylor_seer(interval: int, order: int = 1) -> Rival:
    """diffusers TaylorSeer on every attention and feed-forward (and residual block)."""
    modules = [r".*\.(attn1|attn2|ff)", r".*\.resnets\.\d+"]

    def switch(pipe: Any, steps: int) -> Any:
        config = hooks.TaylorSeerCacheConfig(
            cache_interval=interval,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=modules,
        )
        return _hooked(pipe, lambda model, _: hooks.apply_taylorseer_cache(model, config))

    return Rival(f"TaylorSeer {interval}, order {order}", switch, lambda model, pipe: None)


def taylor_seer_lite(interval: int, order: int = 1) -> Rival:
    """diffusers TaylorSeer that forecasts the model's last projection and skips all blocks.

    Its own ``use_lite_mode`` looks for a layer ``proj_out``, which DiT calls ``proj_out_2``.
    """

    def switch(pipe: Any, steps: int) -> Any:
        config = hooks.TaylorSeerCacheConfig(
            cache_interval=interval,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            skip_predict_identifiers=[r"transformer_blocks\.\d+"],
            cache_identifiers=[r"proj_out(_2)?"],
        )
        return _hooked(pipe, lambda model, _: hooks.apply_taylorseer_cache(model, config))

    return Rival(f"TaylorSeer lite {interval}, order {order}", switch, _no_block_list)


def pyramid_attention(skip: int) -> Rival:
    """diffusers Pyramid Attention Broadcast: attention only."""

    def switch(pipe: Any, steps: int) -> Any:
        def apply(model: torch.nn.Module, position: _Position) -> None:
            config = hooks.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=skip,
                temporal_attention_block_skip_range=skip,
                cross_attention_block_skip_range=2 * skip,
                current_timestep_callback=position.timestep,
            )
            hooks.apply_pyramid_attention_broadcast(model, config)

        return _hooked(pipe, apply)

    return Rival(f"PAB {skip}/{2 * skip}", switch, lambda model, pipe: None)


def faster_cache() -> Rival:
    """diffusers FasterCache with its defaults."""

    def switch(pipe: Any, steps: int) -> Any:
        def apply(model: torch.nn.Module, position: _Position) -> None:
            config = hooks.FasterCacheConfig(
                tensor_format="BCHW", current_timestep_callback=position.timestep
            )
            hooks.apply_faster_cache(model, config)

        return _hooked(pipe, apply)

    reasons = {
        "dit": "takes the first half of the batch for the unguided one; DiTPipeline has it last",
        "animatediff": "cannot halve the timestep, which the pipeline gives as a scalar",
        "svd": "cannot halve the timestep, which the pipeline gives as a scalar",
    }
    return Rival("FasterCache", switch, lambda model, pipe: reasons.get(model))


def sea_cache() -> Rival:
    """diffusers SeaCache: no reference model has what it needs."""

    def switch(pipe: Any, steps: int) -> Any:
        return _hooked(pipe, lambda model, _: hooks.apply_sea_cache(model, hooks.SeaCacheConfig()))

    reason = "serves Cosmos 3 and Wan only: it filters spatiotemporal latents of a flow model"
    return Rival("SeaCache", switch, lambda model, pipe: reason)


def cache_dit(threshold: float, taylor: bool) -> Rival:
    """cache-dit's DBCache (first block computed, no last ones), 4 warm-up steps."""

    @contextmanager
    def switch(pipe: Any, steps: int) -> Iterator[None]:
        library = _quiet_import("cache_dit")
        config = library.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=4,
            residual_diff_threshold=threshold,
        )
        calibrator = library.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
        library.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
        try:
            yield
        finally:
            library.disable_cache(pipe)

    def supports(model: str, pipe: Any) -> str | None:
        return _missing("cache_dit") or _no_block_list(model, pipe)

    suffix = " + TaylorSeer" if taylor else ""
    return Rival(f"cache-dit DBCache {threshold:g}{suffix}", switch, supports)


def deep_cache(interval: int) -> Rival:
    """DeepCache, branch 0: at other steps only the last layer of the last up block runs."""

    @contextmanager
    def switch(pipe: Any, steps: int) -> Iterator[None]:
        helper = _quiet_import("DeepCache").DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        set_timesteps = pipe.scheduler.set_timesteps

        # It knows no end of a run: without this the first features are those of the last call.
        def begin(*args: Any, **kwargs: Any) -> Any:
            helper.start_timestep = None
            helper.cached_output.clear()
            return set_timesteps(*args, **kwargs)

        try:
            with patched(pipe.scheduler, "set_timesteps", begin):
                yield
        finally:
            helper.disable()

    def supports(model: str, pipe: Any) -> str | None:
        missing = _missing("DeepCache")
        return missing or (None if model in VIDEO else "serves UNets only")

    return Rival(f"DeepCache {interval}", switch, supports)


def _missing(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed: pip install --group rivals"
    return None


@functools.cache
def _quiet_import(package: str) -> Any:
    module = importlib.import_module(package)
    for name in list(logging.root.manager.loggerDict):
        if name.lower().startswith(package.lower()):
            logging.getLogger(name).setLevel(logging.ERROR)
    return module


RIVALS: tuple[Rival, ...] = (
    first_block_cache(0.05),
    first_block_cache(0.1),
    first_block_cache(0.2),
    mag_cache(0.06),
    mag_cache(0.24),
    taylor_seer(2),
    taylor_seer(3),
    taylor_seer(4),
    taylor_seer_lite(2),
    taylor_seer_lite(3),
    pyramid_attention(2),
    faster_cache(),
    sea_cache(),
    cache_dit(0.08, taylor=False),
    cache_dit(0.2, taylor=False),
    cache_dit(0.2, taylor=True),
    deep_cache(2),
    deep_cache(3),
    deep_cache(5),
)


def rows_for(model: str, pipe: Any, steps: int) -> tuple[list[Row], dict[str, str]]:
    """The rows of all rivals that can serve a model, and why the others cannot."""
    rows, reasons = [], {}
    for rival in RIVALS:
        reason = rival.supports(model, pipe)
        if reason is None:
            rows.append(rival.row(steps))
        else:
            reasons[rival.name] = reason
    return rows, reasons
