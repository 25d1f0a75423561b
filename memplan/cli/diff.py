"""``memplan diff``: the differences between two results."""

from __future__ import annotations

from pathlib import Path

import click

from memplan.cli.failures import MISMATCH
from memplan.cli.output import Format, show, with_format
from memplan.cli.report import read_file
from memplan.errors import UnitsError
from memplan.report import difference_document, difference_table, increase
from memplan.units import parse_share

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@click.argument("before", type=_FILE)
@click.argument("after", type=_FILE)
@click.option(
    "--fail-on-increase",
    "limit",
    metavar="PERCENT",
    help='End with 4 if the peak grew by more than this: "2%".',
)
@with_format
def diff(before: Path, after: Path, *, limit: str | None, shape: Format) -> None:
    """Compare two results: the peak, what is there then, and the time.

    BEFORE and AFTER are what 'memplan profile -o' and other commands write, or print with --json.

    \b
    Exit codes: 0 no more than the limit, if there is one; 2 wrong usage, or not such a file;
    4 the peak grew by more.
    """
    documents = read_file(before), read_file(after)
    try:
        share = None if limit is None else parse_share(limit)
    except UnitsError as error:
        raise click.BadParameter(str(error), param_hint="--fail-on-increase") from error
    table, document = difference_table(*documents), difference_document(*documents)
    grown = increase(*documents)
    show(shape, [table], document, f"To look at it: memplan report {after}")
    if share is not None and grown > share:
        click.echo(f"the peak grew by {grown:.1%}, more than {share:.1%}", err=True)
        raise SystemExit(MISMATCH)
