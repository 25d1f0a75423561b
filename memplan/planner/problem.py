"""What the search looks at: a program's ops, recoveries and costs as flat tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import networkx as nx

from memplan.program import Costs, Phase, Program, Role
from memplan.schedule import Catalog, Recovery
from memplan.timeline import tangent_bytes


@dataclass(frozen=True, slots=True)
class Problem:
    """A program with the one recovery chosen for each value. Residents do not appear.

    Attributes:
        program: the step to schedule.
        recoveries: all that was offered.
        catalog: ops and values of program and recoveries.
        operands: op id to the non-resident values that it reads.
        results: op id to the values that it allocates.
        may_overwrite: op id to the operands in whose memory its result can be written.
        call_bytes: op id to the bytes of its results and workspace.
        op_seconds: op id to its time.
        nbytes: value id to its size.
        recovery: value id to its recovery, for values that have one.
        inverted: values whose recovery reads what the forward makes after them, with the captured
            op that makes the last of that. They are not dropped before the backward, nor before
            that op.
        latest: restore op to the captured op that writes over what it reads, for those of which
            something is written over: it can run before that one and not after.
        producer: kept value to the captured op directly before or after whose run it is prepared.
        prepared_after: ``prepare`` ops that run after the captured op that they are for, whose
            results they read.
        tangent_bytes: bytes that the caller allocates when the backward starts.
        part: for each captured op, how often the step has turned from forward to backward before
            it: 0 in a forward and 1 in its backward; a fused step may turn more often.
    """

    program: Program
    recoveries: tuple[Recovery, ...]
    catalog: Catalog
    operands: dict[int, tuple[int, ...]]
    results: dict[int, tuple[int, ...]]
    may_overwrite: dict[int, tuple[int, ...]]
    call_bytes: dict[int, int]
    op_seconds: dict[int, float]
    nbytes: dict[int, int]
    recovery: dict[int, Recovery]
    inverted: dict[int, int]
    latest: dict[int, int]
    producer: dict[int, int]
    prepared_after: frozenset[int]
    tangent_bytes: int
    part: tuple[int, ...]

    def crosses(self, before: int, time: int) -> bool:
        """Whether the step turns from forward to backward between two ops."""
        return self.part[before] < self.part[time]

    def is_backward(self, time: int) -> bool:
        """Whether a captured op is not one of the forward, wherever it runs."""
        return self.program.ops[time].phase is not Phase.FORWARD

    def can_come_back(self, value: int, time: int) -> bool:
        """Whether what a value is made of again is there when a captured op is to run."""
        recovery = self.recovery.get(value)
        if recovery is None or time > self.latest.get(recovery.restore.id, time):
            return False
        made = self.inverted.get(value)
        return made is None or (time > made and self.is_backward(time))

    def restore_seconds(self, value: int) -> float:
        """Time of the restore of a value, and of what prepares it."""
        recovery = self.recovery[value]
        prepare = 0.0 if recovery.prepare is None else self.op_seconds[recovery.prepare.id]
        return prepare + self.op_seconds[recovery.restore.id]

    def kept_bytes(self, value: int) -> int:
        """What the recovery of a value keeps instead of it."""
        return sum(kept.nbytes for kept in self.recovery[value].keeps)

    @property
    def num_ops(self) -> int:
        """Number of captured ops."""
        return len(self.program.ops)

    @property
    def num_forward(self) -> int:
        """Number of captured ops that run in the forward."""
        return self.program.num_forward


def make_problem(
    program: Program,
    recoveries: Sequence[Recovery],
    costs: Costs,
    *,
    is_lean: bool = False,
    is_inverting: bool = False,
    anchors: frozenset[int] = frozenset(),
) -> Problem:
    """Tabulate, and choose one recovery for each value.

    The cheapest, or, for a problem that is lean, the one that keeps the fewest bytes; among equals
    the other counts, and then the first offered is chosen. Recoveries that look back (``inverts``)
    are chosen before all others by a problem that is inverting, and by no other; then what they
    read and nothing gives back is kept, and so are the ``anchors``.
    """
    catalog = Catalog.of(program, recoveries)
    never = {v.id for v in program.values if v.role.is_resident or v.role is Role.TANGENT}
    nbytes = {value.id: value.nbytes for value in catalog.values.values()}

    def rank(recovery: Recovery) -> tuple[float, float]:
        seconds = _cost(recovery, costs)
        kept_bytes = sum(value.nbytes for value in recovery.keeps)
        return (kept_bytes, seconds) if is_lean else (seconds, kept_bytes)

    inverting = [one for one in recoveries if inverts(program, one)]
    others = [one for one in recoveries if one not in inverting]
    chosen: dict[int, Recovery] = {}
    for recovery in others:
        for id in recovery.restores:
            current = chosen.get(id)
            if id in program.held:
                continue
            if current is None or rank(recovery) < rank(current):
                chosen[id] = recovery
    inverted: dict[int, int] = {}
    if is_inverting:
        inverted = {
            id: max(_later_sources(program, chosen[id]).values())
            for id in sorted(_invert(program, inverting, anchors, chosen))
        }
    producer: dict[int, int] = {}
    for recovery in recoveries:
        for kept in recovery.keeps:
            made_by = program.values[recovery.restores[0]].producer
            assert made_by is not None, "a recovery restores what an op produced"
            producer[kept.id] = made_by
    return Problem(
        program=program,
        recoveries=tuple(recoveries),
        catalog=catalog,
        operands={
            op.id: tuple(id for id in op.operands if id not in never) for op in catalog.ops.values()
        },
        results={op.id: op.results for op in catalog.ops.values()},
        may_overwrite=_overwritable(program, catalog, never),
        call_bytes={
            op.id: sum(nbytes[id] for id in op.results) + costs.by_op[op.id].workspace_bytes
            for op in catalog.ops.values()
        },
        op_seconds={op.id: costs.by_op[op.id].seconds for op in catalog.ops.values()},
        nbytes=nbytes,
        recovery=chosen,
        inverted=inverted,
        latest=_latest(program, recoveries),
        producer=producer,
        prepared_after=frozenset(
            r.prepare.id for r in recoveries if r.prepare is not None and r.prepare.operands
        ),
        tangent_bytes=tangent_bytes(program),
        part=_parts(program),
    )


def make_problems(
    program: Program,
    recoveries: Sequence[Recovery],
    costs: Costs,
    anchors: frozenset[int] = frozenset(),
) -> tuple[tuple[Problem, ...], ...]:
    """Without recoveries that look back; and, where there are any, with them.

    In each of the two: with the fastest recoveries; and, where those are others, with the ones
    that keep least.
    """
    families = []
    for is_inverting in (False, True):
        fast, lean = (
            make_problem(
                program,
                recoveries,
                costs,
                is_lean=is_lean,
                is_inverting=is_inverting,
                anchors=anchors,
            )
            for is_lean in (False, True)
        )
        if fast.inverted or not is_inverting:
            families.append((fast,) if fast.recovery == lean.recovery else (fast, lean))
    return tuple(families)


def _latest(program: Program, recoveries: Sequence[Recovery]) -> dict[int, int]:
    """For restores that read what the step writes over, the first op that does."""
    writers: dict[int, int] = {}
    for op in reversed(program.ops):
        writers.update((value, op.id) for value in op.mutates)
    written = {
        one.restore.id: [writers[id] for id in one.restore.operands if id in writers]
        for one in recoveries
    }
    return {op: min(ops) for op, ops in written.items() if ops}


def _parts(program: Program) -> tuple[int, ...]:
    is_backward = [op.phase is not Phase.FORWARD for op in program.ops]
    turns = (now and not before for before, now in pairwise([False, *is_backward]))
    return tuple(accumulate(turns, initial=0))[1:]


def inverts(program: Program, recovery: Recovery) -> bool:
    """Whether a recovery reads what was computed from what it restores."""
    return bool(_later_sources(program, recovery))


def _later_sources(program: Program, recovery: Recovery) -> dict[int, int]:
    """What a recovery reads and an op made that itself reads what is restored; and those ops."""
    restored = set(recovery.restores)
    made = {
        id: program.values[id].producer
        for id in recovery.restore.operands
        if id < len(program.values)
    }
    return {
        id: producer
        for id, producer in made.items()
        if producer is not None and restored.intersection(program.ops[producer].operands)
    }


def _invert(
    program: Program,
    inverting: Sequence[Recovery],
    anchors: frozenset[int],
    chosen: dict[int, Recovery],
) -> frozenset[int]:
    """Let values come back from later ones; what nothing gives back among those is kept."""
    kept = anchors | program.held
    wanted = {id: one for one in inverting for id in one.restores if id not in kept}
    sources = {source for one in wanted.values() for source in _later_sources(program, one)}
    for id in (sources | anchors) - wanted.keys():
        chosen.pop(id, None)
    chosen.update(wanted)
    reads = nx.DiGraph((id, read) for id in chosen for read in chosen[id].restore.operands)
    for component in nx.strongly_connected_components(reads):
        for id in component if len(component) > 1 else ():
            chosen.pop(id, None)
    return frozenset(wanted.keys() & chosen.keys())


def _overwritable(
    program: Program, catalog: Catalog, never: set[int]
) -> dict[int, tuple[int, ...]]:
    """For each op that can write over an operand, the operands that are the schedule's to end.

    What a result without bytes of its own was made of may live on in it, and is left alone.
    """
    sizes = {value.id: value.nbytes for value in catalog.values.values()}
    alias = {id for op in program.ops if 0 in map(sizes.get, op.results) for id in op.operands}
    kept = never | alias | program.held
    offered = {
        op.id: tuple(
            id for id in op.may_overwrite if id not in kept and sizes[id] == sizes[op.results[0]]
        )
        for op in catalog.ops.values()
    }
    return {op: values for op, values in offered.items() if values}


def _cost(recovery: Recovery, costs: Costs) -> float:
    prepare = 0.0 if recovery.prepare is None else costs.by_op[recovery.prepare.id].seconds
    return prepare + costs.by_op[recovery.restore.id].seconds
