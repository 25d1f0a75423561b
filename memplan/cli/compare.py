"""``memplan compare``: the proof, on the user's own model."""

from __future__ import annotations

import click
from rich.console import Console

from memplan import api, profiler
from memplan.cli.failures import end_if_broken, failures
from memplan.cli.progress import progress
from memplan.cli.target import load_target, with_bounds, with_target
from memplan.module import PlannedModule
from memplan.plan import Plan
from memplan.profiler import Comparison
from memplan.report import comparison_table
from memplan.schedule import Effect


@click.command()
@with_target
@with_bounds
@click.option(
    "--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds to time."
)
def compare(
    target: str,
    settings: tuple[str, ...],
    budget: str | None,
    max_slowdown: float | None,
    steps: int,
) -> None:
    r"""Plan a training step and measure it beside the untouched one.

    TARGET is file.py:factory or package.module:factory; the factory returns (model, batch), or
    (model, batch, optimizer) for the whole step.

    \b
    Exit codes: 0 the plan holds what it promises; 1 the factory or the capture failed;
    2 wrong usage; 3 no plan fits the budget; 4 the plan breaks a promise.
    """
    model, batch, optimizer = load_target(target, settings)
    with failures(), progress():
        planned = api.optimize(
            model, batch, budget=budget, max_slowdown=max_slowdown, optimizer=optimizer
        )
        comparison = profiler.compare(model, planned, batch, steps=steps)
    show_proof(comparison, planned.plan)
    click.echo(f"{planned.plan.num_restores} ops run again. To train so: {_next(budget, planned)}")


def show_proof(comparison: Comparison, plan: Plan) -> None:
    """Print a comparison; end the command with 4 if the plan breaks a promise."""
    Console().print(comparison_table(comparison, plan))
    if not comparison.is_exact:
        for note in plan.notes:
            click.echo(f"note: {note}", err=True)
    end_if_broken(_broken_promises(comparison, plan))


def _broken_promises(comparison: Comparison, plan: Plan) -> list[str]:
    broken = []
    if all(effect is Effect.EXACT for effect in plan.effects) and not comparison.is_exact:
        broken.append("the plan is exact, but the results differ")
    if comparison.planned.peak_bytes > plan.peak_bytes:
        broken.append("the measured peak is above the predicted peak")
    if plan.budget_bytes is not None and comparison.planned.peak_bytes > plan.budget_bytes:
        broken.append("the measured peak is above the budget")
    return broken


def _next(budget: str | None, planned: PlannedModule) -> str:
    argument = "" if budget is None else f', budget="{budget}"'
    optimizer = "" if planned.optimizer is None else ", optimizer=optimizer"
    return f"model = memplan.optimize(model, batch{argument}{optimizer})"
