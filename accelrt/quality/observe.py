"""Looks into a pipeline call without changing what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from accelrt.memory import tracker

StepCallback = Callable[[int, int], None]


@contextmanager
def captured_latents(pipe: Any) -> Iterator[list[Tensor]]:
    """Collects the final latents of the calls made inside.

    They are what the VAE is asked to decode, or, in a pipeline without one, what the
    scheduler's last step returned. The list holds references, no copies.
    """
    found: list[Tensor] = []
    vae = getattr(pipe, "vae", None)
    if vae is not None and hasattr(vae, "decode"):
        stock_decode = vae.decode

        def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append(z)
            return stock_decode(z, *args, **kwargs)

        patch = (vae, "decode", decode)
    elif hasattr(pipe, "scheduler"):
        stock_step = pipe.scheduler.step

        def step(*args: Any, **kwargs: Any) -> Any:
            result = stock_step(*args, **kwargs)
            found[:] = [result[0]]
            return result

        patch = (pipe.scheduler, "step", step)
    else:
        yield found
        return
    with patched(*patch):
        yield found


class _Bar:
    """Stands in for the tqdm bar of a pipeline: an iterable, or updated by hand."""

    def __init__(self, items: Sequence[Any] | None, total: int, callback: StepCallback) -> None:
        self._items = items
        self._total = total
        self._done = 0
        self._callback = callback

    def update(self, n: int = 1) -> None:
        self._done += n
        self._callback(self._done, self._total)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items or ():
            yield item
            self.update()

    def __len__(self) -> int:
        return self._total

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing to release."""

    def set_postfix(self, *_: Any, **__: Any) -> None:
        """Remarks of the pipeline are not shown."""

    set_description = set_postfix


@contextmanager
def silent_steps(pipe: Any, callback: StepCallback | None = None) -> Iterator[None]:
    """Replaces the pipeline's own progress bar by ``callback(steps done, steps in all)``."""
    report = callback or (lambda done, total: None)

    def progress_bar(iterable: Any = None, total: int | None = None) -> _Bar:
        items = None if iterable is None else list(iterable)
        return _Bar(items, len(items) if items is not None else total or 0, report)

    if not hasattr(pipe, "progress_bar"):
        yield
        return
    with patched(pipe, "progress_bar", progress_bar):
        yield


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute on the instance; afterwards the instance is as it was."""
    missing = object()
    before = owner.__dict__.get(name, missing)
    owner.__dict__[name] = value
    try:
        yield
    finally:
        if before is missing:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before


def pictures(output: Any) -> tuple[Tensor, bool]:
    """The pictures of a pipeline's output.

    Args:
        output: what a pipeline returned for ``output_type="np"``: its ``frames``
            ``[N, F, H, W, C]`` or ``images`` ``[N, H, W, C]``, in [0, 1].

    Returns:
        float32 ``[N, F, C, H, W]`` (``F`` is 1 for images), and whether it is a video.

    Raises:
        ValueError: if the output has neither.
    """
    for name, video in (("frames", True), ("images", False)):
        value = getattr(output, name, None)
        if value is None:
            continue
        array = torch.from_numpy(np.asarray(value, dtype=np.float32))
        if array.dim() != (5 if video else 4):
            raise ValueError(f"{name} of the output has shape {tuple(array.shape)}")
        array = array.movedim(-1, -3)
        return (array if video else array[:, None]), video
    raise ValueError(f"{type(output).__name__} has neither images nor frames")


def weight_bytes(pipe: Any) -> int:
    """Bytes of all parameters and buffers of the pipeline's components, shared ones once."""
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return tracker.weight_bytes(*modules)
