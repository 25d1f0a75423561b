"""Tables as data, and how they look in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ALARM = "DIFFERENT"
"""A cell that starts so is a broken promise, and stands out."""


@dataclass(frozen=True)
class Table:
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

    def to_markdown(self) -> str:
        """One of GitHub's tables, under its title."""
        sides = ["--:" if n in self.numbers else "---" for n in range(len(self.headers))]
        lines = [f"**{self.title}**", "", _line(self.headers), _line(sides)]
        lines += [_line([f"**{c}**" if alarms(c) else c for c in row]) for row in self.rows if row]
        if self.footer:
            lines += ["", self.footer]
        return "\n".join(lines)

    def to_html(self) -> str:
        """For a notebook."""
        numbers = self.numbers
        header = "".join(_cell("th", text, n in numbers) for n, text in enumerate(self.headers))
        rows = [f"<tr>{header}</tr>"]
        for row in filter(None, self.rows):
            cells = (_cell("td", text, n in numbers) for n, text in enumerate(row))
            rows.append(f"<tr>{''.join(cells)}</tr>")
        footer = f"<p>{escape(self.footer)}</p>" if self.footer else ""
        caption = f"<caption><b>{escape(self.title)}</b></caption>"
        return f"<table>{caption}{''.join(rows)}</table>{footer}"


class ShownAsTables:
    """A result that is a line in a terminal, and tables in a notebook."""

    def tables(self) -> list[Table]:
        """What there is to see."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{self}>"

    def _repr_html_(self) -> str:
        return "".join(table.to_html() for table in self.tables())


def markdown(tables: Sequence[Table]) -> str:
    """All, one after the other."""
    return "\n\n".join(table.to_markdown() for table in tables)


def said_of_bits(equal: bool) -> str:
    """In words."""
    return "same bits" if equal else ALARM


def alarms(cell: str) -> bool:
    """Whether a cell is to stand out."""
    return cell.startswith(ALARM)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _cell(tag: str, text: str, is_number: bool) -> str:
    side = "right" if is_number else "left"
    shown = f"<b>{escape(text)}</b>" if alarms(text) else escape(text)
    return f'<{tag} style="text-align: {side}">{shown}</{tag}>'
