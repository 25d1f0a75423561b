"""``memplan plan``: what a budget would cost, without running the model."""

from __future__ import annotations

from pathlib import Path

import click

from memplan import api
from memplan.cli.failures import failures, write_whole
from memplan.cli.output import Format, show, with_format
from memplan.cli.progress import progress
from memplan.cli.target import command_line, load_target, with_bounds, with_target
from memplan.costs import DEVICES
from memplan.options import Options
from memplan.report import plan_document, plan_sheets


@click.command()
@with_target
@with_bounds
@click.option(
    "--device", type=click.Choice(list(DEVICES)), help="Plan for a device that need not be there."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the plan here."
)
@with_format
def plan(
    target: str,
    settings: tuple[str, ...],
    *,
    budget: str | None,
    max_slowdown: float | None,
    device: str | None,
    output: Path | None,
    shape: Format,
) -> None:
    r"""Plan a training step: its peak, its time, and what is alive at the peak.

    TARGET is file.py:factory or package.module:factory; the factory returns (model, batch), or
    (model, batch, optimizer) for the whole step. The model is not run.

    \b
    Exit codes: 0 there is a plan; 1 the factory or the capture failed; 2 wrong usage;
    3 no plan fits the budget.
    """
    model, batch, optimizer = load_target(target, settings)
    with failures(), progress():
        found = api.plan(
            model,
            batch,
            budget=budget,
            max_slowdown=max_slowdown,
            optimizer=optimizer,
            options=Options(device=device),
        )
    if output is not None:
        write_whole(output, found.to_json() + "\n")
    bounds = [] if budget is None else ["--budget", budget]
    bounds += [] if max_slowdown is None else ["--max-slowdown", str(max_slowdown)]
    if device is not None:
        following = f"All trade-offs: {command_line('frontier', target, settings)}"
    elif output is not None:
        following = f"To measure it: {command_line('verify', target, settings, str(output))}"
    else:
        following = f"To measure it: {command_line('compare', target, settings, bounds=bounds)}"
    show(shape, plan_sheets(found), plan_document(found), following)
    for note in (found.advice, *found.notes):
        if note:
            click.echo(f"note: {note}", err=True)
