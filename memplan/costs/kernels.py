"""Memory of a kernel call: measured alone, or bounded by what is known of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from memplan.capture import unchanged_randomness
from memplan.costs.cache import CostCache
from memplan.costs.meters import metering, result_of
from memplan.costs.operands import filled, make_valid, other_cases
from memplan.errors import MemplanError
from memplan.ir.program import OpCost
from memplan.torch_internals import (
    KernelCall,
    OpOverload,
    TensorSpec,
    leaves_of,
    map_leaves,
    storage_key,
    without_autocast,
)

_LOG = logging.getLogger("memplan")

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class KernelMemory:
    """The memory that a call takes.

    Attributes:
        workspace_bytes: what it allocates and frees inside, at its peak, results apart.
        result_bytes: what each result takes, or None where its layout determines it.
        refusal: why it could not be measured, or "".
    """

    workspace_bytes: int = 0
    result_bytes: tuple[int, ...] | None = None
    refusal: str = ""


def measured_memory(
    calls: Iterable[KernelCall], device: torch.device
) -> Callable[[KernelCall], KernelMemory]:
    """Run each distinct call on made-up operands, unless it is in the cache of costs."""
    distinct = {call.signature: call for call in calls if call.result_bytes or _takes_some(call)}
    cache = CostCache.load(device)
    new = {name: call for name, call in distinct.items() if name not in cache.entries}
    measured = _measure(new, device) if new else {}
    kept = {name: one for name, one in measured.items() if not one.refusal}
    cache.updated(
        {
            name: OpCost(0.0, 0, one.workspace_bytes, one.result_bytes or ())
            for name, one in kept.items()
        }
    )
    known = {
        name: KernelMemory(cache.entries[name].workspace_bytes, cache.entries[name].result_bytes)
        for name in distinct
        if name in cache.entries
    }
    known |= measured
    return lambda call: known.get(call.signature, KernelMemory())


def _takes_some(call: KernelCall) -> bool:
    """Tell whether a call is more than a view: in-place ops allocate nothing visible."""
    return call.target._schema.is_mutable


def _measure(calls: Mapping[str, KernelCall], device: torch.device) -> dict[str, KernelMemory]:
    results: dict[str, tuple[int, ...]] = {}
    refusals: dict[str, KernelMemory] = {}
    numbers = {name: str(number) for number, name in enumerate(calls)}
    with unchanged_randomness(), torch.no_grad(), without_autocast(), metering(device) as meter:
        for name, call in calls.items():
            _LOG.debug("measuring kernel %s of %d", numbers[name], len(calls))
            try:
                args, kwargs = map_leaves(_made_up, (call.args, call.kwargs))
                args = _with_own_workspace(call.target, args)
                make_valid(call.target, args, kwargs)
                with torch.set_grad_enabled(call.with_grad):
                    run = partial(call.target, *args, **kwargs)
                    run()
                    cases = other_cases(call.target, args, kwargs)
                    result = result_of(meter, numbers[name], run, cases)
            except torch.OutOfMemoryError as error:
                raise MemplanError(
                    f"there is not enough memory to measure {call.target} alone; use analytic costs"
                ) from error
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                cause = str(error).strip().partition("\n")[0]
                refusals[name] = KernelMemory(refusal=f"{call.target}: {cause}")
                continue
            results[name] = _result_bytes(result, (args, kwargs))
            del result, args, kwargs, run, cases
    peaks = meter.peaks([numbers[name] for name in results])
    measured = {
        name: KernelMemory(max(0, peaks[numbers[name]] - sum(nbytes)), nbytes)
        for name, nbytes in results.items()
    }
    return {**measured, **refusals}


def _made_up(leaf: object) -> object:
    if not isinstance(leaf, TensorSpec):
        return leaf
    flat = filled(leaf.storage_bytes, leaf.dtype, leaf.device)
    return flat.as_strided(leaf.shape, leaf.stride, leaf.offset)


def _with_own_workspace(target: OpOverload, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with what the kernel's forward saved for it where that is opaque.

    Its size is known to oneDNN alone, and the kernel reads past the end of a smaller one.
    """
    if target is not _aten.mkldnn_rnn_layer_backward.default:
        return args
    x, *weights, hidden, cell = args[:7]
    is_reverse, mode, width, layers, has_biases, is_training, is_both, batch_sizes, is_first = args[
        13:22
    ]
    with torch.enable_grad():
        *_, kept = _aten.mkldnn_rnn_layer(
            *(x, *weights, hidden, cell, is_reverse, batch_sizes, mode, width, layers),
            *(has_biases, is_both, is_first, is_training),
        )
    return (*args[:-1], kept)


