"""How a command shows its result: a table, JSON or Markdown, on stdout alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import click
from rich.console import Console

from memplan.cli.failures import write_whole
from memplan.report import Sheet, markdown, terminal

Format = Literal["table", "json", "markdown"]

Command = TypeVar("Command", bound=Callable[..., None])


def with_format(command: Command) -> Command:
    """Give a command ``--format``, and ``--json`` for short."""
    option = click.option(
        "--format",
        "shape",
        type=click.Choice(["table", "json", "markdown"]),
        default="table",
        show_default=True,
        help="How to print the result.",
    )
    short = click.option(
        "--json", "shape", flag_value="json", help="Short for --format json: that, and no more."
    )
    return option(short(command))


def with_output(command: Command) -> Command:
    """Give a command ``-o``, for what ``memplan report`` and ``memplan diff`` read."""
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Write the JSON here too, for 'memplan report' and 'memplan diff'.",
    )(command)


def show(
    shape: Format,
    sheets: Sequence[Sheet],
    document: Mapping[str, object],
    following: str,
    output: Path | None = None,
) -> None:
    """Print a result, and what to do next where people read."""
    if output is not None:
        write_whole(output, json.dumps(document) + "\n")
        following = f"To look at it: memplan report {output} -o {output.with_suffix('.html')}"
    if shape == "json":
        click.echo(json.dumps(document))
        return
    if shape == "markdown":
        click.echo(markdown(sheets))
        return
    console = Console(highlight=False)
    for sheet in sheets:
        console.print(terminal(sheet))
    click.echo(following)
