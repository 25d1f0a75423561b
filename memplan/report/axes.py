"""Axes of an SVG figure: the positions of numbers, and the frame around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from memplan.report.palette import DARK, GROUND, INK, LIGHT, css_class
from memplan.report.panels import ticks

_CHARACTER = 6.6
"""Approximate width of a character in a label."""


@dataclass(frozen=True)
class Frame:
    """A pair of axes.

    Attributes:
        left: left edge, in the figure's units, as are the next three.
        top: upper edge.
        width: between left and right.
        height: between top and bottom.
        x_range: the numbers at the left and the right edge.
        y_range: the numbers at the lower and the upper edge.
    """

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    @property
    def right(self) -> float:
        """The right edge."""
        return self.left + self.width

    @property
    def bottom(self) -> float:
        """The lower edge."""
        return self.top + self.height

    def x(self, number: float) -> float:
        """The position of a number, from the left."""
        return self.left + self.width * _share(number, self.x_range)

    def y(self, number: float) -> float:
        """The position of a number, from the top."""
        return self.bottom - self.height * _share(number, self.y_range)


def _share(number: float, between: tuple[float, float]) -> float:
    low, high = between
    return (number - low) / (high - low) if high > low else 0.0


def figure(width: float, height: float, title: str, description: str, parts: Iterable[str]) -> str:
    """An SVG element to embed in a page."""
    body = "\n".join(parts)
    return (
        f'<svg class="memplan-figure" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" font-family="system-ui, sans-serif" font-size="12" '
        f'fill="currentColor">\n<title>{escape(title)}</title>\n<desc>{escape(description)}</desc>'
        f"\n<style>{_STYLE}</style>\n{text(16, 24, title, 'title')}\n{body}\n</svg>"
    )


def standalone(svg: str) -> str:
    """The element as a file: with its namespace, and its own background and text colours."""
    rules = [
        f"svg.memplan-figure {{ background: {ground}; color: {ink}; }}"
        for ground, ink in zip(GROUND, INK, strict=True)
    ]
    style = f"{rules[0]}\n@media (prefers-color-scheme: dark) {{ {rules[1]} }}\n"
    named = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{named.replace('<style>', f'<style>{style}', 1)}\n"


def text(x: float, y: float, words: str, css: str = "", anchor: str = "start") -> str:
    """A label."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(words)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def steps(frame: Frame, xs: Sequence[float], ys: Sequence[float]) -> str:
    """The path commands that hold each number until the next one."""
    path = [f"M{frame.x(xs[0]):.1f} {frame.y(ys[0]):.1f}"]
    height = ys[0]
    for x, y in zip(xs[1:], ys[1:], strict=True):
        if y != height:
            path.append(f"H{frame.x(x):.1f}V{frame.y(y):.1f}")
            height = y
    return "".join([*path, f"H{frame.x(xs[-1]):.1f}"])


def axes(frame: Frame, x_label: str, y_label: str, units: tuple[float, float]) -> list[str]:
    """Grid, ticks and names of both axes; ticks are multiples of the units."""
    x_unit, y_unit = units
    parts = []
    for tick in ticks(frame.y_range[0] / y_unit, frame.y_range[1] / y_unit, 5):
        y = frame.y(tick * y_unit)
        parts.append(line(frame.left, y, frame.right, y, "grid"))
        parts.append(text(frame.left - 8, y + 4, f"{tick:g}", "tick", "end"))
    for tick in ticks(frame.x_range[0] / x_unit, frame.x_range[1] / x_unit, 8):
        x = frame.x(tick * x_unit)
        parts.append(line(x, frame.bottom, x, frame.bottom + 4, "axis"))
        parts.append(text(x, frame.bottom + 18, f"{tick:g}", "tick", "middle"))
    parts.append(line(frame.left, frame.bottom, frame.right, frame.bottom, "axis"))
    parts.append(text((frame.left + frame.right) / 2, frame.bottom + 36, x_label, "name", "middle"))
    middle = (frame.top + frame.bottom) / 2
    parts.append(
        f'<text transform="translate({frame.left - 50:.1f} {middle:.1f}) rotate(-90)" '
        f'class="name" text-anchor="middle">{escape(y_label)}</text>'
    )
    return parts


def legend(entries: Sequence[tuple[str, str]], top: float, width: float) -> tuple[list[str], float]:
    """Names beside their marks, in as many rows as needed, and the top of the next part.

    Args:
        entries: the mark, drawn in a box of 14 by 10 at the origin, and the name.
        top: top of the first row.
        width: width of a row.
    """
    parts, x, y = [], 16.0, top
    for mark, name in entries:
        needed = 20 + _CHARACTER * len(name) + 16
        if x + needed > width and x > 16:
            x, y = 16.0, y + 20
        parts.append(f'<g transform="translate({x:.1f} {y:.1f})">{mark}{text(20, 9, name)}</g>')
        x += needed
    return parts, y + 22


def area_colour(category: str) -> str:
    """Attributes that fill with a category's colour, even without a style sheet."""
    return f'class="{css_class(category)}" fill="{LIGHT[category]}"'


def _colours() -> str:
    dark = " ".join(
        f".{css_class(name)} {{ fill: {colour}; }}"
        for name, colour in DARK.items()
        if colour != LIGHT[name]
    )
    return (
        f".memplan-figure {{ --ground: {GROUND[0]}; }}\n"
        f"@media (prefers-color-scheme: dark) {{ .memplan-figure {{ --ground: {GROUND[1]}; }} "
        ".bound { stroke: #ff6ba6; } .curve { stroke: #56b4e9; } .point { fill: #56b4e9; } "
        f"{dark} }}"
    )


_STYLE = f"""
.title {{ font-size: 15px; font-weight: 600; }}
.panel-title {{ font-size: 13px; font-weight: 600; }}
.tick, .phase {{ font-size: 11px; opacity: 0.7; }}
.name {{ opacity: 0.85; }}
.note {{ font-weight: 600; paint-order: stroke; stroke: var(--ground); stroke-width: 4px;
  stroke-linejoin: round; }}
.grid {{ stroke: currentColor; stroke-width: 1; opacity: 0.12; }}
.axis {{ stroke: currentColor; stroke-width: 1; opacity: 0.5; }}
.boundary {{ stroke: currentColor; stroke-width: 1; opacity: 0.35; }}
.predicted {{ fill: none; stroke: currentColor; stroke-width: 1.5; stroke-dasharray: 5 3; }}
.bound {{ fill: none; stroke: #d5006d; stroke-width: 1.5; stroke-dasharray: 1.5 3; }}
.curve {{ fill: none; stroke: #0072b2; stroke-width: 2; }}
.point {{ fill: #0072b2; stroke: var(--ground); stroke-width: 2; }}
.dot {{ fill: currentColor; stroke: var(--ground); stroke-width: 2; }}
.cursor {{ visibility: hidden; }}
.stack {{ shape-rendering: crispEdges; }}
{_colours()}
"""
