"""The differences between two documents."""

from __future__ import annotations

from memplan.report.schema import DifferenceDocument, ProfileDocument, Readable, kind_of
from memplan.tables import Table
from memplan.units import format_bytes

_MOST = 10


def increase(before: Readable, after: Readable) -> float:
    """The growth of the peak, as a share of the peak before."""
    if not before.peak_bytes:
        return float(after.peak_bytes > 0)
    return after.peak_bytes / before.peak_bytes - 1


def difference_table(before: Readable, after: Readable) -> Table:
    """Peak, categories at the peak and time, before and after."""
    was, is_now = before.categories, after.categories
    names = sorted(
        was.keys() | is_now.keys(),
        key=lambda name: (
            -abs(is_now.get(name, 0) - was.get(name, 0)),
            -is_now.get(name, 0),
            name,
        ),
    )
    rows: list[tuple[str, ...]] = [
        _bytes_row("peak", before.peak_bytes, after.peak_bytes),
        _bytes_row("  resident", before.resident_bytes, after.resident_bytes),
        (),
        *(_bytes_row(name, was.get(name, 0), is_now.get(name, 0)) for name in names[:_MOST]),
    ]
    times = [one.step_s for one in (before, after) if isinstance(one, ProfileDocument)]
    if len(times) == 2 and all(times):
        shown = [f"{seconds * 1e3:.1f} ms" for seconds in times]
        rows += [(), ("step time", *shown, "", f"{times[1] / times[0] - 1:+.1%}")]
    return Table(
        f"{kind_of(before)} before, {kind_of(after)} after",
        ("", "before", "after", "difference", ""),
        tuple(rows),
        frozenset({1, 2, 3, 4}),
    )


def difference_document(before: Readable, after: Readable) -> DifferenceDocument:
    """The same as a document; its totals are those of the document after."""
    was, is_now = before.categories, after.categories
    return DifferenceDocument(
        peak_bytes=after.peak_bytes,
        resident_bytes=after.resident_bytes,
        categories=is_now,
        unexplained_bytes=after.unexplained_bytes,
        increase=increase(before, after),
        difference_bytes=after.peak_bytes - before.peak_bytes,
        differences={
            name: is_now.get(name, 0) - was.get(name, 0)
            for name in sorted(was.keys() | is_now.keys())
        },
    )


def _bytes_row(name: str, before: int, after: int) -> tuple[str, ...]:
    share = f"{after / before - 1:+.1%}" if before else ""
    sign = "+" if after >= before else ""
    return (
        name,
        *map(format_bytes, (before, after)),
        f"{sign}{format_bytes(after - before)}",
        share,
    )
