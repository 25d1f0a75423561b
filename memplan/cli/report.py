"""``memplan report``: a document as a page or a figure."""

from __future__ import annotations

from pathlib import Path

import click

from memplan.cli.failures import failures
from memplan.cli.output import with_drawn_output, write_document
from memplan.report.figures import FIGURE_SUFFIXES
from memplan.report.schema import Readable, UnreadableDocument, read_document


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
    """
    path = file.with_suffix(".html") if output is None else output
    if path.resolve() == file.resolve():
        raise click.UsageError(f"{file} would be overwritten; name another file with -o")
    document = read_file(file)
    with failures():
        try:
            write_document(document, path)
        except UnreadableDocument as error:
            raise click.UsageError(f"cannot read {file}: {error}") from error
    click.echo(path)


def read_file(path: Path) -> Readable:
    """A document that a command wrote.

    Raises:
        click.UsageError: if the file cannot be read, or is something else.
    """
    try:
        return read_document(path.read_text(encoding="utf-8"))
    except (UnreadableDocument, UnicodeDecodeError) as error:
        raise click.UsageError(f"cannot read {path}: {error}") from error
    except OSError as error:
        raise click.UsageError(f"cannot read {path}: {error.strerror}") from error
