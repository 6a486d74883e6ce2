"""The training itself, through accelerate: one process or many."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn

from accelrt.feedback.module import FeedbackModule

from .config import differences
from .objectives import Landing, Student, Training, objective_of
from .result import LOSSES, REPORT, DistillResult, plain, versions, write
from .state import Average, Checkpoints
from .validation import Row, Validator

LOGS = "logs"
#: Share of the largest learning rate at the end.
LAST_LR = 0.01
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Loop:
    """One training, from the first step or from a checkpoint."""

    def __init__(
        self,
        training: Training,
        module: FeedbackModule,
        accelerator: Any,
        out: Path,
        about: dict[str, Any],
    ) -> None:
        self.training, self.config = training, training.config
        self.module, self.accelerator, self.out, self.about = module, accelerator, out, about
        self.objective = objective_of(training)
        self.checkpoints = Checkpoints(out / "checkpoints")
        optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=self.config.lr,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
        )
        self.average = Average(module, self.config.ema_decay)
        self.validator = Validator(training, module)
        self.losses: list[dict[str, float]] = []
        self.history: list[dict[str, Any]] = []
        self.sums: dict[str, float] = {}
        self.counted = 0
        self.seconds = 0.0
        self.start = 0
        saved = self._saved()
        if saved is not None:
            module.load_state_dict(saved["module"])
            self.average.load(saved["average"])
        self.student, self.optimizer = accelerator.prepare(
            Student(training.denoiser, module), optimizer
        )
        if saved is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
            if accelerator.scaler is not None and saved["scaler"] is not None:
                accelerator.scaler.load_state_dict(saved["scaler"])
            self.start, self.seconds = saved["step"], saved["seconds"]
            self.losses, self.history = saved["losses"], saved["history"]
            self.sums, self.counted = saved["sums"], saved["counted"]

    def _saved(self) -> dict[str, Any] | None:
        """The last checkpoint.

        Raises:
            ValueError: it is of another training.
        """
        saved = self.checkpoints.load()
        if saved is None:
            return None
        about = saved["about"]
        changed = [*differences(about["config"], self.about["config"])]
        changed += [
            key for key in ("backbone", "data", "processes") if about[key] != self.about[key]
        ]
        if changed:
            old = {**about["config"], **about}
            new = {**self.about["config"], **self.about}
            listed = ", ".join(f"{key} {old.get(key)!r}, now {new.get(key)!r}" for key in changed)
            raise ValueError(
                f"{self.out} holds a training with other settings: {listed}; give another folder, "
                f"or remove it"
            )
        return saved

    def run(self, progress: bool, on_step: Callable[[int], None] | None) -> DistillResult:
        """All steps that are left, then the result."""
        accelerator, config = self.accelerator, self.config
        if config.tensorboard:
            accelerator.init_trackers(LOGS)
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[values]}"),
        )  # fmt: skip
        shown = progress and accelerator.is_main_process
        with Progress(
            *columns, console=Console(stderr=True), refresh_per_second=2, disable=not shown
        ) as bar:
            task = bar.add_task("distill", total=config.steps, completed=self.start, values="")
            if isinstance(self.objective, Landing):
                self.objective.on_round = lambda number: bar.update(
                    task, values=f"the teacher runs, round {number + 1}"
                )
            for step in range(self.start, config.steps):
                began = time.perf_counter()
                self._step(step)
                self.seconds += time.perf_counter() - began
                done = step + 1
                if done % config.log_every == 0 or done == config.steps:
                    self._log(step)
                    bar.update(task, values=_text(self.losses[-1]))
                if config.validate_every and done % config.validate_every == 0:
                    self._validate(done)
                # Whoever stops it after this step finds its state.
                if done % config.checkpoint_every == 0 or done == config.steps:
                    self._checkpoint(done)
                bar.update(task, completed=done)
                if on_step is not None:
                    on_step(done)
        result = self._result()
        accelerator.end_training()
        return result

    def _step(self, step: int) -> None:
        """One optimizer step."""
        config, accelerator = self.config, self.accelerator
        ramp = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * ramp * max(cosine, LAST_LR)
        for number in range(step * config.accumulate, (step + 1) * config.accumulate):
            with accelerator.accumulate(self.student):
                parts = self.objective.loss(self.student, number)
                accelerator.backward(parts["loss"])
                if accelerator.sync_gradients and math.isfinite(config.clip):
                    accelerator.clip_grad_norm_(self.student.parameters(), config.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in parts.items():
                # Sums stay on the device until they are looked at.
                self.sums[name] = self.sums.get(name, 0.0) + value.detach()  # type: ignore[assignment]
            self.counted += 1
        self.average.update(step)

    def _log(self, step: int) -> None:
        """A point of the loss curve: means since the last one, over all processes."""
        point: dict[str, float] = {"step": step + 1}
        for name, total in self.sums.items():
            mean = torch.as_tensor(total / self.counted, device=self.training.device)
            point[name] = float(self.accelerator.reduce(mean, reduction="mean"))
        point["lr"] = float(self.optimizer.param_groups[0]["lr"])
        if not math.isfinite(point["loss"]):
            raise ValueError(
                f"the loss is {point['loss']} at step {step + 1}; a smaller lr or clip, or a "
                f"longer warmup may help"
            )
        self.sums, self.counted = {}, 0
        self.losses.append(point)
        if self.config.tensorboard:
            values = {k: v for k, v in point.items() if k != "step"}
            self.accelerator.log(values, step=step + 1)

    def _validate(self, done: int) -> dict[str, Row]:
        """By the average of the weights, on the main process."""
        rows: dict[str, Row] = {}
        if self.accelerator.is_main_process:
            with self.average.in_place():
                rows = self.validator.run()
            self.history.append({"step": done, **plain(rows)})
            if self.config.tensorboard:
                values = {
                    f"validation/{name}/{key}": getattr(row, key)
                    for name, row in rows.items()
                    for key in ("relative_l2", "psnr_db")
                }
                self.accelerator.log(values, step=done)
        self.accelerator.wait_for_everyone()
        return rows

    def _checkpoint(self, done: int) -> None:
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        self.checkpoints.save(
            done,
            {
                "about": self.about,
                "module": self.module.state_dict(),
                "average": self.average.values,
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "seconds": self.seconds,
                "losses": self.losses,
                "history": self.history,
                "sums": {name: float(value) for name, value in self.sums.items()},
                "counted": self.counted,
            },
        )

    def _result(self) -> DistillResult:
        """Validate what is written, write it."""
        from accelerate.utils import broadcast_object_list

        module, dtype = self.module, _DTYPES[self.config.save_dtype]
        with torch.no_grad():
            for value in self.average.values:
                value.copy_(value.to(dtype))
        shared: list[Any] = [self._validate(self.config.steps)]
        rows: dict[str, Row] = broadcast_object_list(shared)[0]
        self.average.put()
        if self.accelerator.is_main_process:
            nn.Module.to(module, dtype).save_pretrained(self.out)
            self._report(rows)
        nn.Module.to(module, self.training.denoiser.model.dtype).requires_grad_(False)
        self.accelerator.wait_for_everyone()
        return DistillResult(
            module, self.out, rows, self.losses, round(self.seconds, 3), self.start
        )

    def _report(self, rows: dict[str, Row]) -> None:
        history = [each for each in self.history if each["step"] < self.config.steps]
        write(self.out / LOSSES, {"losses": self.losses, "validation": history})
        stride = max(1, math.ceil(len(self.losses) / 20))
        report = {
            **self.about,
            "losses": [*self.losses[::stride], *self.losses[-1:]] if stride > 1 else self.losses,
            "validation": plain(rows),
            "parameters": sum(p.numel() for p in self.module.parameters()),
            "device": str(self.training.device),
            "seconds": round(self.seconds, 1),
            "versions": {"python": platform.python_version(), **versions()},
        }
        write(self.out / REPORT, report)


def _text(point: dict[str, float]) -> str:
    """The losses of a point of the curve; a sum of one part is named once."""
    named = {k: v for k, v in point.items() if k not in ("step", "lr")}
    if len(named) == 2:
        named.pop("loss")
    return ", ".join(f"{name} {value:.4g}" for name, value in named.items())
