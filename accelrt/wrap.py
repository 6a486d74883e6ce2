"""Wrap and unwrap: the swap of forwards, and its undoing.

``import accelrt`` imports this module: what takes a while is imported by the functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from accelrt.config import Config
from accelrt.errors import UnsupportedModelError
from accelrt.files import read_json
from accelrt.swap import find, restore, swap

if TYPE_CHECKING:
    from torch import nn

    from accelrt.feedback.module import FeedbackModule
    from accelrt.models.forward import Forward
    from accelrt.planning.budget import BudgetPlanner
    from accelrt.planning.plan import Plan
    from accelrt.report import Summary
    from accelrt.steps.graphs import GraphCache
    from accelrt.steps.rehash import Rehash
    from accelrt.steps.session import Tracker

    Part = tuple[nn.Module, str, Any]


def wrap(
    pipe_or_model: Any,
    *,
    config: Config | None = None,
    rehash: Rehash | str | Path | None = None,
    feedback: FeedbackModule | str | Path | None = None,
    quality_floor: float | None = None,
    **overrides: Any,
) -> Any:
    """Accelerate a diffusers pipeline or model in place and return the same object.

    The forwards of the supported components are replaced by ones that run the same
    modules as sliced, fused operator groups. Classes, signatures, return types,
    parameters and ``state_dict`` keys stay as they are, and, without ``rehash`` and
    ``feedback``, the output equals the stock output within the rounding error that the stock
    model itself has in its dtype.

    Args:
        pipe_or_model: a ``DiffusionPipeline`` (every supported component is wrapped) or
            a model of a supported class.
        config: slice lengths and switches; the defaults if ``None``.
        rehash: leave stages out at some denoising steps, and predict what they would have
            made; the output is then an approximation. A :class:`accelrt.steps.Rehash`, the
            file of a calibrated one, or ``"auto"``: a conservative one. Not
            part of ``config``, whose settings are all exact. ``None``: every step is computed.
        feedback: run with Inner Loop Feedback: a trained
            :class:`accelrt.feedback.FeedbackModule`, which is moved to the model's device and
            dtype, or the folder that it was saved to. A call
            with a number of steps that the module has a schedule for runs the outer steps of
            that schedule; the output is then an approximation. Not together with ``rehash``.
        quality_floor: with ``rehash`` or ``feedback`` and a pipeline: least PSNR in dB, for
            example 30, of a request against the same with every step computed. The first
            request in which steps are predicted, or have feedback, runs twice, from the same
            random numbers, callbacks and progress bar included. Below the floor, its fully
            computed output is returned, and from then on every step is computed, which one
            warning says; else the accelerated output is, and later requests run once.
            ``None``: nothing is checked.
        overrides: single settings of :class:`Config`, over those of ``config``.

    Returns:
        ``pipe_or_model`` itself.

    Raises:
        UnsupportedModelError: nothing in it is of a supported class.
        ValueError: for an unknown or wrong setting, or if it is wrapped already.
        OSError: a file of ``rehash`` or ``feedback`` cannot be read.

    Source: Feature Slicer and Operator Grouping of Streamlined Inference (arXiv
    2411.01171, section 3), made exact; with ``rehash`` its Step Rehash, too; ``feedback``:
    Inner Loop Feedback (arXiv 2501.13107).
    """
    if config is None:
        config = Config()
    elif not isinstance(config, Config):
        raise ValueError(f"config is {type(config).__name__}; expected accelrt.Config")
    config = config.override(**overrides)
    if quality_floor is not None:
        from accelrt.quality import gate

        approximate = rehash is not None or feedback is not None
        gate.check_floor(quality_floor, pipe_or_model, rehash=approximate)
    from accelrt.models import supported
    from accelrt.models.forward import Forward
    from accelrt.steps.graphs import Graphs
    from accelrt.steps.session import Tracker
    from accelrt.steps.stepper import attach

    if rehash is not None and feedback is not None:
        raise ValueError("rehash and feedback were both given; allowed: one of them")
    parts = _parts(pipe_or_model)
    if not parts:
        raise UnsupportedModelError(
            f"{type(pipe_or_model).__name__} has no supported component; "
            f"supported models: {', '.join(supported())}"
        )
    for module, path, _ in parts:
        if find(module) is not None:
            name = type(module).__name__ + (f" ({path})" if path else "")
            raise ValueError(f"{name} is wrapped already; call accelrt.unwrap first")
    settings = _rehash(rehash)
    feedback_module = feedback_of(feedback)
    planner = _planner(pipe_or_model, config)
    cache = _graphs(config)
    tracker: Tracker | None = None
    done: list[nn.Module] = []
    try:
        for module, path, family in parts:
            forward = Forward(module, family, config, path)
            if cache is not None:
                forward.graphs = Graphs(cache, required=config.cuda_graphs is True)
            forward.stages()  # an unexpected structure fails here, not at the first step
            if settings is not None and forward.is_denoiser:
                tracker = tracker or Tracker(settings, pipe_or_model)
                attach(forward, tracker)
            if feedback_module is not None and forward.is_denoiser:
                tracker = _loop(forward, feedback_module, pipe_or_model)
            swap(module, forward)
            done.append(module)
            if planner is not None:
                planner.attach(forward)
        if tracker is None and not (settings is None and feedback_module is None):
            what = "rehash" if feedback_module is None else "feedback"
            raise ValueError(
                f"{what}: {type(pipe_or_model).__name__} has no supported denoiser to step"
            )
        if quality_floor is not None and tracker is not None:
            gate.install(pipe_or_model, tracker, quality_floor)
    except BaseException:
        if tracker is not None:
            tracker.release()
        for module in reversed(done):
            restore(module)
        raise
    return pipe_or_model


def _rehash(given: Rehash | str | Path | None) -> Rehash | None:
    """The settings of the cut along time."""
    from accelrt.steps.auto import CONSERVATIVE
    from accelrt.steps.rehash import Rehash

    if given is None or isinstance(given, Rehash):
        return given
    if given == "auto":
        return CONSERVATIVE
    if isinstance(given, (str, Path)):
        return Rehash.load(given)
    raise ValueError(f"rehash is {given!r}; allowed: a Rehash, the path of a file, 'auto', None")


def feedback_of(given: FeedbackModule | str | Path | None) -> FeedbackModule | None:
    """A feedback module, loaded where its folder is given.

    Raises:
        ValueError: it is neither, or the folder holds something else.
        OSError: a file cannot be read.
    """
    if given is None:
        return None
    from accelrt.feedback.module import FeedbackModule, check_folder

    if isinstance(given, FeedbackModule):
        module: FeedbackModule = given
        return module
    if not isinstance(given, (str, Path)):
        raise ValueError(
            f"feedback is {type(given).__name__}; allowed: a FeedbackModule, a folder's path, None"
        )
    try:
        check_folder(Path(given))
    except ValueError as error:
        raise ValueError(f"feedback: {error}") from error
    read_json(Path(given) / "config.json", _mapping)  # diffusers takes "[]" for a name on the hub
    info: dict[str, Any]
    loaded: FeedbackModule
    try:
        loaded, info = FeedbackModule.from_pretrained(
            given, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except OSError:
        raise
    except Exception as error:  # what diffusers raises depends on where it notices
        raise ValueError(f"feedback: {given} holds no module: {error}") from error
    odd = {*info["missing_keys"], *info["unexpected_keys"]}
    if odd:
        raise ValueError(f"feedback: {given} misses or has too many weights: {sorted(odd)[0]}")
    return loaded


def _mapping(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"a config is a mapping of settings; got {type(values).__name__}")
    return values


def _loop(forward: Forward, module: FeedbackModule, target: Any) -> Tracker:
    """Run a denoiser with feedback; what follows its requests."""
    from accelrt.steps.inner_loop import attach
    from accelrt.steps.outer_steps import OuterSteps

    module.check(forward.module)
    tracker = OuterSteps(module, target)
    attach(forward, module, tracker)
    return tracker


def reset(pipe_or_model: Any) -> Any:
    """Forget what step policies keep of requests, and return the same object.

    A request that runs goes on, and is computed anew from its next step. Not needed between
    requests: each begins with nothing.

    Raises:
        ValueError: if nothing in it is wrapped.
    """
    found = forwards(pipe_or_model)
    if not found:
        raise ValueError(f"{type(pipe_or_model).__name__} is not wrapped; call accelrt.wrap first")
    for _, forward in found:
        if forward.stepper is not None:
            forward.stepper.tracker.reset()
    return pipe_or_model


def _graphs(config: Config) -> GraphCache | None:
    """Where the graphs of a wrap are kept, if there are to be any."""
    from accelrt.steps.graphs import GraphCache

    return None if config.cuda_graphs is False else GraphCache(config.max_cuda_graphs)


def _planner(target: Any, config: Config) -> BudgetPlanner | None:
    """Keeps the config's memory budget, if it has one; refuses one that the weights exceed."""
    if config.memory_budget is None:
        return None
    from accelrt.memory.sizes import parse_budget
    from accelrt.planning.budget import BudgetPlanner

    spec = parse_budget(config.memory_budget)
    modules = list(_modules(target).values())
    planner = BudgetPlanner(spec, config, modules, standalone=_is_module(target))
    planner.check_weights()
    return planner


