"""Greedy repair: from a schedule that is over the budget to one within it.

Every value that is idle over a stretch in which the budget is exceeded could be dropped there and
restored at its next use. Candidates are ranked by the real cost of the restore (with parents that
are not alive there, and would not be restored later anyway) over the bytes times the excess that it
covers. A batch of the best is applied, and the whole step is accounted for anew.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from memplan.ir.schedule import Effect, Recovery, Restore, Run
from memplan.planner.account import Account, Decisions, Effort, ScheduledCall, account_of
from memplan.planner.hoist import hoist
from memplan.planner.problem import Problem

_MAX_CHAIN = 400
"""Longest chain of parents that one drop may recompute."""

_ALIKE = 1.5
"""One round takes candidates whose score is at most this multiple of the best's."""

_PATIENCE = 8
"""Rounds without less excess, after which a repair stretches no more, and then gives up."""

_ROUND_CALLS = 3
"""The cost of a round, in multiples of accounting for the step."""


@dataclass(frozen=True, slots=True)
class Greed:
    """The rules by which a repair chooses and ends.

    Attributes:
        share: part of the excess, in (0, 1], that one round removes.
        is_sharing: whether a parent that is restored later anyway costs nothing if it can be
            restored now and held. Better at loose budgets, worse at tight ones.
        may_stretch: whether a missing parent may be held longer instead of being restored. Two
            drops can then cancel each other: a repair ends without.
        may_choose: whether a value that is dropped nowhere yet may be restored by another recovery
            than the chosen one.
        weigh: a factor for the score of a value restored for an op, to vary the choice.
        most_seconds: predicted time past which the repair is given up.
    """

    share: float
    is_sharing: bool
    may_stretch: bool = True
    may_choose: bool = False
    weigh: Callable[[int, int], float] | None = None
    most_seconds: float = math.inf


@dataclass(frozen=True, slots=True)
class Candidate:
    """A value that could be dropped in one gap.

    Attributes:
        value: what is dropped.
        time: captured op for which it is restored.
        crosses: whether the step turns from forward to backward in the gap.
        start: first position at which the bytes are free.
        stop: position of the next use.
        score: seconds per byte and position of excess, weighed.
        parents: parents to be restored for it.
        stretched: parents to be held to the next use instead.
        recovery: the recovery that restores it.
        sources: what all these are restored from, which must be alive at the next use.
    """

    value: int
    time: int
    crosses: bool
    start: int
    stop: int
    score: float
    parents: tuple[int, ...]
    stretched: tuple[int, ...]
    sources: frozenset[int]
    recovery: Recovery

    @property
    def order(self) -> tuple[float, bool, int, int, int]:
        """A sort key: the best first, of equals the exact."""
        is_inexact = self.recovery.exactness is not Effect.EXACT
        return self.score, is_inexact, self.value, self.time, self.recovery.restore_op.id


def repair(
    problem: Problem,
    start: Decisions,
    target: int,
    effort: Effort,
    greed: Greed,
) -> Iterator[tuple[Decisions, Account]]:
    """Yield the start and each round's decisions, until the target is met or nothing helps.

    Args:
        problem: the step.
        start: decisions to begin with.
        target: non-resident bytes to get down to.
        effort: what may be spent, and is.
        greed: how to choose.
    """
    decisions = start
    account = account_of(problem, decisions)
    effort.spend(len(account.calls))
    yield decisions, account
    least, stale = math.inf, 0
    while account.peak > target and effort.is_left and account.seconds <= greed.most_seconds:
        hoisted = hoist(problem, decisions, account, target)
        if hoisted is not None:
            tried = account_of(problem, hoisted)
            effort.spend(len(tried.calls))
            if _excess(tried, target) < _excess(account, target):
                decisions, account = hoisted, tried
                yield decisions, account
                continue
        chosen = _choose(problem.choosing(decisions.via), account, target, greed)
        updated = _apply(problem, decisions, chosen)
        if stale == _PATIENCE or updated == decisions:
            if not greed.may_stretch:
                return
            greed, stale = replace(greed, may_stretch=False), 0
            continue
        decisions = updated
        account = account_of(problem, decisions)
        effort.spend(_ROUND_CALLS * len(account.calls))
        excess = _excess(account, target)
        stale = 0 if excess < least else stale + 1
        least = min(least, excess)
        yield decisions, account


def _excess(account: Account, target: int) -> int:
    return int(np.maximum(account.peak_bytes - target, 0).sum())


