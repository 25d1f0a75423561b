"""What each device can tell about memory. Hardware that is absent is not an error."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import pynvml
import torch

from memplan.torch_internals import allocations, recording


@dataclass(frozen=True)
class Reading:
    """What was seen while something ran.

    Attributes:
        peak_bytes: the most bytes handed out by torch's allocator above those at the start.
        timeline: (seconds from the start, bytes above those at the start); CPU only.
        reserved_bytes: the most that torch's CUDA allocator held, or None on the CPU.
        process_bytes: GPU memory of this process by NVML, or None where it cannot be told.
        host_bytes: resident set of this process afterwards. Shown, never relied on.
    """

    peak_bytes: int
    timeline: tuple[tuple[float, int], ...]
    reserved_bytes: int | None
    process_bytes: int | None
    host_bytes: int


def read_cpu(run: Callable[[], object]) -> Reading:
    """Run once under torch's profiler: exact to the byte, and the same every time."""
    with recording() as profile:
        kept = run()
    del kept
    events = allocations(profile)
    start_ns = events[0][0] if events else 0
    current = peak = 0
    timeline = []
    for time_ns, nbytes in events:
        current += nbytes
        peak = max(peak, current)
        timeline.append(((time_ns - start_ns) / 1e9, current))
    return Reading(peak, tuple(timeline), None, None, host_bytes())


def read_cuda(run: Callable[[], object], device: torch.device) -> Reading:
    """Run once between two readings of torch's statistics."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    reserved = torch.cuda.max_memory_reserved(device)
    del kept
    return Reading(peak, (), reserved, process_bytes(device.index or 0), host_bytes())


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
