"""Events of the CPU's allocator, as torch's profiler records them."""

from __future__ import annotations

import contextlib
import os
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import torch
from torch._C._autograd import _profiler_enabled
from torch._C._profiler import _EventType

from memplan.errors import MemplanError

SPAN_PREFIX = "memplan#"
"""Prefix of the names under which phases are recorded."""


def _stay() -> None:
    """Do nothing: no recording is to end."""


class _Running(threading.local):
    """The recording of a thread, which may begin in one Python context and end in another."""

    give_way: Callable[[], None] = staticmethod(_stay)


_RUNNING = _Running()


@contextlib.contextmanager
def recording(give_way: Callable[[], None] = _stay) -> Iterator[torch.profiler.profile]:
    """Record the CPU's allocator events inside (torch 2.13-2.15).

    Kineto announces each start and stop on stderr unless this variable tells it not to.

    Args:
        give_way: ends this recording; called where another one begins inside it, as torch has only
            one profiler.

    Raises:
        MemplanError: if a profiler other than memplan's is running; its record would be lost.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    _RUNNING.give_way()
    if is_profiling():
        raise MemplanError(
            "torch's profiler is running, and memplan measures with it, of which only one can run. "
            "Turn it off, or let memplan plan and measure before it starts: "
            "memplan.optimize(model, sample), or model.prepare(memplan.Sample.of(batch))."
        )
    before, _RUNNING.give_way = _RUNNING.give_way, give_way
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            yield profile
    finally:
        _RUNNING.give_way = before


def is_profiling() -> bool:
    """Tell whether a torch profiler is running (torch 2.13-2.15)."""
    return _profiler_enabled()


def allocations(profile: torch.profiler.profile) -> list[tuple[int, int]]:
    """(Time in ns, bytes) of each CPU allocation; frees are negative (torch 2.13-2.15)."""
    events: list[tuple[int, int]] = []

    def walk(node: Any) -> Iterator[Any]:
        stack = [node]
        while stack:
            current = stack.pop()
            yield current
            stack.extend(current.children)

    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    for root in profile.profiler.kineto_results.experimental_event_tree():
        for event in walk(root):
            if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
                events.append((event.start_time_ns, event.extra_fields.alloc_size))
    events.sort(key=lambda event: event[0])
    return events


def span_peaks(profile: torch.profiler.profile, names: Iterable[str]) -> dict[str, int]:
    """The most bytes allocated, net, inside each ``phase`` of these names."""
    events = allocations(profile)
    times = [when for when, _ in events]
    named = spans(profile)
    peaks = {}
    for name in names:
        start, stop = named[name]
        sizes = (
            nbytes for _, nbytes in events[bisect_left(times, start) : bisect_left(times, stop)]
        )
        peaks[name] = max(accumulate(sizes), default=0)
    return {name: max(0, peak) for name, peak in peaks.items()}


def phase(name: str) -> AbstractContextManager[object]:
    """A ``record_function`` that ``spans`` recognises."""
    return torch.profiler.record_function(f"{SPAN_PREFIX}{name}")


def spans(profile: torch.profiler.profile) -> dict[str, tuple[int, int]]:
    """Start and end in ns of every ``phase``, by name (torch 2.13-2.15)."""
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    return {
        event.name().removeprefix(SPAN_PREFIX): (event.start_ns(), event.end_ns())
        for event in profile.profiler.kineto_results.events()
        if event.name().startswith(SPAN_PREFIX)
    }
