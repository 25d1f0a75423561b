"""Adds a finished gradient into the one that its parameter holds, as autograd would."""

from __future__ import annotations

import threading

import torch

_LOCK = threading.Lock()
"""Several threads may run backwards of one module; each addition is one."""


def accumulate(existing: torch.Tensor | None, gradient: torch.Tensor) -> torch.Tensor | None:
    """Add in place, and leave nothing to autograd; or leave it the gradient."""
    if existing is None:
        return gradient
    with _LOCK:
        existing.add_(gradient)
    return None
