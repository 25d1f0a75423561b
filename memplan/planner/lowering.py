"""From decisions to a schedule: what is dropped, and what follows from it.

The decisions are small: which values are not kept across the boundary between forward and
backward, and where else a value is dropped and made again. All else follows. A value that is
missing when it is needed is restored just then, after what its recovery reads; every copy is held
to its last need, needs as a source of a restore included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memplan.planner.problem import Problem
from memplan.schedule import Free, Prepare, Restore, Run, Schedule, Step


@dataclass(frozen=True, slots=True)
class Decisions:
    """What is dropped.

    Attributes:
        evicted: values not kept across the boundary: made again at their first need after it.
        breaks: pairs (value, t): if captured op ``t`` (or a restore for it) needs the value, and
            it was not made for ``t`` itself, make it again then instead of having held it.
    """

    evicted: frozenset[int]
    breaks: frozenset[tuple[int, int]]


class Call:
    """One run of an op, for captured op ``time``."""

    __slots__ = ("binds", "kind", "op", "over", "position", "time")

    def __init__(self, kind: type[Run] | type[Prepare] | type[Restore], op: int, time: int) -> None:
        self.kind = kind
        self.op = op
        self.time = time
        self.position = -1
        self.binds: list[int] = []
        self.over: Copy | None = None


class Copy:
    """One copy of a value: made by a call, needed by later ones."""

    __slots__ = ("made", "time", "uses", "value")

    def __init__(self, value: int, made: Call) -> None:
        self.value = value
        self.made = made
        self.time = made.time
        self.uses: list[Call] = []


@dataclass(frozen=True, slots=True)
class Lowered:
    """A schedule in the making, with its exact account.

    Attributes:
        calls: every run of an op, in order.
        copies: every copy of a value that is needed after it was made, or held by the caller.
        before_bytes: ``[len(calls)]`` non-resident bytes just before each call.
        peak_bytes: ``[len(calls)]`` non-resident bytes during each call.
        seconds: time of all calls.
    """

    calls: list[Call]
    copies: list[Copy]
    before_bytes: NDArray[np.int64]
    peak_bytes: NDArray[np.int64]
    seconds: float

    @property
    def peak(self) -> int:
        """The most non-resident bytes at any time."""
        return int(self.peak_bytes.max(initial=0))


def keep_everything(problem: Problem) -> Decisions:
    """Keep what the backward reads. What it does not read was never kept."""
    read = {
        id for op in problem.program.ops[problem.num_forward :] for id in problem.operands[op.id]
    }
    return Decisions(frozenset(problem.recovery.keys() - read), frozenset())


def lower(problem: Problem, decisions: Decisions) -> Lowered:
    """Follow the captured order, restoring what is missing where it is needed."""
    sweep = _Sweep(problem, decisions)
    for time in range(problem.num_ops):
        sweep.run(time)
    calls = sweep.finish()
    for call, copies in sweep.overwriting:
        call.over = next((copy for copy in copies if copy.uses[-1] is call), None)
    return _account(problem, calls, sweep.copies)


class _Sweep:
    """The state of one pass over the captured ops."""

    def __init__(self, problem: Problem, decisions: Decisions) -> None:
        self.problem = problem
        self.evicted = decisions.evicted
        self.boundary = problem.num_forward
        self.breaks: dict[int, set[int]] = {}
        for value, time in decisions.breaks:
            self.breaks.setdefault(time, set()).add(value)
        self.calls: list[Call] = []
        self.copies: list[Copy] = []
        self.current: dict[int, Copy] = {}
        self.prepared: dict[int, Call] = {}
        self.overwriting: list[tuple[Call, tuple[Copy, ...]]] = []

    def run(self, time: int) -> None:
        operands = self.problem.operands[time]
        current, calls = self.current, len(self.calls)
        for value in operands:
            if not self.is_there(value, time):
                self.restore(value, time)
        if len(self.calls) > calls:
            # a restore may have made what stood there before anew
            for value in operands:
                current[value].time = time
        call = Call(Run, time, time)
        self.calls.append(call)
        for value in operands:
            current[value].uses.append(call)
        if time in self.problem.may_overwrite:
            self.offer(call)
        for value in self.problem.results[time]:
            copy = current[value] = Copy(value, call)
            self.copies.append(copy)

    def is_there(self, value: int, time: int) -> bool:
        """Whether the current copy of a value serves a need at ``time``; then it is held so far."""
        copy = self.current[value]
        if copy.time != time:
            dropped = self.breaks.get(time)
            if (dropped is not None and value in dropped) or (
                copy.time < self.boundary <= time and value in self.evicted
            ):
                return False
            copy.time = time
        return True

    def restore(self, wanted: int, time: int) -> None:
        """Make a value again for ``time``, what it is made of first; without recursion."""
        problem = self.problem
        stack = [wanted]
        while stack:
            value = stack[-1]
            if self.is_there(value, time):
                stack.pop()
                continue
            recovery = problem.recovery[value]
            op = recovery.restore.id
            operands = problem.operands[op]
            missing = [
                id for id in operands if id not in problem.producer and not self.is_there(id, time)
            ]
            if missing:
                stack.extend(missing)
                continue
            if recovery.prepare is not None:
                self.prepare(recovery.prepare.id)
            call = Call(Restore, op, time)
            self.calls.append(call)
            for id in operands:
                self.current[id].uses.append(call)
            if op in problem.may_overwrite:
                self.offer(call)
            for id in problem.results[op]:
                if id not in problem.program.held:
                    copy = self.current[id] = Copy(id, call)
                    self.copies.append(copy)
            stack.pop()

    def offer(self, call: Call) -> None:
        """Remember the copies that the call could write over, if they end there."""
        copies = tuple(self.current[id] for id in self.problem.may_overwrite[call.op])
        self.overwriting.append((call, copies))

    def prepare(self, op: int) -> None:
        """Plan the run of a ``prepare`` op; ``finish`` puts it before the op that it is for."""
        if op in self.prepared:
            return
        kept = self.problem.results[op]
        call = Call(Prepare, op, self.problem.producer[kept[0]])
        self.prepared[op] = call
        for value in kept:
            copy = self.current[value] = Copy(value, call)
            self.copies.append(copy)

    def finish(self) -> list[Call]:
        before: dict[int, list[Call]] = {}
        for call in self.prepared.values():
            before.setdefault(call.time, []).append(call)
        ordered: list[Call] = []
        for call in self.calls:
            if call.kind is Run and call.time in before:
                ordered.extend(before[call.time])
            ordered.append(call)
        for position, call in enumerate(ordered):
            call.position = position
        return ordered


def _account(problem: Problem, calls: list[Call], copies: list[Copy]) -> Lowered:
    held = problem.program.held
    delta = np.zeros(len(calls) + 2, dtype=np.int64)
    needed: list[Copy] = []
    for copy in copies:
        is_held = copy.value in held and copy.made.kind is Run
        if not copy.uses and not is_held:
            continue
        needed.append(copy)
        copy.made.binds.append(copy.value)
        nbytes = problem.nbytes[copy.value]
        delta[copy.made.position + 1] += nbytes
        if not is_held:
            delta[copy.uses[-1].position + 1] -= nbytes
    first = first_of_backward(problem, calls)
    if first < len(calls):
        delta[first] += problem.tangent_bytes
    before = np.cumsum(delta[: len(calls)])
    during = np.fromiter((problem.call_bytes[c.op] for c in calls), np.int64, len(calls))
    for call in calls:
        if call.over is not None:
            during[call.position] -= problem.nbytes[call.over.value]
    seconds = sum(problem.op_seconds[call.op] for call in calls)
    return Lowered(calls, needed, before, before + during, seconds)


def first_of_backward(problem: Problem, calls: list[Call]) -> int:
    """Position of the first call of the backward."""
    for call in calls:
        if call.time >= problem.num_forward:
            return call.position
    return len(calls)


def to_schedule(problem: Problem, lowered: Lowered) -> Schedule:
    """Write the calls down as steps, freeing each copy right after its last use."""
    ends: dict[int, list[int]] = {}
    for copy in lowered.copies:
        if copy.value not in problem.program.held:
            last = copy.uses[-1]
            if last.over is not copy:
                ends.setdefault(last.position, []).append(copy.value)
    segments: tuple[list[Step], list[Step]] = ([], [])
    for call in lowered.calls:
        steps = segments[call.time >= problem.num_forward]
        over = None if call.over is None else call.over.value
        steps.append(call.kind(call.op, tuple(sorted(call.binds)), over))
        steps.extend(Free(value) for value in sorted(ends.get(call.position, ())))
    return Schedule(tuple(segments[0]), tuple(segments[1]))