def _apply(problem: Problem, decisions: Decisions, chosen: list[Candidate]) -> Decisions:
    evicted = set(decisions.evicted)
    breaks = set(decisions.breaks)
    via = dict(decisions.via)
    for candidate in chosen:
        via[candidate.value] = candidate.recovery.restore_op.id
        if candidate.crosses:
            evicted.add(candidate.value)
            evicted.difference_update(candidate.stretched)
        else:
            breaks.add((candidate.value, candidate.time))
        breaks.difference_update((parent, candidate.time) for parent in candidate.stretched)
        breaks.update((parent, candidate.time) for parent in candidate.parents)
    others = ((v, op) for v, op in via.items() if op != problem.recovery[v].restore_op.id)
    return Decisions(frozenset(evicted), frozenset(breaks), decisions.early, frozenset(others))


def _choose(problem: Problem, account: Account, target: int, greed: Greed) -> list[Candidate]:
    """The best candidates that together remove a share of the excess."""
    excess = np.maximum(account.peak_bytes - target, 0)
    area = np.concatenate([[0], np.cumsum(excess)])
    left = excess.astype(np.int64)
    goal = float(area[-1]) * (1 - greed.share)
    found = _Gaps(problem, account, greed, target, area).candidates()
    chosen: list[Candidate] = []
    dropped: dict[int, Recovery] = {}
    relied_on: set[int] = set()
    highest = 0.0
    for candidate in sorted(found, key=lambda one: one.order):
        gap = slice(candidate.start, candidate.stop)
        if not left[gap].any():
            continue
        if chosen and candidate.score > highest:
            break
        # The cost of a drop holds as long as its sources stay.
        if candidate.value in relied_on or not candidate.sources.isdisjoint(dropped):
            continue
        if dropped.setdefault(candidate.value, candidate.recovery) is not candidate.recovery:
            continue
        if not chosen:
            highest = _ALIKE * candidate.score
        chosen.append(candidate)
        relied_on |= candidate.sources
        left[gap] = np.maximum(left[gap] - problem.nbytes[candidate.value], 0)
        if float(left.sum()) <= goal:
            break
    return chosen


