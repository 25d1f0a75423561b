"""The largest value that fits, as a table and as a document."""

from __future__ import annotations

from collections.abc import Mapping

from memplan.planner.plan import Plan
from memplan.report.documents import plan_totals
from memplan.report.schema import Solution, SolutionDocument
from memplan.tables import Table
from memplan.units import format_bytes

Solutions = Mapping[str, tuple[int, Mapping[int, int]]]
""""untouched" and "planned" to the largest value, and the bytes of each that was tried."""


def solution_table(
    field: str, memory_bytes: int, max_slowdown: float, solutions: Solutions
) -> Table:
    """The largest value untouched and planned, and what stands on either side of the bound."""
    rows = []
    for name, (value, tried) in solutions.items():
        here = format_bytes(tried[value]) if value else ""
        more = min((number for number in tried if number > value), default=0)
        above = format_bytes(tried[more]) if more else ""
        rows.append((name, str(value), here, above, str(len(tried))))
    return Table(
        f"The largest {field} within {format_bytes(memory_bytes)}",
        ("step", field, "needs", "the next needs", "tried"),
        tuple(rows),
        frozenset({1, 2, 3, 4}),
        frozenset({1}),
        footer=f"Planned: at no more than {max_slowdown:g}x the predicted time.",
    )


def solution_document(
    field: str, memory_bytes: int, max_slowdown: float, solutions: Solutions, plan: Plan
) -> SolutionDocument:
    """The same; the totals are those of a planned step.

    Args:
        field: the factory's argument.
        memory_bytes: the bound.
        max_slowdown: the bound on the planned step's predicted time.
        solutions: untouched and planned.
        plan: of the largest value that fits, or of the smallest one where not even that fits.
    """
    found = {
        name: Solution(value=value, tried={str(k): nbytes for k, nbytes in sorted(tried.items())})
        for name, (value, tried) in solutions.items()
    }
    return SolutionDocument(
        **plan_totals(plan),
        memory_bytes=memory_bytes,
        field=field,
        max_slowdown=max_slowdown,
        untouched=found["untouched"],
        planned=found["planned"],
    )
