"""Tables of pages, put where a mark says."""

from __future__ import annotations

from pathlib import Path


def put(page: Path, source: str, markdown: str) -> None:
    """Replace what stands on a page between the mark of a source and the next end."""
    before, mark, rest = page.read_text().partition(f"<!-- table: {source} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    assert mark and end, f"{page} has no marks for {source}"
    page.write_text(f"{before}{mark}{markdown}\n{end}{after}")