def _result_bytes(result: object, given: object) -> tuple[int, ...]:
    known = {storage_key(leaf) for leaf in _tensors(given)}
    sizes: dict[int, int] = {}
    for leaf in _tensors(result):
        if storage_key(leaf) not in known:
            sizes.setdefault(storage_key(leaf), leaf.untyped_storage().nbytes())
    return tuple(sizes.values())


def _tensors(tree: object) -> Iterator[torch.Tensor]:
    return (leaf for leaf in leaves_of(tree) if isinstance(leaf, torch.Tensor))


_SHRUNK = frozenset(
    [_aten.mse_loss.default, _aten.smooth_l1_loss.default, _aten.huber_loss.default]
)
"""Kernels whose reduced result occupies the memory of the unreduced one."""

_MOST_WORKSPACE: Mapping[object, float] = {
    _aten.convolution.default: 1.9,
    _aten.convolution_backward.default: 1.5,
    _aten.native_batch_norm.default: 0.1,
    _aten.native_batch_norm_backward.default: 0.5,
    _aten.native_layer_norm.default: 0.5,
    _aten.native_layer_norm_backward.default: 0.5,
    _aten.native_group_norm_backward.default: 0.1,
    _aten.embedding_dense_backward.default: 1.0,
    _aten.mkldnn_rnn_layer.default: 1.6,
    _aten.mkldnn_rnn_layer_backward.default: 1.3,
    _aten._safe_softmax.default: 0.2,
    _aten.mm.default: 0.2,
}
"""Kernels observed to allocate inside, at most so many times the bytes of their operands and
results (35 models, CPU, one and two threads)."""

_BLOCK = 16 * 16 + 1
"""Elements that oneDNN keeps for each element of a grouped convolution's kernel."""

_RECURRENT_SLACK = 1.1


def least_memory(call: KernelCall) -> KernelMemory:
    """The memory of a call whose kernel needs no workspace."""
    if call.target in _SHRUNK and call.result_bytes:
        first = call.args[0]
        return KernelMemory(0, (math.prod(first.shape) * first.dtype.itemsize,))
    if call.target is _aten.mkldnn_rnn_layer.default and call.with_grad:
        return KernelMemory(0, _recurrent_results(call, padding=0))
    return KernelMemory()


def most_memory(call: KernelCall) -> KernelMemory:
    """The memory of a call whose kernel needs the most observed of such kernels."""
    result_bytes = least_memory(call).result_bytes
    factor = _MOST_WORKSPACE.get(call.target)
    if factor is None:
        return KernelMemory(0, result_bytes)
    leaves = leaves_of(call.args)
    operands = sum(leaf.storage_bytes for leaf in leaves if isinstance(leaf, TensorSpec))
    workspace = int(factor * (operands + call.result_bytes))
    if call.target is _aten.convolution_backward.default and call.args[9] > 1:
        weight = call.args[2]
        kernel = math.prod(weight.shape[2:])
        blocked = call.args[9] * (kernel * _BLOCK + 1) * weight.dtype.itemsize
        workspace = max(workspace, blocked)
    if call.target is _aten.mkldnn_rnn_layer.default and call.with_grad:
        *others, kept = _recurrent_results(call, padding=16)
        result_bytes = (*others, int(_RECURRENT_SLACK * kept))
    return KernelMemory(workspace, result_bytes)


def _recurrent_results(call: KernelCall, padding: int) -> tuple[int, ...]:
    """Results of oneDNN's recurrent layer: its saved tensor has a layout of its own.

    Gates at each time; hidden and cell states at each, and a gradient beside either, below and
    above the layer; rows are padded.
    """
    steps, batch, inputs = call.args[0].shape
    width = call.args[10]
    item = call.args[0].dtype.itemsize
    row = max(inputs, width) + padding
    gates = steps * batch * (4 * width + padding)
    states = 5 * 2 * (steps + 1) * batch * row
    output, hidden = steps * batch * width * item, batch * width * item
    return (output, hidden, hidden, (gates + states) * item)
