"""Rendering only: numbers in, text out."""

from memplan.report.chrome import chrome_trace
from memplan.report.differences import difference_document, difference_table, increase
from memplan.report.documents import (
    checks_document,
    choices_document,
    comparison_document,
    estimate_document,
    frontier_document,
    plan_document,
    profile_document,
    solution_document,
    technique_rows,
)
from memplan.report.snapshot import snapshot_bytes
from memplan.report.tables import tables_of, techniques_table
from memplan.report.terminal import terminal

__all__ = [
    "checks_document",
    "choices_document",
    "chrome_trace",
    "comparison_document",
    "difference_document",
    "difference_table",
    "estimate_document",
    "frontier_document",
    "increase",
    "plan_document",
    "profile_document",
    "snapshot_bytes",
    "solution_document",
    "tables_of",
    "technique_rows",
    "techniques_table",
    "terminal",
]
