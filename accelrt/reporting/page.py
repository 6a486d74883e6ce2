"""The self-contained HTML page of a demo."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment as Templates
from jinja2 import PackageLoader, StrictUndefined
from markupsafe import Markup

from accelrt.files import write_text
from accelrt.memory.sizes import bytes_text
from accelrt.quality import Comparison
from accelrt.reporting.environment import Environment
from accelrt.reporting.tables import (
    COLUMNS,
    Exhibit,
    decibel_text,
    error_text,
    groups_text,
    restored_text,
    share_text,
    table_rows,
)

_MEDIA_TYPES = {".gif": "image/gif", ".png": "image/png"}


def write_page(
    path: Path, exhibits: Sequence[Exhibit], environment: Environment, command: str
) -> None:
    """Write the report.

    Args:
        path: the HTML file; pictures are embedded, nothing else is needed to show it.
        exhibits: the compared models, at least one.
        environment: of this machine and build.
        command: that repeats the run.
    """
    templates = Templates(
        loader=PackageLoader("accelrt.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("demo.html.j2").render(
        columns=COLUMNS,
        rows=[row for exhibit in exhibits for row in table_rows(exhibit)],
        exhibits=[_exhibit(exhibit) for exhibit in exhibits],
        facts=_facts(environment),
        statements=environment.statements,
        packages=[package for package in environment.packages if package.version],
        command=command,
        repeats=len(exhibits[0].comparison.accelrt.seconds),
        restored=all(exhibit.comparison.restored for exhibit in exhibits),
        created=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=environment.build.get("accelrt", ""),
    )
    write_text(path, page)


def data_uri(path: Path) -> Markup:
    """A picture file as a ``data:`` address."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return Markup(f"data:{_MEDIA_TYPES[path.suffix]};base64,{data}")


def _exhibit(exhibit: Exhibit) -> dict[str, Any]:
    result = exhibit.comparison
    return {
        "title": exhibit.title,
        "detail": exhibit.detail,
        "picture": data_uri(exhibit.picture),
        "restored": result.restored,
        "restored_text": restored_text(result),
        "groups_text": groups_text(result),
        "rows": result.groups.rows,
        "stock_calls": result.groups.stock,
        "figures": _figures(result),
        "settings": _settings(result),
    }


def _figures(result: Comparison) -> list[tuple[str, str, str]]:
    """The four numbers at the top of an exhibit: value, name, remark."""
    ours, stock = result.accelrt, result.stock
    ssim = "" if result.ssim is None else f", SSIM {result.ssim:.6f}"
    return [
        (f"{result.speedup:.2f}x", "speed", "stock seconds over accelrt seconds"),
        (
            share_text(ours.peak_bytes, stock.peak_bytes),
            "of the stock peak",
            f"{bytes_text(ours.peak_bytes)} of {bytes_text(stock.peak_bytes)}, "
            f"beside {bytes_text(result.weight_bytes)} of weights",
        ),
        (error_text(result.latent_error), "error of the latents", "relative L2 against stock"),
        (decibel_text(result.psnr_db), "PSNR", f"pictures against stock{ssim}"),
    ]


def _settings(result: Comparison) -> list[tuple[str, str]]:
    call = ", ".join(f"{key}={value!r}" for key, value in result.call.items())
    changed = {k: v for k, v in result.config.to_dict().items() if v is not None}
    return [
        ("pipeline", result.pipeline),
        ("call", call),
        ("seed", str(result.seed)),
        ("dtype, device", f"{result.dtype}, {result.device}, CPU threads: {result.threads}"),
        ("config", ", ".join(f"{key}={value}" for key, value in changed.items())),
        ("stock seconds", ", ".join(f"{s:.3f}" for s in result.stock.seconds)),
        ("accelrt seconds", ", ".join(f"{s:.3f}" for s in result.accelrt.seconds)),
    ]


def _facts(environment: Environment) -> list[tuple[str, str]]:
    machine, build = environment.machine, environment.build
    torch = machine["torch"]
    devices = ", ".join(device["name"] for device in torch["devices"]) or "none"
    cuda = f"sm {build['cuda_architectures']}" if build.get("cuda") else "not built"
    return [
        ("processor", f"{machine['processor']}, {machine['cpus']} CPUs"),
        ("memory", bytes_text(machine["memory_bytes"] or 0)),
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("torch", str(torch["version"])),
        ("GPUs", devices),
        ("CPU kernels", str(build.get("active_isa"))),
        ("CUDA kernels", cuda),
    ]
