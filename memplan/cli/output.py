"""Output of a command's result: a table, JSON or Markdown on stdout, and files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import click
from rich.console import Console

from memplan.cli.failures import write_whole
from memplan.ir.memory_trace import MemoryTrace
from memplan.report import chrome_trace, snapshot_bytes, tables_of, terminal
from memplan.report.figures import save_figure
from memplan.report.html import html_report
from memplan.report.schema import (
    ComparisonDocument,
    Document,
    EstimateDocument,
    FrontierDocument,
    ProfileDocument,
    Readable,
    encode,
)
from memplan.tables import Table, markdown

Format = Literal["table", "json", "markdown"]

Command = TypeVar("Command", bound=Callable[..., None])


def with_format(command: Command) -> Command:
    """Add ``--format`` to a command, and ``--json`` for short."""
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


def with_drawn_output(*suffixes: str, text: str) -> Callable[[Command], Command]:
    """Add ``-o`` to a command, for a file of one of several kinds.

    Args:
        suffixes: suffixes of the kinds.
        text: the help text.
    """

    def checked(_ctx: click.Context, _param: click.Parameter, path: Path | None) -> Path | None:
        if path is not None and path.suffix not in suffixes:
            expected = ", ".join(suffixes)
            raise click.BadParameter(f"{path}: expected a name that ends in {expected}")
        return path

    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path, dir_okay=False),
        callback=checked,
        help=text,
    )


with_output = with_drawn_output(
    ".json",
    ".html",
    ".svg",
    ".png",
    text="Write it here too: JSON for 'memplan report' and 'memplan diff', a page or a figure.",
)
"""Add ``-o`` to a command."""


def with_exports(command: Command) -> Command:
    """Add ``--snapshot`` and ``--chrome-trace`` to a command."""
    path = click.Path(path_type=Path, dir_okay=False)
    snapshot = click.option(
        "--snapshot",
        type=path,
        help="Write the step's blocks here, as a pickle for pytorch.org/memory_viz.",
    )
    chrome = click.option(
        "--chrome-trace", type=path, help="Write a timeline here, for Perfetto or chrome://tracing."
    )
    return snapshot(chrome(command))


def export(trace: MemoryTrace, snapshot: Path | None, chrome: Path | None) -> None:
    """Write the files that the options of ``with_exports`` name."""
    if snapshot is not None:
        write_whole(snapshot, snapshot_bytes(trace))
    if chrome is not None:
        write_whole(chrome, json.dumps(chrome_trace(trace)) + "\n")


def write_document(document: Readable, path: Path) -> None:
    """Write a document in the format of the suffix, whole or not at all.

    Raises:
        UnreadableDocument: if there is nothing to draw.
        click.UsageError: if the file cannot be written.
    """
    if path.suffix == ".json":
        write_whole(path, encode(document) + "\n")
    elif path.suffix == ".html":
        write_whole(path, html_report(document))
    else:
        try:
            save_figure(document, path)
        except OSError as error:
            raise click.UsageError(f"cannot write {path}: {error.strerror}") from error


def show(
    shape: Format,
    tables: Sequence[Table],
    document: Document | None,
    following: str,
) -> None:
    """Print a result, and the next step if people read it.

    Args:
        shape: the format.
        tables: the result for people.
        document: the same for programs; not needed for the other formats.
        following: the next step.
    """
    if shape == "json":
        assert document is not None
        click.echo(encode(document))
    elif shape == "markdown":
        click.echo(markdown(tables))
    else:
        # rich keeps bold without colour; users who want no colour want plain text
        colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
        console = Console(highlight=False, color_system=colours)
        for table in tables:
            console.print(terminal(table))
    if shape == "table":
        click.echo(following)


def show_and_write(
    shape: Format,
    document: ProfileDocument | EstimateDocument | FrontierDocument | ComparisonDocument,
    following: str,
    output: Path | None,
) -> None:
    """Print a result, and write it to the output file, if any."""
    if output is not None:
        write_document(document, output)
        if output.suffix == ".json":
            following = f"To look at it: memplan report {output}"
    show(shape, tables_of(document), document, following)