def plan(
    pipe_or_model: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    batch: int = 1,
    guidance: bool = True,
    memory_budget: int | str | None = None,
    config: Config | None = None,
) -> Plan:
    """How a pipeline or model keeps a memory budget for requests of one size.

    Nothing runs and no weights are read: the models are looked at on meta tensors, so they
    may themselves be on the meta device. The pipeline is not changed, and need not be
    wrapped.

    Args:
        pipe_or_model: a ``DiffusionPipeline`` or a model of a supported class.
        height, width: of the pictures in pixels; by default what the model was made for.
        num_frames: per video; by default what the model was made for, or 16.
        batch: pictures or videos.
        guidance: classifier-free guidance: two samples of each.
        memory_budget: as in :class:`Config`; ``None`` for that of ``config``, or ``"auto"``.
        config: slice lengths and switches; the defaults if ``None``.

    Returns:
        A :class:`~accelrt.planning.Plan`: slices, passes, offsets and peaks of every model,
        beside the peaks of the stock models. It prints as a table.

    Raises:
        UnsupportedModelError: nothing in it is of a supported class.
        BudgetError: no exact plan fits; it names the smallest budget that can be met.
        ValueError: for a wrong size or budget.
    """
    from accelrt.models import supported
    from accelrt.planning.pipeline import plan_parts, request_shape, takes_image

    parts = _parts(pipe_or_model)
    if not parts:
        raise UnsupportedModelError(
            f"{type(pipe_or_model).__name__} has no supported component; "
            f"supported models: {', '.join(supported())}"
        )
    config = Config() if config is None else config
    if memory_budget is not None:
        config = config.override(memory_budget=memory_budget)
    shape = request_shape(
        pipe_or_model, parts, height=height, width=width, num_frames=num_frames, batch=batch,
        guidance=guidance,
    )  # fmt: skip
    return plan_parts(
        parts, _modules(pipe_or_model), config, shape,
        takes_image=takes_image(pipe_or_model),
        standalone=_is_module(pipe_or_model),
        stock=True,
    )  # fmt: skip


