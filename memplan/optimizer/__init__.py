"""The optimizer's part of a step: its cost, and its run inside the backward."""

from memplan.optimizer.clone import (
    duplicate_over,
    group_of,
    like,
    state_bytes,
    state_tensors,
    tensors_in,
)
from memplan.optimizer.cost import UpdateCost, update_cost
from memplan.optimizer.in_backward import InBackward
from memplan.optimizer.program import with_update
from memplan.optimizer.resolve import resolve_optimizer

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
