"""Predicted slowdown over the budget: its rises, the smallest budgets, and the slowest plans."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from memplan.compiler.lower import LoweredStep
from memplan.ir.liveness import floor_bytes
from memplan.planner import Solution, solve

sys.path.insert(0, str(Path(__file__).parent))
from steps import lowered, models

BUDGETS = 40


def curves(names: Iterable[str]) -> list[dict[str, Any]]:
    """One row for each model, printed as it is computed."""
    rows = []
    for name in names:
        torch.manual_seed(0)
        rows.append({"model": name, **curve(lowered(*models()[name]()[:2]))})
        print(line(rows[-1]), flush=True)
    return rows


def curve(step: LoweredStep) -> dict[str, Any]:
    """Predicted slowdowns at evenly spread budgets, from the smallest to the unplanned peak."""
    program, resident = step.captured.program, step.captured.program.resident_bytes
    floor = floor_bytes(program, step.recoveries, step.costs) - resident
    smallest = _planned(step, 1).peak_bytes - resident
    highest = step.unplanned.peak_bytes - resident
    above = [int(smallest + (highest - smallest) * i / (BUDGETS - 1)) for i in range(BUDGETS)]
    slowdowns = [
        _planned(step, resident + share).seconds / step.unplanned.seconds for share in above
    ]
    rises = [later - former for former, later in pairwise(slowdowns) if later > former + 1e-9]
    near = [s for s, share in zip(slowdowns, above, strict=True) if share >= 1.1 * smallest]
    return {
        "ops": len(program.ops),
        "smallest_over_floor": smallest / floor,
        "smallest_share": smallest / highest,
        "slowdowns": slowdowns,
        "rises": len(rises),
        "largest_rise": max(rises, default=0.0),
        "slowest_near": max(near),
    }


def _planned(step: LoweredStep, budget_bytes: int) -> Solution:
    return solve(
        step.captured.program, step.costs, step.recoveries,
        budget_bytes=budget_bytes, original_seconds=step.unplanned.seconds,
    )  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row as one line."""
    return (
        f"{row['model']:18} {row['ops']:5} ops  smallest {row['smallest_over_floor']:.3f}x floor "
        f"({row['smallest_share']:.0%}) at {row['slowdowns'][0]:.2f}x; from 1.1x smallest at most "
        f"{row['slowest_near']:.2f}x; {row['rises']} of {BUDGETS - 1} steps rise (by at most "
        f"{row['largest_rise']:.4f})"
    )
