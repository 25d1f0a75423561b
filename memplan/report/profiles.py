"""A measured step as tables: where its bytes are at the peak, and its time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from memplan.ir.memory_trace import SAVED, TEMPORARY, WORKSPACE, MemoryTrace
from memplan.ir.program import Role
from memplan.report.places import Place, by_line, by_module, largest, tree
from memplan.report.schema import Group
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


def profile_tables(
    trace: MemoryTrace, seconds: Mapping[str, float], growth_bytes: int | None = None
) -> list[Table]:
    """What is there at the peak, by category, by module and by line; peak and time by phase.

    Of a script's step also by how many bytes it grows, if it does.
    """
    totals = categories_table(trace, seconds)
    if growth_bytes and growth_bytes > 0:
        grows = f" It leaves {format_bytes(growth_bytes)} more than there was before it."
        totals = replace(totals, footer=totals.footer + grows)
    return [totals, modules_table(trace), lines_table(trace)]


def peak_line(trace: MemoryTrace) -> str:
    """Where the peak is, in a line."""
    block = trace.peak_block
    phase = trace.phase_at(trace.peak_event)
    where = f"peak {format_bytes(trace.peak_bytes)} in {phase}"
    if block is None:
        return where
    place = f" in {block.module}" if block.module else ""
    source = f" ({short_source(block.source)})" if block.source else ""
    return f"{where}, at {block.op or 'an unknown op'}{place}{source}"


def short_source(source: str) -> str:
    """``file.py:line`` with the path from here; or, of installed files too, its last folder."""
    name, _, line = source.rpartition(":")
    if not name:
        return source
    path = Path(name)
    if path.is_relative_to(Path.cwd()) and "site-packages" not in path.parts:
        return f"{path.relative_to(Path.cwd())}:{line}"
    return f"{'/'.join(path.parts[-2:])}:{line}"


def categories_table(trace: MemoryTrace, seconds: Mapping[str, float]) -> Table:
    """Bytes by category at the peak; the most in each phase, and its time."""
    categories = trace.categories(trace.peak_event)
    rows: list[tuple[str, ...]] = [
        (
            category,
            format_bytes(nbytes),
            f"{nbytes / trace.peak_bytes:.1%}",
            "#" * round(_BAR * nbytes / trace.peak_bytes),
        )
        for category, nbytes in sorted(categories.items(), key=lambda item: -item[1])
    ]
    rows += [(), ("total", format_bytes(trace.peak_bytes), "", "")]
    rows.append(("  resident", format_bytes(trace.resident_bytes), "", ""))
    rows.append(("  unexplained", format_bytes(trace.unexplained_bytes), "", ""))
    return Table(
        f"P{peak_line(trace)[1:]}",
        ("at the peak", "bytes", "share", ""),
        tuple(rows),
        frozenset({1, 2}),
        footer=_phases(trace, seconds),
    )


def _phases(trace: MemoryTrace, seconds: Mapping[str, float]) -> str:
    times = {name: f" ({took * 1e3:.1f} ms)" for name, took in seconds.items()}
    peaks = (
        f"{name} {format_bytes(nbytes)}{times.get(name, '')}"
        for name, nbytes in trace.phase_peaks().items()
    )
    whole = f" A step takes {seconds['step'] * 1e3:.1f} ms." if "step" in seconds else ""
    return f"The most in each phase: {', '.join(peaks)}.{whole}"


def modules_table(trace: MemoryTrace) -> Table:
    """The largest modules at the peak."""
    root = tree(by_module(trace, trace.peak_event))
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


def lines_table(trace: MemoryTrace) -> Table:
    """The ops and lines that made most of what is there at the peak."""
    groups = by_line(trace, trace.peak_event)
    rows = [
        (
            format_bytes(group.nbytes),
            f"{group.count} x {group.category}",
            _made_by(group),
            short_source(group.source),
        )
        for group in groups[:_MOST_LINES]
    ]
    rest = groups[_MOST_LINES:]
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
