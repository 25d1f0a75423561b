"""``memplan verify``: a check that a saved plan still keeps its promises."""

from __future__ import annotations

from pathlib import Path

import click

from memplan import api, profiler
from memplan.cli.compare import show_proof, traces_of
from memplan.cli.failures import failures, mismatches
from memplan.cli.output import Format, with_format, with_output
from memplan.cli.progress import progress
from memplan.cli.target import Target, with_target
from memplan.errors import PlanMismatch
from memplan.planner.plan import Plan


@click.command()
@click.argument("path", metavar="PLAN", type=click.Path(path_type=Path, exists=True))
@with_target
@with_format
@with_output
@click.option(
    "--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds to time."
)
def verify(
    target: Target,
    *,
    path: Path,
    steps: int,
    shape: Format,
    output: Path | None,
) -> None:
    """Apply a saved plan, and measure it beside the untouched step.

    PLAN is a file that "memplan plan -o" wrote. TARGET is what it was made for:
    file.py:factory or package.module:factory.

    \b
    Exit codes: 0 the plan holds what it promises; 1 the factory or the capture failed;
    2 wrong usage, or a file that is no plan; 4 a promise is broken, or the plan is for
    another step.
    """
    saved = _read(path)
    model, batch, optimizer = target.load()
    with failures(), mismatches(), progress():
        planned = api.optimize(model, batch, plan=saved, optimizer=optimizer)
        comparison = profiler.compare(model, planned, batch, steps=steps)
        is_written = shape == "json" or output is not None
        traces = traces_of(model, planned, batch) if is_written else {}
    following = "The plan holds."
    show_proof(comparison, planned.plan, traces, shape=shape, following=following, output=output)


def _read(path: Path) -> Plan:
    try:
        return Plan.from_json(path.read_text())
    except (OSError, UnicodeDecodeError, PlanMismatch) as error:
        raise click.UsageError(f"{path}: {error}") from error
