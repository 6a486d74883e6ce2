"""What crosses the boundary at a computed step is copied into the slots of its request."""

from __future__ import annotations

from torch import Tensor

from accelrt.groups import State
from accelrt.groups.skips import whole

from .features import Slots, Store, Unit, rows_of
from .passage import Passage, rows_in
from .rehash import Rehash
from .session import Step, Tracker


class Keeper:
    """Makes the slots of a request, and fills them.

    Args:
        rehash: the settings.
        tracker: is told of what ``max_cache`` changes.
    """

    def __init__(self, rehash: Rehash, tracker: Tracker) -> None:
        self._rehash = rehash
        self._tracker = tracker

    def time(self, step: Step) -> float:
        """Of the time axis that predictors work on."""
        return step.time if self._rehash.time == "timestep" else float(step.index)

    def keep(
        self,
        run: Passage,
        store: Store,
        step: Step,
        units: list[Unit],
        state: State,
        before: Tensor | None,
        lowest: int,
    ) -> None:
        """Copy the features of some units into their slots."""
        hidden = state.hidden
        assert hidden is not None
        if run.forward.family.adds_to_skips(run.inputs):
            lowest = 0  # what lies on the stack is not what the earlier stages put there
        skips = state.skips[lowest:]
        if before is not None and rows_of(hidden, run.batch).shape != before.shape:
            raise ValueError(
                "feature 'residual': the left-out stages change the shape of the hidden states; "
                "allowed here: 'hidden'"
            )
        if not store.slots:
            store.shared = lowest
            self._make(store, step, [hidden, *map(whole, skips)])
        store.marks = {k: v for k, v in state.extras.items() if isinstance(v, bool)}
        time = self.time(step)
        by_slot: dict[int, list[Unit]] = {}
        for unit in units:
            by_slot.setdefault(unit.slot(time, store.points), []).append(unit)
        for slot, some in by_slot.items():
            for unit in some:
                unit.keep(time, slot)
            for index, slots in enumerate(store.slots):
                x = hidden if index == 0 else whole(skips[index - 1])
                self._put(run, slots, slot, some, x, before if index == 0 else None)

    def _put(
        self,
        run: Passage,
        slots: Slots,
        slot: int,
        units: list[Unit],
        x: Tensor,
        before: Tensor | None,
    ) -> None:
        """Copy a feature of some units into a slot; of a residual stream its growth."""
        part, rows = rows_of(x, run.batch), run.positions(units)
        if rows is None and run.rows is None:
            slots.put(slot, part, before)
            return
        part = part if before is None else part - before
        chosen = part if rows is None else part.index_select(0, rows)
        slots.put_rows(slot, chosen, rows_in(units))

    def keep_check(
        self, run: Passage, store: Store, step: Step, units: list[Unit], state: State
    ) -> None:
        """Copy the output of the stage that verifies, into the slots of the features."""
        hidden = state.hidden
        assert hidden is not None
        if store.checks is None:
            store.checks = Slots(hidden, store.batch, store.points)
            step.session.cache_bytes = max(step.session.cache_bytes, kept_bytes(step))
        by_slot: dict[int, list[Unit]] = {}
        for unit in units:
            by_slot.setdefault(unit.times[-1][1], []).append(unit)
        for slot, some in by_slot.items():
            self._put(run, store.checks, slot, some, hidden, None)

    def _make(self, store: Store, step: Step, features: list[Tensor]) -> None:
        """Slots for the features, as many as the cap allows.

        Raises:
            ValueError: not even one set of features fits under ``max_cache``.
        """
        policy = self._rehash.policy
        one = sum(x.numel() * x.element_size() for x in features)
        if policy.verifies:
            one += features[0].numel() * features[0].element_size()
        beside = 0 if store.head is None else store.head.numel() * store.head.element_size()
        cap = self._rehash.cap
        if cap is not None and beside + one * store.points > cap:
            room = max(0, cap - beside) // one
            if room < 1:
                raise ValueError(
                    f"max_cache is {cap} bytes; one step's features take {beside + one}: allow "
                    f"more, or choose a boundary with smaller ones"
                )
            wanted = store.predictor
            store.predictor = wanted.fewer(room)
            self._tracker.tell(
                f"max_cache of {cap} bytes has room for the features of {room} steps: "
                f"{store.predictor} takes the place of {wanted}"
            )
        store.slots = [Slots(x, store.batch, store.points) for x in features]
        step.session.cache_bytes = max(step.session.cache_bytes, kept_bytes(step))


def kept_bytes(step: Step) -> int:
    """Bytes that the request of a step keeps."""
    return sum(store.bytes for store in step.session.stores.values())
