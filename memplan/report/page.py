"""The parts of a page; its style sheet and its script are page.css and page.js."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from memplan.report.palette import DARK, GROUND, INK, LIGHT, css_class
from memplan.tables import Table, alarms
from memplan.units import format_bytes


def page(title: str, body: Iterable[str], data: str) -> str:
    """A whole page.

    Args:
        title: the page's title.
        body: the page's elements.
        data: JSON to embed.
    """
    # Only "</" can end a script, and nothing else in it is special.
    embedded = data.replace("<", "\\u003c")
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            *body,
            "</main>",
            '<div id="tip" hidden></div>',
            f'<script type="application/json" id="memplan">{embedded}</script>',
            f"<script>{SCRIPT}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def section(title: str, *content: str) -> str:
    """A section of the page."""
    return "\n".join(["<section>", f"<h2>{escape(title)}</h2>", *content, "</section>"])


def chart(svg: str) -> str:
    """A figure as a section of the page; it carries its own title."""
    return f'<section class="figure"><div class="chart">{svg}</div></section>'


def card(name: str, value: str, note: str = "") -> str:
    """A card with a key number."""
    css = "card alarm" if alarms(value) else "card"
    below = f'<div class="note-line">{escape(note)}</div>' if note else ""
    return (
        f'<div class="{css}"><div class="label">{escape(name)}</div>'
        f'<div class="value">{escape(value)}</div>{below}</div>'
    )


def table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], numbers: frozenset[int] = frozenset()
) -> str:
    """A table that scrolls if it is too wide.

    Args:
        headers: column headers, as text.
        rows: cells as HTML.
        numbers: positions of the right-aligned columns.
    """
    css = [' class="number"' if n in numbers else "" for n in range(len(headers))]
    head = "".join(f"<th{c}>{escape(h)}</th>" for c, h in zip(css, headers, strict=True))
    body = "\n".join(
        f"<tr>{''.join(f'<td{c}>{cell}</td>' for c, cell in zip(css, row, strict=True))}</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def shown(data: Table) -> str:
    """A table for the terminal as HTML, without its title."""
    rows = [[_cell(text) for text in row] for row in data.rows if row]
    footer = f'<p class="faint">{escape(data.footer)}</p>' if data.footer else ""
    return table(data.headers, rows, data.numbers) + footer


def _cell(text: str) -> str:
    """A cell: highlighted where a promise is broken, coloured where it names a category."""
    if alarms(text):
        return f'<strong class="alarm">{escape(text)}</strong>'
    count, _, category = text.rpartition(" x ")
    if category not in LIGHT:
        return escape(text)
    return f"{escape(count)} x {swatch(category)}" if count else swatch(category)


def bar(categories: Mapping[str, int], whole: int) -> str:
    """Bytes by category as parts of a whole."""
    parts = "".join(
        f'<i class="{css_class(name)}" style="width:{100 * nbytes / whole:.2f}%" '
        f'title="{escape(name)}: {format_bytes(nbytes)}"></i>'
        for name, nbytes in categories.items()
        if nbytes > 0 and whole > 0
    )
    return f'<span class="bar">{parts}</span>'


def swatch(category: str) -> str:
    """A category's name with its colour."""
    return f'<i class="swatch {css_class(category)}"></i>{escape(category)}'


def _colours(index: int, fills: Mapping[str, str]) -> str:
    rules = [f":root {{ --ink: {INK[index]}; --ground: {GROUND[index]}; }}"]
    rules += [f"i.{css_class(name)} {{ background: {fill}; }}" for name, fill in fills.items()]
    return "\n".join(rules)


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


STYLE = f"""
{_colours(0, LIGHT)}
@media (prefers-color-scheme: dark) {{
{_colours(1, DARK)}
}}
{_beside("page.css")}"""

SCRIPT = f"\n{_beside('page.js')}"
