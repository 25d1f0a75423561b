"""Measured peaks, timelines and times: CPU, CUDA and host."""

from memplan.profiler.measure import Comparison, Profile, compare, profile

__all__ = ["Comparison", "Profile", "compare", "profile"]
