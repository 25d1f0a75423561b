"""A stack of reversible blocks under memplan's plan and under other libraries, measured.

Used by ``reversible.py peers``. The same functions F and G of every block, with the same weights,
run as plain PyTorch (autograd saves everything), under ``torch.utils.checkpoint`` around every
function, in MemCNN's ``InvertibleModuleWrapper``, in RevTorch's ``ReversibleSequence``, and as
memplan's plan with ``invert_couplings``. A library that is absent or fails gets a row saying so.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import memplan
from memplan.profiler.step import preserved

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from budgets import _interleaved
from reversible_steps import (
    Batch,
    Outcome,
    activation_bytes,
    errors,
    images,
    outcome,
    right_gradients,
    slope_error,
)
from reversible_tables import Row

from models.reversible import residual

DROPOUT = 0.5


class Checkpointed(nn.Module):
    """A function that torch's own checkpointing recomputes.

    Args:
        function: maps one tensor to one.
        keeps_random_state: whether dropout inside redraws the same mask.
    """

    def __init__(self, function: nn.Module, *, keeps_random_state: bool = False) -> None:
        super().__init__()
        self.function = function
        self.keeps_random_state = keeps_random_state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The function's output."""
        changed: torch.Tensor = checkpoint(
            self.function, x, use_reentrant=False, preserve_rng_state=self.keeps_random_state
        )
        return changed


Functions = Sequence[tuple[nn.Module, nn.Module]]
"""F and G of every block."""


class Coupled(nn.Module):
    """Blocks on the two halves of the channels, as a user writes them."""

    def __init__(self, functions: Functions) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.ModuleList(pair) for pair in functions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels, height, width] to the same."""
        one, other = x.chunk(2, dim=1)
        for f, g in self.pairs:
            one = one + f(other)
            other = other + g(one)
        return torch.cat([one, other], dim=1)


def checkpointed(functions: Functions) -> nn.Module:
    """Every function under a checkpoint."""
    pairs = [
        (Checkpointed(f, keeps_random_state=True), Checkpointed(g, keeps_random_state=True))
        for f, g in functions
    ]
    return Coupled(pairs)


def in_memcnn(functions: Functions) -> nn.Module:
    """The blocks in MemCNN."""
    import memcnn  # noqa: PLC0415  it may be absent

    return nn.Sequential(
        *(
            memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g), preserve_rng_state=True)
            for f, g in functions
        )
    )


def in_revtorch(functions: Functions) -> nn.Module:
    """The blocks in RevTorch."""
    import revtorch  # noqa: PLC0415  it may be absent

    blocks = (revtorch.ReversibleBlock(f, g, fix_random_seed=True) for f, g in functions)
    sequence: nn.Module = revtorch.ReversibleSequence(nn.ModuleList(blocks))
    return sequence


Planning = Callable[[nn.Module, Batch, "int | None"], nn.Module]
"""Makes memplan's module from an eager one and a batch, within a budget if any."""

LIBRARIES = ("memcnn", "revtorch")
DROPOUT_BATCH = 8
"""Images per step with dropout, of which only the results matter."""

RUNS: dict[str, Callable[[Functions], nn.Module]] = {
    "eager": Coupled,
    "checkpoint per function": checkpointed,
    "memcnn": in_memcnn,
    "revtorch": in_revtorch,
}


class Stack:
    """The parts that all runs share: stem, functions of the blocks, and head."""

    def __init__(self, blocks: int, width: int, dropout: float) -> None:
        torch.manual_seed(0)

        def function() -> nn.Module:
            last = [nn.Dropout(dropout)] if dropout else []
            return nn.Sequential(*residual(width, width), *last)

        self.stem = nn.Conv2d(3, 2 * width, 3, 1, 1, bias=False)
        self.functions = [(function(), function()) for _ in range(blocks)]
        self.head = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 10),
        )

    def double(self) -> Stack:
        """Convert the stack to 64 bits."""
        for module in (self.stem, *chain.from_iterable(self.functions), self.head):
            module.double()
        return self

    def run_by(self, make: Callable[[Functions], nn.Module]) -> nn.Module:
        """The whole network and its loss, with the blocks run in one way."""
        blocks = make(self.functions)
        network = nn.Sequential(self.stem, blocks, self.head)
        return memplan.WithLoss(network, cross_entropy).train()


