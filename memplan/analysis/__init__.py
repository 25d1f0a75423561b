"""What several passes look for in a graph."""

from memplan.analysis.couplings import SUMS, Chain, Coupling, Couplings, find_couplings
from memplan.analysis.cuts import Cut, balanced, find_cuts
from memplan.analysis.memory import backward_readers, given_memory, memory_of, views_of
from memplan.analysis.operands import can_drop, drop, operand_memory
from memplan.analysis.residuals import Residuals, last_layers
from memplan.analysis.selecting import (
    Patterns,
    as_texts,
    called_modules,
    head_of,
    is_conv1d,
    is_linear,
    parts_of,
    select_modules,
    select_parameters,
    targeted_layers,
)
from memplan.torch_internals import is_backward

__all__ = [
    "SUMS",
    "Chain",
    "Coupling",
    "Couplings",
    "Cut",
    "Patterns",
    "Residuals",
    "as_texts",
    "backward_readers",
    "balanced",
    "called_modules",
    "can_drop",
    "drop",
    "find_couplings",
    "find_cuts",
    "given_memory",
    "head_of",
    "is_backward",
    "is_conv1d",
    "is_linear",
    "last_layers",
    "memory_of",
    "operand_memory",
    "parts_of",
    "select_modules",
    "select_parameters",
    "targeted_layers",
    "views_of",
]
