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

USAGE = "2 wrong arguments, missing files or packages, or an unsupported model"
FAILED = "3 it failed on the way, also for lack of memory; 130 interrupted"

# What 1 says of each command; those without a question never end with it.
FINDINGS = {
    "doctor": "not usable here",
    "demo": "an unwrapped pipeline differs from the stock one",
    "bench": "a wrapped model's error is above the rule's bound, or a budget was not kept",
    "compare": "the mean PSNR is below --min-psnr, or an unwrapped pipeline differs from the "
    "stock one",
    "calibrate": "the target was not reached, but the closest schedule written",
    "distill": "with the trained module the error is not below that of the same steps without it, "
    "but it is written",
}

EPILOG = (
    "Exit codes: 0 done; 1 the finding is negative, and the answer is printed all the same ("
    + "; ".join(f"`{name}`: {finding}" for name, finding in FINDINGS.items())
    + f"); {USAGE}; {FAILED}."
)


def exit_codes(name: str, usage: str = "") -> str:
    """The sentence under a command's help.

    Args:
        name: of the command.
        usage: what ends it with 2 besides.
    """
    finding = f"1 {FINDINGS[name]}; " if name in FINDINGS else ""
    more = f", or {usage}" if usage else ""
    return f"Exit codes: 0 done; {finding}{USAGE}{more}; {FAILED}."


app = typer.Typer(
    name="accelrt",
    help="Diffusers pipelines in a fraction of their memory and time.",
    epilog=EPILOG,
    no_args_is_help=True,
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


app.command(epilog=exit_codes("doctor"))(doctor)
app.command(epilog=exit_codes("demo"))(demo)
app.command(epilog=exit_codes("bench", "a budget that cannot be met"))(bench)
app.command(epilog=exit_codes("compare"))(compare)
app.command(epilog=exit_codes("calibrate"))(calibrate)
app.command(epilog=exit_codes("distill", "a training with other settings in --out"))(distill)
app.command(epilog=exit_codes("plan", "a budget that cannot be met"))(plan)
app.command(epilog=exit_codes("profile", "a budget that cannot be met"))(profile)


def main() -> None:
    """Run the command line; the entry point of the ``accelrt`` script."""
    app(prog_name="accelrt")
