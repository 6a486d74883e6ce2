"""``accelrt doctor``: what this build has and what this machine can run."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from accelrt.cli.common import print_json
from accelrt.cli.errors import EXIT_NEGATIVE, user_errors
from accelrt.reporting.environment import Environment, cuda_path, inspect_environment


@user_errors
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what this build has, what this machine can run, and what is missing."""
    environment = inspect_environment()
    if as_json:
        print_json(environment.to_dict())
    else:
        show(environment, Console())
    if not environment.usable:
        raise typer.Exit(EXIT_NEGATIVE)


def show(environment: Environment, console: Console) -> None:
    """Print the findings as tables and sentences."""
    _facts(console, "Build", _build(environment.build, environment.machine))
    _facts(console, "Machine", _machine(environment))
    table = Table("package", "version", "needed for", title="Packages", title_justify="left")
    for package in environment.packages:
        version = package.version or ("[red]missing[/]" if package.required else "missing")
        name = package.name + ("" if package.required else " (optional)")
        table.add_row(name, version, package.purpose)
    console.print(table)
    console.print()
    for line in environment.statements[:-1]:
        console.print(f"- {escape(line)}", highlight=False, soft_wrap=True)
    colour = "green" if environment.usable else "red"
    console.print(f"[bold {colour}]{escape(environment.statements[-1])}[/]")


def _facts(console: Console, title: str, facts: list[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts:
        table.add_row(name, escape(value))
    console.print(table)


def _build(build: dict[str, Any], machine: dict[str, Any]) -> list[tuple[str, str]]:
    version = ("accelrt", str(build.get("accelrt", "?")))
    if not build["loaded"]:
        return [version, ("extension", f"does not load: {build['error']}")]
    return [
        version,
        ("extension", f"{build['build_type']}, by {build['compiler']}"),
        (
            "torch",
            f"headers of {build['torch_headers']}, runs on {build['torch_target']} and later",
        ),
        ("CPU kernels", ", ".join(build["cpu_isas"])),
        ("CUDA kernels", cuda_path(build, machine)),
    ]


def _machine(environment: Environment) -> list[tuple[str, str]]:
    machine = environment.machine
    by_nvcc = environment.build.get("cuda_kernels") == "nvcc"
    torch, nvidia = machine["torch"], machine["nvidia"]
    facts = [
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("processor", f"{machine['processor']}, {machine['cpus']} CPUs"),
        (
            "memory",
            f"{_gib(machine['memory_bytes'])}, {_gib(machine['available_bytes'])} available",
        ),
    ]
    if torch["version"] is None:
        facts.append(("torch", f"does not load: {torch['error']}"))
    else:
        cuda = f"CUDA {torch['cuda']}" if torch["cuda"] else "CPU only"
        facts.append(
            ("torch", f"{torch['version']} ({cuda}), threads: {torch['threads']}, "
             f"{torch['cpu_capability']}")
        )  # fmt: skip
    code = {"binary": "has code for it", "ptx": "has PTX for it", None: "has no code for it"}
    for index, device in enumerate(torch["devices"]):
        state = f"; this build {code[device['code']]}" if by_nvcc else ""
        facts.append(
            (f"GPU {index}", f"{device['name']}, sm {device['capability']}, "
             f"{_gib(device['memory_bytes'])}{state}")
        )  # fmt: skip
    if nvidia["driver"]:
        names = ", ".join(device["name"] for device in nvidia["devices"]) or "no device"
        facts.append(("NVIDIA driver", f"{nvidia['driver']} (CUDA {nvidia['cuda']}): {names}"))
    else:
        facts.append(("NVIDIA driver", nvidia["note"]))
    return facts


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