def unwrap(pipe_or_model: Any) -> Any:
    """Undo :func:`wrap` completely and return the same object.

    Raises:
        ValueError: if nothing in it is wrapped.
    """
    wrapped = [module for module, _, _ in _parts(pipe_or_model) if find(module) is not None]
    if not wrapped:
        raise ValueError(f"{type(pipe_or_model).__name__} is not wrapped")
    for module in wrapped:
        forward = find(module)
        if forward is not None and forward.stepper is not None:
            from accelrt.quality import gate

            gate.release(forward.stepper.tracker)
            forward.stepper.tracker.release()
        if forward is not None and forward.graphs is not None:
            forward.graphs.release()  # before the slab in which they work
        if forward is not None and forward.planner is not None:
            forward.planner.release()
        restore(module)
    return pipe_or_model


def is_wrapped(pipe_or_model: Any) -> bool:
    """Whether any component of the pipeline, or the model, is wrapped."""
    return any(find(module) is not None for module, _, _ in _parts(pipe_or_model))


def summary(pipe_or_model: Any) -> Summary:
    """Every operator group of a wrapped object: fused, sliced or untouched, and why.

    Returns:
        A :class:`~accelrt.report.Summary`, which prints as a table and has ``to_dict()``.

    Raises:
        ValueError: if nothing in it is wrapped.
    """
    found = forwards(pipe_or_model)
    if not found:
        raise ValueError(f"{type(pipe_or_model).__name__} is not wrapped; call accelrt.wrap first")
    from accelrt.models import parts_of
    from accelrt.report import describe

    unsupported = {
        name: type(component).__name__
        for name, component in _components(pipe_or_model).items()
        if _is_module(component) and not parts_of(component)
    }
    return describe(found, unsupported)


def forwards(pipe_or_model: Any) -> list[tuple[str, Forward]]:
    """Names and forwards of the wrapped parts, for profilers and schedulers."""
    named = [(name, find(module)) for module, name, _ in _parts(pipe_or_model)]
    return [(name, forward) for name, forward in named if forward is not None]


def _is_module(value: Any) -> TypeGuard[nn.Module]:
    from torch import nn

    return isinstance(value, nn.Module)


def _components(target: Any) -> Mapping[str, Any]:
    """A pipeline's components by name; a model alone has the name ``""``."""
    if _is_module(target):
        return {"": target}
    components = getattr(target, "components", None)
    return components if isinstance(components, Mapping) else {}


def _modules(target: Any) -> dict[str, nn.Module]:
    """The components that have weights."""
    components = _components(target).items()
    return {name: part for name, part in components if _is_module(part)}


def _parts(target: Any) -> list[Part]:
    """Modules whose forward can be swapped, each with its name and family."""
    from accelrt.models import parts_of

    parts: list[Part] = []
    seen: set[int] = set()
    for name, component in _components(target).items():
        if not _is_module(component) or id(component) in seen:
            continue
        seen.add(id(component))
        for path, family in parts_of(component):
            full = ".".join(p for p in (name, path) if p)
            parts.append((component.get_submodule(path), full, family))
    return parts
