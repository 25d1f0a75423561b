"""Comparisons, frontiers and checks as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memplan.planner.plan import Plan
from memplan.profiler import Comparison
from memplan.tables import ALARM, Table, said_of_bits
from memplan.units import format_bytes

_THREE = frozenset({1, 2, 3})


def comparison_table(comparison: Comparison, plan: Plan) -> Table:
    """The original and the planned step side by side."""
    original, planned = comparison.original, comparison.planned
    above = [profile.peak_bytes - profile.resident_bytes for profile in (original, planned)]
    peaks = [original.peak_bytes, planned.peak_bytes]
    rows: list[tuple[str, ...]] = [
        ("peak memory", *map(format_bytes, peaks), f"{peaks[1] / peaks[0]:.3f}"),
        ("  above resident", *map(format_bytes, above), f"{comparison.peak_ratio:.3f}"),
    ]
    for name in planned.phases:
        both = [profile.phases[name] for profile in (original, planned)]
        rows.append((f"  in {name}", *map(format_bytes, both), f"{both[1] / both[0]:.3f}"))
    times = [f"{profile.step_s * 1e3:.1f} ms" for profile in (original, planned)]
    rows += [
        ("step time", *times, f"{comparison.time_ratio:.3f}"),
        (
            "loss",
            *(f"{loss:.6f}" for loss in comparison.losses),
            said_of_bits(comparison.loss_equal),
        ),
        ("gradients", "", "", _gradients(comparison)),
        ("buffers", "", "", said_of_bits(comparison.buffers_equal)),
    ]
    if "optimizer" in planned.phases:
        rows.append(("updated parameters", "", "", said_of_bits(comparison.parameters_equal)))
    rows += [("random state", "", "", said_of_bits(comparison.rng_equal)), ()]
    if plan.budget_bytes is not None:
        rows.append(("budget", "", format_bytes(plan.budget_bytes), ""))
    error = planned.peak_bytes - plan.peak_bytes
    rows += [
        ("predicted peak", "", format_bytes(plan.peak_bytes), ""),
        ("measured - predicted", "", f"{error:+d} B", ""),
        ("predicted time", "", "", f"{plan.slowdown:.3f}"),
    ]
    headers = ("", "original", "planned", "planned / original")
    return Table("One training step, measured", headers, tuple(rows), _THREE, frozenset({3}))


_BAR = 10


def frontier_table(plans: Sequence[Plan]) -> Table:
    """Plans by ascending peak, with the time that each takes."""
    most = max(plan.slowdown for plan in plans) - 1
    rows = []
    for plan in plans:
        above = plan.peak_bytes - plan.resident_bytes
        unplanned = plan.original_peak_bytes - plan.resident_bytes
        added = max(0.0, plan.slowdown - 1)
        rows.append(
            (
                format_bytes(plan.peak_bytes),
                format_bytes(above),
                f"{above / unplanned:.0%}" if unplanned else "",
                f"{plan.slowdown:.3f}x",
                str(plan.num_restores),
                "#" * round(_BAR * added / most) if most > 0 else "",
            )
        )
    headers = ("peak", "above resident", "share", "time", "ops run again", "time added")
    numbers = frozenset(range(5))
    return Table("What memory costs in time, predicted", headers, tuple(rows), numbers)


def checks_table(checks: Mapping[str, tuple[bool, str]]) -> Table:
    """What works on this machine."""
    rows = [(name, "ok" if is_ok else "FAILS", text) for name, (is_ok, text) in checks.items()]
    return Table("memplan on this machine", ("", "", ""), tuple(rows), folded=frozenset({2}))


def _gradients(comparison: Comparison) -> str:
    if comparison.gradients_equal:
        return said_of_bits(True)
    return f"{ALARM} by {comparison.max_gradient_error:.1e}"
