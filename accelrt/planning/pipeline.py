"""The plan of a pipeline for a size of request, ahead of any call."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from accelrt.config import Config
from accelrt.errors import BudgetError, UnsupportedModelError
from accelrt.memory.sizes import AUTO, parse_budget
from accelrt.memory.tracker import storage_bytes, weight_bytes
from accelrt.models.family import CallShape, Family
from accelrt.models.forward import Forward
from accelrt.steps.graphs import expected

from .budget import AUTO_MARGIN, tensors_of
from .clone import double_of
from .component import plan_component
from .cost import Machine, machine
from .dryrun import dry_run
from .plan import ComponentPlan, Plan
from .resident import free_bytes, resident_bytes, workspace_bytes

Part = tuple[nn.Module, str, Family]


def plan_parts(
    parts: list[Part],
    modules: dict[str, nn.Module],
    config: Config,
    shape: CallShape,
    *,
    takes_image: bool = False,
    standalone: bool = False,
    stock: bool = False,
) -> Plan:
    """How some models keep ``config.memory_budget`` for a request of one size.

    Args:
        parts: the supported modules, their paths and families.
        modules: all modules of the pipeline by name, for their weights.
        config: slice lengths, switches and the budget.
        shape: of the request.
        takes_image: the encoder of the VAE runs too.
        standalone: a single model: the budget is for its activations alone.
        stock: also look at the peaks of the stock models.

    Raises:
        BudgetError: no exact plan fits; it names the smallest budget that can be met.
        ValueError: with ``stock``: a stock model does not run at this size.
    """
    spec = AUTO if config.memory_budget is None else parse_budget(config.memory_budget)
    device, dtype = _placement(parts)
    rates = machine(device, dtype)
    target = torch.device("cpu") if device.type == "meta" else device
    total: int | None = spec if isinstance(spec, int) else None
    if spec == AUTO:
        total = int(free_bytes(target) * (1 - AUTO_MARGIN))
        if device.type != "meta" and not standalone:
            total += resident_bytes(modules.values(), device)  # they are there already
    planned: list[ComponentPlan] = []
    stocks: dict[str, tuple[tuple[str, int], ...]] = {}
    unplanned: list[str] = []
    worst: BudgetError | None = None
    held = 0  # by the graphs of the denoisers, while others run
    order = {path: index for index, (_, path, _) in enumerate(parts)}
    for module, path, family in sorted(parts, key=_denoisers_first):
        if path.endswith("encoder") and not takes_image:
            continue
        example = family.example(module, shape, dtype)
        if example is None:
            unplanned.append(path or type(module).__name__)
            continue
        double = double_of(module, family, config, path)
        inputs = double.forward.arguments(**example)
        if stock:
            try:
                stocks[path] = _stock(double.forward, inputs, rates)
            except RuntimeError as error:
                name = path or type(module).__name__
                raise ValueError(
                    f"{name} does not run at this size, a latent of {shape.height}x{shape.width}: "
                    f"{error}"
                ) from error
        resident = reserve = 0
        if not standalone:
            resident = resident_bytes(modules.values(), device, module)
            reserve = workspace_bytes(module, device, spec if isinstance(spec, int) else 0)
            reserve += storage_bytes(tensors_of(inputs)) + held
        limit = None if total is None else total - resident - reserve
        graphs = expected(config, double.forward, target)
        try:
            part, _, _ = plan_component(
                double.forward, inputs, config, rates, target, limit, resident + reserve, graphs
            )
            held += part.graphs_bytes
            planned.append(replace(part, resident_bytes=resident, reserve_bytes=reserve))
        except BudgetError as error:
            if worst is None or error.smallest_bytes > worst.smallest_bytes:
                worst = error
    if worst is not None:
        raise worst
    if not planned:
        raise UnsupportedModelError(
            f"nothing is known ahead of the calls of {', '.join(unplanned)}; wrap with "
            f"memory_budget plans each call when it comes"
        )
    return Plan(
        budget_bytes=total,
        weights={name: weight_bytes(module) for name, module in modules.items()},
        components=tuple(sorted(planned, key=lambda part: order[part.path])),
        unplanned=tuple(unplanned),
        stock=stocks,
    )


def _denoisers_first(part: Part) -> bool:
    return type(part[2]).call_shape is Family.call_shape


def _stock(clone: Forward, inputs: dict[str, Any], rates: Machine) -> tuple[tuple[str, int], ...]:
    """Live bytes of the stock model over time."""
    module = clone.module
    run = type(module).forward.__get__(module)
    return tuple(dry_run(run, inputs, rates).timeline)


def _placement(parts: list[Part]) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first part's weights."""
    for module, _, _ in parts:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def request_shape(
    target: Any,
    parts: list[Part],
    *,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    batch: int,
    guidance: bool,
) -> CallShape:
    """The size of a request in latents.

    Args:
        target: the pipeline or model.
        parts: its supported modules.
        height, width: of the pictures in pixels; by default what the denoiser was made for.
        num_frames: per video; by default what the model was made for, or 16.
        batch: pictures or videos.
        guidance: classifier-free guidance: two samples of each.

    Raises:
        ValueError: for a size that is no positive multiple of the VAE's scale.
    """
    scale = _vae_scale(target)
    denoiser = next((m for m, p, f in parts if not p.endswith(("encoder", "decoder"))), None)
    config: Any = getattr(denoiser, "config", None)
    side = getattr(config, "sample_size", None) or 64
    sides = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value < 1 or value % scale):
            raise ValueError(f"{name} is {value}; allowed: positive multiples of {scale}")
    for name, value in (("batch", batch), ("num_frames", num_frames)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; allowed: an integer >= 1")
    frames = num_frames or getattr(config, "num_frames", None)
    return CallShape(
        samples=batch * (2 if guidance else 1),
        outputs=batch,
        frames=frames or (16 if _is_video(denoiser) else 1),
        height=sides[0] if height is None else height // scale,
        width=sides[1] if width is None else width // scale,
    )


def _is_video(denoiser: Any) -> bool:
    return "Motion" in type(denoiser).__name__ or "Temporal" in type(denoiser).__name__


def _vae_scale(target: Any) -> int:
    """Pixels per latent and side."""
    config: Any = getattr(getattr(target, "vae", target), "config", None)
    channels = getattr(config, "block_out_channels", None)
    is_vae = getattr(config, "latent_channels", None) is not None
    return int(2 ** (len(channels) - 1)) if is_vae and channels else 8


def takes_image(target: Any) -> bool:
    """The pipeline starts from a picture, or the target is no pipeline."""
    if isinstance(target, nn.Module):
        return True
    known = getattr(target, "takes_image", None)
    if isinstance(known, bool):
        return known
    return "image" in inspect.signature(type(target).__call__).parameters
