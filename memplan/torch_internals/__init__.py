"""The only package that uses private torch names. Each was checked on torch 2.13.0.

Everything here has a narrow, typed face, so that a new torch release is met in one place.
"""

from memplan.torch_internals.events import allocations, recording, spans
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
from memplan.torch_internals.state import (
    OpOverload,
    backward_keeps_graph,
    enabled_attention,
    has_hooks,
    storage_key,
    version_of,
    warn_of_untested_torch,
    without_autocast,
)
from memplan.torch_internals.trees import TreeSpec, flatten, unflatten

__all__ = [
    "DispatchMode",
    "Joint",
    "JointInput",
    "JointOutput",
    "OpOverload",
    "TreeSpec",
    "UnsupportedJointError",
    "allocations",
    "as_if_traced",
    "backward_keeps_graph",
    "boxed",
    "copy_joint",
    "cpu_stand_ins",
    "enabled_attention",
    "fake_mode_of",
    "flatten",
    "has_hooks",
    "is_backward",
    "is_fake",
    "is_plain_tensor",
    "questions_about_tracing",
    "recording",
    "set_origin",
    "spans",
    "storage_key",
    "trace_joint",
    "unflatten",
    "version_of",
    "warn_of_untested_torch",
    "without_autocast",
    "without_checkpointing",
    "without_idle_moves",
    "without_log_of_failures",
    "without_modes",
    "without_onednn",
]
