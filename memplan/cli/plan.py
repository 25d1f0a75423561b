"""``memplan plan``: the cost of a budget, without running the model."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from memplan.advise.techniques import Technique, compare_techniques
from memplan.capture.sample import Sample
from memplan.cli.failures import failures, write_whole
from memplan.cli.output import Format, export, show, with_exports, with_format
from memplan.cli.passes import passes_named, with_passes
from memplan.cli.progress import progress
from memplan.cli.target import Target, with_bounds, with_target
from memplan.compiler import autosize
from memplan.compiler.request import make_request
from memplan.costs import DEVICES
from memplan.errors import InfeasibleBudget, MemplanError
from memplan.optimizer import like
from memplan.options import Options
from memplan.passes import PASSES
from memplan.report import plan_document, technique_rows, techniques_table
from memplan.tables import Table
from memplan.transforms.passes import Pass


@click.command()
@with_target
@with_bounds
@with_passes
@click.option(
    "--device", type=click.Choice(list(DEVICES)), help="Plan for a device that need not be there."
)
@click.option(
    "--techniques",
    is_flag=True,
    help="Then plan with each technique alone, and rank them (with --budget).",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the plan here."
)
@with_exports
@with_format
def plan(
    target: Target,
    *,
    budget: str | None,
    max_slowdown: float | None,
    pass_names: tuple[str, ...],
    device: str | None,
    techniques: bool,
    output: Path | None,
    snapshot: Path | None,
    chrome_trace: Path | None,
    shape: Format,
) -> None:
    """Plan a training step: its peak, its time, and what is alive at the peak.

    TARGET is file.py:factory, package.module:factory or hf:config.json; the factory returns
    (model, batch), or (model, batch, optimizer) for the whole step. The model is not run.

    \b
    Exit codes: 0 there is a plan; 1 the factory or the capture failed; 2 wrong usage;
    3 no plan fits the budget.
    """
    if techniques and budget is None:
        raise click.UsageError("--techniques needs --budget: what is to be reached")
    named = passes_named(pass_names)
    model, batch, given = target.load(without_data=device is not None)
    # Passes may add parameters, which the factory's optimizer does not hold.
    optimizer = given if given is None or not named else like(given)
    options = Options(device=device)
    with failures():
        request = make_request(
            model,
            budget=budget,
            max_slowdown=max_slowdown,
            passes=named.values(),
            optimizer=optimizer,
            options=options,
        )
        ranked: list[Technique] = []
        try:
            with progress():
                if techniques and budget is not None:
                    ranked = compare_techniques(
                        model,
                        batch,
                        budget=budget,
                        passes={**_each(), **named},
                        optimizer=optimizer,
                        options=options,
                    )
                step, found = autosize.make_plan(model, Sample.of(batch), request)
        except InfeasibleBudget:
            # What comes nearest is all the more useful then.
            _show_ranked(ranked, shape)
            raise
    traces = {
        "unplanned, predicted": step.unplanned_trace(),
        "planned, predicted": step.trace(found.schedule),
    }
    if output is not None:
        write_whole(output, found.to_json() + "\n")
    export(traces["planned, predicted"], snapshot, chrome_trace)
    document = plan_document(found, traces, ranked)
    tables = [*found.tables(), *_ranked_table(ranked)]
    following = _following(target, budget, max_slowdown, device, output, has_passes=bool(named))
    show(shape, tables, document, following)
    for note in (found.advice, *found.notes):
        if note:
            click.echo(f"note: {note}", err=True)


def _each() -> dict[str, Pass]:
    """The techniques that need no arguments."""
    found = {}
    for name, make in PASSES.items():
        with contextlib.suppress(MemplanError):
            found[name] = make()
    return found


def _show_ranked(ranked: list[Technique], shape: Format) -> None:
    if ranked and shape != "json":
        show(shape, _ranked_table(ranked), None, "")


def _ranked_table(ranked: list[Technique]) -> list[Table]:
    return [techniques_table(technique_rows(ranked))] if ranked else []


def _following(
    target: Target,
    budget: str | None,
    max_slowdown: float | None,
    device: str | None,
    output: Path | None,
    *,
    has_passes: bool,
) -> str:
    """The next step to suggest."""
    bounds = [] if budget is None else ["--budget", budget]
    bounds += [] if max_slowdown is None else ["--max-slowdown", str(max_slowdown)]
    if device is not None:
        sizes = target.command_line("estimate", bounds=["--device", device])
        return f"To see where the untouched step's bytes are: {sizes}"
    if output is not None:
        return f"To measure it: {target.command_line('verify', str(output))}"
    if has_passes:
        again = target.command_line("verify", "plan.json")
        return f"To measure it: add -o plan.json to this command, then {again}"
    return f"To measure it: {target.command_line('compare', bounds=bounds)}"
