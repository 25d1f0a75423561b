"""Results as tables for a terminal."""

from __future__ import annotations

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


def same(equal: bool) -> str:
    """In words."""
    return "same bits" if equal else "[bold red]DIFFERENT[/]"


def _gradients(comparison: Comparison) -> str:
    if comparison.gradients_equal:
        return same(True)
    return f"[bold red]DIFFERENT[/] by {comparison.max_gradient_error:.1e}"
