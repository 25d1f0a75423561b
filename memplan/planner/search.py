"""Find the cheapest schedule within a budget: repair, add back, search nearby."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from memplan.ir.liveness import floor_bytes
from memplan.ir.program import Costs, Program
from memplan.ir.schedule import Recovery, Schedule
from memplan.planner.account import (
    Decisions,
    Effort,
    Evaluated,
    account_of,
    keep_everything,
    to_schedule,
)
from memplan.planner.improve import add_back, search_nearby
from memplan.planner.problem import Problem, make_problem, make_problems
from memplan.planner.repair import Greed, repair
from memplan.planner.starts import starts

MAX_SLOWDOWN = 2.0
"""Schedules that take longer than this multiple of the captured step are not offered."""

FREE_SLOWDOWN = 1.01
"""The slowdown that counts as free when neither a budget nor a slowdown was asked for."""

_SHARES = (0.6, 0.3, 0.15)
_CALLS = 320_000
"""Calls of ops that one search accounts for: about a second."""

_MOST_TIMES = 2500
_FEWEST_TIMES = 200
"""Accounts of the whole step by one search, at most and at least, for small and large steps."""

_LARGE_CALLS, _LARGE_TIMES = 600_000, 70
"""For very large steps, at least so many calls plus so many accounts, if that is less."""

_STARTS = 0.15
"""Part of the effort that repairs from scratch take, if any of them fits; the search nearby gains
more from the rest."""

_ENDS = 4
"""The most repaired schedules that are improved; the neighbourhood of the best comes first."""

_HOPELESS = 1.25
"""A repair past this multiple of the time limit is given up: improving it gains less."""

_PROBES = 8
"""Targets that are tried on the way to the least peak."""


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


def solve(
    program: Program,
    costs: Costs,
    recoveries: Sequence[Recovery],
    *,
    budget_bytes: int | None = None,
    max_slowdown: float | None = None,
    original_seconds: float | None = None,
    anchors: frozenset[int] = frozenset(),
) -> Solution:
    """Choose a schedule.

    Args:
        program: the step.
        costs: of every op, the recoveries' included.
        recoveries: those that passes offer.
        budget_bytes: bound on the peak, residents included; the cheapest schedule within it is
            sought.
        max_slowdown: bound on predicted time over the captured step's; without a budget, the
            schedule of least peak within it is sought. Neither: ``FREE_SLOWDOWN``.
        original_seconds: what slowdowns refer to; by default the program with everything kept.
        anchors: values restored by exact recoveries alone, and from no later value.
    """
    families = make_problems(program, recoveries, costs, anchors)
    problem = families[0][0]
    base = everything_kept(problem)
    reference = base.seconds if original_seconds is None else original_seconds
    floor = floor_bytes(program, recoveries, costs) - program.resident_bytes
    if budget_bytes is None:
        limit = reference * (FREE_SLOWDOWN if max_slowdown is None else max_slowdown)
        found = [
            solution_of(one, _least_peak(one, everything_kept(family[0]), floor, limit))
            for family in families
            for one in family
        ]
        return min(found, key=lambda one: (one.peak_bytes, one.seconds))
    limit = reference * (MAX_SLOWDOWN if max_slowdown is None else max_slowdown)
    target = budget_bytes - program.resident_bytes
    if base.peak <= target and base.seconds <= limit:
        return solution_of(problem, base)
    found = [_cheapest(family, floor, target, limit) for family in families]
    feasible = [one for one in found if one.is_feasible]
    if feasible:
        return min(feasible, key=lambda one: (one.seconds, one.peak_bytes))
    return min(found, key=lambda one: (one.peak_bytes, one.seconds))


def _cheapest(problems: Sequence[Problem], floor: int, target: int, limit: float) -> Solution:
    """The cheapest solution within the target or, failing that, within the lowest peak known."""
    base = everything_kept(problems[0])
    for problem in problems if target >= floor else ():
        state = within(problem, base, target, limit)
        if state is not None:
            return solution_of(problem, state)
    *others, lean = problems
    lowest = descend(lean, base, floor, limit)[-1]
    goal = max(target, lowest.peak)
    found = [solution_of(lean, _improved(lean, [lowest], goal, effort_for(lean)))]
    for problem in others:
        state = within(problem, base, goal, limit)
        found += [] if state is None else [solution_of(problem, state)]
    best = min(found, key=lambda one: (one.seconds, one.peak_bytes))
    is_feasible = best.peak_bytes <= target + lean.program.resident_bytes
    return replace(best, is_feasible=is_feasible)


def keep_all(program: Program, costs: Costs) -> Schedule:
    """The captured step as it is: every op once, each value held to its last use."""
    problem = make_problem(program, (), costs)
    return to_schedule(problem, account_of(problem, keep_everything(problem)))


def solution_of(problem: Problem, state: Evaluated) -> Solution:
    """The solution of a state."""
    account = account_of(problem, state.decisions)
    peak = account.peak + problem.program.resident_bytes
    return Solution(to_schedule(problem, account), peak, account.seconds)


def everything_kept(problem: Problem) -> Evaluated:
    """The state in which nothing is restored."""
    decisions = keep_everything(problem)
    return Evaluated.of(decisions, account_of(problem, decisions))


def effort_for(problem: Problem) -> Effort:
    """The effort that one search may spend on a problem of this size."""
    num_ops = problem.num_ops
    fewest = min(_FEWEST_TIMES * num_ops, _LARGE_CALLS + _LARGE_TIMES * num_ops)
    return Effort(min(max(_CALLS, fewest), _MOST_TIMES * num_ops))


def within(
    problem: Problem, base: Evaluated, target: int, limit: float, effort: Effort | None = None
) -> Evaluated | None:
    """The cheapest state found within the target and the time limit."""
    if base.peak <= target:
        return base
    effort = effort_for(problem) if effort is None else effort
    ends: list[Evaluated] = []
    begun: set[Decisions] = set()
    enough = (1 - _STARTS) * effort.left
    for decisions, greed in _attempts(problem, target, limit):
        if decisions in begun and not effort.is_left:
            continue  # a repair would end where it begins
        begun.add(decisions)
        end = _end(problem, decisions, target, effort, greed)
        if end.peak <= target:
            ends.append(end)
        if ends and effort.left <= enough:
            break
    if not ends:
        return None
    best = _improved(problem, ends, target, effort)
    return best if best.seconds <= limit else None


def _attempts(problem: Problem, target: int, limit: float) -> Iterator[tuple[Decisions, Greed]]:
    """Decisions that repairs start from, each with its greed."""
    for share in _SHARES:
        for start in starts(problem, target):
            for is_sharing in (True, False):
                yield start, Greed(share, is_sharing, most_seconds=_HOPELESS * limit)


def _end(
    problem: Problem, start: Decisions, target: int, effort: Effort, greed: Greed
) -> Evaluated:
    """The last state of a repair."""
    last = None
    for decisions, account in repair(problem, start, target, effort, greed):
        last = Evaluated.of(decisions, account)
    assert last is not None, "a repair yields its start"
    return last


def _improved(problem: Problem, ends: list[Evaluated], target: int, effort: Effort) -> Evaluated:
    """The best state that is reached from states within the target."""

    def worth(state: Evaluated) -> tuple[float, int]:
        return (state.seconds, state.peak)

    best = sorted(dict.fromkeys(ends), key=worth)[:_ENDS]
    added = [_added_back(problem, state, target, effort) for state in best]
    found = [
        search_nearby(problem, state, target, effort)
        for state in sorted(added, key=worth)
        if effort.is_left
    ]
    return min([*added, *found], key=worth)


def _added_back(problem: Problem, state: Evaluated, target: int, effort: Effort) -> Evaluated:
    with effort.part(0.4) as part:
        return add_back(problem, state, target, part)


def descend(problem: Problem, base: Evaluated, floor: int, limit: float) -> list[Evaluated]:
    """States of ever lower peaks: what can be reached at all within the time limit.

    Bisects between the floor and the lowest peak so far. The targets do not depend on a budget, so
    that the smallest peak is reached again when it is asked for.
    """
    reached = [base]
    low = floor
    for _ in range(_PROBES):
        if reached[-1].peak <= low + 1:
            break
        target = (low + reached[-1].peak) // 2
        found, lowest = _reach(problem, reached[-1], target, limit)
        if found is None:
            low = target
            found = lowest
        if found is not None and found.peak < reached[-1].peak:
            reached.append(found)
    return reached


def _reach(
    problem: Problem, state: Evaluated, target: int, limit: float
) -> tuple[Evaluated | None, Evaluated | None]:
    """The fastest state within a target, and the lowest passed, from a state or nothing kept."""
    effort = Effort(effort_for(problem).left // 2)
    within_target: list[Evaluated] = []
    passed: list[Evaluated] = []
    others = [one for one in starts(problem, target) if one != keep_everything(problem)]
    for start in (state.decisions, *others):
        for is_sharing in (True, False) if effort.is_left else (True,):
            greed = Greed(0.6, is_sharing, most_seconds=_HOPELESS * limit)
            states = [
                Evaluated.of(decisions, account)
                for decisions, account in repair(problem, start, target, effort, greed)
            ]
            passed += [one for one in states if one.seconds <= limit]
            if states[-1].peak <= target:
                end = _added_back(problem, states[-1], target, effort)
                within_target += [end] if end.seconds <= limit else []
        if within_target:
            break
    fastest = min(within_target, key=lambda one: (one.seconds, one.peak), default=None)
    return fastest, min(passed, key=lambda one: (one.peak, one.seconds), default=None)


def _least_peak(problem: Problem, base: Evaluated, floor: int, limit: float) -> Evaluated:
    """The state of the lowest peak within the time limit: the floor, or by bisection above it."""
    best = base
    if limit > FREE_SLOWDOWN * base.seconds:
        best = min(descend(problem, base, floor, limit), key=lambda one: one.peak)
    low, target = floor - 1, floor
    for _ in range(_PROBES):
        effort = Effort(effort_for(problem).left // 4)
        found = within(problem, base, target, limit, effort)
        if found is None:
            low = target
        elif found.peak < best.peak:
            best = found
        if best.peak <= low + 1:
            break
        target = (low + best.peak) // 2
    return best
