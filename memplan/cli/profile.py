"""``memplan profile``: where the bytes of a step are."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import click
from torch import nn
from torch.optim import Optimizer

from memplan.cli.failures import failures
from memplan.cli.optimizers import make_optimizer, with_optimizer
from memplan.cli.output import Format, export, show, with_exports, with_format, with_output
from memplan.cli.progress import progress
from memplan.cli.target import command_line, load_target, with_target
from memplan.profiler import time_phases, trace_memory
from memplan.report import profile_document, profile_sheets


@click.command()
@with_target
@with_optimizer
@with_format
@with_output
@with_exports
@click.option(
    "--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Steps to time."
)
def profile(
    target: str,
    settings: tuple[str, ...],
    *,
    optimizer_name: str | None,
    shape: Format,
    output: Path | None,
    snapshot: Path | None,
    chrome_trace: Path | None,
    steps: int,
) -> None:
    """Measure a training step: its peak, and every byte that is there then.

    TARGET is file.py:factory or package.module:factory; the factory returns (model, batch), or
    (model, batch, optimizer) for the whole step. The step starts without gradients. Parameters
    and all other states are as before afterwards.

    \b
    Exit codes: 0 measured; 1 the factory or the step failed; 2 wrong usage.
    """
    model, batch, given = load_target(target, settings)
    with failures(), progress():
        optimizer = make_optimizer(model, optimizer_name, given)
        trace = trace_memory(model, batch, optimizer=optimizer)
        seconds = _seconds(model, batch, optimizer, steps)
    export(trace, snapshot, chrome_trace)
    again = command_line("plan", target, settings, bounds=["--budget", "50%"])
    show(
        shape,
        profile_sheets(trace, seconds),
        profile_document(trace, seconds),
        f"To see what would make it smaller: {again}",
        output,
    )


def _seconds(
    model: nn.Module, batch: object, optimizer: Optimizer | None, steps: int
) -> dict[str, float]:
    """Time of each phase, the median of several steps."""
    times = time_phases(model, batch, optimizer=optimizer, steps=steps)
    return {name: median(each[name] for each in times) for name in times[0]}
