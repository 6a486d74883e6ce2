"""The fastest way to cut a forward that fits: settings of the call, options of the groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelrt.config import Config
from accelrt.groups import Group
from accelrt.memory.arena import Arena
from accelrt.models.forward import Cut, Forward

from .cost import Machine
from .dryrun import DryRun, GroupRun, dry_run
from .plan import ComponentPlan, GroupPlan

#: MiB of scratch that a group may be told to aim at, from loose to tight.
RUNGS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.125, 0.03125)


@dataclass(frozen=True)
class Setting:
    """How the call is cut, which every group of it feels.

    Args:
        samples_per_pass: guidance halves and images that run together; ``None`` for all.
        recompute_skips: skips that are cheap to compute are computed again.
    """

    samples_per_pass: int | None
    recompute_skips: bool


@dataclass(frozen=True)
class Option:
    """How one group is cut, which no other group feels.

    Args:
        slice_mib: scratch aimed at; ``None`` for the config's.
        bands: single images may be cut.
        recompute: the group may compute its own intermediates twice.
    """

    slice_mib: float | None
    bands: bool = False
    recompute: bool = False


def options(base: Config) -> list[Option]:
    """All options, from fast to small; the first is what runs without a budget."""
    always = base.recompute == "always"
    mibs: tuple[float | None, ...] = RUNGS if base.slice_mib is None else (None,)
    found = [Option(None, recompute=always)]
    found += [Option(mib, bands=True, recompute=always) for mib in mibs]
    if base.recompute == "allow":
        few = RUNGS[1::2] + RUNGS[-1:] if base.slice_mib is None else (None,)
        found += [Option(mib, bands=True, recompute=True) for mib in few]
    return found


def settings(base: Config, batch: int, *, skips: bool = True) -> list[Setting]:
    """All settings of a call with ``batch`` samples, from what is usually fast to small.

    Args:
        base: what the user configured.
        batch: samples in the call.
        skips: the model has skips that could be computed again.
    """
    passes: list[int | None] = [base.samples_per_pass]
    if base.samples_per_pass is None:
        half = batch // 2
        while half >= 1:
            passes.append(half)
            half //= 2
    again = {"allow": (False, True), "never": (False,), "always": (True,)}[base.recompute]
    if not skips:
        again = again[:1]
    return [Setting(count, recompute) for recompute in again for count in passes]


class Model:
    """A forward on the meta device that can be run under any setting and option.

    Args:
        forward: of a module whose weights are meta tensors.
        inputs: all arguments by name, as the forward's ``run`` takes them.
        base: what the user configured.
        rates: of the machine that the plan is for.
        slice_mib: what ``slice_mib=None`` means there.
    """

    def __init__(
        self,
        forward: Forward,
        inputs: dict[str, Any],
        base: Config,
        rates: Machine,
        slice_mib: float,
    ) -> None:
        self.forward = forward
        self.inputs = inputs
        self.base = base
        self.rates = rates
        self.slice_mib = slice_mib
        self.fastest = options(base)[0]
        stages = forward.family.stages(forward.module, base)
        self.skips = any(group.makes_skip for stage in stages for group in stage.groups)
        self._runs: dict[tuple[Setting, bool, bool], list[DryRun]] = {}

    def settings(self, batch: int) -> list[Setting]:
        """:func:`settings` of this model."""
        return settings(self.base, batch, skips=self.skips)

    def configure(
        self, forward: Forward, setting: Setting, chosen: dict[str, Option] | Option
    ) -> Cut:
        """Stages of ``forward`` whose groups are set as ``chosen`` says."""
        config = self.base.override(samples_per_pass=setting.samples_per_pass)
        stages = forward.family.stages(forward.module, config)
        for stage in stages:
            for group in stage.groups:
                option = (
                    chosen if isinstance(chosen, Option) else chosen.get(group.name, self.fastest)
                )
                group.configure(self._group_config(config, group, setting, option))
        return Cut(stages, config)

    def _group_config(
        self, config: Config, group: Group, setting: Setting, option: Option
    ) -> Config:
        again = setting.recompute_skips if group.makes_skip else option.recompute
        return config.override(
            recompute="always" if again else "never",
            bands=option.bands or self.base.bands,
            slice_mib=self._slice_mib(option),
        )

    def _slice_mib(self, option: Option) -> float:
        return next(m for m in (option.slice_mib, self.base.slice_mib, self.slice_mib) if m)

    def run(self, setting: Setting, option: Option) -> DryRun:
        """All groups under one option; it runs once for all that make the same slices."""
        kind = (setting, option.bands or self.base.bands, option.recompute)
        runs = self._runs.setdefault(kind, [])
        size = int(self._slice_mib(option) * 2**20)
        for run in runs:
            if run.same_from <= size < run.same_below:
                return run
        runs.append(self.together(setting, option))
        return runs[-1]

    def together(self, setting: Setting, chosen: dict[str, Option] | Option) -> DryRun:
        """Every group under its own option."""
        arena = Arena("meta")
        cut = self.configure(self.forward, setting, chosen).placed(arena)

        def call(**inputs: Any) -> Any:
            return self.forward.run(cut, inputs)

        return dry_run(call, self.inputs, self.rates, forward=self.forward, arena=arena)


@dataclass(frozen=True)
class Found:
    """The best of one setting: an option for every group."""

    setting: Setting
    chosen: dict[str, Option]
    seconds: float


def smallest(model: Model, batch: int) -> int:
    """The least memory in bytes that any cut needs, by the rule of :func:`search`."""
    setting = model.settings(batch)[-1]
    runs = [model.run(setting, option) for option in _tightest(model)]
    totals = []
    for kept in set(map(kept_bytes, runs)):
        scratch = 0
        for name in runs[0].groups:
            own = [run.groups[name] for run in runs if run.groups[name].kept_bytes <= kept]
            scratch = max(scratch, min((g.scratch_bytes for g in own), default=kept))
        totals.append(kept + scratch)
    return min(totals)


def kept_bytes(run: DryRun) -> int:
    """What lives beyond a slice, at its worst."""
    slab = 0 if run.offsets is None else run.offsets.slab_bytes
    return max([slab, *(group.kept_bytes for group in run.groups.values())])


def loosest(run: DryRun) -> int:
    """A limit in bytes within which :func:`search` finds the options of ``run``."""
    return kept_bytes(run) + _scratch_bytes(run)


def _scratch_bytes(run: DryRun) -> int:
    """What its groups make and free outside of the arena, at its worst."""
    return max(group.scratch_bytes for group in run.groups.values())


def _tightest(model: Model) -> list[Option]:
    """The tightest option of each kind."""
    kinds: dict[tuple[bool, bool], Option] = {}
    for option in options(model.base):
        kinds[option.bands, option.recompute] = option
    return list(kinds.values())


def search(model: Model, batch: int, limit: int) -> Found | None:
    """The fastest cut whose live activations stay within ``limit`` bytes, or ``None``."""
    best: Found | None = None
    for setting in model.settings(batch):
        if best is not None and model.run(setting, model.fastest).seconds >= best.seconds:
            continue  # cutting finer makes it no faster
        found = _within(model, setting, limit)
        if found is not None and (best is None or found.seconds < best.seconds):
            best = found
        if best is not None and all(option == model.fastest for option in best.chosen.values()):
            break  # nothing had to be tightened
    return best


def _within(model: Model, setting: Setting, limit: int) -> Found | None:
    """For every group, the fastest option that fits; ``None`` if one has none.

    What is kept and what is scratch share the limit, and an option that keeps less may
    need more scratch: every division that one of the options suggests is tried, by what it
    keeps and by the scratch that it needs.
    """
    fastest = model.run(setting, model.fastest)
    if any(group.entry_bytes > limit for group in fastest.groups.values()):
        return None  # what a group finds alive is there whatever its own option is
    best = _divided(model, setting, limit, kept_bytes(fastest))
    if best is not None:
        return best
    tight = [model.run(setting, option) for option in _tightest(model)[1:]]
    divisions = set(map(kept_bytes, tight))
    divisions.update(limit - _scratch_bytes(run) for run in (fastest, *tight))
    for kept in sorted(divisions - {kept_bytes(fastest)}):
        found = _divided(model, setting, limit, kept)
        if found is not None and (best is None or found.seconds < best.seconds):
            best = found
    return best


def _divided(model: Model, setting: Setting, limit: int, kept: int) -> Found | None:
    """The best with ``kept`` bytes for what lives beyond a slice, the rest for scratch."""
    if kept > limit:
        return None
    first = model.run(setting, model.fastest)
    waiting = set(first.groups)
    chosen: dict[str, Option] = {}
    seconds = 0.0

    def fits(option: Option, name: str) -> bool:
        group = model.run(setting, option).groups[name]
        return group.kept_bytes <= kept and kept + group.scratch_bytes <= limit

    tight = _tightest(model)
    for option in options(model.base):
        for name in sorted(waiting):
            if fits(option, name):
                chosen[name] = option
                seconds += model.run(setting, option).groups[name].seconds
        waiting.difference_update(chosen)
        if not waiting:
            return Found(setting, chosen, seconds)
        if option == model.fastest:
            hopeless = (n for n in waiting if not any(fits(o, n) for o in tight))
            if next(hopeless, None) is not None:
                return None
    return None


def lowered(model: Model, found: Found, slower_at_most: float) -> Found:
    """The same cut with finer options for the groups at the peak, as long as that lowers it.

    A search fills its limit, which is what is kept anywhere and the largest scratch of any
    group together; where the two do not meet, less will do.

    Args:
        model: of the cut.
        found: the cut.
        slower_at_most: than the fastest cut, as a factor of the estimated time.
    """
    order = options(model.base)
    chosen, seconds = dict(found.chosen), found.seconds
    longest = slower_at_most * model.run(model.settings(1)[0], model.fastest).seconds

    def group(name: str, option: Option) -> GroupRun:
        return model.run(found.setting, option).groups[name]

    kept = max(group(name, option).kept_bytes for name, option in chosen.items())
    while True:
        name = max(chosen, key=lambda one: group(one, chosen[one]).peak_bytes)
        now = group(name, chosen[name])
        for option in order[order.index(chosen[name]) + 1 :]:
            finer = group(name, option)
            if finer.peak_bytes < now.peak_bytes and finer.kept_bytes <= kept:
                break
        else:
            break
        if seconds + finer.seconds - now.seconds > longest:
            break
        chosen[name] = option
        seconds += finer.seconds - now.seconds
    return Found(found.setting, chosen, seconds)


def finish(model: Model, found: Found, path: str, limit: int) -> ComponentPlan:
    """The plan of a component, looked at once more as a whole."""
    final = model.together(found.setting, found.chosen)
    fastest = model.run(model.settings(1)[0], model.fastest)
    assert final.offsets is not None
    groups = tuple(_group_plan(run, found.chosen[name]) for name, run in final.groups.items())
    return ComponentPlan(
        path=path,
        samples_per_pass=found.setting.samples_per_pass,
        recompute_skips=found.setting.recompute_skips,
        groups=groups,
        limit_bytes=limit,
        peak_bytes=final.peak_bytes,
        own_bytes=final.own_bytes,
        slab_bytes=final.offsets.slab_bytes,
        bound_bytes=final.offsets.bound_bytes,
        offsets=tuple(final.offsets.offsets),
        seconds=final.seconds,
        fastest_seconds=fastest.seconds,
        timeline=tuple(final.timeline),
    )


def _group_plan(run: GroupRun, option: Option) -> GroupPlan:
    return GroupPlan(
        name=run.name,
        stage=run.stage,
        slice_mib=option.slice_mib,
        bands=option.bands,
        recompute=option.recompute,
        entry_bytes=run.entry_bytes,
        peak_bytes=run.peak_bytes,
        own_bytes=run.own_bytes,
        seconds=run.seconds,
    )
