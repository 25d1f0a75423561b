"""The results of ``reversible.py`` as Markdown, with targets beside the figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
MIB = 2**20

INVERTING = "RevNet, inverting plan"
TARGETS = {"110": (0.10, 1.35), "164b": (0.15, None)}
"""Activations as a share of ResNet's and, if any, time over RevNet's own eager step."""

GROWTH_TARGET = 0.03
MAX_ERROR_TARGET, MEDIAN_ERROR_TARGET = 30, 3

ALIKE = 1e-2
"""Gradients and statistics up to this part of their largest entry count as the same: rounding is
far below, and another dropout mask or another update of a mean far above."""


def memory(rows: list[Row]) -> str:
    """Markdown of ``memory``, with its targets below."""
    lines = [
        f"Batch {rows[0]['batch']}.\n",
        "| depth | step | parameters | above resident | activations | of ResNet's | step time "
        "| of RevNet's | predicted | predicted - measured peak |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    verdicts = []
    for row in rows:
        plain = next(r for r in rows if r["run"] == "ResNet" and r["depth"] == row["depth"])
        share = row["activation_bytes"] / plain["activation_bytes"]
        cells = [row["depth"], row["run"], f"{row['parameters'] / 1e6:.2f} M"]
        cells += [f"{row[key] / MIB:.1f} MiB" for key in ("above_bytes", "activation_bytes")]
        cells += [f"{share:.3f}x", f"{row['step_s']:.2f} s", f"{row['time_ratio']:.2f}x"]
        if "off_bytes" in row:
            cells += [f"{row['predicted_ratio']:.2f}x", f"{row['off_bytes']} B"]
        else:
            cells += ["", ""]
        lines.append(_line(cells))
        if row["run"] == INVERTING and row["depth"] in TARGETS:
            most_share, most_time = TARGETS[row["depth"]]
            verdicts.append(f"* RevNet-{row['depth']}: activations {_verdict(share, most_share)}")
            if most_time is not None:
                verdicts[-1] += f"; time {_verdict(row['time_ratio'], most_time)}"
    return _page(lines, verdicts)


def depths(rows: list[Row]) -> str:
    """Markdown of ``depths``, with its target below."""
    lines = [
        f"Batch {rows[0]['batch']}. The deepest network is planned for the least memory within the "
        "time limit; what its activations take is the budget of all others.\n",
        "| depth | ResNet's activations | growth | RevNet's, inverted | growth | time | plan |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [row["depth"]]
        for key in ("plain_bytes", "activation_bytes"):
            cells += [f"{row[key] / MIB:.1f} MiB", f"{row[key] / rows[0][key] - 1:+.1%}"]
        cells += [f"{row['time_ratio']:.2f}x", f"{row['predicted_ratio']:.2f}x"]
        lines.append(_line(cells))
    last = rows[-1]["activation_bytes"] / rows[0]["activation_bytes"]
    ends = f"From depth {rows[0]['depth']} to {rows[-1]['depth']}"
    return _page(lines, [f"* {ends}: {_verdict(last, 1 + GROWTH_TARGET)}"])


def drift(rows: list[Row]) -> str:
    """Markdown of ``drift``, with its targets below."""
    lines = [
        f"Batch {rows[0]['batch']}; the largest error of a gradient over its largest entry, the "
        "maximum and the median over all gradients.\n",
        "| depth | plain, maximum | inverting, maximum | ratio | plain, median "
        "| inverting, median | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    verdicts = []
    for row in rows:
        cells, ratios = [row["depth"]], []
        for key in ("max", "median"):
            plain, ours = row[f"plain_{key}"], row[f"inverting_{key}"]
            ratios.append(ours / plain)
            cells += [f"{plain:.1e}", f"{ours:.1e}", f"{ratios[-1]:.1f}x"]
        lines.append(_line(cells))
        verdicts.append(
            f"* Depth {row['depth']}: maximum {_verdict(ratios[0], MAX_ERROR_TARGET)} plain's; "
            f"median {_verdict(ratios[1], MEDIAN_ERROR_TARGET)} plain's"
        )
    return _page(lines, verdicts)


def peers(rows: list[Row]) -> str:
    """Markdown of ``peers``."""
    first = rows[0]
    eager = next(row for row in rows if row["run"] == "eager")
    lines = [
        f"{first['blocks']} blocks of two functions of width {first['width']}, batch "
        f"{first['batch']}; errors of gradients against 64 bits. With dropout: whether gradients "
        "are those of the loss that was returned, and, under one seed, those of the eager step; "
        "and whether torch's random state is.\n",
        "| run | activations | of eager's | time | maximum error | median error | running "
        "statistics | dropout: gradients of its loss | as eager's | random state as eager's |",
        "|---|--:|--:|--:|--:|--:|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['run']} | {row['failed']} |" + " |" * 8)
            continue
        share = row["activation_bytes"] / eager["activation_bytes"]
        cells = [row["run"], f"{row['activation_bytes'] / MIB:.1f} MiB", f"{share:.3f}x"]
        cells += [f"{row['time_ratio']:.2f}x", f"{row['max_error']:.1e}"]
        cells += [f"{row['median_error']:.1e}", _rightness(row["statistics_error"])]
        lines.append(_line([*cells, *_dropout_cells(row)]))
    return "\n".join(lines)


def _dropout_cells(row: Row) -> list[str]:
    if "slope_error" not in row:
        return [row.get("dropout_failed", ""), "", ""]
    error = row["dropout_error"]
    as_eager = "yes" if error <= ALIKE else f"no ({error:.0e})"
    return [
        _rightness(row["slope_error"]), as_eager, "yes" if row["same_random_state"] else "no",
    ]  # fmt: skip


def _rightness(error: float) -> str:
    return f"right ({error:.0e})" if error <= ALIKE else f"**wrong** ({error:.0e})"


def _page(lines: list[str], verdicts: list[str]) -> str:
    """A table, and a list below it unless it is empty."""
    return "\n".join([*lines, *(["", *verdicts] if verdicts else [])])


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _verdict(value: float, most: float) -> str:
    return f"{value:.3g}x (target at most {most:g}x: {'met' if value <= most else '**missed**'})"
