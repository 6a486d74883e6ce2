"""The command line: its commands, and what all of them share."""

from __future__ import annotations

from typing import Annotated

import typer

import accelrt
from accelrt.cli.bench import bench
from accelrt.cli.calibrate import calibrate
from accelrt.cli.compare import compare
from accelrt.cli.demo import demo
from accelrt.cli.distill import distill
from accelrt.cli.doctor import doctor
from accelrt.cli.errors import set_debug
from accelrt.cli.plan import plan
from accelrt.cli.profile import profile

EPILOG = (
    "Exit codes: 0 done; 1 the finding is negative (`doctor`: not usable here; `demo`: an "
    "unwrapped pipeline differs from the stock one; `bench`: an error is above the rule's "
    "bound, or a budget was not kept; `compare`: PSNR is below --min-psnr, or an unwrapped "
    "pipeline differs; `calibrate`: the target was not reached; `distill`: the module is no "
    "better than the same steps without it); 2 wrong arguments, missing files or an unsupported "
    "model; 130 interrupted."
)

app = typer.Typer(
    name="accelrt",
    help="Diffusers pipelines in a fraction of their memory and time.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"accelrt {accelrt.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Diffusers pipelines in a fraction of their memory and time."""
    set_debug(debug)


app.command(epilog="Exit codes: 0 usable here; 1 not usable.")(doctor)
app.command(
    epilog="Exit codes: 0 done; 1 an unwrapped pipeline differs from the stock one; "
    "2 wrong arguments, missing files or an unsupported model."
)(demo)
app.command(
    epilog="Exit codes: 0 done; 1 a wrapped model's error is above the rule's bound, or a "
    "budget was not kept; 2 wrong arguments or an unsupported model."
)(bench)
app.command(
    epilog="Exit codes: 0 done; 1 the mean PSNR is below --min-psnr, or an unwrapped pipeline "
    "differs from the stock one; 2 wrong arguments, missing files or an unsupported model."
)(compare)
app.command(
    epilog="Exit codes: 0 done; 1 the target was not reached, but the closest schedule written; "
    "2 wrong arguments, missing files or an unsupported model."
)(calibrate)
app.command(
    epilog="Exit codes: 0 done; 1 with the trained module the error is not below that of the same "
    "steps without it, but it is written; 2 wrong arguments, missing files or packages, an "
    "unsupported model or data, or a training with other settings in --out."
)(distill)
app.command(epilog="Exit codes: 0 done; 2 a budget that cannot be met, or wrong arguments.")(plan)
app.command(epilog="Exit codes: 0 done; 2 wrong arguments, missing files or an unsupported model.")(
    profile
)


def main() -> None:
    """Run the command line; the entry point of the ``accelrt`` script."""
    app(prog_name="accelrt")
