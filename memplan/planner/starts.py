"""The starts of a search."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from memplan.planner.account import Decisions, account_of, keep_everything
from memplan.planner.problem import Problem


def starts(problem: Problem, target: int) -> tuple[Decisions, ...]:
    """Decisions to begin with, the most promising first: with everything kept, and with nothing.

    Where values can be restored from later ones, also with as few of these as ``target`` bytes
    need, and with all. They are restored as soon as the backward needs anything that they are
    computed from: their sources end there, and can be written over.
    """
    nothing = Decisions(frozenset(problem.recovery), frozenset())
    if not problem.inverted:
        return keep_everything(problem), nothing
    undone = replace(nothing, early=frozenset(_inside(problem).asked.items()))
    return *_partly_undone(problem, target), undone, keep_everything(problem), nothing


@dataclass(frozen=True)
class _Inside:
    """The details of values that are restored from later ones.

    Attributes:
        asked: value to the first backward op that needs what the value is computed from.
        between: value to what is recomputed with it: all between its sources and itself.
    """

    asked: dict[int, int]
    between: dict[int, frozenset[int]]


def _partly_undone(problem: Problem, target: int) -> tuple[Decisions, ...]:
    """Invert the cheapest for their bytes, and as many as the target needs; keep all else."""
    inside = _inside(problem)
    base = keep_everything(problem)

    def price(value: int) -> tuple[float, int]:
        made = {id for id in inside.between[value] if id in problem.recovery}
        ops = {problem.recovery[id].restore_op.id for id in (*made, value)}
        nbytes = sum(problem.nbytes[id] for id in {*made, value} - base.evicted)
        return (sum(problem.op_seconds[op] for op in ops) / max(nbytes, 1), value)

    cheapest = sorted(inside.asked, key=price)

    def decisions(count: int) -> Decisions:
        chosen = cheapest[:count]
        dropped = base.evicted.union(chosen, *(inside.between[value] for value in chosen))
        early = frozenset((value, inside.asked[value]) for value in chosen)
        return Decisions(dropped, frozenset(), early)

    fewest, most = 0, len(cheapest)
    if account_of(problem, decisions(most)).peak > target:
        return (decisions(most),)
    while fewest < most:
        middle = (fewest + most) // 2
        if account_of(problem, decisions(middle)).peak <= target:
            most = middle
        else:
            fewest = middle + 1
    return (decisions(most),)


def _inside(problem: Problem) -> _Inside:
    sources = {
        value: problem.operands[recovery.restore_op.id]
        for value, recovery in problem.recovery.items()
    }
    ops = problem.program.ops
    first_read: dict[int, int] = {}
    for op in reversed([op for op in ops if problem.is_backward(op.id)]):
        first_read.update(dict.fromkeys(problem.operands[op.id], op.id))
    needed = _closure(first_read, lambda value: sources.get(value, ()))
    undone = sorted(problem.inverted.keys() & needed, reverse=True)
    streams = {id for value in undone for id in sources[value] if id not in problem.recovery}
    streams |= problem.inverted.keys()
    depends = set(streams)
    for op in (op for op in ops if not problem.is_backward(op.id)):
        if not depends.isdisjoint(problem.operands[op.id]):
            depends.update(op.results)
    found = _Inside({}, {})
    for value in undone:
        between = _closure(
            (id for id in sources[value] if id in depends - streams),
            lambda id: (s for s in sources.get(id, ()) if s in depends - streams),
        )
        times = [first_read[id] for id in between if id in first_read]
        times = times or [found.asked[id] for id in sources[value] if id in found.asked]
        if times:
            found.asked[value] = min(times)
            found.between[value] = frozenset(between & problem.recovery.keys())
    return found


def _closure(start: Iterable[int], following: Callable[[int], Iterable[int]]) -> set[int]:
    """All values reached from some."""
    stack = list(start)
    seen = set(stack)
    while stack:
        new = set(following(stack.pop())) - seen
        seen |= new
        stack.extend(new)
    return seen
