"""``memplan frontier``: the cost in time of each amount of memory."""

from __future__ import annotations

from pathlib import Path

import click

from memplan import api
from memplan.cli.failures import failures
from memplan.cli.output import Format, show_and_write, with_drawn_output, with_format
from memplan.cli.progress import progress
from memplan.cli.target import Target, with_target
from memplan.report import frontier_document


@click.command()
@with_target
@click.option(
    "--points", type=click.IntRange(min=2), default=12, show_default=True, help="Budgets to try."
)
@with_drawn_output(
    ".svg", ".png", ".json", text="Write the figure (.svg, .png) or the JSON here too."
)
@with_format
def frontier(target: Target, *, points: int, output: Path | None, shape: Format) -> None:
    """Plans from the smallest budget that is feasible to the unplanned peak.

    TARGET is file.py:factory or package.module:factory; the factory returns (model, batch), or
    (model, batch, optimizer) for the whole step. The model is not run.

    \b
    Exit codes: 0 there are plans; 1 the factory or the capture failed; 2 wrong usage.
    """
    model, batch, optimizer = target.load()
    with failures(), progress():
        plans = api.frontier(model, batch, points=points, optimizer=optimizer)
    document = frontier_document(plans)
    bounds = ["--budget", str(plans[len(plans) // 2].peak_bytes)]
    again = target.command_line("compare", bounds=bounds)
    following = f"To measure one of them: {again}"
    with failures():
        show_and_write(shape, document, following, output)
