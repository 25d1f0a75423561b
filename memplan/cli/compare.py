"""``memplan compare``: the proof of a plan on the user's own model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click
from torch import nn

from memplan import api, profiler
from memplan.cli.failures import end_if_broken, failures
from memplan.cli.output import Format, show_and_write, with_format, with_output
from memplan.cli.progress import progress
from memplan.cli.target import Target, with_bounds, with_target
from memplan.ir.memory_trace import MemoryTrace
from memplan.ir.schedule import Effect
from memplan.planner.plan import Plan
from memplan.profiler import Comparison, trace_memory
from memplan.report import comparison_document
from memplan.report.documents import PLANNED
from memplan.runtime.module import PlannedModule


@click.command()
@with_target
@with_bounds
@with_format
@with_output
@click.option(
    "--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Rounds to time."
)
def compare(
    target: Target,
    *,
    budget: str | None,
    max_slowdown: float | None,
    steps: int,
    shape: Format,
    output: Path | None,
) -> None:
    """Plan a training step and measure it beside the untouched one.

    TARGET is file.py:factory or package.module:factory; the factory returns (model, batch), or
    (model, batch, optimizer) for the whole step.

    \b
    Exit codes: 0 the plan holds what it promises; 1 the factory or the capture failed;
    2 wrong usage; 3 no plan fits the budget; 4 the plan breaks a promise.
    """
    model, batch, optimizer = target.load()
    with failures(), progress():
        planned = api.optimize(
            model, batch, budget=budget, max_slowdown=max_slowdown, optimizer=optimizer
        )
        comparison = profiler.compare(model, planned, batch, steps=steps)
        is_written = shape == "json" or output is not None
        traces = traces_of(model, planned, batch) if is_written else {}
    again = f"{planned.plan.num_restores} ops run again. To train so: {_next(budget, planned)}"
    show_proof(comparison, planned.plan, traces, shape=shape, following=again, output=output)


def traces_of(model: nn.Module, planned: PlannedModule, batch: object) -> dict[str, MemoryTrace]:
    """Traces of the two measured steps, and the prediction of the second."""
    optimizer = planned.optimizer
    return {
        "original, measured": trace_memory(model, batch, optimizer=optimizer),
        PLANNED: trace_memory(planned, batch, optimizer=optimizer),
        "planned, predicted": planned.trace,
    }


def show_proof(
    comparison: Comparison,
    plan: Plan,
    traces: Mapping[str, MemoryTrace],
    *,
    shape: Format,
    following: str,
    output: Path | None,
) -> None:
    """Print a comparison; exit with 4 if the plan breaks a promise."""
    document = comparison_document(comparison, plan, traces)
    show_and_write(shape, document, following, output)
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
