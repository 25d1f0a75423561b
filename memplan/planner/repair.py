"""Drop values until the peak is within a target: the cheapest drops for the bytes first.

Every round looks at the gaps in which a copy lies idle while the step is over its target. A drop
is scored by what making the value again really costs at its next use (the chain of parents that
are not alive there included) over the bytes times the excess that it covers. A batch of the best
is applied, and the whole step is accounted for anew.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memplan.planner.lowering import Copy, Decisions, Lowered, lower
from memplan.planner.problem import Problem

_MAX_CHAIN = 400
"""Longest chain of parents that one drop may recompute."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A value that could be dropped in one gap.

    Attributes:
        value: what is dropped.
        time: captured op for which it is made again.
        crosses: whether the gap spans the boundary.
        start: first position at which the bytes are free.
        stop: position of the next use.
        score: seconds per byte and position of excess.
        parents: parents to be made again for it.
    """

    value: int
    time: int
    crosses: bool
    start: int
    stop: int
    score: float
    parents: tuple[int, ...]


def repair(
    problem: Problem, start: Decisions, target: int, *, share: float, max_rounds: int
) -> Iterator[tuple[Decisions, Lowered]]:
    """Yield the start and each round's decisions, until the target is met or nothing helps.

    Args:
        problem: the step.
        start: decisions to begin with.
        target: non-resident bytes to get down to.
        share: part of the excess, in (0, 1], that one round removes.
        max_rounds: rounds to try at most.
    """
    decisions = start
    lowered = lower(problem, decisions)
    yield decisions, lowered
    for _ in range(max_rounds):
        if lowered.peak <= target:
            return
        chosen = _choose(problem, lowered, target, share)
        updated = _apply(decisions, chosen)
        if updated == decisions:
            return
        decisions = updated
        lowered = lower(problem, decisions)
        yield decisions, lowered


def _apply(decisions: Decisions, chosen: list[Candidate]) -> Decisions:
    evicted = set(decisions.evicted)
    breaks = set(decisions.breaks)
    for candidate in chosen:
        if candidate.crosses:
            evicted.add(candidate.value)
        else:
            breaks.add((candidate.value, candidate.time))
        breaks.update((parent, candidate.time) for parent in candidate.parents)
    return Decisions(frozenset(evicted), frozenset(breaks))


def _choose(problem: Problem, lowered: Lowered, target: int, share: float) -> list[Candidate]:
    """The best candidates that together remove a share of the excess."""
    excess = np.maximum(lowered.peak_bytes - target, 0)
    area = np.concatenate([[0], np.cumsum(excess)])
    left = excess.astype(np.int64)
    goal = float(area[-1]) * (1 - share)
    chosen: list[Candidate] = []
    for candidate in sorted(
        _candidates(problem, lowered, area), key=lambda c: (c.score, c.value, c.time)
    ):
        gap = slice(candidate.start, candidate.stop)
        if not left[gap].any():
            continue
        chosen.append(candidate)
        left[gap] = np.maximum(left[gap] - problem.nbytes[candidate.value], 0)
        if float(left.sum()) <= goal:
            break
    return chosen


def _candidates(problem: Problem, lowered: Lowered, area: NDArray[np.int64]) -> Iterator[Candidate]:
    alive = _Alive(lowered.copies)
    for copy in lowered.copies:
        if copy.value not in problem.recovery or not problem.nbytes[copy.value]:
            continue
        previous = copy.made
        for use in copy.uses:
            start, stop = previous.position + 1, use.position
            covered = int(area[stop] - area[start]) if stop > start else 0
            if covered > 0 and use.time > previous.time:
                cost, parents = _chain(problem, alive, copy.value, use.time, stop)
                if parents is not None:
                    yield Candidate(
                        value=copy.value,
                        time=use.time,
                        crosses=previous.time < problem.num_forward <= use.time,
                        start=start,
                        stop=stop,
                        score=cost / (problem.nbytes[copy.value] * covered),
                        parents=parents,
                    )
            previous = use


class _Alive:
    """Which values are held across a position."""

    def __init__(self, copies: list[Copy]) -> None:
        self.spans: dict[int, list[tuple[int, int]]] = {}
        for copy in copies:
            end = copy.uses[-1].position if copy.uses else copy.made.position
            self.spans.setdefault(copy.value, []).append((copy.made.position, end))
        for spans in self.spans.values():
            spans.sort()

    def at(self, value: int, position: int) -> bool:
        spans = self.spans.get(value, [])
        index = bisect_left(spans, (position, -1)) - 1
        return index >= 0 and spans[index][1] >= position


def _chain(
    problem: Problem, alive: _Alive, value: int, time: int, position: int
) -> tuple[float, tuple[int, ...] | None]:
    """Seconds to make a value again at a position, and the parents that must be made for it.

    The parents are None if the chain is too long to be worth it.
    """
    seconds = 0.0
    parents: list[int] = []
    done_ops: set[int] = set()
    stack = [value]
    seen = {value}
    while stack:
        recovery = problem.recovery[stack.pop()]
        op = recovery.restore.id
        if op in done_ops:
            continue
        done_ops.add(op)
        seconds += problem.op_seconds[op]
        for operand in problem.operands[op]:
            if operand in seen or operand in problem.producer:
                continue
            seen.add(operand)
            if alive.at(operand, position) or operand not in problem.recovery:
                continue
            parents.append(operand)
            stack.append(operand)
        if len(parents) > _MAX_CHAIN:
            return seconds, None
    return seconds, tuple(parents)
