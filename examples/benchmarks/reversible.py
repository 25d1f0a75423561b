"""Costs and savings of inverting couplings: RevNets beside ResNets, checkpoints and libraries.

    python examples/benchmarks/reversible.py                            # everything, on the CPU
    python examples/benchmarks/reversible.py memory drift --threads 2 --json reversible.json
    python examples/benchmarks/reversible.py memory --depths 38 47b --batch 16
    python examples/benchmarks/reversible.py --json reversible.json --markdown PAGE

Activations are the bytes of a step at its peak besides residents and all gradients, exact to the
byte. Times are medians of ratios to RevNet's eager step over interleaved rounds in one process.
A depth that ends in b has bottlenecks. ``peers`` needs ``pip install --no-deps memcnn revtorch``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import memplan
from memplan.profiler.step import preserved

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import reversible_budgets
import reversible_peers
import reversible_tables
from budgets import _interleaved
from pages import put
from reversible_peers import Checkpointed
from reversible_steps import Batch, activation_bytes, errors, images, outcome, right_gradients
from reversible_tables import INVERTING, Row

from models.reversible import ResNet, RevNet, resized

SOURCE = "examples/benchmarks/results/reversible.json"

Net = TypeVar("Net", ResNet, RevNet)


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements.

    Attributes:
        depths: depths, instead of each part's own.
        batch: images, instead of each part's own number.
        rounds: rounds to time.
        blocks: blocks of the stack that libraries run.
        max_slowdown: bound on inverting plans.
        budget: budget of inverting plans, instead of a slowdown.
    """

    depths: tuple[str, ...]
    batch: int | None
    rounds: int
    blocks: int
    max_slowdown: float
    budget: str | None


