"""The tensor memory that any code takes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn

from memplan.errors import MemplanError
from memplan.gc_pause import paused_collector
from memplan.ir.memory_trace import Allocation
from memplan.profiler.attribution import attributed
from memplan.profiler.tracing import noting
from memplan.torch_internals import peak_requested_bytes, recorded, recording, requested_bytes
from memplan.units import format_bytes

_MOST_BLOCKS = 5


@dataclass(frozen=True)
class Usage:
    """The memory that some code took.

    Attributes:
        peak_bytes: the most bytes of torch's allocator above those at the start.
        blocks: its blocks alive at that moment, the largest first.
    """

    peak_bytes: int
    blocks: tuple[Allocation, ...]


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[Callable[[], Usage]]:
    """Measure the code inside; the function yielded returns the result afterwards.

    On the CPU bytes are those of the allocator's events, on CUDA those requested. It records
    with torch's profiler, of which only one can run at a time.
    """
    is_cuda = device.type == "cuda"
    before = peak_bytes = 0
    # Earlier garbage must not be freed, and counted, inside.
    gc.collect()
    if is_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = requested_bytes(device)

    def usage() -> Usage:
        found = recorded(profile, device.type)
        totals = list(accumulate(event.nbytes for event in found.events))
        trace = attributed(found, (), (), device=str(device))
        highest = max(range(len(totals)), key=totals.__getitem__, default=0)
        blocks = sorted(trace.live(highest), key=lambda block: -block.nbytes)
        peak = peak_bytes if is_cuda else max([0, *totals])
        return Usage(peak, tuple(blocks))

    with paused_collector(), recording(_refuse) as profile, noting(nn.Module()):
        yield usage
    if is_cuda:
        torch.cuda.synchronize(device)
        peak_bytes = max(0, peak_requested_bytes(device) - before)


def _refuse() -> None:
    raise MemplanError(
        "memplan measures kernels inside of code whose tensor memory is measured, and torch has "
        "but one profiler. Plan the model before: in a fixture, or above the limited block."
    )


def describe_excess(usage: Usage, limit_bytes: int) -> str:
    """A message with the excess over a limit and the largest blocks."""
    excess = format_bytes(usage.peak_bytes - limit_bytes)
    lines = [
        f"{format_bytes(usage.peak_bytes)} of tensor memory, {excess} more than the limit of "
        f"{format_bytes(limit_bytes)}",
        "largest blocks at the peak:",
    ]
    for block in usage.blocks[:_MOST_BLOCKS]:
        where = f" at {block.source}" if block.source else ""
        lines.append(f"  {format_bytes(block.nbytes):>12}  {block.op or 'an unknown op'}{where}")
    return "\n".join(lines)
