"""From a module and a sample to a program: forward graph, joint graph, ``Captured``."""

from memplan.capture.call import OpCall, call_of
from memplan.capture.captured import Captured, Primal
from memplan.capture.flat import Differentiable, OutputLeaf
from memplan.capture.joint import Traced, rewrite, trace
from memplan.capture.layout import Strides, other_layouts, with_layouts
from memplan.capture.reader import read
from memplan.capture.surroundings import unchanged_randomness

__all__ = [
    "Captured",
    "Differentiable",
    "OpCall",
    "OutputLeaf",
    "Primal",
    "Strides",
    "Traced",
    "call_of",
    "other_layouts",
    "read",
    "rewrite",
    "trace",
    "unchanged_randomness",
    "with_layouts",
]
