"""What several passes look for in a graph."""

from memplan.analysis.couplings import SUMS, Chain, Coupling, Couplings, find_couplings
from memplan.analysis.memory import backward_readers, given_memory, memory_of, views_of
from memplan.torch_internals import is_backward

__all__ = [
    "SUMS",
    "Chain",
    "Coupling",
    "Couplings",
    "backward_readers",
    "find_couplings",
    "given_memory",
    "is_backward",
    "memory_of",
    "views_of",
]
