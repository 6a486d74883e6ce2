"""The settings of the cut along time, and the file of a calibrated schedule."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelrt.files import read_json, write_text
from accelrt.memory.sizes import parse_budget

from .boundary import DEFAULT, PUBLISHED, Boundary
from .policies import Interval, Policy, Schedule, Threshold, Verified
from .predictors import AdamsBashforth, Hermite, LearnedLinear, Predictor, Reuse, Taylor

FORMAT, VERSION = "accelrt-schedule", 1
#: In the folder that ``accelrt calibrate`` writes.
FILE_NAME = "schedule.json"
FEATURES = ("auto", "hidden", "residual")
TIMES = ("timestep", "step")

_POLICIES: dict[str, type[Policy]] = {
    "schedule": Schedule, "interval": Interval, "threshold": Threshold, "verified": Verified,
}  # fmt: skip
_PREDICTORS: dict[str, type[Predictor]] = {
    "reuse": Reuse, "taylor": Taylor, "hermite": Hermite, "adams_bashforth": AdamsBashforth,
    "learned_linear": LearnedLinear,
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """What a schedule was made for; another pipeline refuses it.

    Args:
        model: class of the denoiser.
        model_hash: of its configuration and parameters; see :func:`accelrt.steps.model_hash`.
        scheduler: class of the scheduler.
        scheduler_hash: of its configuration.
        steps: of the request.
        weights: norms of some parameters, which other weights would not have.
        model_id: where the model was loaded from; for people, not compared.

    Raises:
        ValueError: for a value of another type, naming it.
    """

    model: str
    model_hash: str
    scheduler: str
    scheduler_hash: str
    steps: int
    weights: tuple[float, ...] = ()
    model_id: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(map(float, self.weights)))
        for name in ("model", "model_hash", "scheduler", "scheduler_hash", "model_id"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"Origin: {name} is {getattr(self, name)!r}; allowed: a string")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"Origin: steps is {self.steps!r}; allowed: an integer >= 1")


@dataclass(frozen=True)
class Rehash:
    """How a denoiser is cut along time: fewer steps computed, with an error to be measured.

    At a computed step all stages run, and what crosses the boundary is kept. At a predicted
    step the stages before the boundary are left out, and a weighted sum of what was kept
    takes their place (Step Rehash of arXiv 2411.01171, and its successors).

    Args:
        policy: which steps are computed.
        predictor: what takes the place of features.
        boundary: which stages are left out: a :class:`Boundary`, the name of the last one,
            ``"default"`` (all but the last layer) or ``"published"`` (as Step Rehash: what
            comes up to the first temporal layer of the last up block).
        feature: what is predicted: ``"hidden"``, the output of the stages, or
            ``"residual"``, how much they change their input; ``"auto"`` takes the residual of
            image transformers.
        time: what predictors extrapolate over: ``"timestep"``, or the ``"step"``'s index.
        max_cache: bytes that the kept features may take, a number or ``"64MiB"``; a
            predictor of lower order takes the place of one that needs more. ``None``: no cap.
        origin: what it was calibrated for, if it was.

    Raises:
        ValueError: for a wrong value, naming it and what is allowed.
    """

    policy: Policy = field(default_factory=Interval)
    predictor: Predictor = field(default_factory=Taylor)
    boundary: Boundary | str = DEFAULT
    feature: str = "auto"
    time: str = "timestep"
    max_cache: int | str | None = None
    origin: Origin | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.policy, Policy):
            raise ValueError(f"policy is {self.policy!r}; allowed: {', '.join(_POLICIES)}")
        if not isinstance(self.predictor, Predictor):
            raise ValueError(f"predictor is {self.predictor!r}; allowed: {', '.join(_PREDICTORS)}")
        if isinstance(self.boundary, str) and self.boundary not in (DEFAULT, PUBLISHED):
            object.__setattr__(self, "boundary", Boundary(self.boundary))
        elif not isinstance(self.boundary, (str, Boundary)):
            raise ValueError(f"boundary is {self.boundary!r}; allowed: a Boundary or a name")
        for name, allowed in (("feature", FEATURES), ("time", TIMES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )
        if self.max_cache is not None and not isinstance(parse_budget(self.max_cache), int):
            raise ValueError(f"max_cache is {self.max_cache!r}; allowed: a number of bytes or None")
        learned = isinstance(self.predictor, LearnedLinear)
        if learned and not isinstance(self.policy, Schedule):
            raise ValueError("LearnedLinear was fitted to a Schedule, and needs one as policy")

    @property
    def cap(self) -> int | None:
        """``max_cache`` in bytes."""
        if self.max_cache is None:
            return None
        cap = parse_budget(self.max_cache)
        assert isinstance(cap, int)
        return cap

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the inverse of :meth:`from_dict`.

        Raises:
            ValueError: the policy or the predictor is of a class of your own.
        """
        for part, table in ((self.policy, _POLICIES), (self.predictor, _PREDICTORS)):
            if type(part) not in table.values():
                name = type(part).__name__
                raise ValueError(f"{name} is not one of ours: it cannot be written down")
        return self.described()

    def described(self) -> dict[str, Any]:
        """The same values, for people; classes of your own go by their names."""
        boundary: Any = self.boundary
        return {
            "format": FORMAT,
            "version": VERSION,
            "policy": _named(self.policy, _POLICIES),
            "predictor": _named(self.predictor, _PREDICTORS),
            "boundary": boundary if isinstance(boundary, str) else dataclasses.asdict(boundary),
            "feature": self.feature,
            "time": self.time,
            "max_cache": self.max_cache,
            "origin": None if self.origin is None else dataclasses.asdict(self.origin),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rehash:
        """Build from plain values.

        Raises:
            ValueError: another format or version, an unknown key, or a wrong value.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"a schedule is a mapping; got {type(values).__name__}")
        given = dict(values)
        form, version = given.pop("format", FORMAT), given.pop("version", VERSION)
        if form != FORMAT or version != VERSION:
            raise ValueError(
                f"format is {form!r}, version {version!r}; this is for {FORMAT!r}, {VERSION}"
            )
        given.pop("about", None)
        _known("schedule", given, [f.name for f in dataclasses.fields(cls)])
        arguments = dict(given)
        for key, table in (("policy", _POLICIES), ("predictor", _PREDICTORS)):
            if key in arguments:
                arguments[key] = _built(key, arguments[key], table)
        for key, kind in (("boundary", Boundary), ("origin", Origin)):
            if isinstance(arguments.get(key), Mapping):
                arguments[key] = _record(key, arguments[key], kind)
        if arguments.get("origin") is not None and not isinstance(arguments["origin"], Origin):
            raise ValueError(f"origin is {arguments['origin']!r}; allowed: a mapping or null")
        return cls(**arguments)

    def save(self, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
        """Write a JSON file.

        Args:
            path: of the file.
            about: what else the file shall say, for people.
        """
        values = self.to_dict()
        if about:
            values["about"] = dict(about)
        write_text(path, json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Rehash:
        """Read a JSON file, or :data:`FILE_NAME` in a folder.

        Raises:
            ValueError: it does not parse, or holds something else; the message names the file.
            OSError: it cannot be read.
        """
        path = Path(path)
        return read_json(path / FILE_NAME if path.is_dir() else path, cls.from_dict)


def _known(what: str, given: Mapping[str, Any], known: list[str]) -> None:
    unknown = sorted(str(key) for key in given if key not in known)
    if unknown:
        raise ValueError(f"{what}: unknown {', '.join(unknown)}; known: {', '.join(known)}")


def _named(value: Policy | Predictor, table: Mapping[str, type]) -> dict[str, Any]:
    kinds = (name for name, cls in table.items() if type(value) is cls)
    kind = next(kinds, type(value).__name__)
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else {}
    if isinstance(value, LearnedLinear):
        plain["table"] = {str(step): list(row) for step, row in value.table.items()}
    return {"kind": kind, **plain}


def _built(what: str, values: Any, table: Mapping[str, type]) -> Any:
    kind = values.get("kind") if isinstance(values, Mapping) else values
    if not isinstance(values, Mapping) or not isinstance(kind, str) or kind not in table:
        raise ValueError(f"{what}: kind is {kind!r}; allowed: {', '.join(table)}")
    arguments = {key: value for key, value in values.items() if key != "kind"}
    return _record(f"{what} {kind}", arguments, table[kind])


def _record(what: str, values: Mapping[str, Any], kind: Any) -> Any:
    _known(what, values, [f.name for f in dataclasses.fields(kind)])
    try:
        return kind(**values)
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{what}: {error}") from error
