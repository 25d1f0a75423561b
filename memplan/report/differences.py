"""What changed between two documents."""

from __future__ import annotations

from collections.abc import Mapping

from memplan.report.documents import SCHEMA_VERSION, Document
from memplan.report.reading import optional, required
from memplan.tables import Table
from memplan.units import format_bytes

_MOST = 10


def increase(before: Document, after: Document) -> float:
    """How much the peak grew, as a share of what it was."""
    was, is_now = (required(one, "peak_bytes", int) for one in (before, after))
    return is_now / was - 1 if was else float(is_now > 0)


def difference_table(before: Document, after: Document) -> Table:
    """Peak, categories at the peak and time, before and after."""
    rows = [_bytes_row("peak", *(required(one, "peak_bytes", int) for one in (before, after)))]
    rows.append(
        _bytes_row("  resident", *(required(o, "resident_bytes", int) for o in (before, after)))
    )
    categories = [_categories(one) for one in (before, after)]
    names = sorted(
        categories[0].keys() | categories[1].keys(),
        key=lambda name: (
            -abs(categories[1].get(name, 0) - categories[0].get(name, 0)),
            -categories[1].get(name, 0),
            name,
        ),
    )
    rows.append(())
    rows += [_bytes_row(name, *(one.get(name, 0) for one in categories)) for name in names[:_MOST]]
    times = [optional(one, "step_s", float) for one in (before, after)]
    if times[0] and times[1]:
        shown = [f"{seconds * 1e3:.1f} ms" for seconds in times if seconds]
        rows += [(), ("step time", *shown, "", f"{times[1] / times[0] - 1:+.1%}")]
    return Table(
        f"{before['kind']} before, {after['kind']} after",
        ("", "before", "after", "difference", ""),
        tuple(rows),
        frozenset({1, 2, 3, 4}),
    )


def difference_document(before: Document, after: Document) -> Document:
    """The same; the totals are those of the document after."""
    categories = [_categories(one) for one in (before, after)]
    names = categories[0].keys() | categories[1].keys()
    was, is_now = (required(one, "peak_bytes", int) for one in (before, after))
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "difference",
        "peak_bytes": is_now,
        "resident_bytes": required(after, "resident_bytes", int),
        "categories": dict(categories[1]),
        "unexplained_bytes": required(after, "unexplained_bytes", int),
        "increase": increase(before, after),
        "difference_bytes": is_now - was,
        "differences": {
            name: categories[1].get(name, 0) - categories[0].get(name, 0) for name in sorted(names)
        },
    }


def _categories(document: Document) -> Mapping[str, int]:
    found = required(document, "categories", dict)
    return {str(name): required(found, name, int) for name in found}


def _bytes_row(name: str, before: int, after: int) -> tuple[str, ...]:
    share = f"{after / before - 1:+.1%}" if before else ""
    sign = "+" if after >= before else ""
    return (
        name,
        *map(format_bytes, (before, after)),
        f"{sign}{format_bytes(after - before)}",
        share,
    )
