"""``--optimizer``: one of torch's optimizers by name."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memplan.optimizer import resolve_optimizer

_NEED_MORE = ("lbfgs", "sparseadam")
"""Optimizers that need a closure, or sparse gradients."""

OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type)
    and issubclass(value, Optimizer)
    and value is not Optimizer
    and name.lower() not in _NEED_MORE
}


def make_optimizer(model: nn.Module, name: str | None, given: object) -> Optimizer | None:
    """The named optimizer over the model's parameters, or else the factory's."""
    if name is None:
        return resolve_optimizer(model, given)
    made: Any = OPTIMIZERS[name]
    takes = inspect.signature(made).parameters
    needs_rate = takes["lr"].default is inspect.Parameter.empty
    optimizer = made(model.parameters(), **({"lr": 1e-3} if needs_rate else {}))
    assert isinstance(optimizer, Optimizer)
    return optimizer
