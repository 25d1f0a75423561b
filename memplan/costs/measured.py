"""Costs by running each distinct op once or a few times, on its own. The model is not run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from memplan.capture import (
    Captured,
    call_of,
    stashed_operands,
    tensors_of,
    unchanged_randomness,
)
from memplan.costs.cache import CostCache
from memplan.costs.meters import call_seconds, metering, result_of
from memplan.costs.operands import made_up_like, make_valid, other_cases
from memplan.ir.program import Costs, Layout, Op, OpCost
from memplan.torch_internals import storage_key, without_autocast

_ROUNDS = 2
_LONGEST_S = 0.2
_MOST_ROUNDS = 12
"""All ops are timed one after another in this many rounds: a temporary slowdown of the machine then
shows in one round, and the least time is taken. A few short ops take more rounds, for as long."""

_LOG = logging.getLogger("memplan")


def measured_costs(captured: Captured, ops: Iterable[Op]) -> Costs:
    """Run every distinct op that is not in the cache, and cache the result.

    An op that reads what another one stashed comes after that one. Workspace is the exact peak of
    the allocator inside the op, results apart, after one run to warm up. Time is the least of a few
    runs. An op that refuses made-up operands has a cost that says so.
    """
    ops = list(ops)
    device = captured.device
    cache = CostCache.load(device)
    distinct = {op.signature: op for op in ops if op.signature not in cache.entries}
    num_values = len(captured.program.values)
    stashing = {id: op for op in ops for id in op.results if id >= num_values}
    bench = _Bench(captured, stashing)
    new = _measure(bench, distinct, cache.entries) if distinct else {}
    cache = cache.updated(
        {name: new[name] for name in new if _can_be_kept(distinct[name], new[name])}
    )
    known = {**cache.entries, **new}
    return Costs({op.id: known[op.signature] for op in ops}, f"measured, {cache.machine}")


def _can_be_kept(op: Op, cost: OpCost) -> bool:
    """Tell whether a cost holds for other processes: not if the op's code may be anyone's."""
    is_known = op.variant_of is None or op.target.startswith("memplan.")
    return is_known and not cost.refusal


@dataclass(frozen=True, slots=True)
class _Runnable:
    """A call on made-up operands.

    Attributes:
        run: calls it.
        operands: its operands, by the node that they stand for.
        stashed: operands that were stashed.
        cases: writes its operands anew, for what else a kernel may take.
    """

    run: Callable[[], Any]
    operands: Mapping[fx.Node, Any]
    stashed: tuple[Any, ...]
    cases: Iterator[None]


@dataclass(frozen=True, slots=True)
class _Bench:
    """Runs ops on their own.

    Attributes:
        captured: the step that they belong to.
        stashing: stashed value to the stash op that a pass adds.
    """

    captured: Captured
    stashing: Mapping[int, Op]

    def stashes_of(self, op: Op) -> list[Op]:
        """The ops that stash what an op reads."""
        return [self.stashing[id] for id in stashed_operands(self.captured, op)]

    def runnable(self, op: Op) -> _Runnable:
        """The op on made-up operands of the recorded layout."""
        stashed = tuple(self.stash(id) for id in stashed_operands(self.captured, op))
        call = call_of(self.captured, op, stashed)
        made: dict[fx.Node, Any] = {}

        def operand(node: fx.Node) -> Any:
            if node not in made:
                made[node] = made_up_like(node.meta["val"])
            return made[node]

        args, kwargs = fx.map_arg(call.args, operand), fx.map_arg(call.kwargs, operand)
        make_valid(call.target, args, kwargs)
        cases = other_cases(call.target, args, kwargs)
        return _Runnable(lambda: call.target(*args, **kwargs), made, stashed, cases)

    def stash(self, id: int) -> Any:
        """The stash of made-up operands."""
        op = self.stashing[id]
        items = call_of(self.captured, op).items or {}
        result = self.runnable(op).run()
        return result[items[id]] if id in items else result


def _measure(
    bench: _Bench, distinct: Mapping[str, Op], entries: Mapping[str, OpCost]
) -> dict[str, OpCost]:
    captured, device = bench.captured, bench.captured.device
    elsewhere = _recorded_elsewhere(captured, entries)
    alike: dict[str, list[Op]] = {}
    for op in captured.program.ops:
        alike.setdefault(op.signature, []).append(op)
    result_bytes: dict[str, tuple[int, ...]] = {}
    result_layouts: dict[str, tuple[Layout | None, ...]] = {}
    refused: dict[str, OpCost] = {}
    with unchanged_randomness(), torch.no_grad(), without_autocast(), metering(device) as meter:
        for number, (signature, op) in enumerate(distinct.items()):
            _LOG.debug("measuring op %d of %d", number + 1, len(distinct))
            unknown = [one.signature for one in bench.stashes_of(op) if one.signature in refused]
            if unknown:
                refused[signature] = refused[unknown[0]]
                continue
            runnable = bench.runnable(op)
            if refusal := _refusal(runnable, op, elsewhere):
                refused[signature] = OpCost(0.0, refusal=refusal)
                continue
            result = result_of(meter, str(number), runnable.run, runnable.cases)
            tensors = _in_recorded_places(captured, op, result)
            given = (*runnable.operands.values(), *runnable.stashed)
            result_bytes[signature] = _storage_bytes(tensors, given, device)
            result_layouts[signature] = tuple(map(_layout, tensors))
            for one in alike.get(signature, ()):
                elsewhere |= _seen_elsewhere(captured, one, result_layouts[signature])
            del result, tensors, runnable, given
    measured = {name: op for name, op in distinct.items() if name not in refused}
    seconds = _seconds(bench, measured)
    names = [str(number) for number, name in enumerate(distinct) if name not in refused]
    peaks = meter.peaks(names)
    costs = {
        signature: OpCost(
            seconds=seconds[signature],
            workspace_bytes=max(0, peaks[name] - sum(result_bytes[signature])),
            result_bytes=result_bytes[signature],
            result_layouts=result_layouts[signature],
        )
        for name, signature in zip(names, measured, strict=True)
    }
    return {**costs, **refused}


def _seconds(bench: _Bench, measured: Mapping[str, Op]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    with unchanged_randomness(), torch.no_grad(), without_autocast():
        for number in range(_MOST_ROUNDS):
            if number >= _ROUNDS and time.perf_counter() - start > _LONGEST_S:
                break
            _LOG.debug("timing %d ops, round %d of at least %d", len(measured), number + 1, _ROUNDS)
            for signature, op in measured.items():
                taken = call_seconds(bench.runnable(op).run, bench.captured.device)
                seconds[signature] = min(taken, seconds.get(signature, taken))
    return seconds


def _recorded_elsewhere(captured: Captured, entries: Mapping[str, OpCost]) -> set[fx.Node]:
    """Calls with a known result on another device than the trace recorded."""
    ops = captured.program.ops
    known = [(op, entries[op.signature]) for op in ops if op.signature in entries]
    return {
        node for op, cost in known for node in _seen_elsewhere(captured, op, cost.result_layouts)
    }


def _seen_elsewhere(captured: Captured, op: Op, layouts: Iterable[Layout | None]) -> set[fx.Node]:
    if op.variant_of is not None:
        return set()
    node = captured.calls[op.id]
    pairs = zip(tensors_of(node.meta["val"]), layouts, strict=False)
    moved = any(seen and torch.device(seen.device) != one.device for one, seen in pairs)
    return {node} if moved else set()


def _refusal(runnable: _Runnable, op: Op, elsewhere: set[fx.Node]) -> str:
    """Run an op once, to warm up; return why it refuses made-up operands, or "".

    It does not run with an operand recorded ``elsewhere``: a kernel that takes a host address for
    one of the device ends the process.
    """
    if any({node, *node.all_input_nodes} & elsewhere for node in runnable.operands):
        return f"{op.target} has an operand that is recorded on another device than it is on"
    try:
        runnable.run()
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
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Layout(tensor.stride(), dtype, str(tensor.device))


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
    results: Iterable[torch.Tensor | None], operands: Iterable[object], device: torch.device
) -> tuple[int, ...]:
    """The bytes that each storage of a result takes of the device's memory.

    Zero where it is an operand's memory, elsewhere, or missing.
    """
    operand_keys = {storage_key(tensor) for tensor in operands if isinstance(tensor, torch.Tensor)}
    nbytes: dict[int, int] = {}
    for place, tensor in enumerate(results):
        key = ~place if tensor is None else storage_key(tensor)
        if tensor is None or key in operand_keys or tensor.device.type != device.type:
            nbytes[key] = 0
        else:
            nbytes[key] = tensor.untyped_storage().nbytes()
    return tuple(nbytes.values())
