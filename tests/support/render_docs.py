"""Makes pages of the documentation from what the tests saw.

.ci/full laws
python tests/support/render_docs.py results.json docs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import memplan


def main(results: Path, docs: Path) -> None:
    """Write ``laws.md``, ``support.md`` and ``optimizers.md``."""
    seen = json.loads(results.read_text())
    (docs / "laws.md").write_text(laws_page(list(seen["laws"].values())))
    (docs / "support.md").write_text(support_page(seen["support"]))
    page = optimizers_page(seen["optimizers"], seen["freed"])
    (docs / "optimizers.md").write_text(page)


def laws_page(rows: list[dict[str, Any]]) -> str:
    """The law table."""
    lines = [
        "# The law table",
        "",
        "Every row was run by `tests/test_laws.py`: the planned step against the untouched model, "
        "and its peak as the allocator counted it. A budget in percent is a share of what the step "
        "needs above its resident bytes; where it is not feasible, the smallest that is was taken. "
        "*error* is the largest difference of a gradient from eager's, over the largest entry of "
        "all gradients.",
        "",
        "| model | ops | asked | budget | predicted | measured | slowdown | error |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        sizes = [
            memplan.format_bytes(row[name])
            for name in ("budget_bytes", "predicted_bytes", "measured_bytes")
        ]
        error = "0" if row["error"] == 0 else f"{row['error']:.0e} ({', '.join(row['effects'])})"
        cells = [row["model"], row["ops"], row["budget"], *sizes, f"{row['slowdown']:.3f}x", error]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def support_page(rows: list[tuple[str, str, str]]) -> str:
    """What works and what is refused."""
    lines = [
        "# What is supported",
        "",
        "Every row was run by `tests/test_support.py`. *exact*: the same bits as the untouched "
        "model. Whatever is refused raises an error that says what to do; nothing is lost in "
        "silence.",
        "",
        "| feature | |",
        "|---|---|",
    ]
    for feature, outcome, reason in sorted(rows, key=lambda row: row[1] == "refused"):
        text = f"refused: {reason}" if reason else outcome
        lines.append(f"| {feature} | {text.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def optimizers_page(rows: list[dict[str, Any]], freed: dict[str, float]) -> str:
    """Whole steps, with the optimizer's state and update."""
    lines = [
        "# The whole step",
        "",
        "Every row was run by `tests/update/test_optimizers.py`: a step planned at 50 % (or the "
        "smallest feasible budget), the optimizer's state and update included. *Resident* is "
        "parameters, buffers, inputs and state. *Inside* means "
        "`Options(update_in_backward=True)`. The phase is that of the peak, in plan and "
        "measurement alike.",
        "",
        "| model | optimizer | update | resident | predicted | measured | difference | phase |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        names = ("resident_bytes", "predicted_bytes", "measured_bytes")
        sizes = [memplan.format_bytes(row[name]) for name in names]
        difference = f"{row['predicted_bytes'] - row['measured_bytes']} B"
        where = "inside" if row["in_backward"] else "at the end"
        cells = [row["model"], row["optimizer"], where, *sizes, difference, row["phase"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "For a model of many parameters and few activations, with nothing recomputed, updates in "
        "the backward lower the measured peak by this share of the gradients' bytes:",
        "",
        "| optimizer | share |",
        "|---|--:|",
        *(f"| {optimizer} | {share:.1%} |" for optimizer, share in freed.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
