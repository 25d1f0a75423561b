"""Errors that memplan raises. Every message names the input, what was expected, what to do."""

from __future__ import annotations


class MemplanError(Exception):
    """Base of every error that memplan raises on purpose."""


class UnitsError(MemplanError, ValueError):
    """A number of bytes or a budget that cannot be read."""


class CaptureError(MemplanError):
    """The model's step cannot be captured as a program."""


class UnfaithfulCapture(CaptureError):
    """A planned step left results other than the untouched module's."""


class PlanMismatch(MemplanError):
    """A plan is used for a step that it was not made for."""


class NotPlannedYet(MemplanError):
    """The plan was asked for before there was one."""


class InfeasibleBudget(MemplanError):
    """No schedule keeps the step within the budget.

    Attributes:
        smallest_budget_bytes: the smallest budget for which a plan is known.
    """

    def __init__(self, message: str, smallest_budget_bytes: int) -> None:
        super().__init__(message)
        self.smallest_budget_bytes = smallest_budget_bytes

    def __reduce__(self) -> tuple[type[InfeasibleBudget], tuple[str, int]]:
        return type(self), (str(self), self.smallest_budget_bytes)
