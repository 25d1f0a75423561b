"""``memplan solve``: the largest batch or sequence that fits, by planning."""

from __future__ import annotations

from typing import Literal

import click
import torch

from memplan import api, profiler
from memplan.advise.largest_batch import MOST, largest_fitting
from memplan.cli.failures import NOT_FITTING, failures
from memplan.cli.output import Format, show, with_format
from memplan.cli.progress import progress
from memplan.cli.target import Target, with_target
from memplan.costs import DEVICES
from memplan.options import Options
from memplan.planner.plan import Plan
from memplan.report import solution_document, tables_of
from memplan.units import parse_bytes


@click.command()
@click.argument("field", metavar="FIELD")
@with_target
@click.option("--budget", required=True, metavar="BYTES", help='Bound on the peak, as in "24GiB".')
@click.option(
    "--max-slowdown",
    type=click.FloatRange(min=1),
    default=1.5,
    show_default=True,
    help="Bound on the planned step's predicted time.",
)
@click.option(
    "--multiple-of",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Look at multiples of this alone.",
)
@click.option("--device", type=click.Choice(list(DEVICES)), help="A device that need not be there.")
@with_format
def solve(
    target: Target,
    *,
    field: str,
    budget: str,
    max_slowdown: float,
    multiple_of: int,
    device: str | None,
    shape: Format,
) -> None:
    """The largest value of FIELD whose step fits: untouched, and planned.

    FIELD is an argument of the factory that is a whole number, such as batch_size or seq_len.
    TARGET is file.py:factory, package.module:factory or hf:config.json. The model is not run:
    each value that is tried is estimated and planned. Without --device its kernels are run one by
    one, on operands of its size.

    \b
    Exit codes: 0 there is such a value; 1 the factory or the capture failed; 2 wrong usage;
    3 not even 1 fits.
    """
    options = Options(device=device, on_infeasible="smallest")
    plans: dict[int, Plan] = {}
    with failures():
        memory_bytes = parse_bytes(budget)

    def made(value: int) -> tuple[torch.nn.Module, object, torch.optim.Optimizer | None]:
        return target.with_setting(f"{field}={value}").load(without_data=device is not None)

    def untouched(value: int) -> int:
        model, batch, optimizer = made(value)
        costs: Literal["measured", "analytic"] = "measured" if device is None else "analytic"
        found = profiler.estimate(model, batch, optimizer=optimizer, device=device, costs=costs)
        return found.most_bytes

    def planned(value: int) -> int:
        model, batch, optimizer = made(value)
        plans[value] = api.plan(
            model,
            batch,
            budget=memory_bytes,
            max_slowdown=max_slowdown,
            optimizer=optimizer,
            options=options,
        )
        return plans[value].peak_bytes

    with failures(), progress():
        before, of_untouched = largest_fitting(untouched, memory_bytes, multiple_of)
        if before == (MOST - 1) * multiple_of:
            raise click.UsageError(f"the step's memory does not depend on {field!r}")
        after, of_planned = largest_fitting(planned, memory_bytes, multiple_of)
    again = target.with_setting(f"{field}={after}").command_line(
        "plan", bounds=["--budget", budget]
    )
    rows = {"untouched": (before, of_untouched), "planned": (after, of_planned)}
    plan = plans[after or multiple_of]
    document = solution_document(field, memory_bytes, max_slowdown, rows, plan)
    following = f"To plan it: {again}" if after else "Not even 1 fits."
    show(shape, tables_of(document), document, following)
    if not after:
        raise SystemExit(NOT_FITTING)
