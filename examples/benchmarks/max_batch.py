"""The largest batch in 16 GB at no more than one extra forward pass, beside published numbers.

    python examples/benchmarks/max_batch.py                       # six networks, some minutes
    python examples/benchmarks/max_batch.py VGG-19 --no-step

The setting is that of Jain et al., "Checkmate", 2020, figure 6: 16e9 bytes, float32, multiply-adds
as time. Every network is planned twice.

*Layers*: in Checkmate's account (``layers.py``); parameters count twice, inputs and the workspace
of kernels nothing. All of it is linear in the batch, so the least peak of one image gives the
largest batch; as a real number, like there. *Keep all* keeps every output to the end, as there.
*At most* follows from the largest working set of a single op: no plan beats it. (For VGG-19 both
are Checkmate's number, 289.03. Its number for FCN8, 60, is above what this account allows, and
needs parameters that count once; its 62 for SegNet is 61.7, rounded.)

*Step*: the training step that torch runs, captured on tensors without data: parameters, gradients,
inputs, masks, indices and statistics in their own types, without convolutions' workspace.

A run on real data follows: ``--run-bytes`` of memory, measured kernels, predicted peak against
measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import memplan
from memplan.capture import source_of_call
from memplan.compiler.lower import LoweredStep
from memplan.ir.liveness import ScheduledStep, floor_bytes
from memplan.ir.program import Costs, Op, OpCost, Phase, Program
from memplan.ir.schedule import Catalog
from memplan.planner import keep_all, solve

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from layers import FLOAT_BYTES, everything_kept, layers_of, program_of
from steps import lowered

from models import published

BYTES = 16_000_000_000
PUBLISHED = {
    "U-Net": 61,
    "FCN8": 60,
    "SegNet": 62,
    "ResNet-50": 193,
    "VGG-19": 289,
    "MobileNet": 1105,
}
"""Checkmate's largest batches."""

PUBLISHED_KEEP_ALL = {"U-Net": 16, "VGG-19": 167, "MobileNet": 217}
"""Checkmate's largest batches with everything kept, where known."""


def extra_forward(program: Program, costs: Costs) -> float:
    """The slowdown of a step with its forward run twice."""
    spent = {
        phase: sum(costs.by_op[op.id].seconds for op in program.ops if op.phase is phase)
        for phase in (Phase.FORWARD, Phase.BACKWARD)
    }
    return 1 + spent[Phase.FORWARD] / sum(spent.values())


def in_layers(name: str) -> dict[str, Any]:
    """A row of the table in Checkmate's account."""
    make, size = published.MODELS[name]
    with torch.device("meta"):
        model = make()
    layers = layers_of(model, size)
    program, costs, recoveries = program_of(layers)
    weights = sum(t.numel() for t in [*model.parameters(), *model.buffers()] if t.dim() > 0)
    room = BYTES - 2 * FLOAT_BYTES * weights
    kept = everything_kept(program)
    keep_all_bytes = ScheduledStep(kept, (), costs, keep_all(kept, costs)).peak_bytes
    start = time.perf_counter()
    limit = extra_forward(program, costs)
    found = solve(program, costs, recoveries, max_slowdown=limit)
    base = sum(costs.by_op[op.id].seconds for op in program.ops)
    return {
        "model": name,
        "layers": len(layers),
        "parameters": weights,
        "macs": sum(layer.macs for layer in layers),
        "output_bytes": FLOAT_BYTES * sum(layer.elements for layer in layers),
        "published_keep_all": PUBLISHED_KEEP_ALL.get(name),
        "keep_all": room / keep_all_bytes,
        "published": PUBLISHED[name],
        "batch": room / found.peak_bytes,
        "at_most": room / floor_bytes(program, recoveries, costs),
        "slowdown": found.seconds / base,
        "allowed_slowdown": limit,
        "planning_s": time.perf_counter() - start,
    }


def training_step(name: str, batch: int, costs: str, device: str) -> tuple[LoweredStep, Any, Any]:
    """The captured and priced step of a network with a loss; the module, and its inputs."""
    make, (height, width) = published.MODELS[name]
    with torch.device("meta"):
        logits = make()(torch.empty(batch, 3, height, width))
    torch.manual_seed(0)
    with torch.device(device):
        model = memplan.WithLoss(make(), nn.functional.cross_entropy)
        images = torch.randn(batch, 3, height, width)
        targets = torch.randint(logits.shape[1], (batch, *logits.shape[2:]))
    return lowered(model, (images, targets), costs=costs), model, (images, targets)


