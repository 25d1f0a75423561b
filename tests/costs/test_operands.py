"""Kernels of which the memory depends on what their operands hold: the bound holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memplan

from support import laws
from support.modules import SMALLEST


class Wide(nn.Module):
    """Two linear layers, and a loss of their outputs."""

    def __init__(self, loss):
        super().__init__()
        self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64)
        self.loss = loss

    def forward(self, x, *others):
        return self.loss(self.one(x), self.other(x), *others)


class Bags(nn.Module):
    """Sums of embeddings, squared."""

    def __init__(self, mode, dtype):
        super().__init__()
        self.bags = nn.EmbeddingBag(500, 64, mode=mode).to(dtype)

    def forward(self, *given):
        return self.bags(*given).square().sum()


def complexes(a, b):
    return torch.complex(a, b).view(4, 64, 64), torch.complex(b, a).view(4, 64, 64)


def conjugated(a, b):
    one, other = complexes(a, b)
    return torch.bmm(one.conj(), other).abs().sum()


def summed(a, b):
    one, other = complexes(a, b)
    return torch.einsum("bij,bkj->bik", one, other.conj()).abs().sum()


MASK = (torch.arange(256)[:, None] % 2 == 0).expand(256, 64)
CASES = {
    "a list of places": lambda: (
        Wide(lambda a, b: a[[0, 1, 3] * 30].square().sum() + b.sum()),
        torch.randn(256, 64),
    ),
    "a tensor made in the forward": lambda: (
        Wide(lambda a, b: (a * torch.tensor([[0.5] * 64] * 256)).square().sum() + b.sum()),
        torch.randn(256, 64),
    ),
    "a positive definite matrix": lambda: (
        Wide(lambda a, b: torch.cholesky(a[:64] @ a[:64].T + b[0].exp().diag() * 100).sum()),
        torch.randn(256, 64),
    ),
    "segments": lambda: (
        Wide(
            lambda a, b: torch.segment_reduce(a * b, "max", lengths=torch.tensor([56, 200])).sum()
        ),
        torch.randn(256, 64),
    ),
    "conjugated": lambda: (Wide(conjugated), torch.randn(256, 64)),
    "einsum of conjugated": lambda: (Wide(summed), torch.randn(256, 64)),
    **{
        f"bags, {mode}, {dtype}": lambda mode=mode, dtype=dtype: (
            Bags(mode, dtype),
            (torch.randint(500, (400,)), torch.arange(0, 400, 5)),
        )
        for mode in ("sum", "mean", "max")
        for dtype in (torch.float32, torch.bfloat16)
    },
}


@pytest.mark.by_default(
    "a list of places",
    "conjugated",
    "segments",
    "bags, sum, torch.bfloat16",
    "bags, max, torch.float32",
)
@pytest.mark.parametrize("name", CASES)
def test_the_bound_holds(name):
    model, sample = CASES[name]()
    for budget in ("100%", "1 B"):
        planned = memplan.optimize(model, sample, budget=budget, options=SMALLEST)
        laws.assert_within_budget(planned, sample)
        laws.assert_same_bits(laws.step(planned, sample), laws.step(model, sample))


def test_a_mask_of_which_little_is_known_is_taken_for_the_worst():
    model = Wide(lambda a, b, mask: a.masked_scatter(mask, b).sum())
    for mask in (MASK, ~MASK, MASK | True, MASK & False):
        sample = (torch.randn(256, 64), mask)
        planned = memplan.optimize(model, sample, budget="100%")
        measured = memplan.profile(planned, sample, steps=1)
        assert measured.peak_bytes <= planned.plan.peak_bytes
        laws.assert_same_bits(laws.step(planned, sample), laws.step(model, sample))
