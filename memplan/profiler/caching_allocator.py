"""The bytes that CUDA's caching allocator would reserve for a trace. A model, not verified."""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from memplan.ir.memory_trace import MemoryTrace

_MIB = 2**20
_SMALL = _MIB
"""Requests up to this size are served from segments of their own."""
_SMALL_SEGMENT = 2 * _MIB
_LARGE_SEGMENT = 20 * _MIB
_OWN_SEGMENT = 10 * _MIB
"""Requests from this size on get a segment of their own size, rounded up."""
_GRANULE = 512


@dataclass
class _Pool:
    """Segments for small requests, or for large ones.

    Attributes:
        least_rest: from this size on, the rest of a block becomes a block of its own.
        free: (size, segment, offset) of free blocks, in order.
        used: block to (size, segment, offset).
        cuts: segment to its blocks: offset to (size, whether it is free).
    """

    least_rest: int
    free: list[tuple[int, int, int]] = field(default_factory=list)
    used: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    cuts: dict[int, dict[int, tuple[int, bool]]] = field(default_factory=dict)

    def allocate(self, block: int, nbytes: int) -> int:
        """Serve a request; return the bytes newly reserved for it."""
        place = bisect_left(self.free, (nbytes, -1, -1))
        reserved = 0
        if place == len(self.free):
            reserved = _segment_bytes(nbytes)
            segment = len(self.cuts)
            self.cuts[segment] = {0: (reserved, True)}
            insort(self.free, (reserved, segment, 0))
            place = bisect_left(self.free, (nbytes, -1, -1))
        size, segment, offset = self.free.pop(place)
        rest = size - nbytes
        if rest >= self.least_rest:
            self.cuts[segment][offset + nbytes] = (rest, True)
            insort(self.free, (rest, segment, offset + nbytes))
            size = nbytes
        self.cuts[segment][offset] = (size, False)
        self.used[block] = (size, segment, offset)
        return reserved

    def release(self, block: int) -> None:
        """Free a block, merging it with free neighbours."""
        size, segment, offset = self.used.pop(block)
        cuts = self.cuts[segment]
        after = offset + size
        if cuts.get(after, (0, False))[1]:
            size += self._forget(segment, after)
        before = [at for at, (nbytes, is_free) in cuts.items() if is_free and at + nbytes == offset]
        for at in before:
            size += self._forget(segment, at)
            del cuts[offset]
            offset = at
        cuts[offset] = (size, True)
        insort(self.free, (size, segment, offset))

    def _forget(self, segment: int, offset: int) -> int:
        nbytes, _ = self.cuts[segment].pop(offset)
        self.free.remove((nbytes, segment, offset))
        return nbytes


def _segment_bytes(nbytes: int) -> int:
    if nbytes <= _SMALL:
        return _SMALL_SEGMENT
    if nbytes < _OWN_SEGMENT:
        return _LARGE_SEGMENT
    return -(-nbytes // _SMALL_SEGMENT) * _SMALL_SEGMENT


def reserved_bytes(trace: MemoryTrace) -> int:
    """The bytes that the allocator would hold after a step; it releases none by itself.

    With torch's default settings, on a device with enough memory: best fit in segments of 2 MiB
    for requests up to 1 MiB, of 20 MiB for those below 10 MiB, and of their own size above.
    """
    pools = {True: _Pool(_GRANULE), False: _Pool(_SMALL + 1)}
    reserved = 0
    sizes: dict[int, int] = {}

    def allocate(block: int, nbytes: int) -> None:
        nonlocal reserved
        if not nbytes:
            return
        sizes[block] = max(_GRANULE, -(-nbytes // _GRANULE) * _GRANULE)
        reserved += pools[sizes[block] <= _SMALL].allocate(block, sizes[block])

    for number, resident in enumerate(trace.residents):
        allocate(~number, resident.nbytes)
    happened: list[list[tuple[int, int]]] = [[] for _ in trace.times_s]
    for number, block in enumerate(trace.blocks):
        happened[block.made].append((number, block.nbytes))
        if block.freed is not None:
            happened[block.freed].append((number, -1))
    for number, nbytes in (pair for pairs in happened for pair in pairs):
        if nbytes < 0 and number in sizes:
            pools[sizes[number] <= _SMALL].release(number)
        elif nbytes > 0:
            allocate(number, nbytes)
    return reserved
