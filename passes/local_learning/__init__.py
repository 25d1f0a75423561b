"""Blocks that learn from losses of their own."""

from memplan.passes.local_learning.local_learning import learn_locally

__all__ = ["learn_locally"]
