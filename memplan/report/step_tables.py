"""Tables of a step's bytes at the peak: by category, by module, by line."""

from __future__ import annotations

from pathlib import Path

from memplan.ir.memory_trace import SAVED, TEMPORARY, WORKSPACE
from memplan.ir.program import Role
from memplan.report.places import Place, largest, tree
from memplan.report.schema import Group, Trace
from memplan.tables import Table
from memplan.units import format_bytes

_MOST_PLACES = 10
_MOST_LINES = 6
_BAR = 20
_COLUMNS = {
    "parameters": (Role.PARAMETER.value, Role.BUFFER.value),
    "gradients": (Role.GRADIENT.value, Role.EXISTING_GRADIENT.value),
    "optimizer": (Role.OPTIMIZER_STATE.value,),
    "activations": (SAVED, TEMPORARY, WORKSPACE, Role.OUTPUT.value, Role.KEPT.value),
}


def _peak_line(trace: Trace) -> str:
    """One line on where the peak is."""
    peak = trace.peak
    where = f"Peak {format_bytes(trace.peak_bytes)} in {peak.phase}"
    if not (peak.op or peak.module or peak.source):
        return where
    place = f" in {peak.module}" if peak.module else ""
    source = f" ({short_source(peak.source)})" if peak.source else ""
    return f"{where}, at {peak.op or 'an unknown op'}{place}{source}"


def short_source(source: str) -> str:
    """``file.py:line``, relative to here; for installed files, with the last folder only."""
    name, _, line = source.rpartition(":")
    if not name:
        return source
    path = Path(name)
    if path.is_relative_to(Path.cwd()) and "site-packages" not in path.parts:
        return f"{path.relative_to(Path.cwd())}:{line}"
    return f"{'/'.join(path.parts[-2:])}:{line}"


def categories_table(trace: Trace, footer: str) -> Table:
    """Bytes by category at the peak."""
    rows: list[tuple[str, ...]] = [
        (
            category,
            format_bytes(nbytes),
            f"{nbytes / trace.peak_bytes:.1%}",
            "#" * round(_BAR * nbytes / trace.peak_bytes),
        )
        for category, nbytes in sorted(trace.categories.items(), key=lambda item: -item[1])
    ]
    rows += [(), ("total", format_bytes(trace.peak_bytes), "", "")]
    rows.append(("  resident", format_bytes(trace.resident_bytes), "", ""))
    rows.append(("  unexplained", format_bytes(trace.unexplained_bytes), "", ""))
    headers = ("at the peak", "bytes", "share", "")
    return Table(_peak_line(trace), headers, tuple(rows), frozenset({1, 2}), footer=footer)


def modules_table(trace: Trace) -> Table:
    """The largest modules at the peak."""
    root = tree({one.module: one.categories for one in trace.modules})
    rows = [_place_row(*one) for one in largest(root, _MOST_PLACES)]
    inside = sum(child.total for child in root.children.values())
    if root.total > inside:
        rows.append(("(no module)", *[""] * len(_COLUMNS), format_bytes(root.total - inside)))
    return Table(
        "By module, at the peak",
        ("module", *_COLUMNS, "all"),
        tuple(rows),
        frozenset(range(1, len(_COLUMNS) + 2)),
        frozenset({0}),
    )


def _place_row(place: Place, path: str, depth: int) -> tuple[str, ...]:
    count = f" x{len(place.names)}" if path.endswith("*") else ""
    totals = [sum(place.nbytes[name] for name in names) for names in _COLUMNS.values()]
    cells = [format_bytes(nbytes) if nbytes else "" for nbytes in totals]
    return (f"{'  ' * depth}{path}{count}", *cells, format_bytes(place.total))


def lines_table(trace: Trace, most: int | None = _MOST_LINES) -> Table:
    """The ops and lines that allocated the bytes at the peak; the rest in one row."""
    rows = [
        (
            format_bytes(group.nbytes),
            f"{group.count} x {group.category}",
            _made_by(group),
            short_source(group.source),
        )
        for group in trace.lines[:most]
    ]
    rest = [] if most is None else trace.lines[most:]
    if rest:
        nbytes, count = sum(g.nbytes for g in rest), sum(g.count for g in rest)
        rows.append((format_bytes(nbytes), f"{count} x the rest", "", ""))
    return Table(
        "By op and line, at the peak",
        ("bytes", "what", "made by", "line"),
        tuple(rows),
        frozenset({0}),
        frozenset({2, 3}),
    )


def _made_by(group: Group) -> str:
    op = group.op.removeprefix("aten::") or "an unknown op"
    return f"{op} in {group.module}" if group.module else op
