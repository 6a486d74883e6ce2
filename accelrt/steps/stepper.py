"""Runs one call of a denoiser at its step: whole, or with predicted features."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accelrt import ops
from accelrt.groups import State
from accelrt.groups.skips import Skip

from .boundary import DEFAULT, PUBLISHED, Boundary, Place, Region, begin_of, flat, resolve
from .features import (
    Memories,
    Store,
    Unit,
    rows_of,
    shaped,
    shapes_of,
    single_slot,
    weight_rows,
)
from .graphs import Pass
from .keeping import Keeper
from .passage import Passage, leave_schedule, rows_in, spread
from .policies import Adaptive, Verified
from .rehash import Rehash
from .session import COMPUTED, PREDICTED, REJECTED, Session, Step, Tracker, weights_on

if TYPE_CHECKING:
    from accelrt.models.forward import Cut, Forward

#: Rows of weights, and ways to cut a model, that are kept.
KEPT_WEIGHTS, KEPT_REGIONS = 512, 16
#: Requests whose memory waits for the next ones, where there are graphs that work in it.
KEPT_MEMORIES = 4


class Stepper:
    """The cut along time of one model.

    Args:
        rehash: its settings.
        tracker: follows the requests.
    """

    def __init__(self, rehash: Rehash, tracker: Tracker) -> None:
        self.rehash = rehash
        self.tracker = tracker
        self.recorder: Any = None
        self._begins: dict[tuple[str, ...], int] = {}
        self._weights: dict[Any, Tensor] = {}
        self._regions: dict[int, tuple[Any, tuple[Place, ...], Region]] = {}
        self.memories = Memories(KEPT_MEMORIES)
        self._keeper = Keeper(rehash, tracker)

    def check(self, forward: Forward) -> None:
        """Refuse settings that do not fit a model.

        Raises:
            ValueError: a boundary that the model does not have, or that does not go with the
                policy.
        """
        self._region(forward, flat(forward.stages()))

    def boundary(self, forward: Forward) -> Boundary:
        """The boundary of the settings, by its names in the model."""
        chosen = self.rehash.boundary
        if isinstance(chosen, Boundary):
            return chosen
        stages = forward.stages()
        family = forward.family
        if chosen == PUBLISHED:
            published = family.published_boundary(stages)
            if published is None:
                raise ValueError(
                    f"Step Rehash's own boundary is a temporal layer of a UNet; "
                    f"{type(forward.module).__name__} has none; allowed: {DEFAULT!r}, or a Boundary"
                )
            return published
        return family.default_boundary(stages)

    def cache_bytes(self, forward: Forward, inputs: dict[str, Any]) -> int:
        """What the kept features of a request take: told before it runs.

        Args:
            forward: on a model on the meta device.
            inputs: arguments of a call, meta tensors among them.

        Raises:
            ValueError: ``max_cache`` is too small for any predictor.
        """
        tracker = Tracker(self.rehash)
        meta = Stepper(self.rehash, tracker)
        session = Session()
        step = Step(session, 0, 0.0, (0, 0))
        total = 0
        for part in forward.family.parts(forward.module, inputs, forward.config):
            places = flat(forward.stages())
            batch = int(part[forward.family.input_name].shape[0])
            run = Passage(forward, places, meta._region(forward, places), part, batch)
            store = Store(batch, [Unit(tuple(range(batch)))], self.rehash.predictor)
            meta._computed(run, store, step, store.units, None)
            total += store.bytes
        return total

    def enter(self, forward: Forward, inputs: dict[str, Any]) -> Step | None:
        """The step of a call that begins; ``None`` to run it whole."""
        return self.tracker.enter(id(forward), inputs.get("timestep"))

    def run(
        self, forward: Forward, cut: Cut, inputs: dict[str, Any], step: Step, first: int
    ) -> Tensor:
        """The output of one part of a call.

        Args:
            forward: of the model.
            cut: of the call.
            inputs: of the part.
            step: that the call belongs to.
            first: row of the call at which the part begins.
        """
        batch = int(inputs[forward.family.input_name].shape[0])
        places, region = self._places(forward, cut.stages)
        run = Passage(forward, places, region, inputs, batch, cut=cut)
        key = (step.key, first)
        store = step.session.stores.get(key)
        shapes = shapes_of(inputs)
        if store is not None and store.inputs != shapes:
            store = None  # guidance was switched on or off, or the size has changed
        if store is None:
            units = self._units(forward, inputs, batch)
            store = Store(batch, units, self.rehash.predictor, inputs=shapes)
            device = inputs[forward.family.input_name].device
            if forward.graphs is not None and forward.graphs.serves(device):
                stream = forward.graphs.cache.backend.stream(device)
                form = (step.key, first, region, shapes, stream)
                self.memories.lend(store, form, cut.stages)
                step.session.cache_bytes = max(step.session.cache_bytes, store.bytes)
            step.session.stores[key] = store
        return self._decided(run, store, step)

    # Decisions

    def _decided(self, run: Passage, store: Store, step: Step) -> Tensor:
        policy, units = self.rehash.policy, store.units
        fixed = policy.fixed(step.index, step.session.steps)
        if not store.slots or fixed is True or any(not unit.times for unit in units):
            return self._all_computed(run, store, step)
        if fixed is False:
            self._note(step, [PREDICTED] * len(units))
            return self._all_predicted(run, store, step)
        assert isinstance(policy, Adaptive)
        if run.forward.graphs is not None:
            run.forward.graphs.skipped("the policy decides for each sample, from its features")
        state = run.head()
        wanted = [unit.consecutive < policy.max_consecutive for unit in units]
        if policy.watches:
            changes = self._changes(run, store, state)
            for unit, change in zip(units, changes, strict=True):
                unit.drift += change
            limit = policy.threshold
            wanted = [w and u.drift < limit for w, u in zip(wanted, units, strict=True)]
        return self._mixed(run, store, step, state, wanted)

    def _mixed(
        self, run: Passage, store: Store, step: Step, state: State, wanted: list[bool]
    ) -> Tensor:
        """Some units are predicted, if they stand the check; the others are computed."""
        units = store.units
        kinds = [PREDICTED if w else COMPUTED for w in wanted]
        if not any(wanted):
            self._note(step, kinds)
            return self._computed(run, store, step, units, state)
        chosen = [unit for unit, w in zip(units, wanted, strict=True) if w]
        out: Tensor | None = None
        if len(chosen) == len(units):
            out, bad = self._checked(run, store, step, chosen, state)
        else:
            part = run.part(rows_in(chosen))
            if part is None:
                self._note(step, [COMPUTED] * len(units))
                return self._computed(run, store, step, units, state)
            del state
            some, bad = self._checked(part, store, step, chosen, part.head())
            if some is not None:
                out = spread(out, some, rows_in(chosen), run.batch)
        for unit in chosen:
            unit.consecutive += 1
        for unit, failed in zip(chosen, bad, strict=True):
            if failed:
                kinds[units.index(unit)] = REJECTED
        computed = [u for u, kind in zip(units, kinds, strict=True) if kind != PREDICTED]
        if not computed:
            self._note(step, kinds)
            assert out is not None
            return out
        part = None if len(computed) == len(units) else run.part(rows_in(computed))
        if part is None:  # all of them, also those whose prediction would have done
            self._note(step, [REJECTED if kind == PREDICTED else kind for kind in kinds])
            return self._computed(run, store, step, units, run.head())
        self._note(step, kinds)
        fresh = self._computed(part, store, step, computed, part.head())
        return spread(out, fresh, rows_in(computed), run.batch)

    def _checked(
        self, run: Passage, store: Store, step: Step, units: list[Unit], state: State
    ) -> tuple[Tensor | None, list[bool]]:
        """The predicted output of some units, and which of them failed the check.

        There is no output if all of them did.
        """
        policy = self.rehash.policy
        if not isinstance(policy, Verified):
            return self._predicted(run, store, step, units, state), [False] * len(units)
        self._supply(run, store, state, *self._from_slots(run, store, step, units))
        run.stages(state, run.region.end, run.region.check)
        assert store.checks is not None
        assert state.hidden is not None
        weights = self._on_device(self._weights_of(store, step, units), state.hidden.device)
        expected = rows_of(store.checks.sum(weights), store.batch)
        if run.rows is not None:
            expected = expected.index_select(0, run.rows)
        found = rows_of(state.hidden, run.batch).contiguous()
        changes = self._per_unit(ops.feature_delta(found, expected), run, units)
        bad = [not change <= policy.threshold for change in changes]  # a NaN is rejected too
        if all(bad):
            return None, bad
        return run.finish(state, run.region.check), bad

    def _changes(self, run: Passage, store: Store, state: State) -> list[float]:
        """Change of the head's output since the step before, of each unit."""
        assert state.hidden is not None
        assert store.head is not None
        now = rows_of(state.hidden, run.batch).contiguous()
        change = ops.feature_delta(now, store.head)
        store.head.copy_(now)
        return self._per_unit(change, run, store.units)

    def _per_unit(self, change: Tensor, run: Passage, units: list[Unit]) -> list[float]:
        """The largest value among the rows of each unit. Waits for the device."""
        values = change.tolist()
        at = {row: i for i, row in enumerate(run.numbers)}
        return [max(values[at[row]] for row in unit.rows) for unit in units]

    def _note(self, step: Step, kinds: Sequence[str]) -> None:
        step.note(tuple(kinds))

    # Computed steps

    def _all_computed(self, run: Passage, store: Store, step: Step) -> Tensor:
        self._note(step, [COMPUTED] * len(store.units))
        graphs, cut = run.forward.graphs, run.cut
        if graphs is None or cut is None:
            return self._computed(run, store, step, store.units, None)
        time = self._keeper.time(step)
        slots = {unit.slot(time, store.points) for unit in store.units}
        reason = self._unready(run, store)
        if not reason and len(slots) > 1:
            reason = "samples keep their features in different slots"
        if reason:
            graphs.skipped(reason)
            return self._computed(run, store, step, store.units, None)

        def body(given: dict[str, Any]) -> Tensor:
            return self._computed(run.on(given["inputs"]), store, step, store.units, None)

        def replayed() -> None:
            for unit in store.units:
                unit.keep(time, unit.slot(time, store.points))

        key = (tuple(slots), store.addresses, run.region)
        return graphs.run(
            run.forward, cut, Pass(COMPUTED, key, {"inputs": run.inputs}, body, replayed)
        )

    def _unready(self, run: Passage, store: Store) -> str:
        """Why a pass cannot be captured now; empty if it can."""
        policy = self.rehash.policy
        if self.recorder is not None:
            return "a calibration records features"
        made = bool(store.slots) and run.region.begin is not None
        made = made and not (policy.watches and store.head is None)
        if not made or (policy.verifies and store.checks is None):
            return "the first pass of a form makes the memory of its features"
        return ""

    def _all_predicted(self, run: Passage, store: Store, step: Step) -> Tensor:
        """A step at which every sample is predicted, unchecked."""
        units = store.units
        graphs, cut = run.forward.graphs, run.cut
        if graphs is None or cut is None:
            return self._predicted(run, store, step, units, None)
        reason = self._unready(run, store)
        if reason:
            graphs.skipped(reason)
            return self._predicted(run, store, step, units, None)
        alone, weights = self._from_slots(run, store, step, units)

        def body(given: dict[str, Any]) -> Tensor:
            again = run.on(given["inputs"])
            state = again.head()
            self._supply(again, store, state, alone, given["weights"])
            return again.finish(state, again.region.end)

        key = (alone, store.addresses, run.region)
        given = {"inputs": run.inputs, "weights": weights}
        return graphs.run(run.forward, cut, Pass(PREDICTED, key, given, body))

    def _computed(
        self, run: Passage, store: Store, step: Step, units: list[Unit], state: State | None
    ) -> Tensor:
        """Run all stages for some units, and keep what crosses the boundary."""
        region, policy = run.region, self.rehash.policy
        if region.begin is None:
            if policy.watches or self._is_residual(run):
                return self._computed(self._learned(run), store, step, units, None)
            state, lowest = self._learning(run)
            self._keep(run, store, step, units, state, None, lowest)
            return self._rest(run, store, step, units, state)
        if state is None:
            state = run.head()
        before = None
        if policy.watches:
            assert state.hidden is not None
            now = rows_of(state.hidden, run.batch)
            if store.head is None:
                store.head = now.clone() if now.is_contiguous() else now.contiguous()
            elif run.rows is None:
                store.head.copy_(now)
        if self._is_residual(run):
            assert state.hidden is not None
            before = rows_of(state.hidden, run.batch).clone()
        lowest = run.stages(state, region.begin, region.end)
        self._keep(run, store, step, units, state, before, lowest)
        del before
        return self._rest(run, store, step, units, state)

    def _rest(
        self, run: Passage, store: Store, step: Step, units: list[Unit], state: State
    ) -> Tensor:
        """The stages after the boundary, at a computed step."""
        end = run.region.end
        if self.rehash.policy.verifies:
            run.stages(state, end, run.region.check)
            self._keeper.keep_check(run, store, step, units, state)
            end = run.region.check
        return run.finish(state, end)

    def _learning(self, run: Passage) -> tuple[State, int]:
        """Run up to the boundary, and learn where the left-out stages begin.

        Returns:
            The state, and the depth of the stack of skips there.
        """
        names = tuple(place.group.name for place in run.places)
        state = run.head()
        depths = [len(state.skips)]
        for index in range(run.region.end):
            run.stages(state, index, index + 1)
            depths.append(len(state.skips))
        self._begins[names] = begin_of(depths, run.region)
        return state, depths[-1]

    def _learned(self, run: Passage) -> Passage:
        """The run with a known beginning of the left-out stages, by a pass for nothing else."""
        self._learning(run)
        names = tuple(place.group.name for place in run.places)
        region = run.region
        return run.at(Region(self._begins[names], region.end, region.least, region.check))

    def _is_residual(self, run: Passage) -> bool:
        feature = self.rehash.feature
        if feature == "auto":
            return not run.forward.family.has_skips and run.region.end < len(run.places)
        return feature == "residual"

    def _keep(
        self,
        run: Passage,
        store: Store,
        step: Step,
        units: list[Unit],
        state: State,
        before: Tensor | None,
        lowest: int,
    ) -> None:
        """Keep the features of some units; a calibration sees them too."""
        self._keeper.keep(run, store, step, units, state, before, lowest)
        if self.recorder is not None:
            assert state.hidden is not None
            value = rows_of(state.hidden, run.batch)
            self.recorder(step, run.numbers, value if before is None else value - before)

    # Predicted steps

    def _predicted(
        self, run: Passage, store: Store, step: Step, units: list[Unit], state: State | None
    ) -> Tensor:
        """Run what is not left out, on predicted features, for some units."""
        if state is None:
            state = run.head()
        self._supply(run, store, state, *self._from_slots(run, store, step, units))
        return run.finish(state, run.region.end)

    def _from_slots(
        self, run: Passage, store: Store, step: Step, units: list[Unit]
    ) -> tuple[int | None, Tensor | None]:
        """The slot whose features are taken as they are; or the weights ``[B, points]`` of all."""
        weights = self._weights_of(store, step, units)
        # The output is the caller's, and must not change with the cache.
        whole = run.region.end == len(run.places)
        if not (whole or run.rows is not None or self._is_residual(run)):
            alone = single_slot(weights)
            if alone is not None:
                return alone, None
        return None, self._on_device(weights, store.slots[0].data.device)

    def _supply(
        self, run: Passage, store: Store, state: State, alone: int | None, weights: Tensor | None
    ) -> None:
        """Put predicted features where the left-out stages would have put theirs."""
        leave_schedule()
        base = None
        if self._is_residual(run):
            assert state.hidden is not None
            base = state.hidden
            base = rows_of(base if state.writable(base) else base.clone(), run.batch).contiguous()
        state.hidden = None
        found: list[Tensor] = []
        for index, slots in enumerate(store.slots):
            if alone is not None:
                tensor = slots.alone(alone)
                state.hold(tensor)
            else:
                assert weights is not None
                if base is not None and index == 0 and run.rows is None:
                    tensor = slots.sum(weights, base)
                else:
                    tensor = slots.sum(weights)
                    if run.rows is not None:
                        rows = rows_of(tensor, store.batch).index_select(0, run.rows)
                        if base is not None and index == 0:
                            rows += base
                        shape = torch.Size(
                            (run.batch * slots.shape[0] // store.batch, *slots.shape[1:])
                        )
                        tensor = shaped(rows, shape)
            found.append(tensor)
        state.hidden = found[0]
        kept: list[Skip] = state.skips[: store.shared]
        state.skips = [*kept, *found[1:]]
        state.extras.update(store.marks)

    def _weights_of(
        self, store: Store, step: Step, units: list[Unit]
    ) -> tuple[tuple[float, ...], ...]:
        now = self._keeper.time(step)
        chosen = {id(unit) for unit in units}
        known: dict[tuple[float, ...], Sequence[float]] = {}
        per_unit: list[Sequence[float] | None] = []
        for unit in store.units:
            if id(unit) not in chosen:
                per_unit.append(None)
                continue
            past = tuple(time for time, _ in unit.times)
            if past not in known:
                known[past] = store.predictor.weights(past, now, step.index)
            per_unit.append(known[past])
        return weight_rows(store.units, per_unit, store.batch, store.points)

    def _on_device(self, rows: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
        key = (rows, device)
        found = self._weights.get(key)
        if found is None:
            if len(self._weights) >= KEPT_WEIGHTS:
                self._weights.clear()
            found = self._weights[key] = weights_on(device, rows)
        return found

    # What a call looks like

    def _places(self, forward: Forward, stages: Sequence[Any]) -> tuple[tuple[Place, ...], Region]:
        """The groups of some stages and what is left out of them, looked up once."""
        known = self._regions.get(id(stages))
        if known is not None and known[0] is stages:
            return known[1:]
        places = flat(stages)
        region = self._region(forward, places)
        if region.begin is not None:
            if len(self._regions) >= KEPT_REGIONS:
                self._regions.clear()
            self._regions[id(stages)] = (stages, places, region)
        return places, region

    def _region(self, forward: Forward, places: tuple[Place, ...]) -> Region:
        watched = self.rehash.policy.watches
        features_from = 2 if forward.family.has_skips else 1  # embeddings; first convolution
        region = resolve(
            places, self.boundary(forward), watched=watched, features_from=features_from
        )
        if self.rehash.policy.verifies and region.check == region.end:
            raise ValueError("Verified: no stage comes after the boundary that could verify it")
        if region.begin is None:
            names = tuple(place.group.name for place in places)
            begin = self._begins.get(names) if forward.family.has_skips else region.least
            if begin is not None:
                return Region(begin, region.end, region.least, region.check)
        return region

    def _units(self, forward: Forward, inputs: dict[str, Any], batch: int) -> list[Unit]:
        """Samples with their guidance halves; one unit for all where nothing looks at samples."""
        policy = self.rehash.policy
        if not (policy.watches or policy.verifies):
            return [Unit(tuple(range(batch)))]
        latents = forward.family.latents(forward.module, inputs)
        half = batch // 2
        guided = batch % 2 == 0 and latents.device.type != "meta"
        if guided and torch.equal(latents[:half], latents[half:]):
            return [Unit((i, i + half)) for i in range(half)]
        return [Unit((i,)) for i in range(batch)]


def attach(forward: Forward, tracker: Tracker) -> None:
    """Cut the calls of a denoiser along time.

    Raises:
        ValueError: the settings do not fit the model.
    """
    stepper = Stepper(tracker.rehash, tracker)
    stepper.check(forward)
    module = weakref.ref(forward.module)
    tracker.model = module
    forward.stepper = stepper
