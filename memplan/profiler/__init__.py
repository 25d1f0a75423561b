"""Measured peaks, timelines and times: CPU, CUDA and host."""

from memplan.profiler.comparison import Comparison, compare
from memplan.profiler.estimating import Estimate, estimate
from memplan.profiler.measure import Profile, profile, time_phases
from memplan.profiler.scripts import ScriptProfile, profile_script
from memplan.profiler.tracing import trace_memory

__all__ = [
    "Comparison",
    "Estimate",
    "Profile",
    "ScriptProfile",
    "compare",
    "estimate",
    "profile",
    "profile_script",
    "time_phases",
    "trace_memory",
]
