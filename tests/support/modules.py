"""A small module whose forward is given, and what to ask of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import memplan

from support import laws

SMALLEST = memplan.Options(on_infeasible="smallest")


class Model(nn.Module):
    """Two linear layers and a buffer, and a loss that a function makes of their outputs."""

    def __init__(self, loss: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(5, 6), nn.Linear(5, 6)
        self.register_buffer("scale", torch.linspace(-1, 2, 6))
        self.loss = loss
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: torch.Tensor, *others: Any) -> Any:
        return self.loss(self, self.one(x), self.other(x), *others)


def rows() -> torch.Tensor:
    """A batch for ``Model``."""
    return torch.randn(7, 5)


def assert_eager_bits(
    model: nn.Module, sample: Any, *, effect: memplan.Effect = memplan.Effect.EXACT
) -> None:
    """With all memory and with the least: eager's bits, and a bound that holds."""
    for budget in ("100%", "1 B"):
        planned = memplan.optimize(model, sample, budget=budget, options=SMALLEST)
        assert planned.plan.effects == (effect,)
        for seed in (1, 2):
            theirs, mine = laws.step(model, sample, seed), laws.step(planned, sample, seed)
            if effect is memplan.Effect.EXACT:
                laws.assert_same_bits(mine, theirs)
            else:
                laws.assert_close(theirs, mine)
        laws.assert_within_budget(planned, sample)


def assert_follows(model: nn.Module, *samples: Any, change: Callable[[nn.Module], None]) -> None:
    """Planned for the first sample, then run on all, changed before each but the first."""
    planned = memplan.optimize(model, samples[0])
    for number, sample in enumerate(samples):
        if number:
            change(model)
        laws.assert_same_bits(laws.step(planned, sample), laws.step(model, sample))
