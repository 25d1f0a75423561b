"""Tables in a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as RichTable

from memplan.tables import Table, alarms


def terminal(table: Table) -> RichTable:
    """A table for a console of any width."""
    shown = RichTable(
        title=escape(table.title),
        title_justify="left",
        title_style="bold",
        caption=escape(table.footer) or None,
        caption_justify="left",
        caption_style="",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for position, header in enumerate(table.headers):
        is_folded = position in table.folded
        shown.add_column(
            header,
            justify="right" if position in table.numbers else "left",
            overflow="fold" if is_folded else "ellipsis",
            no_wrap=not is_folded,
        )
    for row in table.rows:
        if not row:
            shown.add_section()
            continue
        shown.add_row(*(f"[bold red]{cell}[/]" if alarms(cell) else escape(cell) for cell in row))
    return shown
