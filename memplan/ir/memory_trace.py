"""A trace of every byte of a step at every moment, measured or predicted. No torch here."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

from memplan.ir.program import Role
from memplan.units import format_bytes

SAVED: Final = "saved activation"
TEMPORARY: Final = "temporary"
WORKSPACE: Final = "workspace"
UNEXPLAINED: Final = "unexplained"

CATEGORIES: Final = (
    Role.PARAMETER.value,
    Role.BUFFER.value,
    Role.CONSTANT.value,
    Role.INPUT.value,
    Role.OPTIMIZER_STATE.value,
    Role.EXISTING_GRADIENT.value,
    Role.GRADIENT.value,
    Role.OUTPUT.value,
    Role.TANGENT.value,
    SAVED,
    Role.KEPT.value,
    TEMPORARY,
    WORKSPACE,
    UNEXPLAINED,
)
"""The purposes of bytes, the longest-lived first."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A storage that is alive before the step and after it.

    Attributes:
        name: its FQN, or what else it is known by.
        nbytes: its size.
        category: one of ``CATEGORIES``.
        op: the op that made it, if known.
        source: ``file.py:line`` of the user's code, where known.
    """

    name: str
    nbytes: int
    category: str
    op: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Allocation:
    """Memory that the step allocates and, mostly, frees.

    Attributes:
        nbytes: its size.
        category: one of ``CATEGORIES``.
        phase: when it was made: "forward", "backward" or "optimizer".
        op: the op that made it, such as "aten::mm"; "" if unknown.
        module: FQN of the module that it belongs to; "" for the root, or where unknown.
        source: ``file.py:line`` of the user's code, where known.
        name: FQN of the parameter that it is the gradient of, else "".
        made: number of the event that made it.
        freed: number of the event that freed it, or None if it outlives the record.
    """

    nbytes: int
    category: str
    phase: str
    op: str
    module: str
    source: str
    name: str
    made: int
    freed: int | None


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of events, ``first`` to before ``end``.

    Attributes:
        phase: "forward", "backward" or "optimizer"; "end" when all is freed.
        first: number of its first event.
        end: number after its last one.
    """

    phase: str
    first: int
    end: int


def spans_of(phases: Sequence[str]) -> tuple[Span, ...]:
    """Stretches of events of the same phase, from the phase of each event."""
    starts = [n for n, phase in enumerate(phases) if n == 0 or phases[n - 1] != phase]
    ends = [*starts[1:], len(phases)]
    return tuple(Span(phases[first], first, end) for first, end in zip(starts, ends, strict=False))


@dataclass(frozen=True)
class MemoryTrace:
    """A step as a sequence of allocator events.

    Attributes:
        kind: whether it was measured or predicted.
        device: the device that it ran on, or would.
        residents: storages alive before and after.
        blocks: the blocks, in the order in which they were made.
        times_s: seconds from the start, of each event.
        spans: the phases, in order; together they hold all events.
    """

    kind: Literal["measured", "predicted"]
    device: str
    residents: tuple[Resident, ...]
    blocks: tuple[Allocation, ...]
    times_s: tuple[float, ...]
    spans: tuple[Span, ...]

    def __repr__(self) -> str:
        return (
            f"<MemoryTrace: {self.kind} on {self.device}, {len(self.blocks)} blocks, peak "
            f"{format_bytes(self.peak_bytes)}>"
        )

    @cached_property
    def resident_bytes(self) -> int:
        """Bytes alive before and after."""
        return sum(resident.nbytes for resident in self.residents)

    @cached_property
    def changes(self) -> tuple[int, ...]:
        """Bytes that each event adds."""
        changes = [0] * len(self.times_s)
        for block in self.blocks:
            changes[block.made] += block.nbytes
            if block.freed is not None:
                changes[block.freed] -= block.nbytes
        return tuple(changes)

    @cached_property
    def totals(self) -> tuple[int, ...]:
        """Bytes after each event, residents included."""
        totals, current = [], self.resident_bytes
        for change in self.changes:
            current += change
            totals.append(current)
        return tuple(totals)

    @cached_property
    def peak_event(self) -> int:
        """Number of the (first) event that reaches the peak."""
        return max(range(len(self.totals)), key=self.totals.__getitem__, default=0)

    @cached_property
    def peak_bytes(self) -> int:
        """The most bytes at any time, residents included."""
        return max(self.totals, default=self.resident_bytes)

    @property
    def peak_block(self) -> Allocation | None:
        """The block whose allocation reaches the peak."""
        return next((block for block in self.blocks if block.made == self.peak_event), None)

    def phase_at(self, event: int) -> str:
        """The phase of an event."""
        place = bisect_right(self.spans, event, key=lambda span: span.first) - 1
        is_inside = place >= 0 and event < self.spans[place].end
        return self.spans[place].phase if is_inside else "end"

    def live(self, event: int) -> list[Allocation]:
        """The blocks that are alive right after an event."""
        return [
            block
            for block in self.blocks
            if block.made <= event and (block.freed is None or block.freed > event)
        ]

    def categories(self, event: int) -> Mapping[str, int]:
        """Bytes by category right after an event; those without any are left out."""
        totals: Counter[str] = Counter()
        for resident in self.residents:
            totals[resident.category] += resident.nbytes
        for block in self.live(event):
            totals[block.category] += block.nbytes
        return {name: totals[name] for name in CATEGORIES if totals[name]}

    @property
    def unexplained_bytes(self) -> int:
        """Bytes at the peak of which nothing is known."""
        return self.categories(self.peak_event).get(UNEXPLAINED, 0)

    def phase_peaks(self) -> Mapping[str, int]:
        """The most bytes in each phase."""
        peaks: dict[str, int] = {}
        for span in self.spans:
            if span.phase != "end":
                highest = max(self.totals[span.first : span.end], default=0)
                peaks[span.phase] = max(peaks.get(span.phase, 0), highest)
        return peaks

    def over_time(self, events: Sequence[int]) -> Mapping[str, list[int]]:
        """Bytes by category right after each of these events, which ascend."""
        current: Counter[str] = Counter()
        for resident in self.residents:
            current[resident.category] += resident.nbytes
        happened: list[list[tuple[str, int]]] = [[] for _ in self.times_s]
        for block in self.blocks:
            happened[block.made].append((block.category, block.nbytes))
            if block.freed is not None:
                happened[block.freed].append((block.category, -block.nbytes))
        series: dict[str, list[int]] = {name: [] for name in CATEGORIES}
        done = 0
        for event in events:
            for category, nbytes in (pair for one in happened[done : event + 1] for pair in one):
                current[category] += nbytes
            done = event + 1
            for name, values in series.items():
                values.append(current[name])
        return {name: values for name, values in series.items() if any(values)}

    def highlights(self, most: int) -> list[int]:
        """About ``most`` events at most, in order: the highest and the lowest of each stretch."""
        count = len(self.totals)
        if count <= most:
            return list(range(count))
        stretch = -(-2 * count // most)
        chosen: set[int] = {0, count - 1}
        for first in range(0, count, stretch):
            events = range(first, min(first + stretch, count))
            chosen.add(max(events, key=self.totals.__getitem__))
            chosen.add(min(events, key=self.totals.__getitem__))
        return sorted(chosen)
