"""What outlives a step: the average of the weights, and checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accelrt.feedback.training import tree

KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")


class Average:
    """Exponential moving average of parameters in fp32, with a warm-up of the decay.

    Args:
        module: whose parameters are followed.
        decay: at most; after ``n`` steps at most ``(1 + n) / (10 + n)``.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = list(module.parameters())
        self.values = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters after optimizer step ``step``, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach().float() for p in self.parameters]
        torch._foreach_lerp_(self.values, current, 1 - decay)

    @torch.no_grad()
    def load(self, values: Sequence[Tensor]) -> None:
        """Take over saved values."""
        for mine, saved in zip(self.values, values, strict=True):
            mine.copy_(saved)

    @torch.no_grad()
    def put(self) -> None:
        """Overwrite the parameters."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Meanwhile the parameters are the average."""
        held = [p.detach().clone() for p in self.parameters]
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, held, strict=True):
                    parameter.copy_(value)


class Checkpoints:
    """Files ``checkpoint-<step>.safetensors`` in a folder, of which the last two are kept.

    A file appears under its name only when it is complete on disk, so a kill at any moment
    leaves a usable one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self) -> list[Path]:
        """From the first to the last step."""
        found = [each for each in self.folder.glob("checkpoint-*") if _NAME.fullmatch(each.name)]
        return sorted(found, key=_step_of)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after ``step`` steps."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"checkpoint-{step:08d}.safetensors"
        part = path.with_suffix(".part")
        try:
            tree.save(part, {**state, "step": step})
            with part.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        for old in self.files()[:-KEPT]:
            old.unlink()

    def load(self) -> dict[str, Any] | None:
        """The last state, on the CPU; ``None`` if there is none.

        Raises:
            ValueError: the file is no checkpoint.
        """
        files = self.files()
        if not files:
            return None
        try:
            return tree.load(files[-1])
        except ValueError as error:
            raise ValueError(f"{files[-1]} is no checkpoint: {error}") from error


def _step_of(path: Path) -> int:
    matched = _NAME.fullmatch(path.name)
    assert matched is not None
    return int(matched[1])
