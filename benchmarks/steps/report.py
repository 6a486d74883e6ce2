"""The files: JSON, a Markdown table, and quality against time as a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import verdict
from measure import Result

from accelrt.benchmarking.gpu_use import GpuUse
from accelrt.benchmarking.tables import driver_markdown

HEAD = (
    "row", "s/batch", "speed-up", "computed", "PSNR", "SSIM", "latent error", "accuracy",
    "Frechet", "cache", "nearest plain", "PSNR gain", "Frechet gain", "verdict",
)  # fmt: skip
COLOURS = {"stock": "0.6", "exact": "black", "ours": "tab:blue", "rival": "tab:orange"}
LABELS = {
    "stock": "diffusers, fewer steps",
    "exact": "accelrt exact, fewer steps",
    "ours": "accelrt",
    "rival": "others",
}


@dataclass(frozen=True)
class Table:
    """All rows at one number of steps.

    Args:
        steps: of the reference.
        samples, batch: pictures or videos in all, and per call.
        results: of the rows.
        left_out: rows that there are not, with their reasons.
        gpu: what its driver said of a picture or video of each row; ``None`` of older tables.
    """

    steps: int
    samples: int
    batch: int
    results: Sequence[Result]
    left_out: dict[str, str]
    gpu: GpuUse | None = None

    def verdict(self, row: Result) -> verdict.Verdict | None:
        """On a configuration; None for plain rows."""
        if row.kind in ("stock", "exact"):
            return None
        return verdict.judge(row, verdict.plain_for(row, self.results))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = []
        for result in self.results:
            found = self.verdict(result)
            values = dataclasses.asdict(result)
            values["verdict"] = None if found is None else dataclasses.asdict(found)
            rows.append(_finite(values))
        return {
            "steps": self.steps,
            "samples": self.samples,
            "batch": self.batch,
            "rows": rows,
            "left_out": self.left_out,
            "gpu": None if self.gpu is None else self.gpu.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Table:
        """The inverse of :meth:`to_dict`."""
        names = [f.name for f in dataclasses.fields(Result)]
        results = []
        for row in values["rows"]:
            fields = {name: row[name] for name in names}
            results.append(Result(**{k: math.nan if v is None else v for k, v in fields.items()}))
        gpu = None if values.get("gpu") is None else GpuUse.from_dict(values["gpu"])
        return cls(
            values["steps"], values["samples"], values["batch"], results, values["left_out"], gpu
        )

    def markdown(self) -> str:
        """The table, and what is missing from it."""
        lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        for result in self.results:
            cells = [
                result.name,
                f"{result.seconds:.3g}",
                f"{result.speedup:.2f}x",
                f"{result.computed:.2f}",
                f"{result.psnr_db:.1f}",
                f"{result.ssim:.4f}",
                f"{result.latent_error:.3f}",
                f"{100 * result.accuracy:.1f} %",
                f"{result.frechet:.2f}",
                _bytes(result.cache_bytes),
            ]
            found = self.verdict(result)
            if found is None:
                cells += [""] * 4
            else:
                cells += [
                    found.nearest,
                    f"{found.psnr_gain_db:+.1f}",
                    f"{found.frechet_gain:+.2f}",
                    found.text,
                ]
            lines.append("| " + " | ".join(cells) + " |")
        lines += [""] + [f"- Left out: {name}: {why}." for name, why in self.left_out.items()]
        return "\n".join(lines).rstrip() + "\n"


def write(folder: Path, model: str, machine: dict[str, Any], table: Table) -> list[Path]:
    """Put a table into the files of a model; tables of other numbers of steps stay.

    Args:
        folder: is made if it does not exist.
        model: name in the files' names.
        machine: what it was measured on.
        table: takes the place of one with the same number of steps.

    Returns:
        Paths of the JSON, Markdown and PNG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"steps-{model}.json"
    tables = {table.steps: table}
    machines = {}
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        machines = known["machines"]
        for values in known["tables"]:
            tables.setdefault(values["steps"], Table.from_dict(values))
    machines[str(table.steps)] = machine
    ordered = [tables[steps] for steps in sorted(tables)]
    document = {
        "model": model,
        "machines": machines,
        "tables": [one.to_dict() for one in ordered],
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    text = path.with_suffix(".md")
    parts = [f"# {model}\n"]
    for one in ordered:
        where = ", ".join(f"{k} {v}" for k, v in machines[str(one.steps)].items())
        parts.append(
            f"## {one.steps} steps: {one.samples} samples in batches of {one.batch}\n\n{where}\n\n"
            + one.markdown()
        )
    # Tables of one machine say the same where there is no driver: once is enough.
    parts += dict.fromkeys(
        driver_markdown(one.gpu, "picture or video") for one in ordered if one.gpu is not None
    )
    text.write_text("\n".join(parts), encoding="utf-8")
    picture = path.with_suffix(".png")
    plot(picture, model, ordered)
    return [path, text, picture]


def plot(path: Path, model: str, tables: Sequence[Table]) -> None:
    """PSNR and Frechet distance against seconds: a column for each number of steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measures = (("psnr_db", "PSNR to all steps (dB)"), ("frechet", "Frechet distance"))
    figure, axes = plt.subplots(
        2, len(tables), figsize=(7 * len(tables), 9), squeeze=False, layout="constrained"
    )
    for column, table in enumerate(tables):
        for axis, (name, label) in zip(axes[:, column], measures, strict=True):
            _draw(axis, table, name)
            axis.set_xlabel("seconds per batch")
            axis.set_ylabel(label)
        axes[0, column].set_title(f"{model}, {table.steps} steps")
        axes[0, column].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw(axis: Any, table: Table, measure: str) -> None:
    for kind, colour in COLOURS.items():
        rows = [row for row in table.results if row.kind == kind]
        if measure == "psnr_db" and kind in ("stock", "exact"):
            rows = [row for row in rows if row.steps < table.steps]  # the reference itself
        rows.sort(key=lambda row: row.seconds)
        x = [row.seconds for row in rows]
        y = [getattr(row, measure) for row in rows]
        if kind in ("stock", "exact"):
            axis.plot(x, y, "o-", color=colour, label=LABELS[kind])
            continue
        axis.plot(x, y, "o", color=colour, label=LABELS[kind])
        for row, a, b in zip(rows, x, y, strict=True):
            if math.isfinite(b):
                axis.annotate(row.name, (a, b), fontsize=6, xytext=(3, 3),
                              textcoords="offset points")  # fmt: skip


def _finite(values: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _bytes(count: int) -> str:
    return "0" if count == 0 else f"{count / 1024:.0f} KiB" if count < 2**20 else (
        f"{count / 2**20:.1f} MiB"
    )  # fmt: skip
