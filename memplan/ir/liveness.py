"""The exact account of a schedule: bytes over time, the peak, and the values alive there.

No torch here. This is the only judge of memory: planner, plan and report all ask it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from memplan.ir.memory_trace import SAVED, TEMPORARY, WORKSPACE
from memplan.ir.program import Costs, Phase, Program, Role, Value
from memplan.ir.schedule import (
    Catalog,
    Free,
    Recovery,
    Schedule,
    Step,
    start_of_backward,
)


@dataclass(frozen=True, slots=True)
class Moment:
    """One call of an op.

    Attributes:
        step: position in ``schedule.steps``.
        op: id of the op.
        peak_bytes: bytes while it runs: what is alive, its results and its workspace.
        live_bytes: bytes after it ran and its unheld results are freed.
    """

    step: int
    op: int
    peak_bytes: int
    live_bytes: int


@dataclass(frozen=True)
class Timeline:
    """Bytes over a whole step, residents included.

    Attributes:
        moments: one for each call of an op, in order.
        resident_bytes: bytes alive before and after the step.
        start_bytes: bytes when the backward starts, before its first op.
        host_bytes: the most bytes at any time in the host's memory, for a step on a GPU.
    """

    moments: tuple[Moment, ...]
    resident_bytes: int
    start_bytes: int
    host_bytes: int = 0

    @property
    def peak(self) -> Moment:
        """The (first) moment of the most bytes."""
        return max(self.moments, key=lambda moment: moment.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most bytes at any time, residents included."""
        highest = max((moment.peak_bytes for moment in self.moments), default=0)
        return max(highest, self.start_bytes, self.resident_bytes)


@dataclass(frozen=True)
class ScheduledStep:
    """A step and its schedule, with the account of its bytes and its time.

    Attributes:
        program: the captured step.
        recoveries: those that a schedule may use.
        costs: of every op of both.
        schedule: how it runs.
    """

    program: Program
    recoveries: tuple[Recovery, ...]
    costs: Costs
    schedule: Schedule

    @cached_property
    def catalog(self) -> Catalog:
        """Every op and value that the schedule may name."""
        return Catalog.of(self.program, self.recoveries)

    @cached_property
    def timeline(self) -> Timeline:
        """Bytes over the whole step.

        Tangents are allocated by the caller when the backward starts and held to the step's end.
        """
        return _simulated(self.program, self.catalog, self.schedule, self.costs)

    @property
    def peak_bytes(self) -> int:
        """The most bytes at any time, residents included."""
        return self.timeline.peak_bytes

    @cached_property
    def seconds(self) -> float:
        """Time of the whole step, by the costs of its ops."""
        by_op = self.costs.seconds
        return sum(by_op[step.op] for step in self.schedule.steps if not isinstance(step, Free))

    @cached_property
    def saved(self) -> frozenset[int]:
        """Values alive when the forward has ended, outputs included."""
        return live_at(self.program, self.schedule, len(self.schedule.forward))

    @cached_property
    def live_at_peak(self) -> frozenset[int]:
        """The non-resident values that are alive while the op at the peak runs, its results too."""
        position = self.timeline.peak.step
        call = self.schedule.steps[position]
        assert not isinstance(call, Free), f"step {position} calls nothing"
        live = live_at(self.program, self.schedule, position) - {call.over}
        if position == start_of_backward(self.program, self.schedule):
            live |= {value.id for value in self.program.values if value.role is Role.TANGENT}
        return live | set(self.catalog.ops[call.op].results)

    def category(self, value: Value) -> str:
        """The name of a value's role; for activations, whether the backward still reads them."""
        if value.role is not Role.ACTIVATION:
            return str(value.role.value)
        return SAVED if value.id in self.saved else TEMPORARY

    @cached_property
    def categories(self) -> Mapping[str, int]:
        """Bytes by category at the peak, workspace being one of them; they add up to the peak."""
        values = self.catalog.values
        totals: dict[str, int] = {}
        residents = (value.id for value in self.program.values if value.role.is_resident)
        for value in (values[id] for id in (*residents, *sorted(self.live_at_peak))):
            if value.device_bytes:
                name = self.category(value)
                totals[name] = totals.get(name, 0) + value.device_bytes
        workspace_bytes = self.costs.by_op[self.timeline.peak.op].workspace_bytes
        return {**totals, WORKSPACE: workspace_bytes} if workspace_bytes else totals

    @cached_property
    def phases(self) -> Mapping[str, int]:
        """The most bytes in forward, backward and, where it is part of the step, optimizer."""
        peaks = {
            Phase.FORWARD.value: self.timeline.resident_bytes,
            Phase.BACKWARD.value: self.timeline.start_bytes,
        }
        for moment in self.timeline.moments:
            is_forward = moment.step < len(self.schedule.forward)
            phase = Phase.FORWARD if is_forward else Phase.BACKWARD
            if self.catalog.ops[moment.op].phase is Phase.OPTIMIZER:
                phase = Phase.OPTIMIZER
            peaks[phase.value] = max(peaks.get(phase.value, 0), moment.peak_bytes)
        return peaks


