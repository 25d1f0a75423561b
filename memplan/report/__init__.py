"""Rendering only: numbers come in, text goes out."""

from memplan.report.documents import (
    comparison_document,
    frontier_document,
    plan_document,
    profile_document,
)
from memplan.report.estimates import estimate_document, estimate_sheets, verdict
from memplan.report.profiles import peak_line, profile_sheets
from memplan.report.sheet import Sheet, markdown, terminal
from memplan.report.text import comparison_sheet, frontier_sheet, plan_sheets

__all__ = [
    "Sheet",
    "comparison_document",
    "comparison_sheet",
    "estimate_document",
    "estimate_sheets",
    "frontier_document",
    "frontier_sheet",
    "markdown",
    "peak_line",
    "plan_document",
    "plan_sheets",
    "profile_document",
    "profile_sheets",
    "terminal",
    "verdict",
]
