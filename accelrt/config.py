"""The settings of a wrapped model: validated, and read from dict, YAML or JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from accelrt.files import parse_json, parse_yaml, read
from accelrt.memory.sizes import parse_budget

_LENGTHS = (
    "frames_per_slice",
    "pixels_per_slice",
    "ff_rows",
    "samples_per_slice",
    "vae_images",
    "samples_per_pass",
)
RECOMPUTE = ("allow", "never", "always")


S = TypeVar("S", bound="Settings")
T = TypeVar("T")


class Settings:
    """Base of frozen dataclasses whose fields are settings, which they check themselves."""

    @classmethod
    def from_dict(cls: type[S], values: Any) -> S:
        """Build it from a mapping.

        Raises:
            ValueError: for an unknown key (naming it and the known ones) or a wrong value.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a config is a mapping of settings; got {type(values).__name__}")
        cls._check_names(values)
        return cls(**values)

    @classmethod
    def from_file(cls: type[S], path: str | Path) -> S:
        """Read it from a ``.yaml``, ``.yml`` or ``.json`` file.

        Raises:
            ValueError: for another suffix, a file that does not parse, an unknown key or
                a wrong value; the message names the file.
            OSError: if the file cannot be read.
        """
        return read_settings(path, cls.from_dict)

    def override(self: S, **values: Any) -> S:
        """A copy with some settings replaced.

        Raises:
            ValueError: for an unknown key or a wrong value.
        """
        self._check_names(values)
        changed: S = dataclasses.replace(self, **values)  # type: ignore[type-var]
        return changed

    @classmethod
    def _check_names(cls, values: dict[str, Any]) -> None:
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"unknown setting {', '.join(unknown)}; known: {', '.join(known)}")


@dataclass(frozen=True)
class Config(Settings):
    """How a wrapped model is cut along space. Every setting is exact; they trade memory for time.

    A length of ``None`` is chosen at each call by one rule: the longest slice whose
    widest intermediate stays within ``slice_mib``, at least one item, and the slices
    of one group as equal as the division allows.

    Args:
        frames_per_slice: images (batch times frames) in one slice of a spatial group:
            ResNet blocks, spatial transformers, upsamplers, the output convolution.
        pixels_per_slice: pixels in one slice of a motion module or of the temporal half
            of a block, each with all its frames and samples.
        ff_rows: tokens in one slice of a feed-forward layer. On the CPU ``None`` means half of
            the rule, but no fewer than 512, where the library makes values and gates of a GEGLU.
        samples_per_slice: batch samples in one slice of an image transformer (DiT,
            PixArt), or of the buffer of a temporal ResNet block.
        vae_images: images that go through the VAE encoder or decoder together; of the
            video VAE's decoder whole videos, at least one.
        samples_per_pass: batch samples, guidance halves among them, that go through a
            denoiser together; ``None`` means all.
        slice_mib: size in MiB that ``None`` lengths aim at; ``None`` means 8 on the CPU
            (about a last-level cache) and 64 on a GPU (long enough to hide launches).
        bands: cut a single image into bands of rows where its intermediates exceed
            ``slice_mib``.
        recompute: ``"always"`` computes again what is cheap to compute and large to keep
            (the skips of first and downsampling convolutions, first convolutions of VAE
            blocks), ``"never"`` keeps it; ``"allow"`` leaves the choice to the plan of a
            memory budget, and keeps it where there is none.
        memory_budget: what a whole call may take: a number of bytes, a string such as
            ``"4GiB"``, ``"auto"`` (what the device has free, less a tenth) or ``"min"`` (for
            the denoiser and the VAE, the smallest exact plan that is estimated at no more than
            1.1 times the time; a number may ask for less). Of a pipeline, its weights count;
            of a single model, what its forward allocates. Every new size of call is planned
            before it runs. ``None``: no plan.
        cuda_graphs: on CUDA, capture the passes of a denoiser as CUDA graphs and launch those.
            ``True`` refuses a call on another device, ``"auto"`` runs it as without. ``False``,
            since nothing of it has been measured on a GPU yet. See ``docs/cuda.md``.
        max_cuda_graphs: graphs that are kept, at most; the least recently used goes first.
        pipeline_slices: on CUDA, a slice begins on a second stream while the one before still
            runs, where slices need nothing of each other; a plan counts the memory of both. No
            effect on other devices. ``False``, since nothing of it has been measured on a GPU
            yet. See ``docs/cuda.md``.
        inplace: groups may write over inputs that nothing else needs.
        fuse: use the fused operators; ``False`` runs the same slices with the model's
            own modules, for comparison.

    Raises:
        ValueError: for a wrong value, naming the setting, the value and what is allowed.
    """

    frames_per_slice: int | None = None
    pixels_per_slice: int | None = None
    ff_rows: int | None = None
    samples_per_slice: int | None = None
    vae_images: int | None = 1
    samples_per_pass: int | None = None
    slice_mib: float | None = None
    bands: bool = False
    recompute: str = "allow"
    memory_budget: int | str | None = None
    cuda_graphs: bool | str = False
    max_cuda_graphs: int = 16
    pipeline_slices: bool = False
    inplace: bool = True
    fuse: bool = True

    def __post_init__(self) -> None:
        for name in _LENGTHS:
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise ValueError(f"{name} is {value!r}; allowed: an integer >= 1, or None")
        mib = self.slice_mib
        if mib is not None and (
            not isinstance(mib, (int, float)) or isinstance(mib, bool) or not 0 < mib < 1e6
        ):
            raise ValueError(f"slice_mib is {mib!r}; allowed: a number above 0, below 1e6, or None")
        if self.memory_budget is not None:
            parse_budget(self.memory_budget)
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute is {self.recompute!r}; allowed: {', '.join(RECOMPUTE)}")
        if type(self.cuda_graphs) is not bool and self.cuda_graphs != "auto":
            raise ValueError(f"cuda_graphs is {self.cuda_graphs!r}; allowed: True, False, 'auto'")
        most = self.max_cuda_graphs
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise ValueError(f"max_cuda_graphs is {most!r}; allowed: an integer >= 1")
        for name in ("bands", "pipeline_slices", "inplace", "fuse"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: True, False")

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values; the inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @property
    def recomputes(self) -> bool:
        """Whether groups compute again what they could keep."""
        return self.recompute == "always"


def read_settings(path: str | Path, build: Callable[[Any], T]) -> T:
    """What ``build`` makes of a ``.yaml``, ``.yml`` or ``.json`` file; an empty one is ``{}``.

    Raises:
        ValueError: for another suffix, a file that does not parse, or if ``build`` refuses
            it; the message names the file.
        OSError: if the file cannot be read.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"{path}: the suffix is {suffix!r}; allowed: .yaml, .yml, .json")
    parse = parse_json if suffix == ".json" else parse_yaml

    def made(values: Any) -> T:
        return build({} if values is None else values)

    return read(path, parse, made)
