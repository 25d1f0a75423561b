"""Decisions on what is dropped, and the schedule that follows from them.

The decisions are small: which values are not kept across the boundary between forward and
backward, and where else a value is dropped and restored. All else follows. A value that is missing
when it is needed is restored just then, after what its recovery reads; every copy is held to its
last use, uses as a source of a restore included.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from memplan.ir.schedule import Free, Restore, Run, Schedule, Stash, Step
from memplan.planner.problem import Problem, Via


@dataclass(frozen=True, slots=True)
class Decisions:
    """The values to drop.

    Attributes:
        evicted: values not kept where the step turns from forward to backward: restored at their
            first need after that.
        breaks: pairs (value, t): if captured op ``t`` (or a restore for it) needs the value, and
            it was not made for ``t`` itself, restore it then instead of having held it.
        early: pairs (value, t): if the value is missing when captured op ``t`` is to run, restore
            it then, for a later op.
        via: for values restored by another recovery than the one that the problem chooses, its
            restore op.
    """

    evicted: frozenset[int]
    breaks: frozenset[tuple[int, int]]
    early: frozenset[tuple[int, int]] = frozenset()
    via: frozenset[Via] = frozenset()


Kind: TypeAlias = type[Run] | type[Stash] | type[Restore]


class ScheduledCall:
    """One run of an op, for captured op ``time``."""

    __slots__ = ("kind", "op", "over", "position", "time")

    def __init__(self, kind: Kind, op: int, time: int) -> None:
        self.kind = kind
        self.op = op
        self.time = time
        self.position = -1
        self.over: Copy | None = None


class Copy:
    """One copy of a value: made by a call, needed by later ones."""

    __slots__ = ("made", "time", "uses", "value")

    def __init__(self, value: int, made: ScheduledCall) -> None:
        self.value = value
        self.made = made
        self.time = made.time
        self.uses: list[ScheduledCall] = []


@dataclass(frozen=True, slots=True)
class Account:
    """A schedule in the making, with its exact account.

    Attributes:
        calls: every run of an op, in order.
        copies: every copy of a value that is needed after it was made, or held by the caller.
        before_bytes: ``[len(calls)]`` non-resident bytes just before each call.
        peak_bytes: ``[len(calls)]`` non-resident bytes during each call.
        seconds: time of all calls.
    """

    calls: list[ScheduledCall]
    copies: list[Copy]
    before_bytes: NDArray[np.int64]
    peak_bytes: NDArray[np.int64]
    seconds: float

    @property
    def peak(self) -> int:
        """The most non-resident bytes at any time."""
        return int(self.peak_bytes.max(initial=0))


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Decisions, with their peak and time.

    Attributes:
        decisions: what is dropped.
        peak: the most non-resident bytes.
        seconds: time of the step.
    """

    decisions: Decisions
    peak: int
    seconds: float

    @classmethod
    def of(cls, decisions: Decisions, account: Account) -> Evaluated:
        """The decisions with their account."""
        return cls(decisions, account.peak, account.seconds)


