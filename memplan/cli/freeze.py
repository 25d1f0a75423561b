"""``memplan freeze``: the savings from training less."""

from __future__ import annotations

import click

from memplan.advise.freezing import compare_choices
from memplan.cli.failures import failures
from memplan.cli.output import Format, show, with_format
from memplan.cli.passes import passes_named, with_passes
from memplan.cli.progress import progress
from memplan.cli.target import Target, with_target
from memplan.costs import DEVICES
from memplan.options import Options
from memplan.report import choices_document, tables_of


@click.command()
@with_target
@with_passes
@click.option(
    "--device", type=click.Choice(list(DEVICES)), help="Plan for a device that need not be there."
)
@with_format
def freeze(
    target: Target, *, pass_names: tuple[str, ...], device: str | None, shape: Format
) -> None:
    """What freezing each part of a model frees, and what biases alone or adapters do.

    TARGET is file.py:factory, package.module:factory or hf:config.json; the factory returns
    (model, batch), or (model, batch, optimizer) for the whole step. The model is not run. With
    --pass, those choices are shown instead.

    \b
    Exit codes: 0 done; 1 the factory or the capture failed; 2 wrong usage.
    """
    model, batch, optimizer = target.load(without_data=device is not None)
    named = passes_named(pass_names)
    with failures(), progress():
        choices = compare_choices(
            model,
            batch,
            optimizer=optimizer,
            options=Options(device=device),
            passes=named or None,
        )
    best = min(choices, key=lambda one: one.peak_bytes)
    bounds = ["--pass", best.option] if best.option else []
    following = f"To plan with one of them: {target.command_line('plan', bounds=bounds)}"
    document = choices_document(choices)
    show(shape, tables_of(document), document, following)
