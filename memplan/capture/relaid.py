"""Tracing with the observed layouts of kernels' results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from memplan.capture.node_info import call_signature, signature
from memplan.ir.program import Layout
from memplan.torch_internals import OpOverload, Relay

Layouts = Sequence[Layout | None]

TRACED_AS = "traced_as"
"""Key in a node's meta of the signature of the traced call."""


def remember_calls(graph: fx.Graph) -> None:
    """Note how each op was called when it was traced; later rewrites may change that."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta[TRACED_AS] = signature(node)


def relaying(known: Mapping[str, Layouts]) -> Relay:
    """A relay that lays results out as observed: layouts by the call's signature."""
    targets = {traced_as.partition("(")[0] for traced_as in known}

    def relay(
        func: OpOverload,
        results: Sequence[torch.Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> list[torch.Tensor | None]:
        target = str(func)
        layouts = known.get(call_signature(target, args, kwargs), ()) if target in targets else ()
        pairs = zip(results, layouts, strict=False)
        return [None if seen is None else _laid_out(tensor, seen) for tensor, seen in pairs]

    return relay


def _laid_out(tensor: torch.Tensor, seen: Layout) -> torch.Tensor:
    dtype = dtype_of(seen)
    return torch.empty_strided(tensor.shape, seen.strides, dtype=dtype, device=seen.device)


def dtype_of(layout: Layout) -> torch.dtype:
    """The dtype of a result."""
    dtype = getattr(torch, layout.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
