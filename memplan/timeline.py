"""The exact account of a schedule: bytes over time, the peak, and what is alive there.

No torch here. This is the only judge of memory: planner, plan and report all ask it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from memplan.program import Costs, Phase, Program, Role
from memplan.schedule import (
    Catalog,
    Free,
    Prepare,
    Recovery,
    Restore,
    Run,
    Schedule,
    start_of_backward,
)


@dataclass(frozen=True, slots=True)
class Moment:
    """One call of an op.

    Attributes:
        step: position in ``schedule.steps``.
        op: id of the op.
        peak_bytes: bytes while it runs: what is alive, its results and its workspace.
        live_bytes: bytes after it ran and its unheld results are gone.
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
        resident_bytes: bytes that are there before and after the step.
        start_bytes: bytes when the backward starts, before its first op.
    """

    moments: tuple[Moment, ...]
    resident_bytes: int
    start_bytes: int

    @property
    def peak(self) -> Moment:
        """The (first) moment of the most bytes."""
        return max(self.moments, key=lambda moment: moment.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most bytes at any time, residents included."""
        highest = max((moment.peak_bytes for moment in self.moments), default=0)
        return max(highest, self.start_bytes, self.resident_bytes)


def simulate(program: Program, catalog: Catalog, schedule: Schedule, costs: Costs) -> Timeline:
    """Account for every step of a schedule.

    Tangents are allocated by the caller when the backward starts and held to the end of the step.
    """
    nbytes = {value.id: value.nbytes for value in catalog.values.values()}
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
    return Timeline(tuple(moments), program.resident_bytes, start)


def peak_by_phase(
    program: Program, catalog: Catalog, schedule: Schedule, costs: Costs
) -> Mapping[str, int]:
    """The most bytes in forward, backward and, where it is part of the step, optimizer."""
    timeline = simulate(program, catalog, schedule, costs)
    peaks = {
        Phase.FORWARD.value: timeline.resident_bytes,
        Phase.BACKWARD.value: timeline.start_bytes,
    }
    for moment in timeline.moments:
        phase = Phase.FORWARD if moment.step < len(schedule.forward) else Phase.BACKWARD
        if catalog.ops[moment.op].phase is Phase.OPTIMIZER:
            phase = Phase.OPTIMIZER
        peaks[phase.value] = max(peaks.get(phase.value, 0), moment.peak_bytes)
    return peaks


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


def live_during(
    program: Program, catalog: Catalog, schedule: Schedule, step: int
) -> frozenset[int]:
    """The non-resident values that are alive while a step's op runs, its results included."""
    call = schedule.steps[step]
    assert not isinstance(call, Free), f"step {step} calls nothing"
    live = live_at(program, schedule, step) - {call.over}
    if step == start_of_backward(program, schedule):
        live |= {value.id for value in program.values if value.role is Role.TANGENT}
    return live | set(catalog.ops[call.op].results)


def categories_at_peak(
    program: Program, catalog: Catalog, schedule: Schedule, costs: Costs
) -> Mapping[str, int]:
    """Bytes by category at the peak; they add up to the peak.

    Categories are the roles' names; what the forward made and the backward still reads is
    "saved activation", what lives only within a phase is "temporary", and the rest is "workspace".
    """
    peak = simulate(program, catalog, schedule, costs).peak
    saved = saved_values(program, schedule)
    totals: dict[str, int] = {}

    def add(category: str, nbytes: int) -> None:
        if nbytes:
            totals[category] = totals.get(category, 0) + nbytes

    for value in program.values:
        if value.role.is_resident:
            add(value.role.value, value.nbytes)
    for id in sorted(live_during(program, catalog, schedule, peak.step)):
        value = catalog.values[id]
        if value.role is Role.ACTIVATION:
            add("saved activation" if id in saved else "temporary", value.nbytes)
        else:
            add(value.role.value, value.nbytes)
    add("workspace", costs.by_op[peak.op].workspace_bytes)
    return totals


def saved_values(program: Program, schedule: Schedule) -> frozenset[int]:
    """Values alive when the forward has ended, outputs included."""
    return live_at(program, schedule, len(schedule.forward))


def seconds(schedule: Schedule, costs: Costs) -> float:
    """Time of the whole step, by the costs of its ops."""
    by_op = costs.seconds
    return sum(
        by_op[step.op] for step in schedule.steps if isinstance(step, Run | Prepare | Restore)
    )


def floor_bytes(program: Program, recoveries: Iterable[Recovery], costs: Costs) -> int:
    """A bound below the peak of every schedule of these ops in this order.

    At each op, its operands, results and workspace are alive, and with them everything that no
    recovery restores and that is needed later. The bound is the most bytes of any op.
    """
    restorable = {id for r in recoveries for id in r.restores} - program.held
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
