"""The examples that train a ResNet in parts, and an autoencoder in blocks."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")
import pretrain_bim
import train_local
from train_local import Settings

TINY = Settings(parts=3, depth=20, width=4, batch_size=32, epochs=2)


@pytest.fixture(scope="module")
def digits():
    train, test = train_local.load_digits()
    return [part[:256] for part in train], [part[:64] for part in test]


@pytest.mark.parametrize("parts", [1, 3])
def test_every_parts_loss_falls(parts, digits, capsys):
    row = train_local.run(replace(TINY, parts=parts), *digits)
    epochs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    losses = [
        [float(one) for one in line.split("losses ")[1].split("  ")[0].split()] for line in epochs
    ]
    assert [len(one) for one in losses] == [parts, parts]
    assert all(after < before for before, after in zip(*losses, strict=True))
    assert row["parts"] == parts and 0 < row["accuracy"] <= 1


def test_a_table_and_a_figure(monkeypatch, tmp_path, digits):
    page, figure, numbers = tmp_path / "a.md", tmp_path / "a.png", tmp_path / "a.json"
    page.write_text("before\n<!-- table: digits -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(train_local, "load_digits", lambda: digits)
    monkeypatch.setattr(train_local, "PARTS", (1, 2, 4))
    command = f"x --table --seeds 1 --rounds 1 --epochs 1 --width 4 --document {page}"
    monkeypatch.setattr(
        sys, "argv", [*command.split(), "--figure", str(figure), "--json", str(numbers)]
    )
    train_local.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    rows = json.loads(numbers.read_text())["rows"]
    peaks = [row["peak_bytes"] - row["resident_bytes"] for row in rows]
    assert peaks == sorted(peaks, reverse=True) and figure.stat().st_size > 1000
    assert text.count("\n| ") == 1 + len(rows)


@pytest.mark.parametrize("blocks", [1, 2])
def test_pretraining_and_probes(blocks, digits, capsys):
    settings = pretrain_bim.Settings(blocks=blocks, depth=4, width=16, batch_size=32, epochs=3)
    row = pretrain_bim.run(settings, *digits)
    epochs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    losses = [
        [float(x) for x in line.split("losses ")[1].split("  ")[0].split()] for line in epochs
    ]
    assert [len(one) for one in losses] == [blocks] * 3
    assert all(last < first for first, last in zip(losses[0], losses[-1], strict=True))
    assert list(row["accuracies"]) == ["0", "1", "2", "3", "4"]
    assert all(0.1 < share <= 1 for share in row["accuracies"].values())


def test_a_table_of_both_ways(monkeypatch, tmp_path, digits):
    page, figure = tmp_path / "a.md", tmp_path / "a.png"
    page.write_text("before\n<!-- table: masked images -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(pretrain_bim, "load_digits", lambda: digits)
    command = f"x --table --seeds 2 --rounds 1 --epochs 1 --width 16 --depth 4 --document {page}"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--figure", str(figure)])
    pretrain_bim.main()
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["end to end", "4 blocks"]
    assert figure.stat().st_size > 1000
