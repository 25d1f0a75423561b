"""The only package that uses private torch names. Each was checked on torch 2.13.0.

Everything here has a narrow, typed face, so that a new torch release is met in one place.
"""

from memplan.torch_internals.backward import (
    backward_keeps_graph,
    exchanges_gradients,
    has_gradient_hooks,
    received_from_one_node,
)
from memplan.torch_internals.events import allocations, phase, recording, span_peaks, spans
from memplan.torch_internals.fake import (
    DispatchMode,
    as_if_traced,
    cpu_stand_ins,
    fake_mode_of,
    is_fake,
    is_plain_tensor,
    questions_about_tracing,
    set_origin,
    without_checkpointing,
    without_idle_moves,
    without_log_of_failures,
    without_modes,
    without_onednn,
)
from memplan.torch_internals.joint import (
    Joint,
    JointInput,
    JointOutput,
    UnsupportedJointError,
    boxed,
    copy_joint,
    is_backward,
    trace_joint,
)
from memplan.torch_internals.memory import (
    Allocations,
    inner_tensors,
    peak_requested_bytes,
    requested_bytes,
    without_data,
)
from memplan.torch_internals.optimizers import attributes_without_hooks, defined_step
from memplan.torch_internals.spent import SpentGradient
from memplan.torch_internals.state import (
    Autocast,
    OpOverload,
    enabled_attention,
    has_hooks,
    is_under_autocast,
    storage_key,
    version_of,
    warn_of_untested_torch,
    without_autocast,
)
from memplan.torch_internals.trees import TreeSpec, flatten, unflatten

__all__ = [
    "Allocations",
    "Autocast",
    "DispatchMode",
    "Joint",
    "JointInput",
    "JointOutput",
    "OpOverload",
    "SpentGradient",
    "TreeSpec",
    "UnsupportedJointError",
    "allocations",
    "as_if_traced",
    "attributes_without_hooks",
    "backward_keeps_graph",
    "boxed",
    "copy_joint",
    "cpu_stand_ins",
    "defined_step",
    "enabled_attention",
    "exchanges_gradients",
    "fake_mode_of",
    "flatten",
    "has_gradient_hooks",
    "has_hooks",
    "inner_tensors",
    "is_backward",
    "is_fake",
    "is_plain_tensor",
    "is_under_autocast",
    "peak_requested_bytes",
    "phase",
    "questions_about_tracing",
    "received_from_one_node",
    "recording",
    "requested_bytes",
    "set_origin",
    "span_peaks",
    "spans",
    "storage_key",
    "trace_joint",
    "unflatten",
    "version_of",
    "warn_of_untested_torch",
    "without_autocast",
    "without_checkpointing",
    "without_data",
    "without_idle_moves",
    "without_log_of_failures",
    "without_modes",
    "without_onednn",
]
