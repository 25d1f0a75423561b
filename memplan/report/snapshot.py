"""A trace in the format of PyTorch's memory viewer, https://pytorch.org/memory_viz."""

from __future__ import annotations

import pickle
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from memplan.ir.memory_trace import Allocation, MemoryTrace, Resident

_PROTOCOL = 4  # the viewer reads 2 to 4
_STREAM = 0
_DEVICE = 0
_START = 1 << 40
"""Address of the first segment; no address is 0."""

Frames = list[dict[str, Any]]


def snapshot(trace: MemoryTrace) -> dict[str, Any]:
    """The return value of ``torch.cuda.memory._snapshot``: plain lists, dicts, numbers, texts.

    One segment holds the bytes alive before the step, another those of the step; addresses are
    made up. A block's frames are the op with its line, and the module with the category. Events
    have no ``category`` of their own: in this format blocks from before the step cannot have
    one, so the viewer's legend would call parameters "unknown".
    """
    frames_of = cache(_frames_of)  # the same list each time, which a pickle then stores once
    residents = [
        _block(resident.nbytes, _frames_of_resident(resident))
        for resident in trace.residents
        if resident.nbytes
    ]
    base = _START + trace.resident_bytes
    addresses, size = _place(trace)
    events = []
    for number, is_made in _order(trace, addresses):
        block = trace.blocks[number]
        event = {
            "addr": base + addresses[number],
            "size": block.nbytes,
            "stream": _STREAM,
            "frames": frames_of(*_origin(block)),
        }
        # The viewer takes a free for one event only if its two halves are adjacent.
        actions = ("alloc",) if is_made else ("free_requested", "free_completed")
        events += [{"action": action, **event} for action in actions]
    remaining = {
        addresses[number]: _block(block.nbytes, frames_of(*_origin(block)))
        for number, block in enumerate(trace.blocks)
        if number in addresses and block.freed is None
    }
    segments = [
        _segment(_START, residents),
        _segment(base, list(_filled(remaining, size))),
    ]
    return {
        "segments": [segment for segment in segments if segment["blocks"]],
        "device_traces": [events],
    }


def snapshot_bytes(trace: MemoryTrace) -> bytes:
    """The content of a file to drop onto https://pytorch.org/memory_viz."""
    return pickle.dumps(snapshot(trace), protocol=_PROTOCOL)


def _order(trace: MemoryTrace, numbers: Iterable[int]) -> list[tuple[int, bool]]:
    """Numbers of blocks in the order in which they are allocated (True) and freed (False)."""
    happens: list[tuple[int, bool, int]] = []
    for number in numbers:
        block = trace.blocks[number]
        happens.append((block.made, True, number))
        if block.freed is not None:
            happens.append((block.freed, False, number))
    return [(number, is_made) for _, is_made, number in sorted(happens)]


def _place(trace: MemoryTrace) -> tuple[Mapping[int, int], int]:
    """An offset for each block, in the first gap that fits it, and the total size."""
    numbers = [number for number, block in enumerate(trace.blocks) if block.nbytes]
    offsets: dict[int, int] = {}
    gaps: list[tuple[int, int]] = []  # (start, end), ascending, never adjacent
    size = 0
    for number, is_made in _order(trace, numbers):
        nbytes = trace.blocks[number].nbytes
        if not is_made:
            _give_back(gaps, offsets[number], offsets[number] + nbytes)
            continue
        found = next((n for n, (start, end) in enumerate(gaps) if end - start >= nbytes), None)
        if found is None:
            offsets[number] = size
            size += nbytes
            continue
        start, end = gaps.pop(found)
        offsets[number] = start
        if start + nbytes < end:
            gaps.insert(found, (start + nbytes, end))
    return offsets, size


def _give_back(gaps: list[tuple[int, int]], start: int, end: int) -> None:
    """Add a gap, merged with those adjacent to it."""
    position = bisect_left(gaps, (start, end))
    if position < len(gaps) and gaps[position][0] == end:
        end = gaps.pop(position)[1]
    if position and gaps[position - 1][1] == start:
        position -= 1
        start = gaps.pop(position)[0]
    gaps.insert(position, (start, end))


def _filled(blocks: Mapping[int, dict[str, Any]], size: int) -> Iterable[dict[str, Any]]:
    """Blocks by offset, with free blocks between them: the viewer adds up sizes."""
    end = 0
    for offset, block in sorted(blocks.items()):
        if offset > end:
            yield _block(offset - end, [], state="inactive")
        yield block
        end = offset + block["size"]
    if size > end:
        yield _block(size - end, [], state="inactive")


def _block(nbytes: int, frames: Frames, state: str = "active_allocated") -> dict[str, Any]:
    return {"size": nbytes, "requested_size": nbytes, "state": state, "frames": frames}


def _segment(address: int, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    at = address
    for block in blocks:
        block["address"] = at
        at += block["size"]
    active = sum(block["size"] for block in blocks if block["state"] == "active_allocated")
    return {
        "device": _DEVICE,
        "address": address,
        "total_size": at - address,
        "allocated_size": active,
        "active_size": active,
        "requested_size": active,
        "stream": _STREAM,
        "segment_type": "large",
        "segment_pool_id": [0, 0],
        "frames": [],
        "blocks": blocks,
    }


def _origin(block: Allocation) -> tuple[str, str, str, str]:
    """The arguments of ``_frames_of``."""
    of = f" of {block.name}" if block.name else ""
    return block.op, block.source, block.module, f"{block.category}{of}, made in {block.phase}"


def _frames_of(op: str, source: str, module: str, purpose: str) -> Frames:
    path, _, line = source.rpartition(":")
    return [
        {"filename": path, "line": int(line or 0), "name": op or "an unknown op"},
        {"filename": module or "the root module", "line": 0, "name": purpose},
    ]


def _frames_of_resident(resident: Resident) -> Frames:
    name = resident.name or resident.category
    return [{"filename": name, "line": 0, "name": f"{resident.category}, there before the step"}]
