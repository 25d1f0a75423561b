"""Plans and comparisons as sheets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memplan.plan import Plan
from memplan.profiler import Comparison
from memplan.report.sheet import ALARM, Sheet
from memplan.units import format_bytes

_THREE = frozenset({1, 2, 3})


def comparison_sheet(comparison: Comparison, plan: Plan) -> Sheet:
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
        ("loss", *(f"{loss:.6f}" for loss in comparison.losses), same(comparison.loss_equal)),
        ("gradients", "", "", _gradients(comparison)),
        ("buffers", "", "", same(comparison.buffers_equal)),
    ]
    if "optimizer" in planned.phases:
        rows.append(("updated parameters", "", "", same(comparison.parameters_equal)))
    rows += [("random state", "", "", same(comparison.rng_equal)), ()]
    if plan.budget_bytes is not None:
        rows.append(("budget", "", format_bytes(plan.budget_bytes), ""))
    error = planned.peak_bytes - plan.peak_bytes
    rows += [
        ("predicted peak", "", format_bytes(plan.peak_bytes), ""),
        ("measured - predicted", "", f"{error:+d} B", ""),
        ("predicted time", "", "", f"{plan.slowdown:.3f}"),
    ]
    headers = ("", "original", "planned", "planned / original")
    return Sheet("One training step, measured", headers, tuple(rows), _THREE, frozenset({3}))


_MOST_LIVE = 8


def plan_sheets(plan: Plan) -> list[Sheet]:
    """What a plan needs, and what is alive at its peak."""
    return [_totals(plan), _at_the_peak(plan)]


def _totals(plan: Plan) -> Sheet:
    peaks = [plan.original_peak_bytes, plan.peak_bytes]
    above = [peak - plan.resident_bytes for peak in peaks]
    rows: list[tuple[str, ...]] = []
    for name, (before, after) in (("peak memory", peaks), ("  above resident", above)):
        ratio = f"{after / before:.3f}" if before else ""
        rows.append((name, format_bytes(before), format_bytes(after), ratio))
    for name, nbytes in plan.phases.items():
        rows.append((f"  in {name}", "", format_bytes(nbytes), ""))
    rows += [
        ("step time", "", "", f"{plan.slowdown:.3f}"),
        ("ops run again", "", f"{plan.num_restores} of {plan.num_ops}", ""),
        ("smallest possible peak", "", f">= {format_bytes(plan.floor_bytes)}", ""),
    ]
    if plan.budget_bytes is not None:
        rows.append(("budget", "", format_bytes(plan.budget_bytes), ""))
    rows.append(("results", "", ", ".join(effect.value for effect in plan.effects), ""))
    headers = ("", "unplanned", "planned", "planned / unplanned")
    title = "One training step, predicted"
    return Sheet(title, headers, tuple(rows), _THREE, frozenset({2, 3}))


def _at_the_peak(plan: Plan) -> Sheet:
    rows: list[tuple[str, ...]] = [
        (format_bytes(nbytes), category, "")
        for category, nbytes in sorted(plan.categories.items(), key=lambda item: -item[1])
        if nbytes
    ]
    rows.append(())
    for value in plan.live[:_MOST_LIVE]:
        where = value.module or "the root module"
        made = f"{value.target} in {where}" if value.target else where
        rows.append((format_bytes(value.nbytes), value.category, made))
    return Sheet(
        f"At the peak: {plan.peak_op}",
        ("bytes", "what", "made by"),
        tuple(rows),
        frozenset({0}),
        frozenset({2}),
    )


_BAR = 10


def frontier_sheet(plans: Sequence[Plan]) -> Sheet:
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
    return Sheet("What memory costs in time, predicted", headers, tuple(rows), numbers)


def checks_sheet(checks: Mapping[str, tuple[bool, str]]) -> Sheet:
    """What works on this machine."""
    rows = [(name, "ok" if is_ok else "FAILS", text) for name, (is_ok, text) in checks.items()]
    return Sheet("memplan on this machine", ("", "", ""), tuple(rows), folded=frozenset({2}))


def same(equal: bool) -> str:
    """In words."""
    return "same bits" if equal else ALARM


def _gradients(comparison: Comparison) -> str:
    if comparison.gradients_equal:
        return same(True)
    return f"{ALARM} by {comparison.max_gradient_error:.1e}"
