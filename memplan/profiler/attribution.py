"""Recorded allocator events as blocks, each with its purpose and origin."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from memplan.ir.memory_trace import (
    SAVED,
    TEMPORARY,
    UNEXPLAINED,
    WORKSPACE,
    Allocation,
    MemoryTrace,
    Resident,
    spans_of,
)
from memplan.ir.program import Phase
from memplan.torch_internals import (
    SPAN_PREFIX,
    AllocatorEvent,
    Enclosing,
    Origin,
    Recorded,
    is_composite,
)

END = "end"
"""The phase in which all memory is freed."""

_ENGINE = "autograd::engine"


@dataclass(frozen=True)
class Named:
    """Storages that are known at a moment.

    Attributes:
        mark: the mark of that moment.
        category: their category.
        names: address to name.
    """

    mark: str
    category: str
    names: Mapping[int, str]


def attributed(
    found: Recorded,
    residents: tuple[Resident, ...],
    named: Iterable[Named],
    *,
    device: str,
    kind: Literal["measured", "predicted"] = "measured",
    otherwise: str = END,
) -> MemoryTrace:
    """The recorded events as a trace.

    Args:
        found: the record.
        residents: storages alive before it.
        named: storages known by address.
        device: the device that it ran on.
        kind: measured or predicted.
        otherwise: the phase of events outside every phase.
    """
    events = found.events
    phases = [_phase_of(event, otherwise) for event in events]
    spans = spans_of(phases)
    ends = _ends(events)
    known = _known(found, tuple(named))
    next_backward = _next_backward(phases)
    blocks = []
    for number, event in enumerate(events):
        if event.nbytes <= 0:
            continue
        origin = _origin(found, event)
        category, name = known.get(number, ("", ""))
        if not category:
            category = _category(events, phases[number], number, ends[number], next_backward)
        op = _op_of(event, origin)
        if not op and phases[number] != Phase.OPTIMIZER.value:
            category = UNEXPLAINED
        blocks.append(
            Allocation(
                nbytes=event.nbytes,
                category=category,
                phase=phases[number],
                op=op,
                module=name.rpartition(".")[0] if name else origin.module,
                source=origin.source,
                name=name,
                made=number,
                freed=ends[number],
            )
        )
    start_ns = events[0].time_ns if events else 0
    return MemoryTrace(
        kind=kind,
        device=device,
        residents=residents,
        blocks=tuple(blocks),
        times_s=tuple((event.time_ns - start_ns) / 1e9 for event in events),
        spans=spans,
    )


def _phase_of(event: AllocatorEvent, otherwise: str) -> str:
    for call in event.enclosing:
        if call.name.startswith(SPAN_PREFIX):
            return call.name.removeprefix(SPAN_PREFIX)
        if call.name.startswith("Optimizer.step#"):
            return Phase.OPTIMIZER.value
        if call.name.startswith(_ENGINE):
            return Phase.BACKWARD.value
    return otherwise


def _ends(events: Sequence[AllocatorEvent]) -> dict[int, int | None]:
    """For each event that allocates a block, the event that frees it.

    Frees by another thread are not recorded: such a block ends when its address is reused.
    """
    ends: dict[int, int | None] = {}
    alive: dict[int, int] = {}
    for number, event in enumerate(events):
        if event.address in alive:
            ends[alive.pop(event.address)] = number
        if event.nbytes > 0:
            alive[event.address] = number
            ends[number] = None
    return ends


def _known(found: Recorded, named: Sequence[Named]) -> dict[int, tuple[str, str]]:
    """Category and name of blocks that are known by address, by the event that allocated them."""
    known: dict[int, tuple[str, str]] = {}
    alive: dict[int, int] = {}
    done = 0
    times = [event.time_ns for event in found.events]
    for one in sorted(named, key=lambda one: found.marks[one.mark]):
        now = bisect_right(times, found.marks[one.mark])
        for number, event in enumerate(found.events[done:now], start=done):
            if event.nbytes > 0:
                alive[event.address] = number
            else:
                alive.pop(event.address, None)
        done = max(done, now)
        for address, name in one.names.items():
            if address in alive:
                known.setdefault(alive[address], (one.category, name))
    return known


def _next_backward(phases: Sequence[str]) -> list[int]:
    """For each event, the number of the next event in a backward."""
    following, result = len(phases), []
    for number in range(len(phases) - 1, -1, -1):
        if phases[number] == Phase.BACKWARD.value:
            following = number
        result.append(following)
    return result[::-1]


def _origin(found: Recorded, event: AllocatorEvent) -> Origin:
    """The origin of an event; in the backward, that of the forward op."""
    for position, call in enumerate(event.enclosing):
        if call.name.startswith(_ENGINE):
            maker = found.makers.get(call.sequence_number, ())
            return Origin.of([*event.enclosing[:position], *maker]) or Origin()
    return Origin.of(event.enclosing) or Origin()


def _kernel_of(event: AllocatorEvent) -> Enclosing | None:
    """The outermost op around an event that does more than call other ops."""
    ops = [call for call in event.enclosing if call.name.startswith("aten::")]
    return next((call for call in reversed(ops) if not is_composite(call.name)), None)


def _op_of(event: AllocatorEvent, origin: Origin) -> str:
    kernel = _kernel_of(event)
    if kernel is not None:
        return kernel.name
    calls = (call.name for call in event.enclosing if not Origin.is_noted_by(call))
    return next((name for name in calls if not name.startswith(SPAN_PREFIX)), origin.function)


def _category(
    events: Sequence[AllocatorEvent],
    phase: str,
    made: int,
    freed: int | None,
    next_backward: Sequence[int],
) -> str:
    kernel = _kernel_of(events[made])
    if kernel is not None and freed is not None and _kernel_of(events[freed]) == kernel:
        return WORKSPACE
    ends = len(events) if freed is None else freed
    if phase == Phase.FORWARD.value and ends >= next_backward[made] < len(events):
        return SAVED
    return TEMPORARY
