"""The search's view of a step: a program's ops, recoveries and costs as flat tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TypeAlias

import networkx as nx

from memplan.ir.liveness import tangent_bytes
from memplan.ir.program import Costs, Phase, Program, Role
from memplan.ir.schedule import Catalog, Effect, Recovery

Via: TypeAlias = tuple[int, int]
"""A value, and the op that restores it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A program with the recoveries of each value, and one of them chosen. Residents do not appear.

    Attributes:
        program: the step to schedule.
        recoveries: all that were offered.
        catalog: ops and values of program and recoveries.
        operands: op id to the non-resident values that it reads.
        results: op id to the values that it allocates.
        may_overwrite: op id to the operands in whose memory its result can be written.
        call_bytes: op id to the bytes of its results and workspace.
        op_seconds: op id to its time.
        nbytes: value id to its bytes in the memory that is planned.
        options: value id to its recoveries by their restore ops, the chosen one first.
        has_options: whether any value has several of them.
        recovery: value id to the chosen recovery, for values that have one.
        inverted: values whose recovery reads later results of the forward, with the captured op
            that makes the last of these. They are not dropped before the backward, nor before
            that op.
        latest: restore op to the captured op that overwrites one of its operands, where there is
            one: the restore can run before that op and not after.
        producer: stashed value to the captured op directly before or after which it is stashed.
        stashed_after: stash ops that run after the captured op that they are for, whose
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
    options: dict[int, dict[int, Recovery]]
    has_options: bool
    recovery: dict[int, Recovery]
    inverted: dict[int, int]
    latest: dict[int, int]
    producer: dict[int, int]
    stashed_after: frozenset[int]
    tangent_bytes: int
    part: tuple[int, ...]

    def choosing(self, via: frozenset[Via]) -> Problem:
        """The same with other recoveries chosen."""
        if not via:
            return self
        chosen = {value: self.options[value][op] for value, op in via}
        return replace(self, recovery={**self.recovery, **chosen})

    def crosses(self, before: int, time: int) -> bool:
        """Tell whether the step turns from forward to backward between two ops."""
        return self.part[before] < self.part[time]

    def is_backward(self, time: int) -> bool:
        """Tell whether a captured op is not one of the forward, wherever it runs."""
        return self.program.ops[time].phase is not Phase.FORWARD

    def can_come_back(self, value: int, time: int) -> bool:
        """Tell whether a value can be restored when a captured op is to run."""
        recovery = self.recovery.get(value)
        return recovery is not None and self.can_come_back_by(recovery, value, time)

    def can_come_back_by(self, recovery: Recovery, value: int, time: int) -> bool:
        """Tell the same for one of its recoveries."""
        if time > self.latest.get(recovery.restore_op.id, time):
            return False
        made = self.inverted.get(value)
        return made is None or (time > made and self.is_backward(time))

    def restore_seconds(self, recovery: Recovery) -> float:
        """Time of a restore, and of its stash."""
        stash_s = 0.0 if recovery.stash_op is None else self.op_seconds[recovery.stash_op.id]
        return stash_s + self.op_seconds[recovery.restore_op.id]

    def kept_bytes(self, recovery: Recovery) -> int:
        """The bytes that a recovery stashes instead of a value."""
        return sum(self.nbytes[kept.id] for kept in recovery.stashed)

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
    """Tabulate, and choose an initial recovery for each value.

    That is the cheapest or, with ``is_lean``, the one that stashes the fewest bytes; ties go by the
    other measure, then to an exact one, and then to the first offered. With ``is_inverting``,
    recoveries that invert (``inverts``) are the only ones of the values that they restore; sources
    that none of them restores are kept, and so are the ``anchors``. Otherwise they are left out,
    and anchors are restored by exact recoveries alone.
    """
    catalog = Catalog.of(program, recoveries)
    never = {v.id for v in program.values if v.role.is_resident or v.role is Role.TANGENT}
    nbytes = {value.id: value.device_bytes for value in catalog.values.values()}

    inverting = [one for one in recoveries if inverts(program, one)]
    others = [one for one in recoveries if one not in inverting]
    options = _options(program, others, costs, anchors, is_lean=is_lean)
    chosen = {id: next(iter(of.values())) for id, of in options.items()}
    inverted: dict[int, int] = {}
    if is_inverting:
        inverted = {
            id: max(_later_sources(program, chosen[id]).values())
            for id in sorted(_invert(program, inverting, anchors, chosen))
        }
    options = _without_cycles(program, options, chosen, inverted)
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
        options=options,
        has_options=any(len(of) > 1 for of in options.values()),
        recovery=chosen,
        inverted=inverted,
        latest=_latest(program, recoveries),
        producer=_producers(program, recoveries),
        stashed_after=frozenset(
            r.stash_op.id for r in recoveries if r.stash_op is not None and r.stash_op.operands
        ),
        tangent_bytes=tangent_bytes(program),
        part=_parts(program),
    )


