"""From a module and a sample to a program: forward graph, joint graph, ``Captured``."""

from memplan.capture.as_on_cuda import CudaDropout, as_on_cuda
from memplan.capture.attributes import unchanged_attributes
from memplan.capture.call import OpCall, call_of, made_up_kept, reads_kept, source_of_call
from memplan.capture.captured import Captured, Primal, tensors_of
from memplan.capture.decisions import Decision, replayed
from memplan.capture.flat import Differentiable, OutputLeaf
from memplan.capture.fuse import fuse, needs_one, orders
from memplan.capture.joint import Traced, rewrite, trace
from memplan.capture.layout import other_layouts
from memplan.capture.origins import Known, running, running_anywhere, users_line, users_place
from memplan.capture.python_state import attributes_of
from memplan.capture.reader import read
from memplan.capture.rehearsal import run_without_data
from memplan.capture.relaid import Layouts
from memplan.capture.surroundings import ONE_AT_A_TIME, unchanged_randomness, without_data_of
from memplan.capture.updates import trained_by, update_in_backward, update_parameter

__all__ = [
    "ONE_AT_A_TIME",
    "Captured",
    "CudaDropout",
    "Decision",
    "Differentiable",
    "Known",
    "Layouts",
    "OpCall",
    "OutputLeaf",
    "Primal",
    "Traced",
    "as_on_cuda",
    "attributes_of",
    "call_of",
    "fuse",
    "made_up_kept",
    "needs_one",
    "orders",
    "other_layouts",
    "read",
    "reads_kept",
    "replayed",
    "rewrite",
    "run_without_data",
    "running",
    "running_anywhere",
    "source_of_call",
    "tensors_of",
    "trace",
    "trained_by",
    "unchanged_attributes",
    "unchanged_randomness",
    "update_in_backward",
    "update_parameter",
    "users_line",
    "users_place",
    "without_data_of",
]