class Segmented(nn.Module):
    """A RevNet with runs of about sqrt(n) functions under one checkpoint each."""

    def __init__(self, net: RevNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to logits."""
        one, other = self.net.stem(x).chunk(2, dim=1)
        functions = list(self.net.functions)
        length = round(math.sqrt(len(functions)))
        for start in range(0, len(functions), length):
            one, other = checkpoint(
                self._segment, one, other, functions[start : start + length],
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
        return self.net.classify(torch.cat([resized(one, other), other], dim=1))

    def _segment(
        self, one: torch.Tensor, other: torch.Tensor, functions: Iterable[nn.Module]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for function in functions:
            change = function(other)
            one, other = other, resized(one, change) + change
        return one, other


def per_function(net: RevNet) -> RevNet:
    """A copy with each residual function under a checkpoint; tensors are shared."""
    tensors = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    copied = copy.deepcopy(net, tensors)
    copied.functions = nn.ModuleList(map(Checkpointed, copied.functions))
    return copied


def with_loss(net: nn.Module) -> memplan.WithLoss:
    """A network and its loss."""
    module = memplan.WithLoss(net, cross_entropy)
    module.train()
    return module


def made(kind: type[Net], depth: str) -> Net:
    """A network of a depth, the same each time."""
    torch.manual_seed(0)
    return kind(int(depth.removesuffix("b")), has_bottlenecks=depth.endswith("b"))


def inverting(
    module: nn.Module, batch: Batch, settings: Settings, budget: int | str | None = None
) -> memplan.PlannedModule:
    """The module with its couplings inverted in the backward."""
    budget = settings.budget if budget is None else budget
    return memplan.optimize(
        module,
        batch,
        budget=budget,
        max_slowdown=settings.max_slowdown if budget is None else None,
        passes=[memplan.passes.invert_couplings()],
        options=memplan.Options(on_infeasible="smallest"),
    )


def memory(settings: Settings) -> list[Row]:
    """Memory and time of each way to train a network of some depths."""
    rows = []
    for depth in settings.depths or ("110", "164b"):
        rows += _memory(depth, settings)
        gc.collect()
    return rows


def _memory(depth: str, settings: Settings) -> list[Row]:
    batch = images(settings.batch or 128)
    net = made(RevNet, depth)
    eager = with_loss(net)
    print(f"{depth}: planning", file=sys.stderr)
    planned = inverting(eager, batch, settings)
    budget_bytes = planned.plan.peak_bytes
    options = memplan.Options(on_infeasible="smallest")
    usual = memplan.optimize(eager, batch, budget=budget_bytes, options=options)
    least = ", least memory" if usual.plan.peak_bytes > budget_bytes else ", same budget"
    modules = {
        "ResNet": with_loss(made(ResNet, depth)),
        "RevNet": eager,
        "RevNet, checkpoint per function": with_loss(per_function(net)),
        "RevNet, checkpoint per sqrt(n)": with_loss(Segmented(net)),
        f"RevNet, default plan{least}": usual,
        INVERTING: planned,
    }
    profiles = {}
    for run, module in modules.items():
        print(f"{depth}: measuring {run}", file=sys.stderr)
        profiles[run] = memplan.profile(module, batch, steps=1)
    with preserved(eager):
        times = _interleaved(modules, memplan.Sample.of(batch), settings.rounds, depth)
    return [
        {
            "depth": depth,
            "run": run,
            "batch": len(batch[0]),
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "above_bytes": profiles[run].peak_bytes - profiles[run].resident_bytes,
            "activation_bytes": activation_bytes(module, profiles[run]),
            "step_s": median(times[run]),
            "time_ratio": median(b / a for a, b in zip(times["RevNet"], times[run], strict=True)),
            **_predicted(module, profiles[run]),
        }
        for run, module in modules.items()
    ]


def _predicted(module: nn.Module, profile: memplan.Profile) -> Row:
    """The predictions of a module's plan, and the error of its peak."""
    if not isinstance(module, memplan.PlannedModule):
        return {}
    plan = module.plan
    off_bytes = plan.peak_bytes - profile.peak_bytes
    return {"predicted_ratio": plan.slowdown, "off_bytes": off_bytes}


def depths(settings: Settings) -> list[Row]:
    """Memory over depth: the activations of the deepest network's plan are the others' budget."""
    batch = images(settings.batch or 128)
    rows: list[Row] = []
    for depth in reversed(settings.depths or ("20", "56", "110", "218")):
        print(f"depth {depth}", file=sys.stderr)
        plain, eager = with_loss(made(ResNet, depth)), with_loss(made(RevNet, depth))
        budget = None
        if rows:
            parameters = 2 * sum(parameter.nbytes for parameter in eager.parameters())
            others = sum(tensor.nbytes for tensor in (*eager.buffers(), *batch))
            budget = parameters + others + rows[0]["activation_bytes"]
        planned = inverting(eager, batch, settings, budget)
        found = memplan.compare(eager, planned, batch, steps=settings.rounds)
        row = {
            "depth": depth,
            "batch": len(batch[0]),
            "plain_bytes": activation_bytes(plain, memplan.profile(plain, batch, steps=1)),
            "activation_bytes": activation_bytes(eager, found.planned),
            "time_ratio": found.time_ratio,
            **_predicted(planned, found.planned),
        }
        rows.append(row)
        del plain, eager, planned
        gc.collect()
    return rows[::-1]


def drift(settings: Settings) -> list[Row]:
    """Errors of gradients against 64 bits."""
    batch = images(settings.batch or 128)
    rows = []
    for depth in settings.depths or ("38", "110"):
        print(f"drift at depth {depth}", file=sys.stderr)
        net = made(RevNet, depth)
        eager = with_loss(net)
        # RevNet itself casts its streams to 32 bits; without saved gradients, 64 fit as well.
        exact = right_gradients(with_loss(Segmented(net)), batch)
        row = {"depth": depth, "batch": len(batch[0])}
        for name, module in (("plain", eager), ("inverting", inverting(eager, batch, settings))):
            outcome(module, eager, batch)  # a plan's first step may differ from all later ones
            off = errors(outcome(module, eager, batch).gradients, exact.gradients)
            row |= {f"{name}_max": max(off), f"{name}_median": median(off)}
        rows.append(row)
        gc.collect()
    return rows


def peers(settings: Settings) -> list[Row]:
    """The same functions under other libraries."""

    def plan(module: nn.Module, batch: Batch, budget: int | None) -> nn.Module:
        return inverting(module, batch, settings, budget)

    size = settings.batch or 64
    return reversible_peers.peers(settings.blocks, 16, size, settings.rounds, plan)


def budgets(settings: Settings) -> list[Row]:
    """The predicted cost of a budget."""
    depth = settings.depths[0] if settings.depths else "110"
    return reversible_budgets.budgets(with_loss(made(RevNet, depth)), images(settings.batch or 32))


PARTS: dict[str, tuple[Callable[[Settings], list[Row]], Callable[[list[Row]], str]]] = {
    "memory": (memory, reversible_tables.memory),
    "depths": (depths, reversible_tables.depths),
    "budgets": (budgets, reversible_budgets.table),
    "peers": (peers, reversible_tables.peers),
    "drift": (drift, reversible_tables.drift),
}


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--threads", type=int, help="of torch's kernels")
    parser.add_argument("--batch", type=int, help="images; 128, for peers 64, for budgets 32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--depths", nargs="+", default=(), help="instead of each part's own, such as 38 or 47b"
    )
    parser.add_argument("--blocks", type=int, default=27, help="of peers")
    parser.add_argument("--max-slowdown", type=float, default=1.35, help="of inverting plans")
    parser.add_argument("--budget", help="of inverting plans, instead of a slowdown")
    parser.add_argument("--json", type=Path, help="write the numbers here, beside those there")
    parser.add_argument("--markdown", type=Path, help="measure nothing: put --json's tables there")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    found = {}
    if arguments.json is not None and arguments.json.exists():
        found = json.loads(arguments.json.read_text())
    parts = arguments.parts or list(PARTS)
    if arguments.markdown is not None:
        if not found:
            parser.error("--markdown needs the numbers of --json")
        tables = [PARTS[part][1](found[part]["rows"]) for part in parts if part in found]
        put(arguments.markdown, SOURCE, "\n\n".join(tables))
        return
    settings = Settings(
        **{field.name: getattr(arguments, field.name) for field in fields(Settings)}
    )
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    for part in parts:
        measure, table = PARTS[part]
        found[part] = {"machine": machine, "rows": measure(settings)}
        print(table(found[part]["rows"]), end="\n\n", flush=True)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
