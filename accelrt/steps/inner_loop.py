"""Runs a pass through a transformer with Inner Loop Feedback."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import Tensor

from accelrt.groups import Group, State

from .conditions import Conditions, identity, joined, rows_of_times, times_together
from .graphs import Pass
from .outer_steps import OuterSteps
from .passage import leave_schedule
from .session import FEEDBACK, PLAIN, Session, Step

if TYPE_CHECKING:
    from accelrt.feedback.module import FeedbackModule
    from accelrt.models.forward import Cut, Forward
    from accelrt.models.stages import Stage

#: Name of the feedback block's group.
NAME = "feedback"


class InnerLoop:
    """The loop of one model.

    Args:
        module: the feedback module.
        tracker: follows the requests.
    """

    def __init__(self, module: FeedbackModule, tracker: OuterSteps) -> None:
        self.module = module
        self.tracker = tracker
        self._groups: dict[int, tuple[Any, Group]] = {}

    def check(self, forward: Forward) -> None:
        """Refuse a module for another model, or that is elsewhere or of another dtype.

        Raises:
            ValueError: naming what differs.
        """
        self.module.check(forward.module)
        self.module.eval()
        theirs = next(forward.module.parameters())
        ours = next(self.module.parameters())
        if (ours.dtype, ours.device) != (theirs.dtype, theirs.device):
            module: Any = self.module
            module.to(device=theirs.device, dtype=theirs.dtype)

    def enter(self, forward: Forward, inputs: dict[str, Any]) -> Step | None:
        """The step of a call that begins; ``None`` to run it without feedback."""
        return self.tracker.enter(id(forward), inputs.get("timestep"))

    def cache_bytes(self, forward: Forward, inputs: dict[str, Any]) -> int:
        """What a pass with feedback holds beside a plain one, told before it runs.

        Args:
            forward: on a model on the meta device.
            inputs: arguments of a call, meta tensors among them.
        """
        total = held = 0
        schedules = self.module.schedules.values()
        most = max((schedule.outer for schedule in schedules), default=1)
        times = most * (1 if self.module.conditioning == "t" else 2)
        for part in forward.family.parts(forward.module, inputs, forward.config):
            stages = forward.stages()
            # As many blocks as there are, and one more: the feedback block is like the last.
            groups = [group for stage in stages for group in stage.groups]
            made = forward.family.made_ahead(forward.module, groups, part, [0.0] * times)
            conditions = Conditions(None, [], made=made)
            state = forward.family.begin(forward.module, part)
            state.extras["context_keys"] = conditions.keys
            stages[0](state)
            stream = self._stream(state)
            copies = 1 if self.module.passes == 1 else 2
            held = max(held, copies * stream.numel() * stream.element_size())
            for stage in stages[1:]:
                stage(state)
            count = len(self._blocks(stages))
            total += conditions.bytes * (count + 1) // count
        return total + held

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
        fed = self.tracker.feedback_at(step)
        step.note((PLAIN if fed is None else FEEDBACK,))
        family = forward.family
        group = self.group(forward, cut.stages)
        conditions = self._conditions(forward, cut.stages, group, inputs, step, first)
        rows = int(inputs[family.input_name].shape[0])
        given: dict[str, Any] = {
            "inputs": inputs,
            "keys": conditions.keys,
            "now": conditions.at(step.time, rows),
        }
        if fed is not None and self.module.conditioning != "t":
            given["again"] = conditions.at(fed.runs_at, rows)
            given["timestep"] = rows_of_times([fed.runs_at], rows, inputs["timestep"])
        moved = fed is not None and fed.runs_at != step.time

        def body(given: dict[str, Any]) -> Tensor:
            return self._pass(forward, cut, group, given, fed is not None, moved)

        conditions.passes += 1
        if forward.graphs is None:
            return body(given)
        if conditions.passes == 1:
            forward.graphs.skipped("a request's first pass makes what its conditioning gives")
            return body(given)
        kind = PLAIN if fed is None else FEEDBACK
        what = Pass(kind, moved, given, body, fixed=("keys",), kept=(group,))
        return forward.graphs.run(forward, cut, what)

    def _pass(
        self,
        forward: Forward,
        cut: Cut,
        group: Group,
        given: dict[str, Any],
        fed: bool,
        moved: bool,
    ) -> Tensor:
        """The output of a pass.

        Args:
            forward: of the model.
            cut: of the call.
            group: the feedback block's.
            given: ``inputs`` of the model; ``keys`` of its context; ``now``, what was made ahead
                for its timestep; with feedback at another timestep that, ``timestep`` ``[B]``,
                and ``again``, what was made ahead for it.
            fed: with feedback.
            moved: the feedback is at another timestep than the step.
        """
        family = forward.family
        state = family.begin(forward.module, given["inputs"])
        state.extras["context_keys"], state.extras["modulations"] = given["keys"], given["now"]
        if not fed:
            self._stages(forward, cut.stages, state)
            return family.finish(forward.module, state)
        blocks = self._blocks(cut.stages)
        loop = self.module.loop
        begin, end = blocks[loop.start], blocks[loop.stop - 1] + 1
        self._stages(forward, cut.stages[:begin], state)
        leave_schedule()
        head = self._stream(state).clone()
        self._stages(forward, cut.stages[begin:end], state)
        self._again(forward, cut.stages[begin:end], group, state, head, given)
        if moved:
            state.extras["modulations"] = given["now"]
        self._stages(forward, cut.stages[end:], state)
        return family.finish(forward.module, state)

    def _again(
        self,
        forward: Forward,
        loop: tuple[Stage, ...],
        group: Group,
        state: State,
        head: Tensor,
        given: dict[str, Any],
    ) -> None:
        """Run the loop again, from ``head``, with feedback from its output ``state.hidden``."""
        passes = self.module.passes
        kept = state.inputs, state.temb, state.extras.get("modulation")
        if self.module.conditioning != "t":
            state.extras["modulations"] = given["again"]
            forward.family.retime(state, given["timestep"])
        for index in range(passes):
            self._run(forward, group, state)  # in place: the loop's output is not needed again
            feedback = state.take()
            state.hidden = head if index == passes - 1 else head.clone()
            for place, stage in enumerate(loop):
                self._add(state, feedback, place)
                self._stages(forward, (stage,), state)
        state.inputs, state.temb = kept[0], kept[1]
        if kept[2] is not None:
            state.extras["modulation"] = kept[2]

    def _add(self, state: State, feedback: Tensor, place: int) -> None:
        """Add the feedback to the input of the loop's block ``place``."""
        scale = self.module.scale(place)
        if scale is None:
            return
        stream = self._stream(state)
        if not state.writable(stream):
            stream = state.hidden = stream.clone()
        stream.addcmul_(feedback, scale.to(stream.dtype))

    def _stages(self, forward: Forward, stages: tuple[Stage, ...], state: State) -> None:
        for stage in stages:
            for group in stage.groups:
                self._run(forward, group, state, stage)

    def _run(
        self, forward: Forward, group: Group, state: State, stage: Stage | None = None
    ) -> None:
        observer = forward.observer
        if observer is None:
            group(state)
            return
        from accelrt.models.stages import Stage

        where = Stage(NAME, (group,)) if stage is None else stage
        observer.enter(where, group, state)
        group(state)
        observer.leave(where, group, state)

    def _blocks(self, stages: tuple[Stage, ...]) -> list[int]:
        """Places of the like blocks' stages."""
        return [i for i, stage in enumerate(stages) if stage.name.startswith("blocks.")]

    def _stream(self, state: State) -> Tensor:
        assert state.hidden is not None
        return state.hidden

    def group(self, forward: Forward, stages: tuple[Stage, ...]) -> Group:
        """The feedback block's group, cut as the loop's last block is."""
        known = self._groups.get(id(stages))
        if known is not None and known[0] is stages:
            return known[1]
        named = {stage.name: stage for stage in stages}
        like = named[f"blocks.{self.module.loop.stop - 1}"].groups[0]
        block: Any = self.module.block
        group = forward.family.block_group(forward.module, NAME, block, like.config)
        self._groups = {id(stages): (stages, group)}
        return group

    def _conditions(
        self,
        forward: Forward,
        stages: tuple[Stage, ...],
        group: Group,
        inputs: dict[str, Any],
        step: Step,
        first: int,
    ) -> Conditions:
        """What the request's conditioning gives, made at its first step."""
        key, kept = identity(forward.family, inputs)
        where = (*step.key, first, "conditions")
        found = step.session.stores.get(where)
        if isinstance(found, Conditions) and found.key == key:
            return found
        made = Conditions(key, kept)
        times = self._times(step.session)
        if times:
            made.times = {time: index for index, time in enumerate(times)}
            groups = [*(g for stage in stages for g in stage.groups), group]
            x = inputs[forward.family.input_name]
            together = times_together(times, len(x), x.dtype)
            parts = [times[i : i + together] for i in range(0, len(times), together)]
            made.made = joined(
                [forward.family.made_ahead(forward.module, groups, inputs, p) for p in parts]
            )
        step.session.stores[where] = made
        step.session.cache_bytes = max(step.session.cache_bytes, self._kept(step.session))
        return made

    def _kept(self, session: Session) -> int:
        return sum(store.bytes for store in session.stores.values())

    def _times(self, session: Session) -> list[float]:
        """All timesteps at which blocks will run in a request, if they are known."""
        if session.times is None:
            return []
        times = list(session.times)
        for index, time in enumerate(session.times):
            fed = self.tracker.feedback_at(Step(session, index, time, (0, 0)))
            if fed is not None:
                times.append(fed.runs_at)
        return sorted(set(times), reverse=True)


def attach(forward: Forward, module: FeedbackModule, tracker: OuterSteps) -> None:
    """Run a denoiser with feedback.

    Raises:
        ValueError: the module is for another model.
    """
    loop = InnerLoop(module, tracker)
    loop.check(forward)
    tracker.model = weakref.ref(forward.module)
    forward.stepper = loop
