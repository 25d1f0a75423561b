"""A step of a script, cut out of the whole recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from memplan.ir.memory_trace import SAVED, UNEXPLAINED, Allocation, MemoryTrace, Resident, spans_of

HELD = "held by the script"
"""The name of tensors that belong to no module and no optimizer."""


def settled(
    trace: MemoryTrace,
    seen: Mapping[int, Resident],
    addresses: Sequence[int],
    marks: tuple[int, int, int],
) -> tuple[MemoryTrace, tuple[Resident, ...]]:
    """A trace with older blocks given their category, and those that outlive the step as residents.

    Args:
        trace: the whole recording.
        seen: storages that Python saw when the step began, by address.
        addresses: the address of each event.
        marks: the events at which the step before began, the step began, and the step ended.
    """
    before, first, last = marks
    blocks: list[Allocation] = []
    residents: list[Resident] = []
    known: set[int] = set()
    for block in trace.blocks:
        is_there = block.made < first and (block.freed is None or block.freed >= first)
        known |= {addresses[block.made]} if is_there else set()
        if not is_there or block.made >= before:
            blocks.append(block)
            continue
        resident = _resident(block, seen.get(addresses[block.made]))
        if block.freed is None or block.freed >= last:
            residents.append(resident)
        else:
            blocks.append(replace(block, category=resident.category, name=resident.name))
    # Memory that is not from torch's allocator is numpy's, or another process's.
    residents += [one for address, one in seen.items() if address not in known]
    return replace(trace, blocks=tuple(blocks)), tuple(residents)


def _resident(block: Allocation, seen: Resident | None) -> Resident:
    """An earlier block as a resident: as Python sees it, or as saved by autograd.

    Otherwise nothing is known but its origin.
    """
    if seen is None or (seen.name == HELD and block.module):
        name = f"{block.module}." if block.module else ""
        category = SAVED if block.module else UNEXPLAINED
        return Resident(name, block.nbytes, category, block.op, block.source)
    return replace(seen, op=block.op, source=block.source)


def cut(trace: MemoryTrace, first: int, last: int) -> MemoryTrace:
    """The events from ``first`` to before ``last``, after one for the bytes already alive."""

    def moved(block: Allocation) -> Allocation:
        freed = block.freed
        return replace(
            block,
            made=max(0, block.made - first + 1),
            freed=None if freed is None or freed >= last else freed - first + 1,
        )

    blocks = [
        moved(block)
        for block in trace.blocks
        if block.made < last and (block.freed is None or block.freed >= first)
    ]
    every = [span.phase for span in trace.spans for _ in range(span.first, span.end)]
    phases = every[first:last]
    times = trace.times_s[first:last]
    start_s = times[0] if times else 0.0
    return replace(
        trace,
        blocks=tuple(blocks),
        times_s=(0.0, *(when - start_s for when in times)),
        spans=spans_of([phases[0] if phases else "", *phases]),
    )
