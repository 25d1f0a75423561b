"""Numbers drawn in place: in eager's order, whatever the layout of what is drawn into."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from support.modules import Model, assert_eager_bits, rows


def turned():
    return torch.empty(7, 6).t()


DRAWS = {
    "bernoulli": lambda m, a, b: (a.t() * turned().bernoulli_(0.5)).sum(),
    "bernoulli of a tensor": lambda m, a, b: (
        a.t() * turned().bernoulli_(torch.full((6, 7), 0.3))
    ).sum(),
    "normal": lambda m, a, b: (a.t() * turned().normal_()).sum(),
    "into gaps": lambda m, a, b: (a * torch.empty(7, 12)[:, ::2].exponential_()).sum(),
    "of a part": lambda m, a, b: (a * torch.zeros(9, 6)[1:8].uniform_()).sum(),
    "integers": lambda m, a, b: (a.t() * turned().random_(1, 5)).sum(),
    "integers of a range": lambda m, a, b: (a * torch.empty(6).random_(0, 4)).sum(),
    "three dimensions": lambda m, a, b: (
        a.sum() * torch.ones(3, 6, 7).transpose(0, 2).bernoulli_(0.5)[..., 0]
    ).sum(),
    "alpha dropout": lambda m, a, b: (
        functional.alpha_dropout(a.t(), 0.3, training=True).square().sum()
    ),
    "dropout in place": lambda m, a, b: (
        functional.dropout(a.t() * 1, 0.4, inplace=True).square().sum()
    ),
    "rrelu": lambda m, a, b: functional.rrelu(a.t(), training=True).square().sum(),
}


@pytest.mark.by_default("bernoulli", "integers of a range", "into gaps", "rrelu")
@pytest.mark.parametrize("name", DRAWS)
def test_drawn_in_place(name):
    assert_eager_bits(Model(lambda m, a, b: DRAWS[name](m, a, b) + b.sum()), rows())


def test_dropout_in_place_on_channels_last():
    layers = (nn.Conv2d(3, 4, 3), nn.Dropout(0.4, inplace=True), nn.Flatten(), nn.Linear(144, 1))
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert_eager_bits(nn.Sequential(model, Sum()), images)


class Sum(nn.Module):
    def forward(self, x):
        return x.sum()
