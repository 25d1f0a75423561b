"""The example that trains while layers or batches are skipped, and the benchmark."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")
import train_skipping
from train_skipping import Settings

TINY = Settings(depth=4, width=16, batch_size=16, epochs=2)


def small(task):
    train, test = train_skipping.load(task)
    return tuple(part[:160] for part in train), tuple(part[:40] for part in test)


@pytest.mark.parametrize(
    ("task", "technique"),
    [
        ("digits", "subset"),
        ("digits", "gated"),
        ("digits", "batches"),
        pytest.param("digits", "none", marks=pytest.mark.slow),
        pytest.param("digits", "blocks", marks=pytest.mark.slow),
        ("text", "blocks"),
        pytest.param("text", "gated", marks=pytest.mark.slow),
    ],
)
def test_a_training(task, technique):
    row = train_skipping.run(replace(TINY, task=task, technique=technique), *small(task))
    assert 0 < row["score"] < 10 and row["flops"] > 0 and row["above_bytes"] > 0
    assert (row["steps"] == 20) == (technique != "batches") and row["steps"] <= 20
    assert (row["saved_in_evaluation"] > 0) <= (technique == "gated")


def test_a_table_and_a_figure(monkeypatch, tmp_path):
    page, figure, numbers = tmp_path / "a.md", tmp_path / "a.png", tmp_path / "a.json"
    page.write_text("before\n<!-- table: digits -->\nold\n<!-- end -->\nafter\n")
    data = small("digits")
    monkeypatch.setattr(train_skipping, "load", lambda task: data)
    kinds = (("none", 0.0, 1.0), ("none", 0.0, 0.5), ("blocks", 0.5, 1.0), ("batches", 0.5, 1.0))
    monkeypatch.setattr(train_skipping, "COMPARED", kinds)
    command = "x --table --seeds 1 --rounds 1 --epochs 1 --depth 4 --width 16 --batch-size 16"
    places = ["--document", str(page), "--figure", str(figure), "--json", str(numbers)]
    monkeypatch.setattr(sys, "argv", [*command.split(), *places])
    train_skipping.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    rows = json.loads(numbers.read_text())["rows"]
    assert [row["work"] for row in rows][:2] == [1, 0.5] and figure.stat().st_size > 1000
    assert rows[2]["work"] < 0.7 and rows[2]["of_whole"] < 0.8 and rows[3]["of_whole"] <= 1
    assert text.count("\n| ") == 1 + len(rows)
