"""The looks of the report: its style sheet, its script, and the pieces of a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from memplan.report.palette import DARK, GROUND, INK, LIGHT, css_class
from memplan.tables import ALARM
from memplan.units import format_bytes


def page(title: str, body: Iterable[str], data: str) -> str:
    """A whole page.

    Args:
        title: of the page.
        body: its elements.
        data: JSON that is embedded.
    """
    # in a script nothing ends it but "</", and nothing else is special
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
    """A part of the page."""
    return "\n".join(["<section>", f"<h2>{escape(title)}</h2>", *content, "</section>"])


def chart(svg: str) -> str:
    """A figure as a part of the page; it has its title itself."""
    return f'<section class="figure"><div class="chart">{svg}</div></section>'


def card(name: str, value: str, note: str = "") -> str:
    """A number that matters."""
    css = "card alarm" if value.startswith(ALARM) else "card"
    below = f'<div class="note-line">{escape(note)}</div>' if note else ""
    return (
        f'<div class="{css}"><div class="label">{escape(name)}</div>'
        f'<div class="value">{escape(value)}</div>{below}</div>'
    )


def table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], numbers: frozenset[int] = frozenset()
) -> str:
    """A table that scrolls where it is too wide.

    Args:
        headers: of the columns, as text.
        rows: cells as HTML.
        numbers: positions of the columns that are aligned to the right.
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


def marked(cell: str) -> str:
    """Text, which stands out where a promise is broken."""
    words = escape(cell)
    return f'<strong class="alarm">{words}</strong>' if cell.startswith(ALARM) else words


def _fills(colours: Mapping[str, str]) -> str:
    return "\n".join(
        f"i.{css_class(name)} {{ background: {colour}; }}" for name, colour in colours.items()
    )


STYLE = f"""
:root {{ color-scheme: light dark; --ink: {INK[0]}; --ground: {GROUND[0]}; --page: #f4f5f7;
  --faint: #667080; --rule: #e1e4e8; --alarm: #c0182b; }}
{_fills(LIGHT)}
@media (prefers-color-scheme: dark) {{
:root {{ --ink: {INK[1]}; --ground: {GROUND[1]}; --page: #0e1013; --faint: #98a2af;
  --rule: #2b3037; --alarm: #ff7b86; }}
{_fills(DARK)}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main {{ max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }}
h1 {{ font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }}
h2 {{ font-size: 17px; margin: 0 0 14px; }}
h3 {{ font-size: 14px; margin: 22px 0 8px; }}
p {{ margin: 8px 0; }}
.sub, .faint {{ color: var(--faint); }}
.sub {{ margin: 0 0 24px; }}
section {{ background: var(--ground); border: 1px solid var(--rule); border-radius: 10px;
  padding: 22px 24px; margin-top: 20px; }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 14px; }}
.cards.pairs {{ grid-template-columns: repeat(auto-fit, minmax(290px, 1fr)); }}
.card {{ background: var(--ground); border: 1px solid var(--rule); border-radius: 10px;
  padding: 14px 18px; }}
.label, .note-line {{ color: var(--faint); font-size: 13px; }}
.value {{ font-size: 19px; font-weight: 600; line-height: 1.35;
  font-variant-numeric: tabular-nums; }}
.alarm, .alarm .value {{ color: var(--alarm); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 14px; }}
th {{ text-align: left; font-weight: 500; color: var(--faint); font-size: 13px; }}
th, td {{ padding: 6px 24px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top;
  white-space: nowrap; }}
tr:last-child td {{ border-bottom: 0; }}
th:last-child, td:last-child {{ padding-right: 0; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
code, .mono {{ font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }}
.bar {{ display: inline-flex; vertical-align: middle; width: 100%; min-width: 90px; height: 10px;
  border-radius: 3px; overflow: hidden; background: var(--rule); }}
.bar i {{ display: block; height: 100%; flex: none; }}
.swatch {{ display: inline-block; width: 10px; height: 10px; border-radius: 3px;
  margin-right: 9px; }}
details > summary {{ cursor: pointer; }}
.fold {{ border-top: 1px solid var(--rule); padding: 10px 0; }}
.fold > summary {{ font-weight: 600; font-size: 14px; }}
.fold[open] > summary {{ margin-bottom: 8px; }}
.tree {{ min-width: 680px; font-size: 14px; }}
.tree details > :not(summary) {{ margin-left: 18px; }}
.tree summary, .tree .leaf {{ display: grid; align-items: center; gap: 14px; padding: 3px 6px;
  grid-template-columns: minmax(120px, 1fr) 92px 160px 290px; border-radius: 5px; }}
.tree summary:hover, .tree .leaf:hover {{ background: var(--page); }}
.tree summary .mono::before {{ content: "▸"; display: inline-block; width: 16px;
  color: var(--faint); }}
.tree details[open] > summary .mono::before {{ content: "▾"; }}
.tree .leaf .mono {{ padding-left: 16px; }}
.tree summary {{ list-style: none; }}
.tree summary::-webkit-details-marker {{ display: none; }}
.parts {{ color: var(--faint); font-size: 12px; line-height: 1.35; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 5px 24px; margin: 0; }}
dt {{ color: var(--faint); }}
dd {{ margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }}
.figure {{ padding: 12px 8px 4px; }}
.chart {{ overflow-x: auto; }}
.chart svg {{ display: block; width: 100%; min-width: 720px; height: auto; }}
#tip {{ position: fixed; z-index: 1; pointer-events: none; background: var(--ground);
  border: 1px solid var(--rule); border-radius: 8px; padding: 9px 12px; font-size: 13px;
  box-shadow: 0 4px 16px rgb(0 0 0 / 0.18); font-variant-numeric: tabular-nums; }}
#tip b {{ display: block; margin-bottom: 4px; }}
#tip span {{ display: flex; gap: 10px; }}
#tip span i {{ align-self: center; margin: 0; }}
#tip span em {{ font-style: normal; margin-right: auto; padding-right: 14px; }}
@media print {{ body {{ background: none; }} section, .card {{ break-inside: avoid; }} }}
"""

