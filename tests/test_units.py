"""Bytes and budgets as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memplan.errors import UnitsError
from memplan.units import format_bytes, parse_budget, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("6GiB", 6 * 1024**3),
        ("6 GB", 6 * 10**9),
        ("500MB", 500 * 10**6),
        ("1.5g", 3 * 1024**3 // 2),
        ("12", 12),
        (" 7 kib ", 7 * 1024),
        (".5k", 512),
        ("1TiB", 1024**4),
        (6_000_000_000, 6_000_000_000),
    ],
)
def test_accepted_forms(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "6 GiBs", "GB", "-3MB", "1e9", "6,5g", "50 %%", "x%", None, 0.5, True, -1, "٣MB"]
)
def test_anything_else_names_the_accepted_forms(text):
    with pytest.raises(UnitsError, match="accepted forms"):
        parse_budget(text)


def test_percent_is_of_what_is_above_resident():
    assert parse_budget("50%").resolve(1000, 2000) == 1500
    assert parse_budget("0%").resolve(1000, 2000) == 1000
    assert parse_budget("100 %").resolve(1000, 2000) == 2000
    with pytest.raises(UnitsError, match="above 100%"):
        parse_budget("101%")


@given(st.integers(0, 2**60))
def test_bytes_survive_text(nbytes):
    assert parse_bytes(str(nbytes)) == parse_bytes(nbytes) == nbytes
    assert format_bytes(nbytes).split()[1] in {"B", "KiB", "MiB", "GiB", "TiB"}
