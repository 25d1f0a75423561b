"""The memory of an optimizer's state and update, and of a whole step with it.

    pip install "memplan[low-bit]"
    python examples/low_bit_optimizers.py

Each optimizer trains the same GPT on the same text; predicted and measured peak of the whole step
are shown side by side. Low-bit optimizers change the training by rounding their state; memplan only
counts them, and gives the results that they would give without it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import memplan

sys.path.insert(0, str(Path(__file__).parent))
from train_gpt import gpt_and_batch

MakeOptimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


def optimizers() -> dict[str, MakeOptimizer]:
    """The optimizers by name; those of missing packages are left out, and named on stderr."""
    made: dict[str, MakeOptimizer] = {
        "torch AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
        "torch Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from bitsandbytes.optim import AdamW8bit as BitsAndBytes8bit  # noqa: PLC0415
        made["bitsandbytes AdamW8bit"] = lambda parameters: BitsAndBytes8bit(parameters, lr=3e-4)
    except ImportError:
        print("bitsandbytes is not installed", file=sys.stderr)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.optim import AdamW4bit, AdamW8bit  # noqa: PLC0415
        made["torchao AdamW8bit"] = lambda parameters: AdamW8bit(parameters, lr=3e-4)
        made["torchao AdamW4bit"] = lambda parameters: AdamW4bit(parameters, lr=3e-4)
    except ImportError:
        print("torchao is not installed", file=sys.stderr)
    return made


def main() -> None:
    """Plan and measure a step with each optimizer."""
    table = Table(title="One training step of a GPT at its least memory", title_justify="left")
    table.add_column("optimizer")
    for header in ("state", "predicted peak", "measured peak", "bits"):
        table.add_column(header, justify="right")
    model, batch = gpt_and_batch()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    for name, make in optimizers().items():
        model, batch = gpt_and_batch()
        options = memplan.Options(update_in_backward=True)
        planned = memplan.optimize(model, batch, max_slowdown=1.5, optimizer=make, options=options)
        comparison = memplan.compare(model, planned, batch, steps=1)
        inputs = sum(tensor.nbytes for tensor in batch)
        state = planned.plan.resident_bytes - weights - inputs
        table.add_row(
            name,
            memplan.format_bytes(state),
            memplan.format_bytes(planned.plan.peak_bytes),
            memplan.format_bytes(comparison.planned.peak_bytes),
            "same" if comparison.is_exact else "DIFFERENT",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
