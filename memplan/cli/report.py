"""``memplan report``: a document as a page or a figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import click

from memplan.cli.failures import failures, write_whole
from memplan.report.figures import FIGURE_SUFFIXES, save_figure
from memplan.report.html import html_report
from memplan.report.reading import UnreadableDocument, read_document

Command = TypeVar("Command", bound=Callable[..., None])


def with_drawn_output(*suffixes: str, text: str) -> Callable[[Command], Command]:
    """Give a command ``-o``, for a file of one of several kinds.

    Args:
        suffixes: that tell the kinds.
        text: what the help says.
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


def write_document(document: Mapping[str, object], path: Path) -> None:
    """Write a document as what the suffix says, whole or not at all.

    Raises:
        UnreadableDocument: if there is nothing in it to draw.
        click.UsageError: if the file cannot be written.
    """
    if path.suffix == ".json":
        write_whole(path, json.dumps(document) + "\n")
    elif path.suffix == ".html":
        write_whole(path, html_report(document))
    else:
        try:
            save_figure(document, path)
        except OSError as error:
            raise click.UsageError(f"cannot write {path}: {error.strerror}") from error


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@with_drawn_output(
    ".html",
    *FIGURE_SUFFIXES,
    text="A page (.html) or a figure (.svg, .png).  [default: FILE with .html]",
)
def report(file: Path, output: Path | None) -> None:
    """Make a page or a figure of a result.

    FILE is what 'memplan profile -o' and 'memplan compare -o' write, or what any command prints
    with --json. A page is one file that needs no network.

    \b
    Exit codes: 0 written; 1 a PNG without matplotlib; 2 wrong usage, or not such a file.
    """  # noqa: D301
    path = file.with_suffix(".html") if output is None else output
    if path.resolve() == file.resolve():
        raise click.UsageError(f"{file} would be overwritten; name another file with -o")
    with failures():
        try:
            write_document(read_document(file.read_text(encoding="utf-8")), path)
        except (UnreadableDocument, UnicodeDecodeError) as error:
            raise click.UsageError(f"cannot read {file}: {error}") from error
        except OSError as error:
            raise click.UsageError(f"cannot read {file}: {error.strerror}") from error
    click.echo(path)
