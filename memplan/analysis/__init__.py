"""What several passes look for in a graph."""

from memplan.analysis.memory import backward_readers, given_memory, memory_of

__all__ = ["backward_readers", "given_memory", "memory_of"]
