"""What a call runs, and the many steps that all rows are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tasks
import torch
from measure import Row, observed
from torch import Tensor

from accelrt.quality.observe import pictures as pictures_of
from accelrt.swap import find

# Pictures of the untimed call that counts blocks.
COUNTED = 10


@dataclass(frozen=True)
class Work:
    """What one call ran.

    Args:
        outer: passes through the model.
        blocks: transformer blocks in all of them, the feedback's among them.
    """

    outer: int
    blocks: int


def work_of(pipe: Any, row: Row, model: str, samples: int) -> Work:
    """Counts the passes and blocks of one untimed call of ``samples`` pictures.

    A block that is left out for what a cache holds is not counted, nor one of which only the
    norms run.
    """
    batch = tasks.make(model, samples, samples).batches[0]
    outer = blocks = 0

    def step() -> None:
        nonlocal outer
        outer += 1

    def block() -> None:
        nonlocal blocks
        blocks += 1

    with _each_block(pipe.transformer, block), observed(pipe, on_step=step):
        tasks.call(pipe, batch, row.steps)
    return Work(outer, blocks)


@contextmanager
def _each_block(model: Any, tell: Callable[[], None]) -> Iterator[None]:
    """Tells of every block that runs, in a stock model or a wrapped one."""
    forward = find(model)
    if forward is None:
        # The caches of others replace blocks, or what they call; all of them run this layer.
        handles = [
            block.attn1.to_q.register_forward_hook(lambda *_: tell())
            for block in model.transformer_blocks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        return

    class Blocks:
        def enter(self, stage: Any, group: Any, state: Any) -> None:
            if stage.name.startswith("blocks.") or stage.name == "feedback":
                tell()

        def leave(self, stage: Any, group: Any, state: Any) -> None: ...

    before, forward.observer = forward.observer, Blocks()
    try:
        yield
    finally:
        forward.observer = before


def reference(
    pipe: Any, task: tasks.Task, steps: int, tell: Callable[[str], None] = lambda text: None
) -> tuple[list[Tensor], list[Tensor]]:
    """Final latents and pictures of the stock pipeline with many steps, one entry a batch."""
    latents: list[Tensor] = []
    pictures: list[Tensor] = []
    for i, batch in enumerate(task.batches):
        tell(f"reference: batch {i + 1} of {len(task.batches)}")
        with observed(pipe) as seen:
            output = tasks.call(pipe, batch, steps)
        latents.append(torch.cat(seen.latents))
        pictures.append(pictures_of(output)[0])
    return latents, pictures
