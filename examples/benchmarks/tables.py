"""Put the JSON results of the planner's benchmarks into the README and ``docs/planner.md``.

python examples/benchmarks/tables.py examples/benchmarks/results README.md docs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import curves
import max_batch
import peer_tables
import planner
from pages import put

NAMES = ("bounds", "curves", "optimality", "peers", "max_batch")


def planner_page(found: dict[str, Any]) -> str:
    """All tables of the planner."""
    rows = {name: found[name]["rows"] for name in ("bounds", "curves", "optimality", "peers")}
    verdicts = map(peer_tables.verdict, peer_tables.by_model(rows["peers"]))
    parts = [
        "# How good plans are",
        "Printed by `examples/benchmarks/planner.py` and put here by "
        "`examples/benchmarks/tables.py`, on two CPU cores. Times are medians of ratios over "
        "interleaved rounds, and noisy by some percent; peaks are exact.",
        "## Against what a user would pick instead",
        "*Above resident* is what parameters and inputs do not take. *Time* and *gradients* are "
        "against the untouched module; *predicted* and *bound* (no plan within the budget is "
        "faster) against the captured step. A point whose gradients are wrong is dominated by "
        "nothing, and dominates nothing. `torch` is `activation_memory_budget`.",
        "![Time over memory](peers.png)",
        "\n".join(f"* {line}" for line in peer_tables.summary(rows["peers"]).splitlines()),
        "\n".join(f"* {verdict}" for verdict in verdicts),
        peer_tables.table(rows["peers"]),
        "## Against proven bounds",
        "Overhead over the same step with nothing recomputed, in percent, and the proven lower "
        "bound on it; for models with the budget as a share of what the captured step needs above "
        "its residents. *Infeasible* is proven.",
        planner.bounds_table(rows["bounds"]),
        "\n".join(f"* {line}" for line in planner.summary(rows["bounds"]).splitlines()),
        "## Over the budget",
        "Predicted slowdowns at 40 budgets, from the smallest to the unplanned peak.",
        "\n".join(f"* {curves.line(row)}" for row in rows["curves"]),
        "## Against proven optima",
        planner.optimality_summary(rows["optimality"]) + ".",
        planner.optimality_table(rows["optimality"]),
    ]
    return "\n\n".join(parts) + "\n"


def main(results: Path, readme: Path, docs: Path) -> None:
    """Write the page, and the README's tables."""
    found = {name: json.loads((results / f"{name}.json").read_text()) for name in NAMES}
    (docs / "planner.md").write_text(planner_page(found))
    peer_tables.figure(found["peers"]["rows"], docs / "peers.png")
    source = "examples/benchmarks/results"
    put(readme, f"{source}/peers.json", peer_tables.short_table(found["peers"]["rows"]))
    batches = max_batch.table(found["max_batch"]["rows"])
    if found["max_batch"]["run"] is not None:
        batches += f"\n\n{max_batch.ran(found['max_batch']['run'])}."
    put(readme, f"{source}/max_batch.json", batches)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
