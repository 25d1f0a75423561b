"""Failures as one line and an exit code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click

from memplan import costs
from memplan.errors import (
    InfeasibleBudget,
    MemplanError,
    PlanMismatch,
    UnfaithfulCapture,
    UnitsError,
)

NOT_FITTING = 3
"""Too little memory for a step, or for every plan of it."""

MISMATCH = 4
"""A broken promise, or a plan for another step."""


PARTLY = 5
"""Something not measured or not explained, with ``--strict``."""


class InfeasibleError(click.ClickException):
    """No plan fits."""

    exit_code = NOT_FITTING


class MismatchError(click.ClickException):
    """A plan is for another step, or its results differ from the untouched module's."""

    exit_code = MISMATCH


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """End the command on an error that memplan raises inside.

    The exit code is 2 for wrong usage, 3 where no plan fits, 4 for a step that differs from the
    untouched one, and 1 for the rest.
    """
    try:
        yield
    except UnitsError as error:
        raise click.BadParameter(str(error), param_hint="--budget or --memory") from error
    except InfeasibleBudget as error:
        raise InfeasibleError(str(error)) from error
    except UnfaithfulCapture as error:
        raise MismatchError(str(error)) from error
    except MemplanError as error:
        raise click.ClickException(str(error)) from error


def described(error: BaseException) -> str:
    """An exception's type and message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@contextlib.contextmanager
def mismatches() -> Iterator[None]:
    """End the command with 4 if a plan inside is for another step."""
    try:
        yield
    except PlanMismatch as error:
        raise MismatchError(str(error)) from error


def end_if_broken(broken: list[str]) -> None:
    """Print the broken promises, and exit with 4 if there are any."""
    for promise in broken:
        click.echo(f"broken promise: {promise}", err=True)
    if broken:
        raise SystemExit(MISMATCH)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        click.UsageError: if it cannot be written.
    """
    try:
        costs.write_whole(path, content)
    except OSError as error:
        raise click.UsageError(f"cannot write {path}: {error.strerror}") from error
