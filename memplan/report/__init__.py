"""Rendering only: numbers come in, text goes out."""

from memplan.report.text import comparison_table, frontier_table, plan_tables

__all__ = ["comparison_table", "frontier_table", "plan_tables"]
