"""What a training leaves: the module, how it does, and the files beside the weights."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelrt.feedback.module import FeedbackModule
from accelrt.files import write_text

from .validation import Row

LOSSES, REPORT = "losses.json", "training.json"
_PACKAGES = ("torch", "diffusers", "accelerate")


@dataclass(frozen=True)
class DistillResult:
    """A trained module and how it does.

    Args:
        module: in evaluation mode, in the backbone's precision.
        folder: where it was written.
        validation: by name; see :class:`~accelrt.feedback.training.validation.Validator`.
        losses: points of the loss curve.
        seconds: of all steps, validation and interruptions left out.
        resumed_at: the step of the checkpoint that it went on from; 0 if there was none.
    """

    module: FeedbackModule
    folder: Path
    validation: dict[str, Row]
    losses: list[dict[str, float]]
    seconds: float
    resumed_at: int

    @property
    def improved(self) -> bool:
        """Whether feedback is nearer to the teacher than the same steps without it."""
        rows = self.validation
        return rows["feedback"].relative_l2 < rows["without"].relative_l2

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "folder": str(self.folder),
            "improved": self.improved,
            "validation": plain(self.validation),
            "final_loss": self.losses[-1]["loss"] if self.losses else None,
            "seconds": self.seconds,
            "resumed_at": self.resumed_at,
        }


def versions() -> dict[str, str]:
    """Of the packages that the weights depend on."""
    import accelrt

    installed = {name: version(name) for name in _PACKAGES if name != "accelrt"}
    return {**installed, "accelrt": accelrt.__version__}


def plain(rows: dict[str, Row]) -> dict[str, dict[str, Any]]:
    """JSON has no infinity: identical pictures have no PSNR."""
    plain = {name: row.to_dict() for name, row in rows.items()}
    for values in plain.values():
        if not math.isfinite(values["psnr_db"]):
            values["psnr_db"] = None
    return plain


def write(path: Path, values: Any) -> None:
    """JSON, to be read by people too."""
    write_text(path, json.dumps(values, indent=2) + "\n")
