"""``memplan frontier``: what each amount of memory costs in time."""

from __future__ import annotations

import json

import click
from rich.console import Console

from memplan import api
from memplan.cli.failures import failures
from memplan.cli.progress import progress
from memplan.cli.target import command_line, load_target, with_target
from memplan.report import frontier_table

SCHEMA_VERSION = 1


@click.command()
@with_target
@click.option(
    "--points", type=click.IntRange(min=2), default=12, show_default=True, help="Budgets to try."
)
@click.option("--json", "is_json", is_flag=True, help="Print the points as JSON, and no more.")
def frontier(target: str, settings: tuple[str, ...], points: int, is_json: bool) -> None:
    r"""Plans from the smallest budget that is feasible to the unplanned peak.

    TARGET is file.py:factory or package.module:factory; the factory returns (model, batch), or
    (model, batch, optimizer) for the whole step. The model is not run.

    \b
    Exit codes: 0 there are plans; 1 the factory or the capture failed; 2 wrong usage.
    """
    model, batch, optimizer = load_target(target, settings)
    with failures(), progress():
        plans = api.frontier(model, batch, points=points, optimizer=optimizer)
    if is_json:
        rows = [
            {
                "peak_bytes": one.peak_bytes,
                "slowdown": one.slowdown,
                "num_restores": one.num_restores,
            }
            for one in plans
        ]
        total = {
            "schema_version": SCHEMA_VERSION,
            "resident_bytes": plans[0].resident_bytes,
            "original_peak_bytes": plans[0].original_peak_bytes,
            "plans": rows,
        }
        click.echo(json.dumps(total))
        return
    Console().print(frontier_table(plans))
    bounds = ["--budget", str(plans[len(plans) // 2].peak_bytes)]
    again = command_line("compare", target, settings, bounds=bounds)
    click.echo(f"To measure one of them: {again}")
