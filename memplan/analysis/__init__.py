"""Structures that several passes look for in a graph."""

from memplan.analysis.blocks import Block, NamedAsLayers, find_blocks, own_tensors
from memplan.analysis.branches import Branch, Branches, Expected, find_branches
from memplan.analysis.calls import Key, Record, flops_of
from memplan.analysis.cuts import Cut, balanced, find_cuts
from memplan.analysis.memory import backward_readers, given_memory, memory_of, views_of
from memplan.analysis.operands import can_drop, drop, operand_memory
from memplan.analysis.replaying import Replay
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
    "Block",
    "Branch",
    "Branches",
    "Cut",
    "Expected",
    "Key",
    "NamedAsLayers",
    "Patterns",
    "Record",
    "Replay",
    "Residuals",
    "as_texts",
    "backward_readers",
    "balanced",
    "called_modules",
    "can_drop",
    "drop",
    "find_blocks",
    "find_branches",
    "find_cuts",
    "flops_of",
    "given_memory",
    "head_of",
    "is_backward",
    "is_conv1d",
    "is_linear",
    "last_layers",
    "memory_of",
    "operand_memory",
    "own_tensors",
    "parts_of",
    "select_modules",
    "select_parameters",
    "targeted_layers",
    "views_of",
]
