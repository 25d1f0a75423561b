"""Functions called from Python, as a CUDA device would run them, where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from memplan.capture.attention import CudaAttention
from memplan.capture.casts import cuda_casts_on_cpu
from memplan.capture.sample import Sample
from memplan.torch_internals import FunctionMode


@contextlib.contextmanager
def as_on_cuda(given: Sample) -> Iterator[None]:
    """Context in which attention and autocast are those of a CUDA device."""
    is_there = any(tensor.is_cuda for tensor in given.tensors())
    with CudaAttention(), contextlib.nullcontext() if is_there else cuda_casts_on_cpu():
        yield


class CudaDropout(FunctionMode):
    """Mode in which dropout is CUDA's fused kernel, which saves a boolean mask."""

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is nn.functional.dropout:
            x, probability, is_training = _dropout_arguments(*args, **kwargs)
            if is_training and 0 < probability < 1:
                return torch.native_dropout(x, probability, True)[0]
        return func(*args, **kwargs)


def _dropout_arguments(
    input: torch.Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> tuple[torch.Tensor, float, bool]:
    del inplace
    return input, p, training
