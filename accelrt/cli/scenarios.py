"""What the demo runs: the reference models, or any pipeline of the user's."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import accelrt

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_PROMPT = "a handwritten seven bouncing to the right"
REFERENCE_FOLDER = Path("examples") / "reference_models"
REFERENCE_NAMES = ("animatediff", "svd", "dit", "pixart")
TRAIN_COMMAND = "python examples/reference_models/train.py"

# Sizes of the default demo: enough to look at, seconds on two cores.
_PROMPTS = (
    "a handwritten seven bouncing to the right",
    "a handwritten two bouncing down",
)
_CLASSES = (*range(10), *range(10))
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Scenario:
    """One pipeline and how it is called.

    Args:
        name: of the files that are written.
        title: what it is, for tables.
        detail: how it is called, in a few words.
        pipe: the loaded pipeline.
        call: keywords of its call.
    """

    name: str
    title: str
    detail: str
    pipe: Any
    call: dict[str, Any]


def reference_folder() -> Path:
    """Where the reference models are: under the current folder, or in the source checkout.

    Raises:
        FileNotFoundError: naming what is missing and the command that creates it.
    """
    source = Path(accelrt.__file__).resolve().parent.parent
    places = [Path.cwd() / REFERENCE_FOLDER, source / REFERENCE_FOLDER]
    for place in places:
        if all((place / name / "model_index.json").is_file() for name in REFERENCE_NAMES):
            return place
    missing = sorted(
        name
        for name in REFERENCE_NAMES
        if not any((place / name / "model_index.json").is_file() for place in places)
    )
    raise FileNotFoundError(
        f"reference models not found: {', '.join(missing) or 'no folder has all'} "
        f"(looked in {' and '.join(str(place) for place in dict.fromkeys(places))}). "
        f"Run `accelrt demo` in the source folder; `{TRAIN_COMMAND}` creates the models there. "
        "Any other pipeline: `accelrt demo --model PATH_OR_HUB_ID`."
    )


def reference_scenario(name: str, folder: Path, dtype: str, device: str, steps: int) -> Scenario:
    """A reference model with its call: two short videos, or twenty images."""
    pipe = load_pipeline(str(folder / name), dtype, device, quiet=True)
    title, detail, call = _REFERENCE_CALLS[name](folder, pipe)
    return Scenario(name, title, detail, pipe, {**call, "num_inference_steps": steps})


def _animatediff(folder: Path, pipe: Any) -> tuple[str, str, dict[str, Any]]:
    call = {"prompt": list(_PROMPTS), "num_frames": 16, "guidance_scale": 7.5}
    return "AnimateDiff", f"{len(_PROMPTS)}x16 frames", call


def _svd(folder: Path, pipe: Any) -> tuple[str, str, dict[str, Any]]:
    """The first frames lie beside the model: digits that it was not trained on."""
    images = [open_image(folder / "svd" / "first_frames" / f"{digit}.png") for digit in (7, 2)]
    call = {"image": images, "height": 32, "width": 32, "max_guidance_scale": 3.0}
    frames = pipe.unet.config.num_frames
    return "Stable Video Diffusion", f"{len(images)}x{frames} frames", call


def _dit(folder: Path, pipe: Any) -> tuple[str, str, dict[str, Any]]:
    call = {"class_labels": list(_CLASSES), "guidance_scale": 4.0}
    return "DiT", f"{len(_CLASSES)} images", call


def _pixart(folder: Path, pipe: Any) -> tuple[str, str, dict[str, Any]]:
    prompts = [f"a handwritten {digit}" for digit in _DIGITS] * 2
    call = {
        "prompt": prompts,
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": 32,
    }
    return "PixArt", f"{len(prompts)} images", call


_REFERENCE_CALLS = {"animatediff": _animatediff, "svd": _svd, "dit": _dit, "pixart": _pixart}


def custom_scenario(
    model: str,
    dtype: str,
    device: str,
    steps: int,
    prompt: str | None,
    frames: int | None,
    image: Path | None = None,
) -> Scenario:
    """A pipeline of the user's, called with what its signature asks for.

    Raises:
        FileNotFoundError: if there is no such folder or hub id.
        ValueError: if the call needs something that cannot be guessed.
    """
    pipe = load_pipeline(model, dtype, device)
    call = generic_call(pipe, steps, prompt, frames, image)
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(model).name).strip("-").lower() or "model"
    return Scenario(
        name, type(pipe).__name__.removesuffix("Pipeline"), Path(model).name, pipe, call
    )


def generic_call(
    pipe: Any,
    steps: int,
    prompt: str | None = None,
    frames: int | None = None,
    image: Path | None = None,
) -> dict[str, Any]:
    """Keywords of a call, from the pipeline's signature.

    Args:
        pipe: any diffusers pipeline.
        steps: denoising steps.
        prompt: text, for pipelines that take one; ``None`` for a default.
        frames: number of frames, for pipelines that take one; ``None`` for theirs.
        image: file of a picture, for pipelines that take one.

    Raises:
        ValueError: if a required argument is none that we can supply, or ``prompt``,
            ``frames`` or ``image`` is given to a pipeline that takes none.
        FileNotFoundError: if there is no such picture.
    """
    kind = type(pipe).__name__
    known = inspect.signature(type(pipe).__call__).parameters
    call: dict[str, Any] = {}
    if "prompt" in known:
        call["prompt"] = prompt or DEFAULT_PROMPT
    elif prompt is not None:
        raise ValueError(f"{kind} takes no prompt; leave --prompt out")
    if "class_labels" in known:
        call["class_labels"] = [0, 1, 2, 3]
    if "num_frames" in known:
        if frames is not None:
            call["num_frames"] = frames
    elif frames is not None:
        raise ValueError(f"{kind} takes no num_frames; leave --frames out")
    if "image" in known:
        if image is not None:
            call["image"] = open_image(image)
        elif known["image"].default is inspect.Parameter.empty:
            raise ValueError(f"{kind} starts from a picture; give one with --image FILE")
    elif image is not None:
        raise ValueError(f"{kind} takes no image; leave --image out")
    if "num_inference_steps" in known:
        call["num_inference_steps"] = steps
    required = [
        name
        for name, parameter in known.items()
        if name != "self"
        and parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in call
    ]
    if required:
        raise ValueError(
            f"{kind} needs {', '.join(required)}, which the demo cannot supply; "
            "call accelrt.quality.compare(pipe, {...}) with them"
        )
    return call


def open_image(path: Path) -> Image.Image:
    """A picture as RGB.

    Raises:
        FileNotFoundError: if it cannot be read as one.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{path} cannot be read as a picture: {error}") from error


