"""The predicted cost of a budget, with couplings inverted and without."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

import memplan

SHARES = ("70%", "50%", "35%", "25%", "20%", "15%", "12%", "10%")


def budgets(module: nn.Module, batch: object) -> list[dict[str, Any]]:
    """Predicted slowdowns of plans; None where no plan keeps the budget."""
    rows = []
    for share in SHARES:
        print(f"budget {share}", file=sys.stderr)
        row: dict[str, Any] = {"budget": share}
        for name, passes in (("exact", []), ("undone", [memplan.passes.invert_couplings()])):
            options = memplan.Options(on_infeasible="smallest")
            plan = memplan.plan(module, batch, budget=share, passes=passes, options=options)
            asked = memplan.units.parse_budget(share).resolve(
                plan.resident_bytes, plan.original_peak_bytes
            )
            row[name] = plan.slowdown if plan.peak_bytes <= asked else None
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of ``budgets``."""
    lines = [
        "Predicted time over that of the step with everything kept, by budget.\n",
        "| budget | recomputed | and undone |",
        "|--:|--:|--:|",
    ]
    for row in rows:
        cells = ["infeasible" if row[n] is None else f"{row[n]:.2f}x" for n in ("exact", "undone")]
        lines.append(f"| {row['budget']} | {' | '.join(cells)} |")
    return "\n".join(lines)
