"""Memory and time of a call, as each device reports them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from memplan.torch_internals import (
    peak_requested_bytes,
    phase,
    recording,
    requested_bytes,
    span_peaks,
)

_RUNS = 3
_FEWEST_RUNS = 2
_ENOUGH_S = 0.1
"""A call that took this long altogether is run the fewest times only."""

_BATCH_S = 1e-3
_LARGEST_BATCH = 20
"""On CUDA, calls are timed in batches of about this long, of at most this many calls."""


class Meter(Protocol):
    """Reads the memory of named stretches of code."""

    def during(self, name: str) -> AbstractContextManager[object]:
        """Context of a stretch."""

    def peaks(self, names: Iterable[str]) -> dict[str, int]:
        """The most bytes allocated, net, in stretches; known once the meter is closed."""


def result_of(meter: Meter, name: str, run: Callable[[], Any], cases: Iterable[object]) -> Any:
    """The result of a call that is metered under a name, once and again for each case."""
    with meter.during(name):
        result = run()
        for _ in cases:
            del result
            result = run()
    return result


class _CpuMeter:
    """A meter by the events of the CPU's allocator."""

    def __init__(self, profile: torch.profiler.profile) -> None:
        self._profile = profile

    def during(self, name: str) -> AbstractContextManager[object]:
        return phase(name)

    def peaks(self, names: Iterable[str]) -> dict[str, int]:
        return span_peaks(self._profile, names)


class _CudaMeter:
    """A meter by statistics of CUDA's allocator: bytes requested, not the blocks that served."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        before = requested_bytes(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        self._peaks[name] = max(0, peak_requested_bytes(self._device) - before)

    def peaks(self, names: Iterable[str]) -> dict[str, int]:
        return {name: self._peaks[name] for name in names}


@contextlib.contextmanager
def metering(device: torch.device) -> Iterator[Meter]:
    """Context with a meter for a device."""
    if device.type == "cuda":
        yield _CudaMeter(device)
        return
    with recording() as profile:
        yield _CpuMeter(profile)


def call_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The least time of a few runs.

    On CUDA, the time for each of several calls in a row: of the kernel or of its launch, whichever
    takes longer.
    """
    if device.type == "cuda":
        return _cuda_seconds(run, device)
    times: list[float] = []
    while len(times) < _FEWEST_RUNS or (len(times) < _RUNS and sum(times) < _ENOUGH_S):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _cuda_seconds(run: Callable[[], object], device: torch.device) -> float:
    def batch(calls: int) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls

    calls = min(_LARGEST_BATCH, max(_FEWEST_RUNS, int(_BATCH_S / batch(_FEWEST_RUNS))))
    return min(batch(calls) for _ in range(_FEWEST_RUNS))
