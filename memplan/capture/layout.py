"""Layouts of kernels' results, where a trace recorded others.

The rules by which torch predicts a kernel's strides, dtypes and devices are sometimes wrong, and so
is what follows from them: a ``view`` that the kernel's real result cannot have, where eager copies;
a gradient that autograd computes in the layout of what it is for; a norm's statistics in 32 bits,
recorded in 16. So the step is traced again, with the observed layouts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from memplan.capture.captured import Captured, tensors_of
from memplan.capture.node_info import signature, source_of, target_name
from memplan.capture.relaid import TRACED_AS, Layouts, dtype_of
from memplan.errors import CaptureError
from memplan.ir.program import Costs, Layout
from memplan.torch_internals import memory_format_of


def other_layouts(
    captured: Captured, costs: Costs, known: Mapping[str, Layouts]
) -> dict[str, Layouts]:
    """Observed layouts of results that differ from those recorded, by the traced call.

    Raises:
        CaptureError: naming an op whose results differ although its layouts are known.
    """
    found: dict[str, Layouts] = {}
    for op, node in captured.calls.items():
        seen = costs.by_op[op].result_layouts
        recorded = tensors_of(node.meta["val"])
        if not any(_differ(like, layout) for like, layout in zip(recorded, seen, strict=False)):
            continue
        traced_as = node.meta.get(TRACED_AS, "")
        is_other_shape = any(
            one is not None and like.dim() != len(one.strides)
            for like, one in zip(recorded, seen, strict=False)
        )
        can_follow = traced_as.startswith(f"{target_name(node)}(") and traced_as not in known
        if is_other_shape or not can_follow:
            raise CaptureError(
                f"{target_name(node)} (at {source_of(node) or 'an unknown line'}) lays out its "
                f"results otherwise than torch predicts ({signature(node)} gives {seen}), and a "
                "trace cannot follow that; unsupported"
            )
        found[traced_as] = seen
    return found


def _differ(recorded: torch.Tensor, seen: Layout | None) -> bool:
    if seen is None:
        return False
    if recorded.dim() != len(seen.strides):
        return True  # no layout corrects that, and the trace is refused
    if recorded.dtype != dtype_of(seen) or recorded.device != torch.device(seen.device):
        return True
    pairs = zip(recorded.shape, recorded.stride(), seen.strides, strict=True)
    if recorded.numel() > 0 and any(size > 1 and mine != other for size, mine, other in pairs):
        return True
    # Where a size is 1, its stride has no effect on places, but torch still goes by it.
    like = torch.empty_strided(recorded.shape, seen.strides, device="meta")
    return memory_format_of(like) != memory_format_of(recorded)
