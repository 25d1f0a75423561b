"""TARGET: the model and batch of a command."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import click
from torch import nn
from torch.optim import Optimizer

from memplan.cli.dtypes import DTYPES, default_dtype, under_autocast
from memplan.cli.factory import make
from memplan.cli.failures import failures
from memplan.cli.optimizers import OPTIMIZERS, make_optimizer

Command = TypeVar("Command", bound=Callable[..., None])


@dataclass(frozen=True)
class Target:
    """The target of a command.

    Attributes:
        text: ``path/to/file.py:factory``, ``package.module:factory`` or ``hf:config.json``.
        settings: keyword arguments of the factory, each ``name=value``.
        dtype: the type that the model computes in; None leaves it to the factory.
        optimizer: name of one of torch's optimizers, in place of the factory's.
    """

    text: str
    settings: tuple[str, ...] = ()
    dtype: str | None = None
    optimizer: str | None = None

    def load(self, *, without_data: bool = False) -> tuple[nn.Module, object, Optimizer | None]:
        """Model, batch and optimizer.

        Args:
            without_data: create tensors that have a shape and no data, if the factory can.

        Raises:
            click.ClickException: if there is no such factory, or it fails.
        """
        with default_dtype(self.dtype):
            model, batch, given = make(self.text, self.settings, without_data=without_data)
        with failures():
            model = under_autocast(model, self.dtype)
            return model, batch, make_optimizer(model, self.optimizer, given)

    def with_setting(self, setting: str) -> Target:
        """The same target with one more argument of the factory."""
        return Target(self.text, (*self.settings, setting), self.dtype, self.optimizer)

    def command_line(self, command: str, *more: str, bounds: Iterable[str] = ()) -> str:
        """The command line for a command on the same target."""
        given = [part for setting in self.settings for part in ("--set", setting)]
        given += [] if self.dtype is None else ["--dtype", self.dtype]
        given += [] if self.optimizer is None else ["--optimizer", self.optimizer]
        return shlex.join(["memplan", command, *more, self.text, *given, *bounds])


def with_target(command: Command) -> Command:
    """Add TARGET to a command, as its first argument, and the options that go with it."""

    @functools.wraps(command)
    def run(
        *,
        target: str,
        settings: tuple[str, ...],
        batch_size: int | None,
        seq_len: int | None,
        dtype: str | None,
        optimizer_name: str | None,
        **others: Any,
    ) -> None:
        sizes = {"batch_size": batch_size, "seq_len": seq_len}
        given = [f"{name}={size}" for name, size in sizes.items() if size is not None]
        command(Target(target, (*settings, *given), dtype, optimizer_name), **others)

    decorated: Any = run
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    result: Command = click.argument("target")(decorated)
    return result


_OPTIONS = (
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        help="An argument of the factory, as often as there are some.",
    ),
    click.option("--batch-size", type=click.IntRange(min=1), help="Short for --set batch_size=..."),
    click.option("--seq-len", type=click.IntRange(min=1), help="Short for --set seq_len=..."),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Make the model in this type, or train it under autocast (-mixed).",
    ),
    click.option(
        "--optimizer",
        "optimizer_name",
        type=click.Choice(sorted(OPTIMIZERS), case_sensitive=False),
        metavar="NAME",
        help="Count the step of this optimizer too: adamw, sgd, ... (torch's, with its defaults).",
    ),
)


def with_bounds(command: Command) -> Command:
    """Add ``--budget`` and ``--max-slowdown`` to a command."""
    budget = click.option(
        "--budget", metavar="BYTES", help='Bound on the peak: "6GiB", 6000000000, "50%".'
    )
    max_slowdown = click.option(
        "--max-slowdown",
        type=click.FloatRange(min=1),
        metavar="X",
        help="Bound on predicted time: 1.2 is 20% more.",
    )
    return budget(max_slowdown(command))