def _options(
    program: Program,
    recoveries: Sequence[Recovery],
    costs: Costs,
    anchors: frozenset[int],
    *,
    is_lean: bool,
) -> dict[int, dict[int, Recovery]]:
    """The recoveries of each value by restore op, the best first."""

    def rank(recovery: Recovery) -> tuple[float, float, bool]:
        seconds = _cost(recovery, costs)
        kept_bytes = sum(value.device_bytes for value in recovery.stashed)
        order = (kept_bytes, seconds) if is_lean else (seconds, kept_bytes)
        return (*order, recovery.exactness is not Effect.EXACT)

    options: dict[int, dict[int, Recovery]] = {}
    for recovery in sorted(recoveries, key=rank):
        for id in recovery.values:
            is_close = recovery.exactness is Effect.EXACT or id not in anchors
            if id not in program.held and is_close:
                options.setdefault(id, {}).setdefault(recovery.restore_op.id, recovery)
    return options


def _without_cycles(
    program: Program,
    options: dict[int, dict[int, Recovery]],
    chosen: dict[int, Recovery],
    inverted: dict[int, int],
) -> dict[int, dict[int, Recovery]]:
    """The recoveries of each chosen value, such that no value is restored from itself.

    That cannot be where no recovery inverts.
    """
    kept = {
        id: {one.restore_op.id: one} if id in inverted else options[id]
        for id, one in chosen.items()
    }
    every = (one for of in kept.values() for one in of.values())
    if not any(inverts(program, one) for one in every):
        return kept
    reads = nx.DiGraph(
        (id, read)
        for id, of in kept.items()
        for one in of.values()
        for read in one.restore_op.operands
    )
    for component in nx.strongly_connected_components(reads):
        if len(component) > 1:
            kept |= {id: {chosen[id].restore_op.id: chosen[id]} for id in component if id in kept}
    return kept


def _producers(program: Program, recoveries: Sequence[Recovery]) -> dict[int, int]:
    """For each stashed value, the captured op beside which it is stashed."""
    found: dict[int, int] = {}
    for recovery in recoveries:
        made_by = _made_by(program, recovery)
        found |= dict.fromkeys((kept.id for kept in recovery.stashed), made_by)
    return found


def make_problems(
    program: Program,
    recoveries: Sequence[Recovery],
    costs: Costs,
    anchors: frozenset[int] = frozenset(),
) -> tuple[tuple[Problem, ...], ...]:
    """Problems without recoveries that invert; and, where there are any, with them.

    In each of the two: with the fastest recoveries; and, where those are others, with the ones
    that stash least.
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
    """For restores that read what the step overwrites, the first op that overwrites it."""
    writers: dict[int, int] = {}
    for op in reversed(program.ops):
        writers.update((value, op.id) for value in op.mutates)
    written = {
        one.restore_op.id: [writers[id] for id in one.restore_op.operands if id in writers]
        for one in recoveries
    }
    return {op: min(ops) for op, ops in written.items() if ops}


def _parts(program: Program) -> tuple[int, ...]:
    is_backward = [op.phase is not Phase.FORWARD for op in program.ops]
    turns = (now and not before for before, now in pairwise([False, *is_backward]))
    return tuple(accumulate(turns, initial=0))[1:]


def inverts(program: Program, recovery: Recovery) -> bool:
    """Tell whether a recovery reads values computed from those that it restores."""
    return bool(_later_sources(program, recovery))


def _made_by(program: Program, recovery: Recovery) -> int:
    """The captured op that makes the values that a recovery restores."""
    made_by = program.values[recovery.values[0]].producer
    assert made_by is not None, "a recovery restores what an op produced"
    return made_by


def _later_sources(program: Program, recovery: Recovery) -> dict[int, int]:
    """The operands of a recovery that were computed from what it restores, with their ops.

    These are the results of ops that read the restored values themselves or, where it reads none
    of those, all that were made later.
    """
    restored = set(recovery.values)
    made = {
        id: program.values[id].producer
        for id in recovery.restore_op.operands
        if id < len(program.values)
    }
    later = {
        id: by for id, by in made.items() if by is not None and by > _made_by(program, recovery)
    }
    direct = {id: by for id, by in later.items() if restored.intersection(program.ops[by].operands)}
    return direct or later


def _invert(
    program: Program,
    inverting: Sequence[Recovery],
    anchors: frozenset[int],
    chosen: dict[int, Recovery],
) -> frozenset[int]:
    """Let values be restored from later ones; later ones that nothing restores are kept."""
    kept = anchors | program.held
    wanted = {id: one for one in inverting for id in one.values if id not in kept}
    sources = {source for one in wanted.values() for source in _later_sources(program, one)}
    for id in (sources | anchors) - wanted.keys():
        chosen.pop(id, None)
    chosen.update(wanted)
    reads = nx.DiGraph((id, read) for id in chosen for read in chosen[id].restore_op.operands)
    for component in nx.strongly_connected_components(reads):
        for id in component if len(component) > 1 else ():
            chosen.pop(id, None)
    return frozenset(wanted.keys() & chosen.keys())


def _overwritable(
    program: Program, catalog: Catalog, never: set[int]
) -> dict[int, tuple[int, ...]]:
    """For each op that can write over an operand, the operands that are the schedule's to free.

    The operands of a result without bytes of its own may live on in it, and are left alone.
    """
    sizes = {value.id: value.device_bytes for value in catalog.values.values()}
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
    stash_s = 0.0 if recovery.stash_op is None else costs.by_op[recovery.stash_op.id].seconds
    return stash_s + costs.by_op[recovery.restore_op.id].seconds
