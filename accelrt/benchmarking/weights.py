"""Models of any size with random weights, built without initialising them twice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def on_meta(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """The model on the meta device: shapes without storage."""
    with torch.device("meta"):
        model = make().eval()
    # Some parameters are made by constructors that know no device context.
    return nn.Module.to(model, device="meta", dtype=dtype)


def cast(model: Any, dtype: torch.dtype) -> Any:
    """All weights in ``dtype``, one after the other in place, like a checkpoint loaded in it."""
    # Not the model's own `to`, which warns of layers that checkpoints keep in float32.
    return nn.Module.to(model, dtype=dtype)


def random_model(make: Callable[[], Any], dtype: torch.dtype, device: str, seed: int = 0) -> Any:
    """The model with random weights that keep its activations finite and of order one.

    Matrices and convolutions are uniform with variance ``1 / fan_in``, embeddings with
    variance 1, biases with standard deviation 0.1, norms are 1 and 0, other vectors
    0.5. No weight is zero, so that every path counts, also those that training begins
    with at zero.

    Args:
        make: constructs the model.
        dtype: of the weights; they are drawn in it.
        device: where they are drawn; the values depend on it.
        seed: of the generator.
    """
    with _parameters_on_meta():
        model = cast(make().eval(), dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = torch.empty(parameter.shape, dtype=dtype, device=device)
                _fill(value, module, name, generator)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model


def share(model: Any) -> Any:
    """A copy of the modules around the same parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _fill(value: Tensor, module: nn.Module, name: str, generator: torch.Generator) -> None:
    is_norm = "Norm" in type(module).__name__ and value.dim() == 1
    if is_norm:
        value.fill_(0.0 if name == "bias" else 1.0)
    elif name == "bias":
        _uniform(value, 0.1, generator)
    elif isinstance(module, nn.Embedding):
        _uniform(value, 1.0, generator)
    elif value.dim() > 1:
        _uniform(value, (value[0].numel()) ** -0.5, generator)
    else:
        value.fill_(0.5)


def _uniform(value: Tensor, deviation: float, generator: torch.Generator) -> None:
    # A third of the time that normals take, and a gigabyte of weights counts.
    bound = 3**0.5 * deviation
    value.uniform_(-bound, bound, generator=generator)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Construct modules without storage for parameters; buffers are computed as usual."""
    owner: Any = nn.Module
    register = owner.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    owner.register_parameter = register_on_meta
    try:
        yield
    finally:
        owner.register_parameter = register
