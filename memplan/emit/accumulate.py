"""Accumulation of a gradient into the one that its parameter holds, as by autograd."""

from __future__ import annotations

import threading

import torch

_LOCK = threading.Lock()
"""Lock of each addition: several threads may run backwards of one module."""


def accumulate(existing: torch.Tensor | None, gradient: torch.Tensor) -> torch.Tensor | None:
    """Add in place and leave nothing to autograd, or leave it the gradient."""
    if existing is None:
        return gradient
    with _LOCK:
        existing.add_(gradient)
    return None