def _simulated(program: Program, catalog: Catalog, schedule: Schedule, costs: Costs) -> Timeline:
    nbytes = {value.id: value.device_bytes for value in catalog.values.values()}
    result_bytes = {
        op.id: sum(nbytes[value] for value in op.results) for op in catalog.ops.values()
    }
    live = program.resident_bytes
    moments: list[Moment] = []
    start = 0
    first = start_of_backward(program, schedule)
    for position, step in enumerate(schedule.steps):
        if position == first:
            live += tangent_bytes(program)
            start = live
        if isinstance(step, Free):
            live -= nbytes[step.value]
            continue
        if step.over is not None:
            live -= nbytes[step.over]
        peak = live + result_bytes[step.op] + costs.by_op[step.op].workspace_bytes
        live += sum(nbytes[value] for value in step.binds)
        moments.append(Moment(position, step.op, peak, live))
    return Timeline(
        tuple(moments), program.resident_bytes, start, _host_bytes(catalog, schedule.steps)
    )


def _host_bytes(catalog: Catalog, steps: Iterable[Step]) -> int:
    """The most bytes in the host's memory."""
    live = most = 0
    for step in steps:
        if isinstance(step, Free):
            live -= catalog.values[step.value].host_bytes
        else:
            live -= 0 if step.over is None else catalog.values[step.over].host_bytes
            live += sum(catalog.values[id].host_bytes for id in step.binds)
            most = max(most, live)
    return most


def tangent_bytes(program: Program) -> int:
    """Bytes of the incoming gradients."""
    return sum(value.nbytes for value in program.values if value.role is Role.TANGENT)


def live_at(program: Program, schedule: Schedule, step: int) -> frozenset[int]:
    """The non-resident values that are alive just before a step of the schedule."""
    live: set[int] = set()
    first = start_of_backward(program, schedule)
    for position, earlier in enumerate(schedule.steps[:step]):
        if position == first:
            live |= {value.id for value in program.values if value.role is Role.TANGENT}
        if isinstance(earlier, Free):
            live.discard(earlier.value)
        else:
            live.discard(-1 if earlier.over is None else earlier.over)
            live.update(earlier.binds)
    return frozenset(live)


def floor_bytes(program: Program, recoveries: Iterable[Recovery], costs: Costs) -> int:
    """A lower bound on the peak of every schedule of these ops in this order.

    At each op, its operands, results and workspace are alive, and with them everything that no
    recovery restores and that is needed later. The bound is the most bytes of any op.
    """
    restorable = {id for r in recoveries for id in r.values} - program.held
    last_use: dict[int, int] = {}
    for op in program.ops:
        for id in (*op.operands, *op.results):
            last_use[id] = op.id
    last_use |= dict.fromkeys(program.outputs, len(program.ops))
    nbytes = [value.nbytes for value in program.values]
    never = {value.id for value in program.values if value.role.is_resident}
    never |= {value.id for value in program.values if value.role is Role.TANGENT}
    must_live: set[int] = set()
    must_bytes = 0
    floor = program.resident_bytes
    tangents = tangent_bytes(program)
    for op in program.ops:
        base = program.resident_bytes + must_bytes
        base += tangents if op.id >= program.turn else 0
        others = set(op.operands) - must_live - never
        working = sum(nbytes[id] for id in (*others, *op.results))
        ends = [id for id in op.may_overwrite if last_use[id] == op.id or id in restorable]
        working -= max((nbytes[id] for id in ends), default=0)
        floor = max(floor, base + working + costs.by_op[op.id].workspace_bytes)
        for id in op.results:
            if id not in restorable:
                must_live.add(id)
                must_bytes += nbytes[id]
        for id in (*op.operands, *op.results):
            if id in must_live and last_use[id] == op.id:
                must_live.discard(id)
                must_bytes -= nbytes[id]
    return floor
