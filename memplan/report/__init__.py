"""Rendering only: numbers come in, text goes out."""

from memplan.report.choices import choices_document, choices_sheets
from memplan.report.chrome import chrome_trace
from memplan.report.differences import difference_document, difference_sheet, increase
from memplan.report.documents import (
    checks_document,
    comparison_document,
    frontier_document,
    plan_document,
    profile_document,
)
from memplan.report.estimates import estimate_document, estimate_sheets, verdict
from memplan.report.profiles import peak_line, profile_sheets
from memplan.report.sheet import Sheet, markdown, terminal
from memplan.report.snapshot import snapshot_bytes
from memplan.report.solutions import solution_document, solution_sheet
from memplan.report.techniques import techniques_document, techniques_sheet
from memplan.report.text import checks_sheet, comparison_sheet, frontier_sheet, plan_sheets

__all__ = [
    "Sheet",
    "checks_document",
    "checks_sheet",
    "choices_document",
    "choices_sheets",
    "chrome_trace",
    "comparison_document",
    "comparison_sheet",
    "difference_document",
    "difference_sheet",
    "estimate_document",
    "estimate_sheets",
    "frontier_document",
    "frontier_sheet",
    "increase",
    "markdown",
    "peak_line",
    "plan_document",
    "plan_sheets",
    "profile_document",
    "profile_sheets",
    "snapshot_bytes",
    "solution_document",
    "solution_sheet",
    "techniques_document",
    "techniques_sheet",
    "terminal",
    "verdict",
]