class _Gaps:
    """The gaps in which values are idle, and the costs of restoring them."""

    def __init__(
        self,
        problem: Problem,
        account: Account,
        greed: Greed,
        target: int,
        area: NDArray[np.int64],
    ) -> None:
        self.problem = problem
        self.copies = account.copies
        self.highest = RangeMaximum(account.peak_bytes)
        self.target = target
        self.greed = greed
        self.least_score = math.inf
        self.area: list[int] = area.tolist()
        self.position_of_run = {c.op: c.position for c in account.calls if c.kind is Run}
        self.restored = {copy.value for copy in account.copies if copy.made.kind is Restore}
        self.spans: dict[int, list[tuple[int, int]]] = {}
        for copy in self.copies:
            end = copy.uses[-1].position if copy.uses else copy.made.position
            self.spans.setdefault(copy.value, []).append((copy.made.position, end))
        for spans in self.spans.values():
            spans.sort()

    def candidates(self) -> Iterator[Candidate]:
        """All whose score is close to the least so far; others are never chosen."""
        problem, area = self.problem, self.area
        for copy in self.copies:
            if copy.value not in problem.recovery or not problem.nbytes[copy.value]:
                continue
            previous = copy.made
            for use in copy.uses:
                start, stop = previous.position + 1, use.position
                covered = area[stop] - area[start] if stop > start else 0
                if covered > 0 and use.time > previous.time:
                    for recovery in self.recoveries_of(copy.value, use.time):
                        for candidate in self.drops(copy.value, recovery, previous, use, covered):
                            self.least_score = min(self.least_score, candidate.score)
                            yield candidate
                previous = use

    def recoveries_of(self, value: int, time: int) -> list[Recovery]:
        """The recoveries that can restore a value."""
        problem = self.problem
        is_open = self.greed.may_choose and value not in self.restored
        all_of = problem.options[value].values() if is_open else (problem.recovery[value],)
        return [one for one in all_of if problem.can_come_back_by(one, value, time)]

    def drops(
        self,
        value: int,
        recovery: Recovery,
        previous: ScheduledCall,
        use: ScheduledCall,
        covered: int,
    ) -> Iterator[Candidate]:
        """A drop between two uses: with missing parents restored, or held until then."""
        problem, stop, restore = self.problem, use.position, recovery.restore_op
        saved = (problem.nbytes[value] - problem.kept_bytes(recovery)) * covered
        if saved <= 0:
            return
        weight = self.greed.weigh(value, use.time) if self.greed.weigh is not None else 1.0
        operands = [id for id in problem.operands[restore.id] if id not in problem.producer]
        alive = [id for id in operands if self.is_alive(id, stop)]
        missing = tuple(id for id in operands if id not in alive and id in problem.recovery)

        def candidate(
            seconds: float, saved: int, parents: tuple[int, ...], sources: frozenset[int]
        ) -> Candidate:
            return Candidate(
                value=value,
                time=use.time,
                crosses=problem.crosses(previous.time, use.time),
                start=previous.position + 1,
                stop=stop,
                score=weight * seconds / saved,
                parents=parents,
                stretched=() if parents else missing,
                sources=sources,
                recovery=recovery,
            )

        if missing and self.greed.may_stretch:
            held = sum(problem.nbytes[id] * self.area_since(id, stop) for id in missing)
            if held < saved:
                seconds = problem.restore_seconds(recovery)
                yield candidate(seconds, saved - held, (), frozenset(operands))
        most_seconds = _ALIKE * self.least_score * saved / weight
        chain = self.chain(value, recovery, stop, most_seconds)
        if chain is not None:
            seconds, parents, sources = chain
            yield candidate(seconds, saved, parents, sources)

    def chain(
        self, value: int, recovery: Recovery, stop: int, most_seconds: float
    ) -> tuple[float, tuple[int, ...], frozenset[int]] | None:
        """The needs of a restore at a position: seconds, missing parents, and the other sources.

        None where that is too long, in parents or seconds: most chains of recurrent models are.
        """
        problem = self.problem
        seconds = problem.restore_seconds(recovery)
        parents: list[int] = []
        sources: set[int] = set()
        ops = {recovery.restore_op.id}
        seen = {value}
        stack = [recovery.restore_op.id]
        while stack:
            if seconds > most_seconds or len(parents) > _MAX_CHAIN:
                return None
            for operand in problem.operands[stack.pop()]:
                if operand in seen or operand in problem.producer:
                    continue
                seen.add(operand)
                if operand not in problem.recovery or self.is_alive(operand, stop):
                    sources.add(operand)
                    continue
                parents.append(operand)
                op = problem.recovery[operand].restore_op.id
                if op in ops:
                    continue
                ops.add(op)
                stack.append(op)
                if not (self.greed.is_sharing and self.is_made_later_anyway(operand, stop)):
                    seconds += problem.restore_seconds(problem.recovery[operand])
        return seconds, tuple(parents), frozenset(sources)

    def area_since(self, value: int, position: int) -> int:
        """The excess between the end of the copy before a position and that position."""
        spans = self.spans.get(value, [])
        index = bisect_left(spans, (position, -1)) - 1
        start = spans[index][1] + 1 if index >= 0 else self.made_at(value)
        return self.area[position] - self.area[min(start, position)]

    def made_at(self, value: int) -> int:
        """Position after which a value that nothing holds could be held."""
        producer = self.problem.program.values[value].producer
        assert producer is not None, "what is restored was produced"
        return self.position_of_run[producer] + 1

    def is_alive(self, value: int, position: int) -> bool:
        spans = self.spans.get(value, [])
        index = bisect_left(spans, (position, -1)) - 1
        return index >= 0 and spans[index][1] >= position

    def is_made_later_anyway(self, value: int, position: int) -> bool:
        """Tell whether a copy restored now could be held until one is restored anyway."""
        spans = self.spans.get(value, [])
        index = bisect_right(spans, (position, 1 << 62))
        if index == len(spans):
            return False
        highest = self.highest.between(position, spans[index][0])
        return highest + self.problem.nbytes[value] <= self.target


class RangeMaximum:
    """The maximum of any stretch of an array, from the maxima of all that are 2^k long."""

    def __init__(self, values: NDArray[np.int64]) -> None:
        self._levels: list[list[int]] = [values.tolist()]
        length = 1
        while len(values) > length:
            values = np.maximum(values[:-length], values[length:])
            self._levels.append(values.tolist())
            length *= 2

    def between(self, start: int, stop: int) -> int:
        """The largest from ``start`` to before ``stop``; 0 if that is nothing."""
        if start >= stop:
            return 0
        level = (stop - start).bit_length() - 1
        maxima = self._levels[level]
        return max(maxima[start], maxima[stop - (1 << level)])
