"""Measurement of a training step: memory by phase, and time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn
from torch.optim import Optimizer

from memplan.capture.sample import Sample
from memplan.ir.program import Role
from memplan.optimizer import state_bytes
from memplan.profiler.devices import Reading, read_cpu, read_cuda
from memplan.profiler.step import (
    During,
    clear_gradients,
    preserved,
    resident_bytes,
    run_step,
    unchanged_inputs,
)
from memplan.runtime.module import PlannedModule
from memplan.tables import ShownAsTables, Table
from memplan.units import format_bytes


@dataclass(frozen=True, repr=False)
class Profile(ShownAsTables):
    """A measured training step: forward, backward and, if given, the optimizer's step.

    Gradients are None at its start, and the optimizer has its state.

    Attributes:
        peak_bytes: the most bytes at any time, residents included.
        resident_bytes: parameters, buffers, inputs and the optimizer's state.
        phases: the most bytes in "forward", "backward" and "optimizer".
        step_s: time of a step; the median of several.
        timeline: (seconds, bytes with residents) at each event of the allocator; CPU only.
        device: where it ran.
        reserved_bytes: the most that torch's CUDA allocator held, or None.
        process_bytes: GPU memory of the process by NVML, or None.
        host_bytes: resident set of the process; shown, never relied on.
    """

    peak_bytes: int
    resident_bytes: int
    phases: Mapping[str, int]
    step_s: float
    timeline: tuple[tuple[float, int], ...]
    device: str
    reserved_bytes: int | None
    process_bytes: int | None
    host_bytes: int

    @property
    def peak_phase(self) -> str:
        """The phase of the peak; the first of those that reach it."""
        return max(self.phases, key=self.phases.__getitem__)

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {format_bytes(n)}" for name, n in self.phases.items())
        return (
            f"Profile: peak {format_bytes(self.peak_bytes)} ({phases}), of which "
            f"{format_bytes(self.resident_bytes)} resident; {self.step_s * 1e3:.1f} ms a step "
            f"on {self.device}"
        )

    def tables(self) -> list[Table]:
        """A table of the step's memory by phase, and its time."""
        rows = [
            ("peak memory", format_bytes(self.peak_bytes)),
            *((f"in {name}", format_bytes(nbytes)) for name, nbytes in self.phases.items()),
            ("resident", format_bytes(self.resident_bytes)),
            ("step time", f"{self.step_s * 1e3:.1f} ms"),
        ]
        title = f"One training step on {self.device}, measured"
        return [Table(title, ("", "measured"), tuple(rows), frozenset({1}))]


def profile(
    module: nn.Module, sample: object, *, steps: int = 3, optimizer: Optimizer | None = None
) -> Profile:
    """Measure a training step of a module.

    Args:
        module: returns its loss, alone or among other outputs.
        sample: one batch, as in ``memplan.optimize``.
        steps: how many steps to time, after one to warm up and one to read memory.
        optimizer: measure its step as well. A planned module's own is included without being named.

    Parameters, buffers, gradients, the optimizer's state and random states are restored
    afterwards.

    Returns:
        Peak, resident bytes, the most bytes in each phase, and seconds.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = memplan.WithLoss(net, nn.functional.cross_entropy)
        >>> batch = torch.randn(4, 8), torch.randint(2, (4,))
        >>> measured = memplan.profile(model, batch)
        >>> measured.peak_bytes > measured.resident_bytes
        True
    """
    batch = Sample.of(sample)
    if optimizer is None and isinstance(module, PlannedModule):
        optimizer = module.optimizer
    with preserved(module, optimizer), unchanged_inputs(batch):
        reading = read_memory(module, batch, optimizer)
        step_s = median(time_step(module, batch, optimizer) for _ in range(max(1, steps)))
        return describe(module, batch, optimizer, reading, step_s)


def describe(
    module: nn.Module,
    sample: Sample,
    optimizer: Optimizer | None,
    reading: Reading,
    step_s: float,
) -> Profile:
    """A reading and a time as a profile."""
    resident = resident_bytes(module, sample, optimizer)
    if isinstance(module, PlannedModule):
        # Constants of the capture are among the plan's residents; state is as it is.
        planned = module.plan.categories.get(Role.OPTIMIZER_STATE.value, 0)
        measured = 0 if optimizer is None else state_bytes(optimizer)
        resident = module.plan.resident_bytes - planned + measured
    return Profile(
        peak_bytes=resident + reading.peak_bytes,
        resident_bytes=resident,
        phases={name: resident + nbytes for name, nbytes in reading.phases.items()},
        step_s=step_s,
        timeline=tuple((when, resident + nbytes) for when, nbytes in reading.timeline),
        device=str(_device(module)),
        reserved_bytes=reading.reserved_bytes,
        process_bytes=reading.process_bytes,
        host_bytes=reading.host_bytes,
    )


def _device(module: nn.Module) -> torch.device:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def read_memory(module: nn.Module, sample: Sample, optimizer: Optimizer | None) -> Reading:
    """Memory of one step, after one to warm up."""
    run_step(module, sample, optimizer)
    clear_gradients(module)
    device = _device(module)

    def run(during: During) -> object:
        return run_step(module, sample, optimizer, during)

    reading = read_cuda(run, device) if device.type == "cuda" else read_cpu(run)
    clear_gradients(module)
    return reading


def time_phases(
    module: nn.Module, sample: object, *, optimizer: Optimizer | None = None, steps: int = 5
) -> list[dict[str, float]]:
    """Seconds of each phase, in each of several steps after one to warm up."""
    batch = Sample.of(sample)
    is_cuda = _device(module).type == "cuda"
    times: list[dict[str, float]] = []

    @contextlib.contextmanager
    def during(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if is_cuda:
            torch.cuda.synchronize()
        times[-1][name] = time.perf_counter() - start

    with preserved(module, optimizer), unchanged_inputs(batch):
        for _ in range(steps + 1):
            times.append({})
            run_step(module, batch, optimizer, during)
            clear_gradients(module)
    return times[1:]


def time_step(module: nn.Module, sample: Sample, optimizer: Optimizer | None) -> float:
    """Seconds that one step takes; gradients are None afterwards."""
    is_cuda = _device(module).type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run_step(module, sample, optimizer)
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    clear_gradients(module)
    return seconds
