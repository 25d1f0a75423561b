"""A model of two layers, its input, and an optimizer, for what needs no more."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 1)

    def forward(self, x):
        return self.second(torch.relu(self.first(x))).square().mean()


X = torch.linspace(-1, 1, 64 * 16).view(64, 16)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
