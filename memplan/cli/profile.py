"""``memplan profile``: the bytes of a measured step, and their origin."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import click
from torch import nn
from torch.optim import Optimizer

from memplan.cli.factory import failing
from memplan.cli.failures import PARTLY, failures
from memplan.cli.output import (
    Format,
    export,
    show_and_write,
    with_exports,
    with_format,
    with_output,
)
from memplan.cli.progress import progress
from memplan.cli.target import Target, with_target
from memplan.profiler import ScriptProfile, profile_script, time_phases, trace_memory
from memplan.report import profile_document

_EXPLAINED = 0.01


@click.command()
@with_target
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@with_format
@with_output
@with_exports
@click.option(
    "--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Steps to time."
)
@click.option(
    "--strict", is_flag=True, help="End with 5 if more than 1 % of the peak is unexplained."
)
@click.option(
    "--step",
    type=click.IntRange(min=3),
    default=4,
    show_default=True,
    help="Of a script: the step to record. The script is stopped after it.",
)
def profile(
    target: Target,
    *,
    arguments: tuple[str, ...],
    shape: Format,
    output: Path | None,
    snapshot: Path | None,
    chrome_trace: Path | None,
    steps: int,
    step: int,
    strict: bool,
) -> None:
    """Measure a training step: its peak, and every byte that is there then.

    TARGET is file.py:factory, package.module:factory or hf:config.json; the factory returns
    (model, batch), or (model, batch, optimizer) for the whole step. The step starts without
    gradients. Parameters and all other states are as before afterwards.

    TARGET can also be a whole training script, which needs no change: script.py -- ARGUMENTS...
    One of its steps is recorded, from the end of an optimizer step to the end of the next.

    \b
    Exit codes: 0 measured; 1 the factory, the script or the step failed; 2 wrong usage;
    5 too much is unexplained, with --strict.
    """
    growth_bytes: int | None = None
    if target.text.endswith(".py"):
        script = _script(target, arguments, step)
        trace, seconds, growth_bytes = script.trace, {"step": script.step_s}, script.growth_bytes
        following = "To plan such a step, write a factory that returns (model, batch, optimizer)"
    elif arguments:
        raise click.UsageError(
            f"{target.text} takes --set NAME=VALUE; '-- ...' is for a whole script"
        )
    else:
        model, batch, optimizer = target.load()
        with failing(target.text), failures(), progress():
            trace = trace_memory(model, batch, optimizer=optimizer)
            seconds = _seconds(model, batch, optimizer, steps)
        again = target.command_line("plan", bounds=["--budget", "50%"])
        following = f"To see what would make it smaller: {again}"
    export(trace, snapshot, chrome_trace)
    document = profile_document(trace, seconds, growth_bytes)
    show_and_write(shape, document, following, output)
    if strict and trace.unexplained_bytes > _EXPLAINED * trace.peak_bytes:
        raise SystemExit(PARTLY)


def _script(target: Target, arguments: tuple[str, ...], step: int) -> ScriptProfile:
    if target != Target(target.text):
        raise click.UsageError("a whole script takes its own arguments, after --")
    path = Path(target.text)
    if not path.is_file():
        raise click.UsageError(f"there is no file {target.text!r}")
    with failing(target.text), failures():
        return profile_script(path, arguments, step=step)


def _seconds(
    model: nn.Module, batch: object, optimizer: Optimizer | None, steps: int
) -> dict[str, float]:
    """Time of each phase, the median of several steps."""
    times = time_phases(model, batch, optimizer=optimizer, steps=steps)
    return {name: median(each[name] for each in times) for name in times[0]}
