"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from memplan.plan import Plan
from memplan.profiler import Comparison
from memplan.units import format_bytes


def comparison_table(comparison: Comparison, plan: Plan) -> Table:
    """The original and the planned step side by side."""
    original, planned = comparison.original, comparison.planned
    table = Table(title="One training step, measured", title_justify="left")
    table.add_column("")
    for header in ("original", "planned", "planned / original"):
        table.add_column(header, justify="right")
    above = [profile.peak_bytes - profile.resident_bytes for profile in (original, planned)]
    table.add_row(
        "peak memory",
        format_bytes(original.peak_bytes),
        format_bytes(planned.peak_bytes),
        f"{planned.peak_bytes / original.peak_bytes:.3f}",
    )
    table.add_row(
        "  above resident",
        format_bytes(above[0]),
        format_bytes(above[1]),
        f"{comparison.peak_ratio:.3f}",
    )
    for name in planned.phases:
        peaks = [profile.phases[name] for profile in (original, planned)]
        table.add_row(f"  in {name}", *map(format_bytes, peaks), f"{peaks[1] / peaks[0]:.3f}")
    table.add_row(
        "step time",
        f"{original.step_s * 1e3:.1f} ms",
        f"{planned.step_s * 1e3:.1f} ms",
        f"{comparison.time_ratio:.3f}",
    )
    table.add_row(
        "loss", *(f"{loss:.6f}" for loss in comparison.losses), same(comparison.loss_equal)
    )
    table.add_row("gradients", "", "", _gradients(comparison))
    table.add_row("buffers", "", "", same(comparison.buffers_equal))
    if "optimizer" in planned.phases:
        table.add_row("updated parameters", "", "", same(comparison.parameters_equal))
    table.add_row("random state", "", "", same(comparison.rng_equal))
    table.add_section()
    if plan.budget_bytes is not None:
        table.add_row("budget", "", format_bytes(plan.budget_bytes), "")
    table.add_row("predicted peak", "", format_bytes(plan.peak_bytes), "")
    error = planned.peak_bytes - plan.peak_bytes
    table.add_row("measured - predicted", "", f"{error:+d} B", "")
    table.add_row("predicted time", "", "", f"{plan.slowdown:.3f}")
    return table


_MOST_LIVE = 8


def plan_tables(plan: Plan) -> list[Table]:
    """What a plan needs, and what is alive at its peak."""
    totals = Table(title="One training step, predicted", title_justify="left")
    totals.add_column("")
    for header in ("unplanned", "planned", "planned / unplanned"):
        totals.add_column(header, justify="right")
    peaks = [plan.original_peak_bytes, plan.peak_bytes]
    above = [peak - plan.resident_bytes for peak in peaks]
    for name, (before, after) in (("peak memory", peaks), ("  above resident", above)):
        ratio = f"{after / before:.3f}" if before else ""
        totals.add_row(name, format_bytes(before), format_bytes(after), ratio)
    for name, nbytes in plan.phases.items():
        totals.add_row(f"  in {name}", "", format_bytes(nbytes), "")
    totals.add_row("step time", "", "", f"{plan.slowdown:.3f}")
    totals.add_row("ops run again", "", f"{plan.num_restores} of {plan.num_ops}", "")
    totals.add_row("smallest possible peak", "", f">= {format_bytes(plan.floor_bytes)}", "")
    if plan.budget_bytes is not None:
        totals.add_row("budget", "", format_bytes(plan.budget_bytes), "")
    totals.add_row("results", "", ", ".join(effect.value for effect in plan.effects), "")
    peak = Table(title=f"At the peak: {escape(plan.peak_op)}", title_justify="left")
    peak.add_column("bytes", justify="right")
    peak.add_column("what")
    peak.add_column("made by", overflow="fold")
    for category, nbytes in sorted(plan.categories.items(), key=lambda item: -item[1]):
        if nbytes:
            peak.add_row(format_bytes(nbytes), category, "")
    peak.add_section()
    for value in plan.live[:_MOST_LIVE]:
        where = value.module or "the root module"
        made = f"{value.target} in {where}" if value.target else where
        peak.add_row(format_bytes(value.nbytes), value.category, escape(made))
    return [totals, peak]


_BAR = 10


def frontier_table(plans: Sequence[Plan]) -> Table:
    """Plans by ascending peak, with the time that each takes."""
    table = Table(title="What memory costs in time, predicted", title_justify="left")
    for header in ("peak", "above resident", "share", "time", "ops run again"):
        table.add_column(header, justify="right")
    table.add_column("time added", no_wrap=True)
    most = max(plan.slowdown for plan in plans) - 1
    for plan in plans:
        above = plan.peak_bytes - plan.resident_bytes
        unplanned = plan.original_peak_bytes - plan.resident_bytes
        added = max(0.0, plan.slowdown - 1)
        table.add_row(
            format_bytes(plan.peak_bytes),
            format_bytes(above),
            f"{above / unplanned:.0%}" if unplanned else "",
            f"{plan.slowdown:.3f}x",
            str(plan.num_restores),
            "#" * round(_BAR * added / most) if most > 0 else "",
        )
    return table


def same(equal: bool) -> str:
    """In words."""
    return "same bits" if equal else "[bold red]DIFFERENT[/]"


def _gradients(comparison: Comparison) -> str:
    if comparison.gradients_equal:
        return same(True)
    return f"[bold red]DIFFERENT[/] by {comparison.max_gradient_error:.1e}"