def load_pipeline(model: str, dtype: str, device: str, *, quiet: bool = False) -> Any:
    """Load a pipeline from a folder or from the hub; of weights, safetensors alone.

    Args:
        model: folder or hub id.
        dtype: a key of :data:`DTYPES`.
        device: where it is moved to.
        quiet: no remarks of diffusers about the files.

    Raises:
        FileNotFoundError: if there is no such folder or hub id; with the reason.
        ImportError: if a package that the pipeline needs is missing; with its command.
    """
    from diffusers import DiffusionPipeline

    loader: Any = DiffusionPipeline
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"{model} is no pipeline: it has no model_index.json")
        source = str(folder)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        source = model
    else:
        raise FileNotFoundError(f"{model} is neither a folder nor a hub id (owner/name)")
    try:
        with _without_bars(quiet):
            pipe = loader.from_pretrained(source, dtype=DTYPES[dtype], use_safetensors=True)
    # An index that names what this diffusers does not have, or is no index: what the loader raises
    # then depends on what is missing.
    except (OSError, AttributeError, KeyError, TypeError) as error:
        raise FileNotFoundError(f"{model} cannot be loaded: {_first_lines(error)}") from error
    return pipe.to(device)


def choose_device(asked: str) -> str:
    """``auto`` is a GPU that torch sees and this build has code for, else the CPU.

    Raises:
        ValueError: if ``cuda`` was asked for and is not available.
    """
    from accelrt.reporting.environment import inspect_build, inspect_machine

    if asked == "cpu":
        return asked
    devices = inspect_machine()["torch"]["devices"]
    ready = bool(inspect_build().get("cuda")) and bool(devices) and devices[0]["code"] is not None
    if asked == "auto":
        return "cuda" if ready else "cpu"
    if not ready:
        raise ValueError("--device cuda is not available here; `accelrt doctor` says why")
    return asked


@contextmanager
def _without_bars(quiet: bool) -> Iterator[None]:
    """Hide the loading bars of the libraries, and with ``quiet`` their warnings."""
    from diffusers.utils import logging

    libraries: list[Any] = [logging]
    if importlib.util.find_spec("transformers") is not None:
        libraries.append(importlib.import_module("transformers.utils.logging"))
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
        if quiet:
            library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).split("\n")[:2])
