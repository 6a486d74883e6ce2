"""A profile as one self-contained page."""

from __future__ import annotations

import base64
import datetime
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment as Templates
from jinja2 import PackageLoader, StrictUndefined
from markupsafe import Markup

from accelrt.files import write_text
from accelrt.memory.sizes import bytes_text
from accelrt.reporting.tables import seconds_text

from . import figures
from .tables import cells, heads, sentences

if TYPE_CHECKING:
    from .capture import Profile

ROWS = 40
_KINDS = ("part", "stage", "group", "op", "step")


def write_page(profile: Profile, path: Path) -> None:
    """Write the page; pictures are embedded."""
    templates = Templates(
        loader=PackageLoader("accelrt.profiling", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("profile.html.j2").render(
        title=profile.title,
        created=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        figures=_numbers(profile),
        sentences=sentences(profile),
        pictures=_pictures(profile),
        tables=[_table(profile, by) for by in _KINDS],
    )
    write_text(path, page)


def _numbers(profile: Profile) -> list[tuple[str, str, str]]:
    """The numbers at the top: value, name, remark."""
    found = [
        (f"{seconds_text(profile.seconds)} s", "wall time", f"{profile.steps} steps"),
        (f"{100 * profile.coverage:.1f} %", "has a name", "of the calls' time"),
        (bytes_text(profile.peak_bytes), "peak", "tensors made in the block, alive at once"),
    ]
    if profile.ceilings is not None and profile.seconds:
        whole = sum(row.flops for row in profile.rows("part"))
        share = whole / profile.seconds / profile.ceilings.flops_per_second
        remark = f"of {profile.ceilings.flops_per_second / 1e9:.4g} GFLOP/s"
        found.append((f"{share:.2f}", "utilisation", remark))
    if profile.joules_per_image is not None:
        found.append((f"{profile.joules_per_image:.3g} J", "per image", profile.samples.gpu.name))
    return found


def _pictures(profile: Profile) -> list[tuple[str, Markup]]:
    drawings: list[tuple[str, Any]] = []
    if profile.analysis.spans:
        drawings.append(("Timeline", figures.draw_timeline))
    if profile.steps:
        drawings.append(("Steps", figures.draw_steps))
    drawings.append(("Memory", figures.draw_memory))
    if profile.ceilings is not None and any(row.flops and row.bytes for row in profile.rows()):
        drawings.append(("Roofline", figures.draw_roofline))
    found = []
    for title, draw in drawings:
        buffer = io.BytesIO()
        draw(profile, buffer)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        found.append((title, Markup(f"data:image/png;base64,{data}")))
    return found


def _table(profile: Profile, by: str) -> dict[str, Any]:
    rows = profile.rows(by)
    return {
        "by": by,
        "heads": heads(profile, by),
        "rows": [cells(profile, row) for row in rows[:ROWS]],
        "more": max(0, len(rows) - ROWS),
    }
