"""Every table as text, at two widths and in Markdown.

To write them: ``python tests/support/golden.py --write``.
"""

from __future__ import annotations

import difflib
import math

import pytest

from memplan.cli.output import show
from memplan.report import tables_of

from support import golden

TEXTS = golden.texts()
ESCAPE = "\x1b"
RED = "\x1b[1;31m"


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_is_as_it_was(name):
    before = (golden.FOLDER / name).read_text()
    lines = (text.splitlines(keepends=True) for text in (before, TEXTS[name]))
    changed = "".join(difflib.unified_diff(*lines, f"tests/report/golden/{name}", "now"))
    assert not changed, f"\n{changed}\nif it should be so: python tests/support/golden.py --write"


def test_no_file_is_left_over():
    assert {path.name for path in golden.FOLDER.iterdir()} == set(TEXTS)


@pytest.mark.parametrize("width", golden.WIDTHS)
def test_everything_fits_and_nothing_is_cut_off(width):
    for name, text in TEXTS.items():
        if name.endswith(f".{width}.txt"):
            assert max(map(len, text.splitlines())) <= width, name
            assert "…" not in text, name


def test_a_broken_promise_is_said_in_every_shape():
    for shape in ("80.txt", "140.txt", "md.txt"):
        assert "DIFFERENT by 3.3e-07" in " ".join(TEXTS[f"different.{shape}"].split())
        assert "DIFFERENT" not in TEXTS[f"comparison.{shape}"]


def test_what_is_not_finite_is_null_and_said():
    document = golden.comparison(False, error=math.nan, loss=math.inf)
    assert document.max_gradient_error is None and document.planned.loss is None
    text = golden.rendered(tables_of(document), 80)
    assert "not finite" in text and "DIFFERENT by" not in text


@pytest.fixture
def shown(monkeypatch, capsys):
    """What a command prints of two steps that differ."""

    def shown(**environment):
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm", "COLUMNS": "80", **environment}.items():
            monkeypatch.setenv(name, value)
        show("table", tables_of(golden.comparison(is_exact=False)), None, "")
        return capsys.readouterr().out

    return shown


def test_a_terminal_shows_a_broken_promise_in_red(shown):
    out = shown(FORCE_COLOR="1")
    assert f"{RED}DIFFERENT" in out
    assert out.count(RED) == 2


@pytest.mark.parametrize(
    "environment", [{}, {"NO_COLOR": "1"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}]
)
def test_elsewhere_there_are_no_escape_codes(shown, environment):
    out = shown(**environment)
    assert ESCAPE not in out and "DIFFERENT" in out
