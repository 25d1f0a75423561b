"""A table as data, and what it looks like in a terminal, in Markdown or in HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as escape_html

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

ALARM = "DIFFERENT"
"""A cell that starts so is a broken promise, and stands out."""


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        title: above it.
        headers: of the columns.
        rows: cells as text; an empty row separates sections.
        numbers: positions of the columns that are aligned to the right.
        folded: positions of the columns that are broken where there is no room; others never are.
        footer: below it.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()
    folded: frozenset[int] = frozenset()
    footer: str = ""


def terminal(sheet: Sheet) -> Table:
    """For a console of any width."""
    table = Table(
        title=escape(sheet.title),
        title_justify="left",
        title_style="bold",
        caption=escape(sheet.footer) or None,
        caption_justify="left",
        caption_style="",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for position, header in enumerate(sheet.headers):
        is_folded = position in sheet.folded
        table.add_column(
            header,
            justify="right" if position in sheet.numbers else "left",
            overflow="fold" if is_folded else "ellipsis",
            no_wrap=not is_folded,
        )
    for row in sheet.rows:
        if not row:
            table.add_section()
            continue
        table.add_row(*(f"[bold red]{cell}[/]" if _alarms(cell) else escape(cell) for cell in row))
    return table


def markdown(sheets: Sequence[Sheet]) -> str:
    """GitHub's tables, each under its title."""
    return "\n\n".join(map(_markdown, sheets))


def _markdown(sheet: Sheet) -> str:
    positions = range(len(sheet.headers))
    lines = [
        f"**{sheet.title}**",
        "",
        _line(sheet.headers),
        _line(["--:" if position in sheet.numbers else "---" for position in positions]),
    ]
    lines += [_line([f"**{c}**" if _alarms(c) else c for c in row]) for row in sheet.rows if row]
    if sheet.footer:
        lines += ["", sheet.footer]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def html_table(sheet: Sheet) -> str:
    """For a notebook."""
    header = "".join(_cell("th", text, n in sheet.numbers) for n, text in enumerate(sheet.headers))
    rows = [f"<tr>{header}</tr>"]
    for row in filter(None, sheet.rows):
        cells = (_cell("td", text, n in sheet.numbers) for n, text in enumerate(row))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    footer = f"<p>{escape_html(sheet.footer)}</p>" if sheet.footer else ""
    caption = f"<caption><b>{escape_html(sheet.title)}</b></caption>"
    return f"<table>{caption}{''.join(rows)}</table>{footer}"


def _cell(tag: str, text: str, is_number: bool) -> str:
    side = "right" if is_number else "left"
    shown = f"<b>{escape_html(text)}</b>" if _alarms(text) else escape_html(text)
    return f'<{tag} style="text-align: {side}">{shown}</{tag}>'


def _alarms(cell: str) -> bool:
    return cell.startswith(ALARM)