def arithmetic(step: LoweredStep) -> Costs:
    """Multiply-adds instead of seconds, for products and convolutions; else one per element."""

    def cost(op: Op) -> OpCost:
        found = step.costs.by_op[op.id]
        value = source_of_call(step.captured, op).meta["val"]
        results = value if isinstance(value, list | tuple) else (value,)
        elements = sum(one.numel() for one in results if isinstance(one, torch.Tensor))
        return replace(found, seconds=float(found.flops // 2 or elements))

    catalog = Catalog.of(step.captured.program, step.recoveries)
    return Costs({id: cost(op) for id, op in catalog.ops.items()}, "multiply-adds")


def fits(step: LoweredStep, budget_bytes: int, *, is_planned: bool) -> bool:
    """Tell whether a step fits the bytes: planned with at most one extra forward, or as it is."""
    program, costs = step.captured.program, arithmetic(step)
    if not is_planned:
        return step.unplanned.peak_bytes <= budget_bytes
    limit = extra_forward(program, costs)
    found = solve(program, costs, step.recoveries, budget_bytes=budget_bytes, max_slowdown=limit)
    return found.is_feasible


def largest(start: int, does_fit: Callable[[int], bool]) -> int:
    """The largest batch that fits, by doubling and bisection from a guess."""
    low, high = 0, max(1, start)
    width = max(1, start // 16)
    if does_fit(high):
        while does_fit(high):
            low, high, width = high, high + width, 2 * width
    else:
        while high - width > 0 and not does_fit(high - width):
            high, width = high - width, 2 * width
        low = max(0, high - width)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if does_fit(middle) else (low, middle)
    return low


def in_step(name: str, budget_bytes: int = BYTES) -> dict[str, Any]:
    """The largest batch of the step that torch runs, without the workspace of its kernels."""
    start = time.perf_counter()
    steps: dict[int, LoweredStep] = {}

    def step(batch: int) -> LoweredStep:
        if batch not in steps:
            steps[batch] = training_step(name, batch, "analytic", "meta")[0]
        return steps[batch]

    # Peaks are linear in the batch, or nearly so.
    small, large = (step(batch).unplanned.peak_bytes for batch in (8, 16))
    guess = int(8 + 8 * (budget_bytes - small) / (large - small))
    kept = largest(guess, lambda batch: fits(step(batch), budget_bytes, is_planned=False))
    guess = expected_batch(step(16), 16, budget_bytes)
    batch = largest(guess, lambda batch: fits(step(batch), budget_bytes, is_planned=True))
    return {
        "ops": len(step(16).captured.program.ops),
        "step_keep_all": kept,
        "step_batch": batch,
        "step_planning_s": time.perf_counter() - start,
    }


def expected_batch(step: LoweredStep, batch: int, budget_bytes: int) -> int:
    """The batch that fits if a step's least peak is linear in it."""
    program, costs = step.captured.program, arithmetic(step)
    limit = extra_forward(program, costs)
    lowest = solve(program, costs, step.recoveries, max_slowdown=limit).peak_bytes
    fixed = program.resident_bytes
    return max(1, int(batch * (budget_bytes - fixed) / (lowest - fixed)))


def run(name: str, run_bytes: int) -> dict[str, Any]:
    """Train one step of the largest batch that fits into given bytes here; kernels are measured."""
    expected = in_step(name, run_bytes)
    batch = expected["step_batch"]
    while True:
        print(f"{name}: measuring kernels at batch {batch}", file=sys.stderr)
        step, model, given = training_step(name, batch, "measured", "cpu")
        if fits(step, run_bytes, is_planned=True):
            break
        # Only here is the workspace of kernels known.
        batch = min(batch - 1, expected_batch(step, batch, run_bytes))
    module = memplan.optimize(model, given, budget=run_bytes)
    profile = memplan.profile(module, given, steps=1)
    eager = memplan.profile(model, given, steps=1)
    return {
        "model": name,
        "run_bytes": run_bytes,
        "batch": batch,
        "batch_without_workspace": expected["step_batch"],
        "keep_all_without_workspace": expected["step_keep_all"],
        "predicted_bytes": module.plan.peak_bytes,
        "measured_bytes": profile.peak_bytes,
        "eager_bytes": eager.peak_bytes,
        "predicted_slowdown": module.plan.slowdown,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| network | parameters | GMAC | keep all (published) | Checkmate | memplan, its account "
        "| at most | slowdown (allowed) | keep all, torch's step | memplan, torch's step |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        known = row["published_keep_all"]
        lines.append(
            f"| {row['model']} | {row['parameters'] / 1e6:.2f} M | {row['macs'] / 1e9:.2f} "
            f"| {row['keep_all']:.1f} ({known or 'unknown'}) | {row['published']} "
            f"| {row['batch']:.1f} | {row['at_most']:.1f} "
            f"| {row['slowdown']:.2f}x ({row['allowed_slowdown']:.2f}x) "
            f"| {row.get('step_keep_all', '')} | {row.get('step_batch', '')} |"
        )
    return "\n".join(lines)


def ran(row: dict[str, Any]) -> str:
    """The real run as a sentence."""
    peak, measured, eager = (
        memplan.format_bytes(row[f"{key}_bytes"]) for key in ("predicted", "measured", "eager")
    )
    return (
        f"{row['model']} in {memplan.format_bytes(row['run_bytes'])}, really run: batch "
        f"{row['batch']} ({row['batch_without_workspace']} without the workspace of kernels; with "
        f"everything kept {row['keep_all_without_workspace']}); predicted peak {peak}, measured "
        f"{measured} ({row['predicted_bytes'] - row['measured_bytes']:+d} B), the untouched module "
        f"{eager}; predicted slowdown {row['predicted_slowdown']:.2f}x"
    )


def main() -> None:
    """Plan, print, run, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(published.MODELS))
    parser.add_argument("--no-step", action="store_true", help="leave torch's step out")
    parser.add_argument("--run", default="MobileNet", help="the network to run")
    parser.add_argument("--run-bytes", default="512MiB", help="its budget; 0 for no run")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    for name in [*arguments.models, arguments.run]:
        if name not in published.MODELS:
            parser.error(f"there is no network {name!r}; there is {', '.join(published.MODELS)}")
    rows = []
    for name in arguments.models or published.MODELS:
        row = in_layers(name)
        print(f"{name}: {row['batch']:.1f} in layers, {row['planning_s']:.1f} s", file=sys.stderr)
        if not arguments.no_step:
            row |= in_step(name)
            print(
                f"{name}: {row['step_batch']} in torch's step, {row['step_planning_s']:.1f} s",
                file=sys.stderr,
            )
        rows.append(row)
    print(table(rows))
    run_bytes = memplan.parse_bytes(arguments.run_bytes)
    result = None if run_bytes == 0 else run(arguments.run, run_bytes)
    if result is not None:
        print(ran(result))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"rows": rows, "run": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
