"""Tables as data, and their rendering in Markdown and in HTML."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ALARM = "DIFFERENT"
"""Start of a cell that marks a broken promise, and is highlighted."""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: text above it.
        headers: column headers.
        rows: cells as text; an empty row separates sections.
        numbers: positions of the right-aligned columns.
        folded: positions of the columns that wrap if there is no room; others never do.
        footer: text below it.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()
    folded: frozenset[int] = frozenset()
    footer: str = ""

    def to_markdown(self) -> str:
        """A GitHub table, under its title."""
        sides = ["--:" if n in self.numbers else "---" for n in range(len(self.headers))]
        lines = [f"**{self.title}**", "", _line(self.headers), _line(sides)]
        lines += [_line([f"**{c}**" if alarms(c) else c for c in row]) for row in self.rows if row]
        if self.footer:
            lines += ["", self.footer]
        return "\n".join(lines)

    def to_html(self) -> str:
        """HTML for a notebook."""
        numbers = self.numbers
        header = "".join(_cell("th", text, n in numbers) for n, text in enumerate(self.headers))
        rows = [f"<tr>{header}</tr>"]
        for row in filter(None, self.rows):
            cells = (_cell("td", text, n in numbers) for n, text in enumerate(row))
            rows.append(f"<tr>{''.join(cells)}</tr>")
        footer = f"<p>{escape(self.footer)}</p>" if self.footer else ""
        caption = f"<caption><b>{escape(self.title)}</b></caption>"
        return f"<table>{caption}{''.join(rows)}</table>{footer}"


class ShownAsTables(ABC):
    """A result shown as a line in a terminal, and as tables in a notebook."""

    @abstractmethod
    def tables(self) -> list[Table]:
        """The tables to show."""

    def __repr__(self) -> str:
        return f"<{self}>"

    def _repr_html_(self) -> str:
        return "".join(table.to_html() for table in self.tables())


def markdown(tables: Sequence[Table]) -> str:
    """The tables in Markdown, one after the other."""
    return "\n\n".join(table.to_markdown() for table in tables)


def said_of_bits(equal: bool) -> str:
    """The result of a comparison of bits, in words."""
    return "same bits" if equal else ALARM


def alarms(cell: str) -> bool:
    """Tell whether a cell is to be highlighted."""
    return cell.startswith(ALARM)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _cell(tag: str, text: str, is_number: bool) -> str:
    side = "right" if is_number else "left"
    shown = f"<b>{escape(text)}</b>" if alarms(text) else escape(text)
    return f'<{tag} style="text-align: {side}">{shown}</{tag}>'
