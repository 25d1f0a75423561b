"""Rendering only: numbers come in, text goes out."""

from memplan.report.text import comparison_table

__all__ = ["comparison_table"]
