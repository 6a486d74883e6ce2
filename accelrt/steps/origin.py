"""What a calibrated schedule was made for: hashes of models and schedulers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from .rehash import Origin

#: Parameters whose norms tell weights apart, and how much of each is read.
SAMPLED, LOOKED_AT = 16, 4096
#: How far a norm may be off: precisions differ.
TOLERANCE = 0.02
# Settings that say where something came from, not what it computes.
_PRIVATE = ("_name_or_path", "_diffusers_version", "_class_name", "_use_default_values")


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def settings_of(owner: Any) -> dict[str, Any]:
    """The configuration of a model or scheduler, without where it came from."""
    config = getattr(owner, "config", {})
    items = config.items() if isinstance(config, Mapping) else vars(config).items()
    return {key: value for key, value in items if key not in _PRIVATE}


def model_hash(model: nn.Module) -> str:
    """16 hexadecimal digits of a model's class, configuration, and names and shapes of its
    parameters. Its precision and device make no difference."""
    shapes = [(name, list(p.shape)) for name, p in model.named_parameters()]
    return _digest([type(model).__name__, settings_of(model), shapes])


def weight_norms(model: nn.Module) -> tuple[float, ...]:
    """Norms of the beginnings of some parameters; 0 for those that cannot be looked at."""
    named = sorted(model.named_parameters())
    chosen = named[:: -(-len(named) // SAMPLED)] if named else []
    norms = []
    for _, parameter in chosen:
        known = parameter.device.type != "meta" and parameter.is_floating_point()
        part = parameter.detach().reshape(-1)[:LOOKED_AT]
        norms.append(float(f"{float(part.float().norm()):.5g}") if known else 0.0)
    return tuple(norms)


def scheduler_hash(scheduler: Any) -> str:
    """16 hexadecimal digits of a scheduler's class and configuration."""
    return _digest([type(scheduler).__name__, settings_of(scheduler)])


def origin_of(model: nn.Module, scheduler: Any, steps: int) -> Origin:
    """What a schedule for this model and scheduler says of them."""
    from .rehash import Origin

    return Origin(
        model=type(model).__name__,
        model_hash=model_hash(model),
        scheduler=type(scheduler).__name__,
        scheduler_hash=scheduler_hash(scheduler),
        steps=steps,
        weights=weight_norms(model),
        model_id=model_id(model),
    )


def model_id(model: nn.Module) -> str:
    """Where a model was loaded from; of a local folder its last two names, which say enough."""
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def check_origin(origin: Origin, model: nn.Module | None, scheduler: Any, steps: int) -> None:
    """Refuse a schedule that was made for something else.

    Raises:
        ValueError: naming what differs.
    """
    differences = []
    if model is not None:
        if type(model).__name__ != origin.model:
            differences.append(f"model {origin.model}, not {type(model).__name__}")
        elif model_hash(model) != origin.model_hash:
            differences.append(f"another {origin.model} (hash {origin.model_hash})")
        elif not same_weights(origin.weights, weight_norms(model)):
            differences.append(f"a {origin.model} with other weights")
    if type(scheduler).__name__ != origin.scheduler:
        differences.append(f"scheduler {origin.scheduler}, not {type(scheduler).__name__}")
    elif scheduler_hash(scheduler) != origin.scheduler_hash:
        differences.append(f"another configuration of {origin.scheduler}")
    if steps != origin.steps:
        differences.append(f"{origin.steps} steps, not {steps}")
    if differences:
        raise ValueError(f"the schedule was made for {'; for '.join(differences)}")


def same_weights(made_for: tuple[float, ...], found: tuple[float, ...]) -> bool:
    """Whether norms from :func:`weight_norms` are of the same weights, in any precision."""
    if len(made_for) != len(found):
        return not made_for
    pairs = zip(made_for, found, strict=True)
    return all(abs(a - b) <= TOLERANCE * max(a, b) for a, b in pairs if a and b)
