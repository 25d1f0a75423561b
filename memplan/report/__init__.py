"""Rendering only: numbers come in, text goes out."""

from memplan.report.choices import choices_document, choices_tables
from memplan.report.chrome import chrome_trace
from memplan.report.differences import difference_document, difference_table, increase
from memplan.report.documents import (
    checks_document,
    comparison_document,
    frontier_document,
    plan_document,
    profile_document,
)
from memplan.report.estimates import estimate_document, estimate_tables, verdict
from memplan.report.profiles import peak_line, profile_tables
from memplan.report.snapshot import snapshot_bytes
from memplan.report.solutions import solution_document, solution_table
from memplan.report.techniques import techniques_table
from memplan.report.terminal import terminal
from memplan.report.text import checks_table, comparison_table, frontier_table

__all__ = [
    "checks_document",
    "checks_table",
    "choices_document",
    "choices_tables",
    "chrome_trace",
    "comparison_document",
    "comparison_table",
    "difference_document",
    "difference_table",
    "estimate_document",
    "estimate_tables",
    "frontier_document",
    "frontier_table",
    "increase",
    "peak_line",
    "plan_document",
    "profile_document",
    "profile_tables",
    "snapshot_bytes",
    "solution_document",
    "solution_table",
    "techniques_table",
    "terminal",
    "verdict",
]
