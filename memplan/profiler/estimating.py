"""An estimate of a step's memory, before it is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from memplan.costs import Device, device_named, least_memory, measured_memory, most_memory
from memplan.errors import MemplanError
from memplan.ir.memory_trace import MemoryTrace
from memplan.profiler.abstract_run import follow_step
from memplan.profiler.caching_allocator import reserved_bytes
from memplan.units import format_bytes

_UNSEEN = 0.01
"""Share of the bytes above residents, for scalars that no op is seen to make, and the like."""


@dataclass(frozen=True)
class Estimate:
    """The memory that a step of an untouched module will take.

    Attributes:
        trace: the step, block by block; its peak is the estimate.
        least_bytes: lower bound on the peak.
        most_bytes: upper bound on the peak.
        reserved_bytes: what CUDA's caching allocator would hold, by a model of it that is not
            verified; None for the CPU.
        costs: whether kernels' workspace was "measured" on this machine, or is "analytic".
        refusals: kernels that could not be measured alone, and why.
        device: the device that it is for.
    """

    trace: MemoryTrace
    least_bytes: int
    most_bytes: int
    reserved_bytes: int | None
    costs: Literal["measured", "analytic"]
    refusals: tuple[str, ...]
    device: Device

    @property
    def peak_bytes(self) -> int:
        """The estimate; with analytic costs, without kernels' workspace."""
        return self.trace.peak_bytes

    def __str__(self) -> str:
        return (
            f"Estimate: peak {format_bytes(self.peak_bytes)}, between "
            f"{format_bytes(self.least_bytes)} and {format_bytes(self.most_bytes)}, of which "
            f"{format_bytes(self.trace.resident_bytes)} resident; {self.costs} costs on "
            f"{self.device.name}"
        )

    def __repr__(self) -> str:
        return f"<{self}>"


def estimate(
    module: nn.Module,
    sample: object,
    *,
    optimizer: Optimizer | None = None,
    device: str | None = None,
    costs: Literal["measured", "analytic"] = "analytic",
) -> Estimate:
    """Estimate the memory of a training step, before it is run.

    The step is that of the module as it is, with Python's and autograd's references; for a plan's
    see ``memplan.plan``. Gradients are None at its start, and the optimizer has its state.

    Args:
        module: returns its loss, alone or among other outputs; it may be without data.
        sample: one batch, as in ``memplan.optimize``.
        optimizer: its step is part of it.
        device: a name of ``memplan.costs.DEVICES``, which need not be present; None is the
            module's device.
        costs: "measured" runs each distinct kernel alone, on this machine. "analytic" runs
            nothing: the interval then spans the workspace that kernels may need.

    Returns:
        The peak, and an interval that contains it.

    Raises:
        MemplanError: if the device is not known, or the step needs data.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = memplan.WithLoss(net, nn.functional.cross_entropy)
        >>> batch = torch.randn(4, 8), torch.randint(2, (4,))
        >>> found = memplan.estimate(model, batch)
        >>> found.least_bytes <= memplan.profile(model, batch).peak_bytes <= found.most_bytes
        True
    """
    spec = None if device is None else device_named(device)
    if costs == "measured" and spec is not None:
        raise MemplanError(
            'costs="measured" runs kernels on this machine, and cannot for another device; leave '
            'device out, or use "analytic"'
        )
    step = follow_step(module, sample, optimizer=optimizer, device=spec)
    least, most = (step.trace(memory) for memory in (least_memory, most_memory))
    trace, refusals = least, set[str]()
    if costs == "measured":
        where = next((p.device for p in module.parameters()), torch.device("cpu"))
        memory = measured_memory(step.calls, torch.device("cpu") if where.type == "meta" else where)
        trace = most = step.trace(memory)
        refusals = {memory(call).refusal for call in step.calls} - {""}
    unseen = int(_UNSEEN * (most.peak_bytes - most.resident_bytes))
    lowest = least if refusals else trace
    is_cuda = step.device.is_cuda
    return Estimate(
        trace=trace,
        least_bytes=max(lowest.resident_bytes, lowest.peak_bytes - unseen),
        most_bytes=most.peak_bytes + unseen,
        reserved_bytes=reserved_bytes(trace) if is_cuda else None,
        costs=costs,
        refusals=tuple(sorted(refusals)),
        device=step.device,
    )
