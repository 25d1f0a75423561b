"""Restores moved to an earlier op, where there is room while they run.

A restore needs bytes of its own while it runs: its operands and results. If these exceed the budget
directly before the op that needs the value, they may not before one of the ops just earlier; the
value is then held for a moment. This costs no time.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from memplan.ir.schedule import Restore, Run
from memplan.planner.account import Account, Decisions, ScheduledCall
from memplan.planner.problem import Problem

_REACH = 4
"""The most ops that a restore is moved by."""


def hoist(
    problem: Problem, decisions: Decisions, account: Account, target: int
) -> Decisions | None:
    """The decisions with restores over the target moved; None if none can be."""
    calls = account.calls
    over = [int(p) for p in np.flatnonzero(account.peak_bytes > target)]
    times = sorted({calls[p].time for p in over if calls[p].kind is Restore})
    if not times:
        return None
    runs = {call.time: call.position for call in calls if call.kind is Run}
    breaks, early = set(decisions.breaks), set(decisions.early)
    for time in times:
        first = runs[time - 1] + 1 if time else 0
        group = [call for call in calls[first : runs[time]] if call.kind is Restore]
        wanted = _wanted(problem, group, time)
        places = range(time - 1, max(_earliest(problem, wanted, time), time - _REACH) - 1, -1)
        room = target - sum(problem.nbytes[value] for value in wanted)
        at = _better_place(account, [(place, runs[place]) for place in places], first, room)
        if at is None:
            continue
        for call in group:
            for value in problem.results[call.op]:
                if (value, time) in breaks:
                    breaks.remove((value, time))
                    breaks.add((value, at))
        early |= {(value, at) for value in wanted}
        early -= {(value, time) for value in wanted}
    changed = replace(decisions, breaks=frozenset(breaks), early=frozenset(early))
    return None if changed == decisions else changed


def _earliest(problem: Problem, wanted: set[int], time: int) -> int:
    """The first op before which values can be restored: in the same part, after all are made."""
    producers = (problem.program.values[value].producer for value in wanted)
    made = (producer + 1 for producer in producers if producer is not None)
    return max([problem.part.index(problem.part[time]), *made])


def _wanted(problem: Problem, group: list[ScheduledCall], time: int) -> set[int]:
    """The values restored before an op that it, or a later one, needs."""
    made = {value for call in group for value in problem.results[call.op]}
    read = {value for call in group for value in problem.operands[call.op]}
    return made & (set(problem.operands[time]) | (made - read))


def _better_place(
    account: Account, places: list[tuple[int, int]], first: int, most_bytes: int
) -> int | None:
    """The op before which the restores have most room, if their results can be held from there.

    Args:
        account: of the schedule so far.
        places: ops and their positions, latest first.
        first: position of the first of the restores.
        most_bytes: bytes that may be alive meanwhile.
    """
    best, most_room = None, 0
    for op, position in places:
        if int(account.peak_bytes[position:first].max(initial=0)) > most_bytes:
            break
        room = int(account.before_bytes[first] - account.before_bytes[position])
        if room > most_room:
            best, most_room = op, room
    return best
