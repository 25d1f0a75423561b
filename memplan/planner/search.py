"""Find the cheapest schedule within a budget: repair from several starts, then add back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from memplan.planner.lowering import (
    Call,
    Decisions,
    Lowered,
    keep_everything,
    lower,
    to_schedule,
)
from memplan.planner.problem import Problem, make_problem
from memplan.planner.repair import repair
from memplan.program import Costs, Program
from memplan.schedule import Recovery, Restore, Run, Schedule

MAX_SLOWDOWN = 2.0
"""Schedules that take longer than this multiple of the captured step are not offered."""

FREE_SLOWDOWN = 1.01
"""What counts as free when neither a budget nor a slowdown was asked for."""

_SHARES = (0.15, 0.4)
_ROUNDS = 60
_ADD_BACK_CALLS = 150_000
"""Calls of ops that adding back may account for: its effort is counted, never timed."""


Drop: TypeAlias = tuple[int, int]
"""A value, and the captured op for which it is made again, or -1 at the boundary."""


@dataclass(frozen=True)
class Solution:
    """The answer of the search.

    Attributes:
        schedule: the steps; those of the lowest peak known if no schedule is within the bounds.
        peak_bytes: its peak, residents included.
        seconds: its predicted time.
        is_feasible: whether it is within the bounds.
    """

    schedule: Schedule
    peak_bytes: int
    seconds: float
    is_feasible: bool = True


@dataclass(frozen=True, slots=True)
class _State:
    decisions: Decisions
    peak: int
    seconds: float


def solve(
    program: Program,
    costs: Costs,
    recoveries: Sequence[Recovery],
    *,
    budget_bytes: int | None = None,
    max_slowdown: float | None = None,
    original_seconds: float | None = None,
) -> Solution:
    """Choose a schedule.

    Args:
        program: the step.
        costs: of every op, the recoveries' included.
        recoveries: what passes offer.
        budget_bytes: bound on the peak, residents included; the cheapest schedule within it is
            sought.
        max_slowdown: bound on predicted time over the captured step's; without a budget, the
            schedule of least peak within it is sought. Neither: ``FREE_SLOWDOWN``.
        original_seconds: what slowdowns refer to; by default the program with everything kept.
    """
    problem = make_problem(program, recoveries, costs)
    base = _account(problem, keep_everything(problem))
    reference = base.seconds if original_seconds is None else original_seconds
    if budget_bytes is None:
        slowdown = FREE_SLOWDOWN if max_slowdown is None else max_slowdown
        return _solution(problem, _least_peak(problem, base, reference * slowdown))
    limit = reference * (MAX_SLOWDOWN if max_slowdown is None else max_slowdown)
    target = budget_bytes - program.resident_bytes
    found = _within(problem, base, target, limit)
    if found is not None:
        return _solution(problem, found)
    pool = _ladder(problem, base, limit)
    feasible = [state for state in pool if state.peak <= target]
    if feasible:
        best = min(feasible, key=lambda state: (state.seconds, state.peak))
        return _solution(problem, _add_back(problem, best, target))
    lowest = min(pool, key=lambda state: (state.peak, state.seconds))
    return replace(_solution(problem, lowest), is_feasible=False)


def keep_all(program: Program, costs: Costs) -> Schedule:
    """The captured step as it is: every op once, each value held to its last use."""
    problem = make_problem(program, (), costs)
    return to_schedule(problem, lower(problem, keep_everything(problem)))


def _solution(problem: Problem, state: _State) -> Solution:
    lowered = lower(problem, state.decisions)
    peak = lowered.peak + problem.program.resident_bytes
    return Solution(to_schedule(problem, lowered), peak, lowered.seconds)


def _account(problem: Problem, decisions: Decisions) -> _State:
    return _state(decisions, lower(problem, decisions))


def _state(decisions: Decisions, lowered: Lowered) -> _State:
    return _State(decisions, lowered.peak, lowered.seconds)


def _starts(problem: Problem) -> Iterator[Decisions]:
    yield keep_everything(problem)
    yield Decisions(frozenset(problem.recovery), frozenset())


def _attempts(problem: Problem, target: int) -> Iterator[list[_State]]:
    """For each start and batch size, all states on the way to the target."""
    for start in _starts(problem):
        for share in _SHARES:
            yield [
                _state(decisions, lowered)
                for decisions, lowered in repair(
                    problem, start, target, share=share, max_rounds=_ROUNDS
                )
            ]


def _within(problem: Problem, base: _State, target: int, limit: float) -> _State | None:
    """The cheapest state found within the target and the time limit."""
    if base.peak <= target:
        return base
    ends = [states[-1] for states in _attempts(problem, target)]
    ends = sorted(
        (state for state in ends if state.peak <= target),
        key=lambda state: (state.seconds, state.peak),
    )
    improved = [_add_back(problem, state, target) for state in ends[:2]]
    within = [state for state in improved if state.seconds <= limit]
    return min(within, key=lambda state: (state.seconds, state.peak), default=None)


def _ladder(problem: Problem, base: _State, limit: float) -> list[_State]:
    """States for ever lower targets: what can be reached at all within the time limit.

    The targets do not depend on the budget, so that the smallest peak found is found again when
    it is asked for.
    """
    pool = [base]
    for percent in range(90, 0, -5):
        target = base.peak * percent // 100
        reached = [state for states in _attempts(problem, target) for state in states]
        within = [state for state in reached if state.seconds <= limit]
        pool.extend(within)
        if min(state.peak for state in pool) > target:
            break
    return pool


def _least_peak(problem: Problem, base: _State, limit: float) -> _State:
    """The state of the lowest peak within the time limit, by bisection over targets."""
    best = base
    low, high = 0, base.peak
    for _ in range(8):
        target = (low + high) // 2
        found = _within(problem, base, target, limit)
        if found is None:
            low = target
        else:
            high = target
            if found.peak < best.peak:
                best = found
    return best


def _add_back(problem: Problem, state: _State, target: int) -> _State:
    """Undo drops that the target does not need, the dearest for their bytes first."""
    lowered = lower(problem, state.decisions)
    kept_at_first = keep_everything(problem).evicted

    def worth(drop: tuple[Drop, slice]) -> tuple[float, Drop]:
        value, _ = drop[0]
        seconds = problem.op_seconds[problem.recovery[value].restore.id]
        return (-seconds / max(problem.nbytes[value], 1), drop[0])

    tries = max(20, _ADD_BACK_CALLS // max(problem.num_ops, 1))
    for (value, time), gap in sorted(dropped_gaps(problem, lowered).items(), key=worth):
        if time < 0 and value in kept_at_first:
            continue
        if lowered.peak_bytes[gap].max(initial=0) + problem.nbytes[value] > target:
            continue
        decisions = state.decisions
        if time < 0:
            changed = Decisions(decisions.evicted - {value}, decisions.breaks)
        else:
            changed = Decisions(decisions.evicted, decisions.breaks - {(value, time)})
        if changed == decisions:
            continue
        tried = lower(problem, changed)
        if tried.peak <= target and tried.seconds <= state.seconds:
            lowered, state = tried, _state(changed, tried)
        tries -= 1
        if tries == 0:
            break
    return state


def dropped_gaps(problem: Problem, lowered: Lowered) -> dict[Drop, slice]:
    """Where each dropped value is missing: positions from its last use to its next making."""
    runs = {call.op: call for call in lowered.calls if call.kind is Run}
    end: dict[int, Call] = {}
    gaps: dict[Drop, slice] = {}
    for copy in sorted(lowered.copies, key=lambda copy: copy.made.position):
        if copy.made.kind is Restore:
            producer = problem.program.values[copy.value].producer
            assert producer is not None, "what is restored was produced"
            previous = end.get(copy.value, runs[producer])
            crosses = previous.time < problem.num_forward <= copy.made.time
            drop = (copy.value, -1 if crosses else copy.made.time)
            gaps[drop] = slice(previous.position + 1, copy.made.position)
        end[copy.value] = copy.uses[-1] if copy.uses else copy.made
    return gaps
