"""``accelrt profile``: what a pipeline's call is made of, and what limits it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from accelrt.cli.common import bars, check_folder, check_packages, prepared, print_json, words
from accelrt.cli.demo import Device, Dtype
from accelrt.cli.errors import user_errors

if TYPE_CHECKING:
    from accelrt.cli.scenarios import Scenario
    from accelrt.profiling import Profile


class By(str, enum.Enum):
    """What a row of the table stands for."""

    step = "step"
    part = "part"
    component = "component"
    stage = "stage"
    group = "group"
    op = "op"


@user_errors
def profile(
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME_OR_PATH_OR_HUB_ID",
            autocompletion=words("animatediff", "svd", "dit", "pixart"),
            help="A pipeline, or one of the reference models: animatediff, svd, dit, pixart.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of trace and report.")] = Path("profile_out"),
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    by: Annotated[By, typer.Option(help="What a row of the table is.")] = By.group,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table.")] = 20,
    stock: Annotated[
        bool, typer.Option("--stock", help="The pipeline as it is, unwrapped.")
    ] = False,
    ops_every: Annotated[
        int,
        typer.Option(min=0, help="Record operators in one of so many steps; 0: none; 1: all."),
    ] = 20,
    warm: Annotated[bool, typer.Option(help="Run two steps before the profile.")] = True,
    budget: Annotated[
        str | None,
        typer.Option(
            autocompletion=words("auto", "min"),
            help="Memory budget of the wrap: 4GiB, auto, min.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the run.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Precision.")] = Dtype.fp32,
    device: Annotated[
        Device, typer.Option(help="auto: a GPU that this build has code for, else the CPU.")
    ] = Device.auto,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings of the wrap: YAML or JSON.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The text.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="The number of frames.")] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The picture to start from.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table.")
    ] = False,
) -> None:
    """Run a pipeline once and say where its time and memory went.

    Writes trace.json, for ui.perfetto.dev, and report.html. Under Nsight Systems
    (`nsys profile --capture-range=cudaProfilerApi accelrt profile ...`) the names are NVTX ranges.
    """
    import accelrt

    if stock and (config is not None or budget is not None):
        raise ValueError("--stock was given with --config or --budget; allowed: one of them")
    check_packages("pictures and page", "matplotlib", "jinja2")
    settings, _ = prepared(config, threads)
    if budget is not None:
        settings = settings.override(memory_budget=budget)
    check_folder(out)
    with bars(still=True) as progress:
        task = progress.add_task("loading", total=4, model=model)

        def begin(what: str, done: int) -> None:
            progress.update(task, description=what, completed=done, refresh=True)

        scenario = _scenario(model, dtype.value, device.value, steps, prompt, frames, image)
        out.mkdir(parents=True, exist_ok=True)
        if not stock:
            accelrt.wrap(scenario.pipe, config=settings)
        found = _run(scenario, seed, ops_every, warm, begin)
        begin("writing trace and page", 3)
        trace, page = found.save(out / "trace.json"), found.html(out / "report.html")
        begin("done", 4)
    if as_json:
        print_json({**found.to_dict(), "trace": str(trace), "report": str(page)})
        return
    console = Console()
    console.print(found.table(by.value, top))
    for path in (trace, page):
        console.print(f"written: {path}", highlight=False, soft_wrap=True)


def _scenario(
    model: str,
    dtype: str,
    device: str,
    steps: int,
    prompt: str | None,
    frames: int | None,
    image: Path | None,
) -> Scenario:
    from accelrt.cli import scenarios

    where = scenarios.choose_device(device)
    if model not in scenarios.REFERENCE_NAMES:
        return scenarios.custom_scenario(model, dtype, where, steps, prompt, frames, image)
    if not (prompt is None and frames is None and image is None):
        raise ValueError("--prompt, --frames and --image go with a pipeline of your own")
    folder = scenarios.reference_folder()
    return scenarios.reference_scenario(model, folder, dtype, where, steps)


def _run(
    scenario: Scenario, seed: int, ops_every: int, warm: bool, begin: Callable[[str, int], None]
) -> Profile:
    import torch

    import accelrt
    from accelrt.quality.observe import silent_steps

    pipe: Any = scenario.pipe

    def call(**overrides: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        pipe(**{**scenario.call, **overrides}, generator=generator, output_type="np")

    with silent_steps(pipe):
        if warm:
            begin("warming up", 1)
            call(**({"num_inference_steps": 2} if "num_inference_steps" in scenario.call else {}))
        begin("the call, and the rates of this machine", 2)
        with accelrt.profile(pipe, ops_every=ops_every) as found:
            call()
    return found
