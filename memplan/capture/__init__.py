"""Capture of a module and a sample as a program: forward graph, joint graph, ``Captured``."""

from memplan.capture.call import (
    call_of,
    first_tensor,
    items_of,
    source_of_call,
    stashed_operands,
)
from memplan.capture.captured import Captured, InPlace, Lowering, OpCall, Primal, tensors_of
from memplan.capture.cuda_emulation import CudaDropout, as_on_cuda
from memplan.capture.fake_run import run_without_data
from memplan.capture.flat import Differentiable, OutputLeaf
from memplan.capture.fuse import fuse, needs_one, orders
from memplan.capture.input_guards import Decision, replayed
from memplan.capture.isolation import ONE_AT_A_TIME, unchanged_randomness, without_data_of
from memplan.capture.joint import Traced, rewrite, trace
from memplan.capture.layout import other_layouts
from memplan.capture.module_state import unchanged_attributes
from memplan.capture.provenance import Known, running, running_anywhere, users_line, users_place
from memplan.capture.python_state import attributes_of
from memplan.capture.reader import read
from memplan.capture.relaid import Layouts
from memplan.capture.updates import trained_by, update_in_backward, update_parameter

__all__ = [
    "ONE_AT_A_TIME",
    "Captured",
    "CudaDropout",
    "Decision",
    "Differentiable",
    "InPlace",
    "Known",
    "Layouts",
    "Lowering",
    "OpCall",
    "OutputLeaf",
    "Primal",
    "Traced",
    "as_on_cuda",
    "attributes_of",
    "call_of",
    "first_tensor",
    "fuse",
    "items_of",
    "needs_one",
    "orders",
    "other_layouts",
    "read",
    "replayed",
    "rewrite",
    "run_without_data",
    "running",
    "running_anywhere",
    "source_of_call",
    "stashed_operands",
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
