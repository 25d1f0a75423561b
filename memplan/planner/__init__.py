"""The search: program, costs, recoveries and a budget in; a schedule out. No torch here."""

from memplan.planner.search import MAX_SLOWDOWN, Solution, keep_all, solve

__all__ = ["MAX_SLOWDOWN", "Solution", "keep_all", "solve"]