class Effort:
    """The effort left to a search, in calls of ops that it accounts for; never in seconds."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    @property
    def is_left(self) -> bool:
        """Tell whether any effort is left."""
        return self.left > 0

    def spend(self, calls: int) -> None:
        """Spend some; work begun is completed, so that less than nothing may be left."""
        self.left -= calls

    @contextmanager
    def part(self, share: float) -> Iterator[Effort]:
        """Context with a share of what is left; its unspent rest is returned afterwards."""
        part = Effort(max(0, int(self.left * share)))
        self.left -= part.left
        yield part
        self.left += part.left


def keep_everything(problem: Problem) -> Decisions:
    """Keep all that the backward reads. What it does not read was never kept."""
    made = {id: value.producer for id, value in enumerate(problem.program.values)}
    read = {
        id
        for op in problem.program.ops
        for id in problem.operands[op.id]
        if (by := made[id]) is not None and problem.crosses(by, op.id)
    }
    return Decisions(frozenset(problem.recovery.keys() - read), frozenset())


def account_of(problem: Problem, decisions: Decisions) -> Account:
    """Follow the captured order, restoring what is missing where it is needed."""
    sweep = _Sweep(problem.choosing(decisions.via), decisions)
    sweep.run()
    return _summed(problem, sweep.finish(), sweep.copies, sweep.overwriting)


def follow(problem: Problem, calls: Iterable[tuple[Kind, int, int]]) -> Account:
    """Account for chosen calls: kind, op, and the captured op that each is for."""
    sweep = _Sweep(problem, Decisions(frozenset(), frozenset()))
    for kind, op, time in calls:
        sweep.call(ScheduledCall(kind, op, time))
    for position, call in enumerate(sweep.calls):
        call.position = position
    return _summed(problem, sweep.calls, sweep.copies, sweep.overwriting)


class _Sweep:
    """The state of one pass over the captured ops."""

    def __init__(self, problem: Problem, decisions: Decisions) -> None:
        self.problem = problem
        self.evicted = decisions.evicted
        self.part = problem.part
        self.can_always = not problem.inverted and not problem.latest
        self.breaks: dict[int, set[int]] = {}
        for value, time in decisions.breaks:
            self.breaks.setdefault(time, set()).add(value)
        self.early: dict[int, list[int]] = {}
        for value, time in sorted(decisions.early):
            self.early.setdefault(time, []).append(value)
        self.calls: list[ScheduledCall] = []
        self.copies: list[Copy] = []
        self.current: dict[int, Copy] = {}
        self.stashes: dict[int, ScheduledCall] = {}
        self.first: dict[int, Copy] = {}
        self.read_after = {v for op in problem.stashed_after for v in problem.operands[op]}
        self.held = problem.program.held
        self.overwriting: list[tuple[ScheduledCall, tuple[Copy, ...]]] = []

    def run(self) -> None:
        """Run every captured op; a search spends most of its time here."""
        problem, current, part = self.problem, self.current, self.part
        for time in range(problem.num_ops):
            operands, early = problem.operands[time], self.early.get(time)
            breaks, now, calls = self.breaks.get(time), part[time], len(self.calls)
            for value in operands if early is None else (*operands, *early):
                copy = current[value]
                is_kept = value not in self.evicted or part[copy.time] == now
                if is_kept and (breaks is None or value not in breaks):
                    copy.time = time
                elif not self.is_there(value, time):
                    self.restore(value, time)
            if len(self.calls) > calls:
                # a restore may have replaced the copy of an operand
                for value in operands:
                    current[value].time = time
            self.call(ScheduledCall(Run, time, time))

    def is_there(self, value: int, time: int) -> bool:
        """Tell whether a value's current copy serves at ``time``; if so, it is held until then."""
        copy = self.current[value]
        if copy.time != time and (self.can_always or self.problem.can_come_back(value, time)):
            dropped = self.breaks.get(time)
            if (dropped is not None and value in dropped) or (
                self.part[copy.time] < self.part[time] and value in self.evicted
            ):
                return False
        copy.time = time
        return True

    def restore(self, wanted: int, time: int) -> None:
        """Restore a value for ``time``, its sources first; without recursion."""
        problem = self.problem
        stack = [wanted]
        while stack:
            value = stack[-1]
            if self.is_there(value, time):
                stack.pop()
                continue
            recovery = problem.recovery[value]
            op = recovery.restore_op.id
            operands = problem.operands[op]
            missing = [
                id for id in operands if id not in problem.producer and not self.is_there(id, time)
            ]
            if missing:
                stack.extend(missing)
                continue
            if recovery.stash_op is not None:
                self.stash(recovery.stash_op.id)
            self.call(ScheduledCall(Restore, op, time))
            stack.pop()

    def call(self, call: ScheduledCall) -> None:
        """Run an op on the current copies; its results are current from then on."""
        problem, current, op = self.problem, self.current, call.op
        self.calls.append(call)
        for value in problem.operands[op]:
            current[value].uses.append(call)
        if op in problem.may_overwrite:
            copies = tuple(current[value] for value in problem.may_overwrite[op])
            self.overwriting.append((call, copies))
        is_new = call.kind is not Restore
        for value in problem.results[op]:
            if is_new or value not in self.held:
                copy = current[value] = Copy(value, call)
                self.copies.append(copy)
                if is_new and value in self.read_after:
                    self.first[value] = copy

    def stash(self, op: int) -> None:
        """Plan the run of a stash op; ``finish`` puts it beside the op that it is for."""
        if op in self.stashes:
            return
        kept = self.problem.results[op]
        call = ScheduledCall(Stash, op, self.problem.producer[kept[0]])
        self.stashes[op] = call
        for value in self.problem.operands[op]:
            self.first[value].uses.insert(0, call)
        for value in kept:
            copy = self.current[value] = Copy(value, call)
            self.copies.append(copy)

    def finish(self) -> list[ScheduledCall]:
        before: dict[int, list[ScheduledCall]] = {}
        after: dict[int, list[ScheduledCall]] = {}
        for call in self.stashes.values():
            beside = after if call.op in self.problem.stashed_after else before
            beside.setdefault(call.time, []).append(call)
        ordered: list[ScheduledCall] = [] if self.stashes else self.calls
        for call in self.calls if self.stashes else ():
            is_run = call.kind is Run
            if is_run and call.time in before:
                ordered.extend(before[call.time])
            ordered.append(call)
            if is_run and call.time in after:
                ordered.extend(after[call.time])
        for position, call in enumerate(ordered):
            call.position = position
        return ordered


