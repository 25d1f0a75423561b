"""Optimizers with low-bit state: counted right, and used as they are. Needs ``.[low-bit]``."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch import nn

import memplan
from memplan.profiler.step import resident_bytes

from support import laws

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def optimizer_of(package, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return partial(getattr(pytest.importorskip(f"{package}.optim"), name), lr=1e-3)


def made():
    layers = [layer for _ in range(6) for layer in (nn.Linear(128, 128), nn.GELU())]
    model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
    return model, (torch.randn(64, 128), torch.randn(64, 128))


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(
    ("package", "name", "bits"),
    [
        ("bitsandbytes", "AdamW8bit", 16),
        ("bitsandbytes", "Lion8bit", 8),
        ("torchao", "AdamW8bit", 16),
        ("torchao", "AdamW4bit", 8),
        ("torchao", "AdamWFp8", 16),
    ],
)
def test_low_bit_state_is_counted(package, name, bits, in_backward):
    model, sample = made()
    options = memplan.Options(on_infeasible="smallest", update_in_backward=in_backward)
    optimizer = optimizer_of(package, name)
    planned = memplan.optimize(model, sample, budget="60%", optimizer=optimizer, options=options)
    plan, measured = planned.plan, memplan.profile(planned, sample, steps=1)
    assert measured.peak_bytes <= plan.peak_bytes
    assert plan.peak_bytes - measured.peak_bytes <= 0.01 * (plan.peak_bytes - plan.resident_bytes)
    assert plan.peak_phase == measured.peak_phase
    batch = memplan.Sample.of(sample)
    with laws.preserved(model, planned.optimizer):
        laws.run_step(model, batch, planned.optimizer)
        assert plan.resident_bytes == resident_bytes(model, batch, planned.optimizer)
    state = plan.resident_bytes - resident_bytes(model, batch)
    numel = sum(layer.weight.numel() for layer in model.model if isinstance(layer, nn.Linear))
    assert bits / 8 * numel <= state <= 1.2 * bits / 8 * numel
    assert memplan.compare(model, planned, sample, steps=1).is_exact
