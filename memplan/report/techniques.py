"""Techniques as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from memplan.advise.techniques import Technique
from memplan.tables import Table
from memplan.units import format_bytes


def techniques_table(ranked: Sequence[Technique]) -> Table:
    """Each technique's yield, as they are ranked."""
    rows = [
        (
            one.name,
            format_bytes(one.plan.peak_bytes),
            f"{one.plan.slowdown:.3f}x",
            _yield(one),
            ", ".join(effect.value for effect in one.plan.effects),
            "fits" if one.fits else "",
        )
        for one in ranked
    ]
    return Table(
        "What would make it fit",
        ("technique", "peak", "time", "saved per 1 %", "results", ""),
        tuple(rows),
        frozenset({1, 2, 3}),
        frozenset({0, 4}),
        footer="Each planned alone, as near to the budget as it comes; exact ones first.",
    )


def _yield(one: Technique) -> str:
    if math.isinf(one.bytes_per_percent):
        return "free"
    return format_bytes(int(one.bytes_per_percent)) if one.saved_bytes else ""
