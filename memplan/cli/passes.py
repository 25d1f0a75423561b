"""``--pass``: techniques by name, ``NAME`` or ``NAME:ARGUMENT=VALUE,...``."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable
from typing import TypeVar

import click

from memplan.errors import MemplanError
from memplan.passes import PASSES
from memplan.transforms.passes import Pass

Command = TypeVar("Command", bound=Callable[..., None])


def with_passes(command: Command) -> Command:
    """Add ``--pass`` to a command."""
    return click.option(
        "--pass",
        "pass_names",
        multiple=True,
        metavar="NAME[:ARGUMENT=VALUE,...]",
        help="Add a technique to the exact defaults, as often as there are some.",
    )(command)


def passes_named(texts: Iterable[str]) -> dict[str, Pass]:
    """Passes from their texts, by their names.

    Raises:
        click.UsageError: if there is no such pass, or it does not take these arguments.
    """
    return {text: _pass(text) for text in texts}


def _pass(text: str) -> Pass:
    name, _, rest = text.partition(":")
    if name not in PASSES:
        raise click.UsageError(
            f"--pass {name!r} is not known; there is {', '.join(sorted(PASSES))}"
        )
    arguments: dict[str, object] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise click.UsageError(f"--pass {text!r}: {part!r} must be ARGUMENT=VALUE")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = value
    try:
        return PASSES[name](**arguments)
    except (TypeError, ValueError, MemplanError) as error:
        takes = ", ".join(inspect.signature(PASSES[name]).parameters) or "no arguments"
        raise click.UsageError(f"--pass {text!r}: {error}; it takes {takes}") from error
