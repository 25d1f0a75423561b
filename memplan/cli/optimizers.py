"""``--optimizer``: one of torch's, by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import click
import torch
from torch import nn
from torch.optim import Optimizer

from memplan.update import resolve_optimizer

Command = TypeVar("Command", bound=Callable[..., None])

_CLASSES: dict[str, type[Optimizer]] = {
    name.lower(): value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
}
_CLASSES = {name: value for name, value in _CLASSES.items() if name not in ("lbfgs", "sparseadam")}


def with_optimizer(command: Command) -> Command:
    """Give a command ``--optimizer``."""
    return click.option(
        "--optimizer",
        "optimizer_name",
        type=click.Choice(sorted(_CLASSES), case_sensitive=False),
        metavar="NAME",
        help="Count the step of this optimizer too: adamw, sgd, ... (torch's, with its defaults).",
    )(command)


def make_optimizer(model: nn.Module, name: str | None, given: object) -> Optimizer | None:
    """The named one over the model's parameters, or else what the factory gave."""
    if name is None:
        return resolve_optimizer(model, given)
    made: Any = _CLASSES[name]
    takes = inspect.signature(made).parameters
    needs_rate = takes["lr"].default is inspect.Parameter.empty
    optimizer = made(model.parameters(), **({"lr": 1e-3} if needs_rate else {}))
    assert isinstance(optimizer, Optimizer)
    return optimizer
