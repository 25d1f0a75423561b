"""Measured peaks, timelines and times: CPU, CUDA and host."""

from memplan.profiler.comparison import Comparison, compare
from memplan.profiler.measure import Profile, profile, time_phases
from memplan.profiler.tracing import trace_memory

__all__ = ["Comparison", "Profile", "compare", "profile", "time_phases", "trace_memory"]