def _summed(
    problem: Problem,
    calls: list[ScheduledCall],
    copies: list[Copy],
    overwriting: list[tuple[ScheduledCall, tuple[Copy, ...]]],
) -> Account:
    held, sizes = problem.program.held, problem.nbytes
    for call, over in overwriting:
        call.over = next((copy for copy in over if copy.uses[-1] is call), None)
    delta = [0] * (len(calls) + 2)
    needed: list[Copy] = []
    for copy in copies:
        is_held = copy.value in held and copy.made.kind is Run
        if not copy.uses and not is_held:
            continue
        needed.append(copy)
        nbytes = sizes[copy.value]
        delta[copy.made.position + 1] += nbytes
        if not is_held:
            delta[copy.uses[-1].position + 1] -= nbytes
    first = first_of_backward(problem, calls)
    delta[first] += problem.tangent_bytes
    before = np.cumsum(np.array(delta[: len(calls)], dtype=np.int64))
    during = [problem.call_bytes[call.op] for call in calls]
    for call, _ in overwriting:
        if call.over is not None:
            during[call.position] -= sizes[call.over.value]
    seconds = sum([problem.op_seconds[call.op] for call in calls])
    return Account(calls, needed, before, before + np.array(during, dtype=np.int64), seconds)


def first_of_backward(problem: Problem, calls: list[ScheduledCall]) -> int:
    """Position of the first call for an op of the backward."""
    turn = problem.program.turn
    for call in calls:
        if call.time >= turn:
            return call.position
    return len(calls)


def to_schedule(problem: Problem, account: Account) -> Schedule:
    """Write the calls down as steps, freeing each copy right after its last use."""
    ends: dict[int, list[int]] = {}
    binds: dict[int, list[int]] = {}
    for copy in account.copies:
        binds.setdefault(copy.made.position, []).append(copy.value)
        if copy.value not in problem.program.held:
            last = copy.uses[-1]
            if last.over is not copy:
                ends.setdefault(last.position, []).append(copy.value)
    segments: tuple[list[Step], list[Step]] = ([], [])
    for call in account.calls:
        steps = segments[call.time >= problem.num_forward]
        over = None if call.over is None else call.over.value
        steps.append(call.kind(call.op, tuple(sorted(binds.get(call.position, ()))), over))
        steps.extend(Free(value) for value in sorted(ends.get(call.position, ())))
    return Schedule(tuple(segments[0]), tuple(segments[1]))
