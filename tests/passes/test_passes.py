"""What belongs to one pass alone; the laws are in test_laws.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import memplan
from memplan.passes import DEFAULT_PASSES, PASSES
from memplan.rng import apply_mask

from support import laws
from support.modules import Model, assert_eager_bits, rows

SMALLEST = memplan.Options(on_infeasible="smallest")


def test_every_pass_is_named_as_its_factory_and_has_a_card():
    cards = {card.stem for card in Path(memplan.passes.__file__).parent.glob("*.md")}
    for name, factory in PASSES.items():
        made = factory("head") if name == "freeze" else factory()
        assert made.name == name == factory.__name__
        assert cards.intersection(factory.__module__.split(".")[2:])  # its file's, or its folder's
    assert all(PASSES[name]().effect is memplan.Effect.EXACT for name in DEFAULT_PASSES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropouts_backward_has_the_bits_of_torchs(dtype):
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-310, torch.inf, -torch.inf, torch.nan])
    gradient = torch.cat([special, torch.randn(1001) * 1e30, torch.randn(1001)]).to(dtype)
    mask = torch.rand(gradient.shape) < 0.7
    for scale in (1 / 0.9, 1 / 0.3, 2.0, 0.0):
        torchs = torch.ops.aten.native_dropout_backward(gradient, mask, scale)
        ours = apply_mask(gradient, mask, scale)
        same = (torchs == ours) & (torch.signbit(torchs) == torch.signbit(ours))
        assert (same | (torchs.isnan() & ours.isnan())).all()


def test_dropouts_kernel_is_replaced_and_exact():
    step = memplan.WithLoss(
        nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1)), nn.functional.mse_loss
    )
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        step.to(dtype)
        sample = (torch.randn(32, 64, dtype=dtype), torch.randn(32, 64, dtype=dtype))
        planned = memplan.optimize(step, sample, budget="100%")
        targets = {op.target for op in planned.prepare(memplan.Sample(sample)).captured.program.ops}
        assert {"memplan.rng.draw_mask", "memplan.rng.apply_mask"} <= targets
        laws.assert_same_bits(laws.step(step, sample), laws.step(planned, sample))


@pytest.mark.by_default(
    "0.04-dtype0",
    "0.1-dtype0",
    "0.15-dtype0",
    "0.5-dtype0",
    "0.71-dtype0",
    "0.97-dtype0",
    "1.0-dtype0",
    "0.15-dtype1",
    "0.71-dtype2",
    "0.5-dtype3",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.04, 0.1, 0.15, 0.5, 0.71, 0.97, 1.0])
def test_dropout_has_eagers_bits_whatever_its_probability(p, dtype):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            x = nn.functional.dropout(self.layer(x), p)
            return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=p).square().mean()

    model, x = Attends().to(dtype), torch.randn(2, 2, 8, 16, dtype=dtype)
    planned = memplan.optimize(model, x, budget="1 B", options=SMALLEST)
    laws.assert_same_bits(laws.step(model, x), laws.step(planned, x))


@pytest.mark.parametrize("is_training", [True, False])
def test_a_norm_by_batches_runs_again_by_the_statistics_that_it_had(is_training):
    """By the op itself, since a module in evaluation asks for another."""

    def loss(model, a, b):
        norm = torch.ops.aten._native_batch_norm_legit.default
        y = norm(a.sin(), *model.weights, model.mean, model.variance, is_training, 0.1, 1e-5)[0]
        return (y * b).square().sum()

    model = Model(loss)
    model.weights = nn.ParameterList([torch.rand(6), torch.randn(6)])
    for name, values in (("mean", torch.randn(6)), ("variance", torch.rand(6) + 1)):
        model.register_buffer(name, values)
    assert_eager_bits(model, rows())
