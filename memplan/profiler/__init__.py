"""Measured peaks, timelines and times: CPU, CUDA and host."""

from memplan.profiler.comparison import Comparison, compare
from memplan.profiler.measure import Profile, profile

__all__ = ["Comparison", "Profile", "compare", "profile"]
