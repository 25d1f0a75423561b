"""What training less would free, as tables and as a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from memplan.advise.freezing import FreezingChoice
from memplan.report.schema import Choice, ChoicesDocument
from memplan.tables import Table
from memplan.units import format_bytes

_MOST_KERNELS = 3


def choices_tables(choices: Sequence[FreezingChoice]) -> list[Table]:
    """The model as it is and what each choice frees of it; and what the rest is kept for."""
    before, *others = choices
    totals = (before.gradient_bytes, before.state_bytes, before.activation_bytes, before.peak_bytes)
    rows: list[tuple[str, ...]] = [
        (before.name, format_bytes(before.trained_bytes), *map(format_bytes, totals)),
        (),
    ]
    for one in others:
        left = (one.gradient_bytes, one.state_bytes, one.activation_bytes, one.peak_bytes)
        freed = (_freed(*pair) for pair in zip(totals, left, strict=True))
        rows.append((one.name, format_bytes(one.trained_bytes), *freed))
    usual = _kept_for(before)
    distinct = [before, *(one for one in others if _kept_for(one) != usual)]
    return [
        Table(
            "What training less would free",
            ("choice", "trained", "gradients", "optimizer", "activations", "peak"),
            tuple(rows),
            frozenset({1, 2, 3, 4, 5}),
            frozenset({0}),
            footer="A name alone: that part frozen. Nothing is recomputed; budgets go below that.",
        ),
        Table(
            "What the activations that stay are kept for",
            ("choice", "kernels of the backward, and what each reads"),
            tuple((one.name, _kept_for(one)) for one in distinct),
            folded=frozenset({0, 1}),
            footer="What several kernels read counts for each. Choices not shown: as it is.",
        ),
    ]


def _freed(before: int, after: int) -> str:
    """Bytes less, or a plus where there are more."""
    if after > before:
        return f"+{format_bytes(after - before)}"
    return f"-{format_bytes(before - after)}" if after < before else "0 B"


def _kept_for(choice: FreezingChoice) -> str:
    return ", ".join(
        f"{target.split('.')[-2] if '.' in target else target} {format_bytes(nbytes)}"
        for target, nbytes in choice.kept_for[:_MOST_KERNELS]
    )


def choices_document(choices: Sequence[FreezingChoice]) -> ChoicesDocument:
    """The same as data."""
    return ChoicesDocument(
        choices=tuple(Choice(**{**asdict(one), "kept_for": dict(one.kept_for)}) for one in choices)
    )
