"""Memory readings of each device. Absent hardware is not an error."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import psutil
import pynvml
import torch

from memplan.gc_pause import paused_collector
from memplan.profiler.step import During
from memplan.torch_internals import (
    allocations,
    peak_requested_bytes,
    phase,
    recording,
    requested_bytes,
    spans,
)


@dataclass(frozen=True)
class Reading:
    """Memory readings of a run.

    Attributes:
        peak_bytes: the most bytes handed out by torch's allocator above those at the start.
        phases: the same in each phase.
        timeline: (seconds from the start, bytes above those at the start); CPU only.
        reserved_bytes: the most that torch's CUDA allocator held, or None on the CPU.
        process_bytes: GPU memory of this process by NVML, or None where it is unknown.
        host_bytes: resident set of this process afterwards. Shown, never relied on.
    """

    peak_bytes: int
    phases: Mapping[str, int]
    timeline: tuple[tuple[float, int], ...]
    reserved_bytes: int | None
    process_bytes: int | None
    host_bytes: int


def read_cpu(run: Callable[[During], object]) -> Reading:
    """Run once under torch's profiler: exact to the byte, and the same every time."""
    # Earlier garbage must not be freed, and counted, inside.
    gc.collect()
    with paused_collector(), recording() as profile:
        kept = run(phase)
    del kept
    events = allocations(profile)
    ends = [(name, stop) for name, (_, stop) in spans(profile).items()]
    ends.sort(key=lambda end: end[1])
    phases = dict.fromkeys((name for name, _ in ends), 0)
    start_ns = events[0][0] if events else 0
    current = peak = 0
    timeline = []
    for time_ns, nbytes in events:
        current += nbytes
        peak = max(peak, current)
        name = next((name for name, stop in ends if time_ns <= stop), None)
        if name is not None:
            phases[name] = max(phases[name], current)
        timeline.append(((time_ns - start_ns) / 1e9, current))
    return Reading(peak, phases, tuple(timeline), None, None, host_bytes())


def read_cuda(run: Callable[[During], object], device: torch.device) -> Reading:
    """Run once between readings of torch's statistics.

    Bytes are those requested; the allocator's blocks are up to a few hundred bytes larger each.
    """
    torch.cuda.synchronize(device)
    # Cached memory of earlier steps would count as reserved.
    torch.cuda.empty_cache()
    before = requested_bytes(device)
    phases: dict[str, int] = {}
    reserved = 0

    @contextlib.contextmanager
    def during(name: str) -> Iterator[None]:
        nonlocal reserved
        torch.cuda.reset_peak_memory_stats(device)
        yield
        torch.cuda.synchronize(device)
        phases[name] = peak_requested_bytes(device) - before
        reserved = max(reserved, torch.cuda.max_memory_reserved(device))

    kept = run(during)
    del kept
    peak, process = max(phases.values()), process_bytes(device.index or 0)
    return Reading(peak, phases, (), reserved, process, host_bytes())


def host_bytes() -> int:
    """Resident set of this process."""
    return int(psutil.Process().memory_info().rss)


def process_bytes(index: int) -> int | None:
    """GPU memory of this process as the driver sees it, or None where there is no NVML."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return None
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
