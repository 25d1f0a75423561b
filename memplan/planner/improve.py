"""Make a schedule within the budget faster: add back what fits, then search its neighbourhood.

The second is a large-neighbourhood search (Shaw, "Using constraint programming and local search
methods to solve vehicle routing problems", 1998): revert some of the drops, repair with randomly
weighted scores, add back; keep what is faster. Its random numbers are its own and always the same,
and its effort is counted, so equal problems have equal answers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from memplan.ir.schedule import Restore, Run
from memplan.planner.account import (
    Account,
    Decisions,
    Effort,
    Evaluated,
    ScheduledCall,
    account_of,
    keep_everything,
)
from memplan.planner.problem import Problem
from memplan.planner.repair import Greed, repair

Drop: TypeAlias = tuple[int, int]
"""A value, and the captured op for which it is restored, or -1 at the boundary."""

_SPREAD = 0.5
"""Standard deviation of the logarithm of the random weights."""

_TRIES = 8
"""Values that each step of the search tries to add back."""

_SHARES = (0.3, 0.6, 1.0)
_PATIENCE = 100
"""Steps of the search without an improvement, after which it ends."""

_CHOOSING = 0.3
"""Among several recoveries of a value, the search chooses once less than this share of its effort
is left, or half of its patience is gone."""

_SLACK = 0.02
"""The slowdown, as a part of the restores' time, that a step of the search may have at first."""


def add_back(
    problem: Problem, state: Evaluated, target: int, effort: Effort, tries: int | None = None
) -> Evaluated:
    """Revert drops that the target does not need, the costliest per byte first."""
    account = account_of(problem, state.decisions)
    chosen = problem.choosing(state.decisions.via).recovery

    def worth(drop: tuple[Drop, slice]) -> tuple[float, Drop]:
        value, _ = drop[0]
        seconds = problem.op_seconds[chosen[value].restore_op.id]
        return (-seconds / max(problem.nbytes[value], 1), drop[0])

    for drop, gap in sorted(dropped_gaps(problem, account).items(), key=worth):
        if not effort.is_left or tries == 0:
            break
        if account.peak_bytes[gap].max(initial=0) + problem.nbytes[drop[0]] > target:
            continue
        changed = _without(state.decisions, {drop})
        if changed == state.decisions:
            continue
        tried = account_of(problem, changed)
        effort.spend(len(tried.calls))
        tries = None if tries is None else tries - 1
        if tried.peak <= target and tried.seconds <= state.seconds:
            account, state = tried, Evaluated.of(changed, tried)
    return state


def dropped_gaps(problem: Problem, account: Account) -> dict[Drop, slice]:
    """The gap of each dropped value: positions from its last use to its next restore."""
    runs = {call.op: call for call in account.calls if call.kind is Run}
    end: dict[int, ScheduledCall] = {}
    gaps: dict[Drop, slice] = {}
    for copy in sorted(account.copies, key=lambda copy: copy.made.position):
        if copy.made.kind is Restore:
            producer = problem.program.values[copy.value].producer
            assert producer is not None, "what is restored was produced"
            previous = end.get(copy.value, runs[producer])
            crosses = problem.crosses(previous.time, copy.made.time)
            drop = (copy.value, -1 if crosses else copy.made.time)
            gaps[drop] = slice(previous.position + 1, copy.made.position)
        end[copy.value] = copy.uses[-1] if copy.uses else copy.made
    return gaps


def search_nearby(problem: Problem, state: Evaluated, target: int, effort: Effort) -> Evaluated:
    """The fastest state within the target that is found near one, itself included."""
    whole = effort.left
    draw = random.Random(0)
    base = sum(problem.op_seconds[op] for op in range(problem.num_ops))
    never_kept = keep_everything(problem).evicted
    best = current = state
    stale = 0
    while effort.is_left and stale < _PATIENCE:
        stale += 1
        evicted = sorted(current.decisions.evicted - never_kept)
        drops = [*((value, -1) for value in evicted), *sorted(current.decisions.breaks)]
        undone = _some_of(problem, drops, draw)
        effort.spend(1)
        if not undone:
            continue
        slack = _SLACK * effort.left / whole * draw.random()
        allowed = current.seconds + slack * (best.seconds - base)
        may_choose = problem.has_options and (
            effort.left < _CHOOSING * whole or stale > _PATIENCE // 2
        )
        without = _without(current.decisions, undone)
        found = _repaired(problem, without, target, draw, effort, may_choose=may_choose)
        if found is None or found.seconds - base > 1.3 * (current.seconds - base):
            continue
        found = add_back(problem, found, target, effort, _TRIES)
        if found.seconds <= allowed:
            current = found
        if (found.seconds, found.peak) < (best.seconds, best.peak):
            best, stale = found, 0
    return best


def _repaired(
    problem: Problem,
    start: Decisions,
    target: int,
    draw: random.Random,
    effort: Effort,
    *,
    may_choose: bool,
) -> Evaluated | None:
    last = None
    greed = Greed(
        share=draw.choice(_SHARES),
        is_sharing=draw.random() < 0.7,
        may_stretch=draw.random() < 0.7,
        may_choose=may_choose,
        weigh=_random_weights(draw),
    )
    for decisions, account in repair(problem, start, target, effort, greed):
        last = Evaluated.of(decisions, account)
    return last if last is not None and last.peak <= target else None


def _random_weights(draw: random.Random) -> Callable[[int, int], float]:
    weights: dict[Drop, float] = {}

    def weigh(value: int, time: int) -> float:
        if (value, time) not in weights:
            weights[value, time] = math.exp(draw.gauss(0, _SPREAD))
        return weights[value, time]

    return weigh


def _some_of(problem: Problem, drops: Sequence[Drop], draw: random.Random) -> set[Drop]:
    """Random drops: anywhere, of values made in one part of the forward, or breaks."""
    kind = draw.random()
    if kind < 0.4:
        share = draw.uniform(0.02, 0.3)
        return {drop for drop in drops if draw.random() < share}
    if kind < 0.8:
        end = problem.program.end_of_forward
        width = max(4, int(end * draw.uniform(0.03, 0.45)))
        first = draw.randrange(-width // 2, max(end, 1))
        made = {value: problem.program.values[value].producer for value, _ in drops}
        window = range(first, first + width)
        return {drop for drop in drops if made[drop[0]] in window}
    return {drop for drop in drops if drop[1] >= 0 and draw.random() < 0.5}


def _without(decisions: Decisions, drops: set[Drop]) -> Decisions:
    """Decisions without some of the drops."""
    at_boundary = {value for value, time in drops if time < 0}
    return replace(
        decisions, evicted=decisions.evicted - at_boundary, breaks=decisions.breaks - drops
    )
