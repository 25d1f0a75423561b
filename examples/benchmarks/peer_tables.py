"""The results of ``peers.py``: verdicts, tables and a figure."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from statistics import median
from typing import Any

import memplan

sys.path.insert(0, str(Path(__file__).parent))
from peers import is_right


def verdict(rows: list[dict[str, Any]]) -> str:
    """The verdict on one model: dominance, the smallest peak, and predicted times."""
    by_run = {row["run"]: row for row in rows}
    others = [row for row in rows if not row["run"].startswith("memplan") and is_right(row)]
    dominated = [row for row in others if row["dominated_by"] is not None]
    missed = [row["run"] for row in others if row["dominated_by"] is None]
    resident = by_run["untouched"]["peak_bytes"] - by_run["untouched"]["above_bytes"]
    smallest, near = by_run["memplan smallest"], by_run["memplan 1.1 smallest"]
    floor = smallest["floor_bytes"] - resident
    least = min(row["above_bytes"] for row in others)
    slowest = max(
        row["predicted_slowdown"]
        for row in rows
        if row["run"].startswith("memplan") and row["above_bytes"] >= near["above_bytes"]
    )
    return (
        f"{smallest['model']}: {len(dominated)} of {len(others)} right points dominated"
        f"{' but for ' + ', '.join(missed) if missed else ''}; smallest "
        f"{smallest['above_bytes'] / floor:.2f}x floor, {smallest['above_bytes'] / least:.2f}x the "
        f"best of the others; slowest plan from 1.1x smallest on {slowest:.2f}x; |measured - "
        f"predicted| {median(map(abs, _errors(rows))):.3f} in the median"
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """The verdict on all models together: dominance, and times at two budgets."""
    right = [row for row in rows if not row["run"].startswith("memplan") and is_right(row)]
    lines = [
        f"{sum(row['dominated_by'] is not None for row in right)} of {len(right)} right points of "
        f"{len({row['model'] for row in rows})} models are dominated"
    ]
    for run in ("memplan 50%", "memplan 30%"):
        own = [row for row in rows if row["run"] == run]
        if own:
            lines.append(
                f"{run}: geometric mean over {len(own)} models {_mean(own, 'time_ratio'):.3f}x "
                f"measured, {_mean(own, 'predicted_slowdown'):.3f}x predicted, "
                f"{_mean(own, 'slowdown_bound'):.3f}x its bound"
            )
    errors = [error for model in by_model(rows) for error in _errors(model)]
    lines.append(
        f"|measured - predicted slowdown| {median(map(abs, errors)):.3f} in the median of "
        f"{len(errors)} plans; predicted too slow {sum(e < 0 for e in errors)} times"
    )
    return "\n".join(lines)


def by_model(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows, one list for each model."""
    names = dict.fromkeys(row["model"] for row in rows)
    return [[row for row in rows if row["model"] == name] for name in names]


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return math.exp(sum(math.log(row[name]) for row in rows) / len(rows))


def _errors(rows: list[dict[str, Any]]) -> list[float]:
    """Measured minus predicted slowdowns of one model's plans, against its plan at 100 %."""
    first = next(row for row in rows if row["run"] == "memplan 100%")["predicted_slowdown"]
    return [
        row["to_memplan_100"] - row["predicted_slowdown"] / first
        for row in rows
        if row["run"].startswith("memplan") and row["run"] != "memplan 100%"
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The peers' rows as Markdown."""
    lines = [
        "| model | run | above resident | time | predicted | bound | gradients | dominated by |",
        "|---|---|--:|--:|--:|--:|---|---|",
    ]
    for row in rows:
        bound = "" if row["slowdown_bound"] is None else f"{row['slowdown_bound']:.2f}x"
        predicted = row["predicted_slowdown"]
        is_peer = not row["run"].startswith("memplan") and is_right(row)
        error = row["gradient_error"]
        gradients = "same bits" if error == 0 else f"off by {error:.0e}"
        lines.append(
            f"| {row['model']} | {row['run']} | {memplan.format_bytes(row['above_bytes'])} "
            f"| {row['time_ratio']:.2f}x | {'' if predicted is None else f'{predicted:.2f}x'} "
            f"| {bound} | {gradients} "
            f"| {(row['dominated_by'] or 'none') if is_peer else ''} |"
        )
    return "\n".join(lines)


def short_table(rows: list[dict[str, Any]]) -> str:
    """One line for each model, as Markdown."""
    lines = [
        "| model | points of others, gradients right | dominated | smallest peak, others' "
        "| smallest peak, memplan's | time at 50%, predicted | time at 30%, predicted |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for of_model in by_model(rows):
        own = {row["run"]: row for row in of_model}
        others = [row for run, row in own.items() if not run.startswith("memplan")]
        right = [row for row in others if is_right(row)]
        least = min(right, key=lambda row: row["above_bytes"])
        smallest = own["memplan smallest"]
        cells = [
            f"{own[run]['time_ratio']:.2f}x, {own[run]['predicted_slowdown']:.2f}x"
            if run in own
            else "infeasible"
            for run in ("memplan 50%", "memplan 30%")
        ]
        lines.append(
            f"| {smallest['model']} | {len(right)} of {len(others)} "
            f"| {sum(row['dominated_by'] is not None for row in right)} "
            f"| {memplan.format_bytes(least['above_bytes'])} at {least['time_ratio']:.2f}x "
            f"| {memplan.format_bytes(smallest['above_bytes'])} at {smallest['time_ratio']:.2f}x "
            f"| {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Time over memory, one panel per model, four side by side; needs matplotlib."""
    import matplotlib.pyplot as plt  # noqa: PLC0415

    names = list(dict.fromkeys(row["model"] for row in rows))
    across, down = min(4, len(names)), math.ceil(len(names) / 4)
    _, axes = plt.subplots(down, across, figsize=(4.5 * across, 4 * down), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    styles = {"memplan": "o-", "torch": "x", "checkpoint": "s", "untouched": "*"}
    for axis, name in zip(axes.flat, names, strict=False):
        for kind, style in styles.items():
            points = sorted(
                (row["above_bytes"] / 2**20, row["time_ratio"])
                for row in rows
                if row["model"] == name and row["run"].startswith(kind) and is_right(row)
            )
            axis.plot([p[0] for p in points], [p[1] for p in points], style, label=kind)
        axis.set(title=name, xlabel="peak above resident (MiB)", ylabel="step time / untouched")
        axis.legend()
    plt.tight_layout()
    plt.savefig(path)
