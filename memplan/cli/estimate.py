"""``memplan estimate``: the memory that a step will take, before it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
import psutil

from memplan import profiler
from memplan.cli.failures import NOT_FITTING, PARTLY, failures
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
from memplan.costs import CPU, DEVICES
from memplan.report import estimate_document
from memplan.units import parse_bytes


@click.command()
@with_target
@click.option("--device", type=click.Choice(list(DEVICES)), help="A device that need not be there.")
@click.option("--memory", metavar="BYTES", help="What there is, if not the device's memory.")
@click.option(
    "--costs",
    type=click.Choice(["analytic", "measured"]),
    default="analytic",
    show_default=True,
    help="Whether to run each kernel alone, for its workspace.",
)
@click.option("--strict", is_flag=True, help="End with 5 if a kernel could not be measured.")
@with_format
@with_output
@with_exports
def estimate(
    target: Target,
    *,
    device: str | None,
    memory: str | None,
    costs: Literal["analytic", "measured"],
    strict: bool,
    shape: Format,
    output: Path | None,
    snapshot: Path | None,
    chrome_trace: Path | None,
) -> None:
    """What a training step will take: whether it fits, and what is there at the peak.

    TARGET is file.py:factory, package.module:factory or hf:config.json. Nothing is allocated or
    computed: the factory runs on tensors that have no data. With "--costs measured" it runs for
    real, and each distinct kernel is run alone.

    \b
    Exit codes: 0 it fits; 1 the factory failed, or the step needs data; 2 wrong usage;
    3 it does not fit, or may not; 5 something could not be measured, with --strict.
    """
    with failures(), progress():
        memory_bytes = _memory_bytes(memory, device)
        is_real = costs == "measured"
        model, batch, optimizer = target.load(without_data=not is_real)
        found = profiler.estimate(model, batch, optimizer=optimizer, device=device, costs=costs)
    export(found.trace, snapshot, chrome_trace)
    document = estimate_document(found, memory_bytes)
    fits = document.verdict == "fits"
    bounds = [
        "--budget",
        "50%" if fits else str(memory_bytes),
        *([] if device is None else ["--device", device]),
    ]
    following = f"To make it smaller: {target.command_line('plan', bounds=bounds)}"
    show_and_write(shape, document, following, output)
    if not fits:
        raise SystemExit(NOT_FITTING)
    if strict and found.refusals:
        raise SystemExit(PARTLY)


def _memory_bytes(memory: str | None, device: str | None) -> int:
    if memory is not None:
        return parse_bytes(memory)
    spec = CPU if device is None else DEVICES[device]
    return spec.memory_bytes or int(psutil.virtual_memory().total)
