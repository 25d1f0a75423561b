"""Where a search begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from memplan.planner.lowering import Decisions, keep_everything
from memplan.planner.problem import Problem


def starts(problem: Problem) -> tuple[Decisions, ...]:
    """Where a search begins: with everything kept, with nothing; and, in turn, with what is undone.

    In the last nothing is kept that can come back, and what comes back from later values does so as
    soon as the backward needs anything of what it is computed from: so the value that it is had
    from ends there, and can be written over.
    """
    nothing = Decisions(frozenset(problem.recovery), frozenset())
    if not problem.inverted:
        return keep_everything(problem), nothing
    return replace(nothing, early=_undone_at(problem)), keep_everything(problem), nothing


def _undone_at(problem: Problem) -> frozenset[tuple[int, int]]:
    """For values that come back from later ones, the op of the backward that first asks for it."""
    sources = {
        value: problem.operands[recovery.restore.id] for value, recovery in problem.recovery.items()
    }
    backward = problem.program.ops[problem.num_forward :]
    first_read: dict[int, int] = {}
    for op in reversed(backward):
        first_read.update(dict.fromkeys(problem.operands[op.id], op.id))
    needed = _closure(first_read, lambda value: sources.get(value, ()))
    undone = sorted(problem.inverted & needed, reverse=True)
    streams = {id for value in undone for id in sources[value] if id not in problem.recovery}
    streams |= problem.inverted
    depends = set(streams)
    for op in problem.program.ops[: problem.num_forward]:
        if not depends.isdisjoint(problem.operands[op.id]):
            depends.update(op.results)
    asked: dict[int, int] = {}
    for value in undone:
        inside = _closure(
            (id for id in sources[value] if id in depends - streams),
            lambda id: (s for s in sources.get(id, ()) if s in depends - streams),
        )
        times = [first_read[id] for id in inside if id in first_read]
        times = times or [asked[id] for id in sources[value] if id in asked]
        if times:
            asked[value] = min(times)
    return frozenset(asked.items())


def _closure(start: Iterable[int], following: Callable[[int], Iterable[int]]) -> set[int]:
    """All that is reached from some values."""
    stack = list(start)
    seen = set(stack)
    while stack:
        new = set(following(stack.pop())) - seen
        seen |= new
        stack.extend(new)
    return seen
