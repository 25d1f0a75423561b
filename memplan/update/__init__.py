"""The optimizer's part of a step: what it needs, and how it runs inside the backward."""

from memplan.update.cost import UpdateCost, update_cost
from memplan.update.duplicate import (
    duplicate_over,
    group_of,
    like,
    state_bytes,
    state_tensors,
    tensors_in,
)
from memplan.update.given import resolve_optimizer
from memplan.update.in_backward import InBackward
from memplan.update.program import with_update

__all__ = [
    "InBackward",
    "UpdateCost",
    "duplicate_over",
    "group_of",
    "like",
    "resolve_optimizer",
    "state_bytes",
    "state_tensors",
    "tensors_in",
    "update_cost",
    "with_update",
]
