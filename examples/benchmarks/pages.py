"""Tables on pages, placed at marks."""

from __future__ import annotations

from pathlib import Path


def put(page: Path, source: str, markdown: str) -> None:
    """Replace the text on a page between the mark of a source and the next end mark."""
    before, mark, rest = page.read_text().partition(f"<!-- table: {source} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    assert mark and end, f"{page} has no marks for {source}"
    page.write_text(f"{before}{mark}{markdown}\n{end}{after}")
