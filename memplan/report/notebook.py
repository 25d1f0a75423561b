"""Plans, profiles and comparisons as HTML, for notebooks."""

from __future__ import annotations

from memplan.plan import Plan
from memplan.profiler import Comparison, Profile
from memplan.report.sheet import Sheet, html_table
from memplan.report.text import plan_sheets, same
from memplan.units import format_bytes


def plan_html(plan: Plan) -> str:
    """What a plan needs, and what is alive at its peak."""
    return "".join(map(html_table, plan_sheets(plan)))


def profile_html(profile: Profile) -> str:
    """The memory of a measured step by phase, and its time."""
    rows = [
        ("peak memory", format_bytes(profile.peak_bytes)),
        *((f"in {name}", format_bytes(nbytes)) for name, nbytes in profile.phases.items()),
        ("resident", format_bytes(profile.resident_bytes)),
        ("step time", f"{profile.step_s * 1e3:.1f} ms"),
    ]
    title = f"One training step on {profile.device}, measured"
    return html_table(Sheet(title, ("", "measured"), tuple(rows), frozenset({1})))


def comparison_html(comparison: Comparison) -> str:
    """Memory, time and bits of two measured steps, side by side."""
    both = (comparison.original, comparison.planned)
    peaks = [profile.peak_bytes for profile in both]
    above = [profile.peak_bytes - profile.resident_bytes for profile in both]
    times = [f"{profile.step_s * 1e3:.1f} ms" for profile in both]
    rows = (
        ("peak memory", *map(format_bytes, peaks), f"{peaks[1] / peaks[0]:.3f}"),
        ("above resident", *map(format_bytes, above), f"{comparison.peak_ratio:.3f}"),
        ("step time", *times, f"{comparison.time_ratio:.3f}"),
        ("results", "", "", same(comparison.is_exact)),
    )
    headers = ("", "original", "planned", "planned / original")
    return html_table(Sheet("One training step, measured", headers, rows, frozenset({1, 2, 3})))