def peers(blocks: int, width: int, batch_size: int, rounds: int, plan: Planning) -> list[Row]:
    """A row for each way to run the stack.

    Args:
        blocks: number of blocks, each of two residual functions.
        width: channels of each half.
        batch_size: images of 3x32x32.
        rounds: how many interleaved rounds to time.
        plan: makes memplan's plan.
    """
    batch = images(batch_size)
    modules, failures = _modules(Stack(blocks, width, 0.0), batch, plan)
    eager = modules["eager"]
    exact, usual = right_gradients(eager, batch), outcome(eager, eager, batch)
    rows: dict[str, Row] = {}
    for name in list(modules):
        print(f"peers: measuring {name}", file=sys.stderr)
        try:
            rows[name] = _row(modules[name], eager, batch, exact, usual)
        except Exception as error:  # a library's error becomes its row
            failures[name] = _first_line(error)
            del modules[name]
    peaks = [rows[name]["peak_bytes"] for name in LIBRARIES if name in rows]
    if peaks:
        name = "memplan, inverting, the least of these libraries' memory"
        modules[name] = plan(eager, batch, min(peaks))
        rows[name] = _row(modules[name], eager, batch, exact, usual)
    with preserved(eager):
        times = _interleaved(modules, memplan.Sample.of(batch), rounds, "peers")
    for name, spent in times.items():
        ratios = [b / a for a, b in zip(times["eager"], spent, strict=True)]
        rows[name] |= {"time_ratio": median(ratios), "step_s": median(spent)}
    del modules, eager, exact, usual
    gc.collect()
    _add_dropout(rows, Stack(blocks, width, DROPOUT).double(), batch, plan)
    settings = {"blocks": blocks, "width": width, "batch": batch_size}
    found = [{"run": name, **settings, **row} for name, row in rows.items()]
    return found + [{"run": name, **settings, "failed": why} for name, why in failures.items()]


def _modules(
    stack: Stack, batch: Batch, plan: Planning
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The stack run in each way, and the reasons why some ways fail."""
    modules: dict[str, nn.Module] = {}
    failures: dict[str, str] = {}
    for name, make in RUNS.items():
        try:
            modules[name] = stack.run_by(make)
        except Exception as error:  # a library's error becomes its row
            failures[name] = _first_line(error)
    modules["memplan, inverting"] = plan(modules["eager"], batch, None)
    return modules, failures


def _row(module: nn.Module, eager: nn.Module, batch: Batch, exact: Outcome, usual: Outcome) -> Row:
    """Memory and results of a step."""
    with preserved(eager):
        profile = memplan.profile(module, batch, steps=1)
    found = outcome(module, eager, batch)
    off = errors(found.gradients, exact.gradients)
    return {
        "peak_bytes": profile.peak_bytes,
        "activation_bytes": activation_bytes(eager, profile),
        "max_error": max(off),
        "median_error": median(off),
        "statistics_error": max(errors(found.buffers, usual.buffers)),
    }


def _add_dropout(rows: dict[str, Row], stack: Stack, batch: Batch, plan: Planning) -> None:
    """Add steps with dropout in 64 bits: gradients, and random state against the eager step's."""
    batch = (batch[0][:DROPOUT_BATCH].double(), batch[1][:DROPOUT_BATCH])
    modules, _ = _modules(stack, batch, plan)
    eager = modules["eager"]
    usual = outcome(eager, eager, batch)
    for name, row in rows.items():
        if name not in modules:
            continue
        print(f"peers: {name} with dropout", file=sys.stderr)
        try:
            found = outcome(modules[name], eager, batch)
            row["dropout_error"] = max(errors(found.gradients, usual.gradients))
            row["same_random_state"] = torch.equal(found.random_state, usual.random_state)
            row["slope_error"] = slope_error(modules[name], eager, batch)
        except Exception as error:  # a library's error becomes its row
            row["dropout_failed"] = _first_line(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
