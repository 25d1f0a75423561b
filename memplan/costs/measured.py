"""Costs by running each distinct op once or a few times, on its own. The model is not run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

import torch
from torch import fx

from memplan.capture import Captured, call_of, made_up_kept, unchanged_randomness
from memplan.costs.cache import CostCache
from memplan.program import Costs, Layout, Op, OpCost
from memplan.torch_internals import (
    phase,
    recording,
    span_peaks,
    storage_key,
    without_autocast,
)

_RUNS = 5
_FEWEST_RUNS = 3
_ENOUGH_S = 0.25
"""An op that took this long altogether is run no more often than the fewest times."""

_LOG = logging.getLogger("memplan")


def measured_costs(captured: Captured, ops: Iterable[Op]) -> Costs:
    """Run every distinct op that is not in the cache; keep the result there.

    Workspace is the exact peak of the allocator's events inside the op, results apart, after one
    run to warm up. Time is the median of up to five runs. An op that refuses made-up operands has
    a cost that says so.
    """
    ops = list(ops)
    cache = CostCache.load()
    distinct = {op.signature: op for op in ops if op.signature not in cache.entries}
    new = _measure(captured, distinct) if distinct else {}
    cache = cache.updated({name: cost for name, cost in new.items() if not cost.refusal})
    known = {**cache.entries, **new}
    return Costs({op.id: known[op.signature] for op in ops}, f"measured, {cache.machine}")


def _measure(captured: Captured, distinct: Mapping[str, Op]) -> dict[str, OpCost]:
    result_bytes: dict[str, tuple[int, ...]] = {}
    result_layouts: dict[str, tuple[Layout | None, ...]] = {}
    seconds: dict[str, float] = {}
    refused: dict[str, OpCost] = {}
    with unchanged_randomness(), torch.no_grad(), without_autocast(), recording() as profile:
        for number, (signature, op) in enumerate(distinct.items()):
            _LOG.debug("measuring op %d of %d", number + 1, len(distinct))
            run, operands = _runnable(captured, op)
            if refusal := _refusal(run, op):
                refused[signature] = OpCost(0.0, refusal=refusal)
                continue
            with phase(str(number)):
                result = run()
            tensors = _in_recorded_places(captured, op, result)
            result_bytes[signature] = _storage_bytes(tensors, operands)
            result_layouts[signature] = tuple(map(_layout, tensors))
            del result, tensors
    for number, (signature, op) in enumerate(distinct.items()):
        if signature in refused:
            continue
        _LOG.debug("timing op %d of %d", number + 1, len(distinct))
        with unchanged_randomness(), torch.no_grad(), without_autocast():
            seconds[signature] = _seconds(_runnable(captured, op)[0])
    names = [str(number) for number, name in enumerate(distinct) if name not in refused]
    peaks = span_peaks(profile, names)
    measured = {
        signature: OpCost(
            seconds=seconds[signature],
            workspace_bytes=max(0, peaks[str(number)] - sum(result_bytes[signature])),
            result_bytes=result_bytes[signature],
            result_layouts=result_layouts[signature],
        )
        for number, signature in enumerate(distinct)
        if signature not in refused
    }
    return {**measured, **refused}


def _refusal(run: Callable[[], object], op: Op) -> str:
    """Run an op once, to warm up; why it refuses made-up operands, or ""."""
    try:
        run()
    except (RuntimeError, IndexError, ValueError) as error:
        cause = str(error).strip().partition("\n")[0]
        return (
            f"{op.target} (at {op.source or 'an unknown line'}) cannot be measured, because it "
            f'refuses made-up operands: {cause}. Pass Options(costs="analytic"), whose plans '
            "know no workspace."
        )
    return ""


def _layout(tensor: torch.Tensor | None) -> Layout | None:
    if tensor is None:
        return None
    return Layout(tensor.stride(), str(tensor.dtype).removeprefix("torch."))


def _in_recorded_places(captured: Captured, op: Op, result: object) -> list[torch.Tensor | None]:
    """A result's tensors; None where the trace recorded one and the kernel made none."""
    results = result if isinstance(result, list | tuple) else (result,)
    if op.variant_of is not None:
        return [item for item in results if isinstance(item, torch.Tensor)]
    value = captured.calls[op.id].meta["val"]
    recorded = value if isinstance(value, list | tuple) else (value,)
    return [
        item if isinstance(item, torch.Tensor) else None
        for item, like in zip(results, recorded, strict=True)
        if isinstance(like, torch.Tensor)
    ]


def _storage_bytes(
    results: Iterable[torch.Tensor | None], operands: Iterable[object]
) -> tuple[int, ...]:
    """What each storage of a result takes; nothing where it is an operand's memory, or missing."""
    operand_keys = {storage_key(tensor) for tensor in operands if isinstance(tensor, torch.Tensor)}
    nbytes: dict[int, int] = {}
    for place, tensor in enumerate(results):
        key = ~place if tensor is None else storage_key(tensor)
        is_new = tensor is not None and key not in operand_keys
        nbytes[key] = tensor.untyped_storage().nbytes() if is_new and tensor is not None else 0
    return tuple(nbytes.values())


def _seconds(run: Callable[[], object]) -> float:
    times: list[float] = []
    while len(times) < _FEWEST_RUNS or (len(times) < _RUNS and sum(times) < _ENOUGH_S):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def _runnable(captured: Captured, op: Op) -> tuple[Callable[[], object], Iterable[object]]:
    """The op on made-up operands of the recorded layout (floats 0.5, integers 0); the operands."""
    call = call_of(captured, op, made_up_kept(captured, op))
    made: dict[fx.Node, Any] = {}

    def operand(node: fx.Node) -> Any:
        if node not in made:
            made[node] = _like(node.meta["val"])
        return made[node]

    args = fx.map_arg(call.args, operand)
    if call.target is torch.ops.aten.nonzero_static.default:
        # As many places as the step was captured for; how many there are rules the workspace.
        mask = torch.arange(args[0].numel()) < call.kwargs["size"]
        args[0].copy_(mask.view(args[0].shape))
    kwargs = fx.map_arg(call.kwargs, operand)
    return lambda: call.target(*args, **kwargs), made.values()


def _like(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_like(item) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    count = value.untyped_storage().nbytes() // value.element_size()
    fill = 0.5 if value.is_floating_point() or value.is_complex() else 0
    flat = torch.full((count,), fill, dtype=value.dtype, device=value.device)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset())
