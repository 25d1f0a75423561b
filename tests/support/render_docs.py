"""Makes pages of the documentation from what the tests saw.

.ci/full laws databases
python tests/support/render_docs.py results.json docs
python tests/support/render_docs.py databases.xml docs
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import memplan


def main(results: Path, docs: Path) -> None:
    """Write ``laws.md``, ``support.md`` and ``optimizers.md``; or what was seen of databases."""
    if results.suffix == ".xml":
        (docs / "databases.json").write_text(json.dumps(counted(results), indent=1) + "\n")
        results = docs / "results.json"
    seen = json.loads(results.read_text())
    known = docs / "databases.json"
    databases = databases_part(json.loads(known.read_text())) if known.exists() else ""
    (docs / "laws.md").write_text(laws_page(list(seen["laws"].values())))
    (docs / "support.md").write_text(support_page(seen["support"]) + databases)
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


def counted(seen: Path) -> dict[str, Any]:
    """What happened to the cases of torch's databases, and why some were refused."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    reasons: Counter[str] = Counter()
    for test in ElementTree.parse(seen).iter("testcase"):
        dtype = test.get("name", "").removesuffix("]").rpartition("-")[2]
        group = f"operators, {dtype}" if "operators" in test.get("name", "") else "modules, float32"
        for found in test.iter("property"):
            outcome, _, reason = found.get("value", "").partition(": ")
            counts[group][outcome] += 1
            if reason:
                reasons[_kind(reason)] += 1
    return {"counts": counts, "reasons": reasons.most_common()}


def _kind(reason: str) -> str:
    """The first sentence of a reason, without what differs from case to case."""
    reason = re.sub(r" at /\S+ \(.*?\): ", ": ", reason)
    reason = re.sub(r"\(at \S+\) |\(aten\..*\)\)", "", reason)
    reason = re.sub(r"OfOperator|OfModule", "a model", reason)
    reason = re.sub(r"aten\.\S+|'[^']*'", "...", reason)
    return re.split(r"(?<!\.)\. |; |, because", re.sub(r"\d+", "N", reason))[0].strip().rstrip(".")


def databases_part(seen: dict[str, Any]) -> str:
    """Torch's own modules and operators."""
    outcomes = ("right", "rounding", "refused", "wrong", "over", "eager fails")
    lines = [
        "",
        "## Torch's own databases",
        "",
        "Cases of `module_db` and of all differentiable operators of `op_db`, each with nothing "
        "and with all that can be recomputed, by `tests/test_databases.py`. *right*: outputs, "
        "gradients, buffers and random state have the same bits, and the peak is within the "
        "predicted one. *rounding*: they do not, and the plan says so.",
        "",
        f"| | {' | '.join(outcomes)} |",
        f"|---|{'--:|' * len(outcomes)}",
    ]
    for group, counts in sorted(seen["counts"].items()):
        cells = [str(counts.get(outcome, 0)) for outcome in outcomes]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    lines += ["", "Why cases are refused:", "", "| reason | cases |", "|---|--:|"]
    lines += [f"| {reason.replace('|', '/')} | {count} |" for reason, count in seen["reasons"]]
    return "\n".join(lines) + "\n"


def optimizers_page(rows: list[dict[str, Any]], freed: dict[str, float]) -> str:
    """Whole steps, with the optimizer's state and update."""
    lines = [
        "# The whole step",
        "",
        "Every row was run by `tests/optimizer/test_optimizers.py`: a step planned at 50 % (or the "
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
