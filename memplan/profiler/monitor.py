"""Measurement of a running training now and then, beside its plan's prediction."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable
from itertools import accumulate
from types import TracebackType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from memplan.errors import MemplanError
from memplan.ir.program import Phase, Role
from memplan.optimizer import state_bytes
from memplan.planner.plan import Plan
from memplan.runtime.module import PlannedModule
from memplan.torch_internals import (
    allocations,
    is_profiling,
    peak_requested_bytes,
    recording,
    requested_bytes,
)
from memplan.units import format_bytes

_LOG = logging.getLogger("memplan")


def log_memory(planned: PlannedModule, every: int = 100) -> MemoryLog:
    """Log the predicted and the measured peak of one step in ``every``, at INFO to "memplan".

    A context manager, or close it by hand. Steps are calls of the module with gradients enabled,
    and last until the optimizer's step, which is measured if the plan covers it, or until the
    next call. The others cost nothing. A step for which a plan is made, or in which something
    else is measured, is skipped in favour of the next.

    On the CPU, one step is recorded with torch's profiler, of which only one can run at a time;
    on CUDA, torch's peak statistics are reset.

    Args:
        planned: the result of ``memplan.optimize``.
        every: the number of steps per line.

    Returns:
        The lines logged so far; a context manager.

    Raises:
        MemplanError: if ``every`` is less than 1.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = memplan.WithLoss(net, nn.functional.cross_entropy)
        >>> batch = torch.randn(4, 8), torch.randint(2, (4,))
        >>> planned = memplan.optimize(model, batch)
        >>> with memplan.log_memory(planned, every=2) as log:
        ...     for _ in range(4):
        ...         planned(*batch).backward()
    """
    if every < 1:
        raise MemplanError(f"every {every} steps is not possible; log every step with every=1")
    return MemoryLog(planned, every)


class MemoryLog:
    """A log that runs until it is closed."""

    def __init__(self, planned: PlannedModule, every: int) -> None:
        self._planned = planned
        self._every = every
        self._step = 0
        self._is_due = False
        self._reading: _Reading | None = None
        # Hooks of the planned module itself, unlike the original's, are in no signature.
        self._handle = planned.register_forward_pre_hook(self._before_call)

    def close(self) -> None:
        """Log the step being measured, if any, and stop."""
        self._handle.remove()
        self._finish()

    def __enter__(self) -> MemoryLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and self._reading is not None:
            self._reading.stop()  # a failed step shows nothing
            self._reading = None
        self.close()

    def _before_call(self, module: object, inputs: object) -> None:
        del module, inputs
        self._finish()
        if not torch.is_grad_enabled():
            return
        self._step += 1
        self._is_due = self._is_due or self._step % self._every == 0
        if self._is_due and not is_profiling():
            self._reading = _Reading(self._planned, self._finish)

    def _finish(self) -> None:
        reading, self._reading = self._reading, None
        if reading is None:
            return
        plan, above_bytes = reading.plan, reading.stop()
        if plan is None or above_bytes is None:
            return
        self._is_due = False
        planned_state = plan.categories.get(Role.OPTIMIZER_STATE.value, 0)
        measured = plan.resident_bytes - planned_state + reading.state_bytes + above_bytes
        _LOG.info(
            "step %d: predicted %s, measured %s, ratio %.3f",
            self._step,
            format_bytes(plan.peak_bytes),
            format_bytes(measured),
            measured / plan.peak_bytes,
        )


class _Reading:
    """One step being measured.

    Attributes:
        state_bytes: bytes of the planned optimizer's state before the step.
    """

    def __init__(self, planned: PlannedModule, finish: Callable[[], None]) -> None:
        self.state_bytes = 0 if planned.optimizer is None else state_bytes(planned.optimizer)
        self._planned = planned
        self._known = planned.plans
        self._finish = finish
        self._parameters = {id(parameter) for parameter in planned.parameters()}
        device = next((p.device for p in planned.parameters()), torch.device("cpu"))
        self._stop = _read_cuda(device) if device.type == "cuda" else _read_cpu()
        self._hooks = (
            register_optimizer_step_pre_hook(self._before_update),
            register_optimizer_step_post_hook(self._after_update),
        )

    @property
    def plan(self) -> Plan | None:
        """The step's plan; None if it was made in the step, which then did more than its plan."""
        if not self._planned.plans:
            return None
        plan = self._planned.plan
        return plan if any(plan is known for known in self._known) else None

    def stop(self) -> int | None:
        """The most bytes above those at the start; None if another measurement interrupted it."""
        above_bytes = self._stop()
        for hook in self._hooks:
            hook.remove()
        return above_bytes

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        if self._is_for_us(optimizer) and not self._is_update_planned():
            self._finish()

    def _after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        if self._is_for_us(optimizer) and self._is_update_planned():
            self._finish()

    def _is_for_us(self, optimizer: Optimizer) -> bool:
        groups = optimizer.param_groups
        return any(id(p) in self._parameters for group in groups for p in group["params"])

    def _is_update_planned(self) -> bool:
        return self.plan is not None and Phase.OPTIMIZER.value in self.plan.phases


def _read_cpu() -> Callable[[], int | None]:
    """Start recording; the function returned stops it, and returns the peak above the start."""
    # Earlier garbage must not be freed, and counted, in the step.
    gc.collect()
    stack = contextlib.ExitStack()
    given_way: list[bool] = []

    def give_way() -> None:
        given_way.append(True)
        stack.close()

    profile = stack.enter_context(recording(give_way))

    def stop() -> int | None:
        stack.close()
        if given_way:
            return None
        return max(accumulate((nbytes for _, nbytes in allocations(profile)), initial=0))

    return stop


def _read_cuda(device: torch.device) -> Callable[[], int]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = requested_bytes(device)

    def stop() -> int:
        torch.cuda.synchronize(device)
        return peak_requested_bytes(device) - before

    return stop
