"""The bytes alive at the peak, as HTML: by category, by module, by op and line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from memplan.ir.memory_trace import CATEGORIES
from memplan.report.page import bar, section, shown, swatch, table
from memplan.report.places import Place, tree
from memplan.report.schema import Trace
from memplan.report.step_tables import lines_table
from memplan.units import format_bytes

_OPEN = 0.15
"""Share of all bytes above which a module is shown expanded."""


def by_category(title: str, columns: Mapping[str, Mapping[str, int]]) -> str:
    """Bytes by category, one column per trace, with bars on the same scale."""
    largest = max((n for column in columns.values() for n in column.values()), default=0)
    present = [c for c in CATEGORIES if any(c in column for column in columns.values())]
    rows = []
    for name in sorted(present, key=lambda c: -max(col.get(c, 0) for col in columns.values())):
        cells = [swatch(name)]
        for column in columns.values():
            nbytes = column.get(name, 0)
            cells += [format_bytes(nbytes), bar({name: nbytes}, largest)]
        rows.append(cells)
    totals = [sum(column.values()) for column in columns.values()]
    rows.append(
        ["<strong>total</strong>"]
        + [c for total in totals for c in (f"<strong>{format_bytes(total)}</strong>", "")]
    )
    headers = ["category", *(words for label in columns for words in (label, ""))]
    numbers = frozenset(range(1, len(headers), 2))
    return section(title, table(headers, rows, numbers))


def by_module(traces: Sequence[Trace]) -> str:
    """The module trees of the traces that have one; empty if none has."""
    named = [one for one in traces if any(module.module for module in one.modules)]
    if not named:
        return ""
    note = '<p class="faint">Modules that differ by a number alone are shown as one.</p>'
    folds = [
        _fold(one.label, _tree(tree({m.module: m.categories for m in one.modules})), n == 0)
        for n, one in enumerate(named)
    ]
    return section("At the peak, by module", note, *folds)


def by_line(traces: Sequence[Trace]) -> str:
    """The ops and lines that allocated the bytes; empty if none is known."""
    known = [one for one in traces if one.lines]
    if not known:
        return ""
    folds = [
        _fold(one.label, shown(lines_table(one, most=None)), n == 0) for n, one in enumerate(known)
    ]
    return section("At the peak, by op and source line", *folds)


def _fold(label: str, content: str, is_open: bool) -> str:
    state = " open" if is_open else ""
    return f'<details class="fold"{state}><summary>{escape(label)}</summary>\n{content}\n</details>'


def _tree(root: Place) -> str:
    outside = root.nbytes.copy()
    for child in root.children.values():
        outside.subtract(child.nbytes)
    rest = Place("(no module)", nbytes=+outside)
    places = [*root.children.values(), *([rest] if rest.total else [])]
    rows = [_place(place, "", root.total) for place in _largest_first(places)]
    return f'<div class="wide"><div class="tree">{"".join(rows)}</div></div>'


def _place(place: Place, above: str, whole: int) -> str:
    name = place.path[len(above) :].removeprefix(".")
    count = f" x{len(place.names)}" if len(place.names) > 1 else ""
    categories = {c: place.nbytes[c] for c in CATEGORIES if place.nbytes[c]}
    parts = ", ".join(
        f"{category} {format_bytes(nbytes)}"
        for category, nbytes in sorted(categories.items(), key=lambda item: -item[1])
    )
    row = (
        f'<span class="mono">{escape(name)}{count}</span>'
        f'<span class="number">{format_bytes(place.total)}</span>{bar(categories, whole)}'
        f'<span class="parts">{escape(parts)}</span>'
    )
    if not place.children:
        return f'<div class="leaf">{row}</div>'
    inside = [_place(one, place.path, whole) for one in _largest_first(place.children.values())]
    state = " open" if place.total > _OPEN * whole else ""
    return f"<details{state}><summary>{row}</summary>\n{''.join(inside)}</details>"


def _largest_first(places: Iterable[Place]) -> list[Place]:
    return sorted(places, key=lambda place: (-place.total, place.path))
