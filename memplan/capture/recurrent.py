"""Recurrent modules with dropout between their layers, captured one layer at a time.

torch 2.13 traces a recurrent module of several layers as if its dropout were zero. Run one layer
at a time, with dropout between them, the trace draws what the untouched module draws.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from memplan.torch_internals import FunctionMode, without_onednn

_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


@contextlib.contextmanager
def without_flat_weights() -> Iterator[None]:
    """Context in which recurrent modules leave their weights where they are.

    For cuDNN they move them into one buffer, which needs the addresses of a trace's tensors.
    """
    original = nn.RNNBase.flatten_parameters
    nn.RNNBase.flatten_parameters = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.RNNBase.flatten_parameters = original  # type: ignore[method-assign]


class OneLayerAtATime(FunctionMode):
    """Mode in which a recurrent call with dropout between layers becomes one call per layer.

    Attributes:
        seen: names of the recurrent kernels that were called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", "")
        if name in _RECURRENT and len(args) == 9:
            # cuDNN keeps the state of its own generator.
            other = " with dropout that draws other numbers" if _has_cudnn_dropout(args) else ""
            self.seen.add(f"{name}{other}")
            # What oneDNN's recurrent kernels save for their backward is opaque: it can be neither
            # measured nor recomputed.
            with without_onednn():
                return _recurrent(func, args)
        return func(*args, **kwargs)


def _recurrent(func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    if _has_dropout(args):
        return _layer_by_layer(func, *args)
    return func(*args)


def _has_dropout(args: tuple[Any, ...]) -> bool:
    """Tell whether a recurrent call has dropout between its layers."""
    # A packed sequence has its states where others have weights; torch does not trace those.
    if not isinstance(args[2], list):
        return False
    num_layers, dropout, training = args[4:7]
    return bool(training and dropout > 0 and num_layers > 1)


def _has_cudnn_dropout(args: tuple[Any, ...]) -> bool:
    return _has_dropout(args) and args[0].is_cuda and torch.backends.cudnn.enabled


def _layer_by_layer(
    func: Callable[..., Any],
    inputs: torch.Tensor,
    states: torch.Tensor | tuple[torch.Tensor, ...],
    weights: Sequence[torch.Tensor],
    *settings: Any,
) -> tuple[torch.Tensor, ...]:
    """Run as the kernel does: time first, dropout on every layer's output but the last."""
    bias, num_layers, dropout, _, bidirectional, batch_first = settings
    is_tuple = isinstance(states, tuple)
    initial: tuple[torch.Tensor, ...] = states if isinstance(states, tuple) else (states,)
    num_directions = 2 if bidirectional else 1
    num_weights = len(weights) // num_layers
    x = inputs.transpose(0, 1) if batch_first else inputs
    finals: list[tuple[torch.Tensor, ...]] = []
    for layer in range(num_layers):
        rows = slice(layer * num_directions, (layer + 1) * num_directions)
        own = weights[layer * num_weights : (layer + 1) * num_weights]
        start = tuple(state[rows] for state in initial)
        given = start if is_tuple else start[0]
        x, *final = func(x, given, own, bias, 1, 0.0, True, bidirectional, False)
        finals.append(tuple(final))
        if layer < num_layers - 1:
            x = torch.dropout(x, dropout, True)
    output = x.transpose(0, 1) if batch_first else x
    return (output, *(torch.cat(parts) for parts in zip(*finals, strict=True)))