SCRIPT = """
(() => {
  "use strict";
  const traces = JSON.parse(document.getElementById("memplan").textContent).traces || [];
  const tip = document.getElementById("tip");
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const size = (nbytes) => {
    let power = 0;
    while (nbytes >= 1024 && power < units.length - 1) { nbytes /= 1024; power += 1; }
    return (power ? nbytes.toFixed(2) : nbytes) + " " + units[power];
  };
  const element = (name, words) => {
    const made = document.createElement(name);
    made.textContent = words;
    return made;
  };
  const last = (times, seconds) => {
    let low = 0, high = times.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (times[middle] <= seconds) { low = middle; } else { high = middle - 1; }
    }
    return low;
  };
  const fill = (trace, event) => {
    const rows = Object.entries(trace.series).filter(([, sizes]) => sizes[event]).reverse();
    const total = rows.reduce((sum, [, sizes]) => sum + sizes[event], 0);
    const time = (trace.times_s[event] * 1e3).toFixed(2) + " ms";
    tip.replaceChildren(element("b", size(total) + " at " + time + ", " + trace.phases[event]));
    for (const [name, sizes] of rows) {
      const row = element("span", ""), colour = element("i", "");
      colour.className = "swatch " + name.replaceAll(" ", "-");
      row.append(colour, element("em", name), size(sizes[event]));
      tip.append(row);
    }
  };
  for (const panel of document.querySelectorAll("g.panel")) {
    const trace = traces[Number(panel.dataset.trace)];
    const left = Number(panel.dataset.left), width = Number(panel.dataset.width);
    const cursor = panel.querySelector(".cursor"), sensor = panel.querySelector(".sensor");
    sensor.addEventListener("pointermove", (pointer) => {
      const matrix = panel.ownerSVGElement.getScreenCTM().inverse();
      const x = new DOMPoint(pointer.clientX, pointer.clientY).matrixTransform(matrix).x;
      const seconds = (x - left) / width * Number(panel.dataset.seconds);
      fill(trace, last(trace.times_s, seconds));
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.style.visibility = "visible";
      tip.hidden = false;
      const toLeft = pointer.clientX + tip.offsetWidth + 24 > window.innerWidth;
      tip.style.left = pointer.clientX + (toLeft ? -tip.offsetWidth - 16 : 16) + "px";
      const lowest = window.innerHeight - tip.offsetHeight - 8;
      tip.style.top = Math.max(8, Math.min(pointer.clientY + 12, lowest)) + "px";
    });
    sensor.addEventListener("pointerleave", () => {
      cursor.style.visibility = "hidden";
      tip.hidden = true;
    });
  }
})();
"""
