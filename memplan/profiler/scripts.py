"""Measurement of a step of an unmodified training script while it trains."""

from __future__ import annotations

import contextlib
import gc
import os
import runpy
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from memplan.capture import Known, running_anywhere
from memplan.errors import MemplanError
from memplan.ir.memory_trace import MemoryTrace, Resident
from memplan.ir.program import Phase, Role
from memplan.optimizer import tensors_in
from memplan.profiler.attribution import Named, attributed
from memplan.profiler.cutting import HELD, cut, settled
from memplan.profiler.tracing import address_of, gradients_at, noting_in
from memplan.torch_internals import (
    SPAN_PREFIX,
    is_fake,
    mark,
    note,
    recorded,
    recording,
    storage_key,
    stored_in,
)

_MOST_CALLS = 200_000
"""Limit on the recorded calls of torch's functions before the steps that matter."""


@dataclass(frozen=True)
class ScriptProfile:
    """A step of a script.

    Attributes:
        trace: the step, from the end of one optimizer step to the end of the next.
        step_s: time of the step after it, which is not recorded; without one, that of the steps up
            to it.
        step: number of the step, counted from 1.
    """

    trace: MemoryTrace
    step_s: float
    step: int

    @property
    def growth_bytes(self) -> int:
        """Growth in bytes from the start of the step to its end."""
        totals = self.trace.totals
        return totals[-1] - totals[0] if totals else 0


class _Done(BaseException):
    """Ends a script whose step was recorded; scripts do not catch it by accident."""


def profile_script(path: Path, arguments: Sequence[str], *, step: int = 4) -> ScriptProfile:
    """Run a script for so many optimizer steps, and account for the last of them.

    Steps are those of the optimizer that steps first. The script runs unchanged, and is stopped
    a step later, which is timed. Its output goes to stderr. Memory that Python does not see counts
    as unexplained, even if another thread has freed it.

    Args:
        path: the script.
        arguments: the script's ``sys.argv``.
        step: the step to record; the one before is recorded too, to know what it leaves behind.

    Raises:
        MemplanError: if the script ends before that.
    """
    if step < 3:
        raise MemplanError(f"the step to record must be the third or a later one, got {step}")
    recorder = _ScriptRecorder(step)
    before = list(sys.argv), list(sys.path)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    ended = "it ended"
    try:
        with recorder.watching(), contextlib.redirect_stdout(sys.stderr):
            runpy.run_path(str(path), run_name="__main__")
    except _Done:
        pass
    except SystemExit as error:
        ended = f"it exited with {error.code!r}"
    finally:
        sys.argv, sys.path[:] = before
    if recorder.is_over:
        return recorder.profile()
    if not recorder.count:
        raise MemplanError(
            f"{path} made no step of a torch.optim.Optimizer, by which steps are told apart: "
            f"{ended}. Where it updates parameters by itself, let it use torch.optim, or profile a "
            "factory that returns (model, batch)"
        )
    raise MemplanError(
        f"{path} made {recorder.count} optimizer steps, and {step} are needed: {ended}. Let it "
        "train longer, or record an earlier step with --step"
    )


@contextlib.contextmanager
def _without_warning_of_hooks() -> Iterator[None]:
    """Silence torch.compile's warning about the hooks that it traces: they do nothing there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*there are global hooks on modules")
        yield


class _ScriptRecorder:
    """Counts optimizer steps, times the one after the recorded step, and ends the script.

    All is recorded from the start, so that memory that Python does not see is known by its origin.
    If that becomes too much, or memplan itself measures, the recording ends, and restarts two
    steps before the end. Nowhere else: a call must not begin in one record and end in another.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.count = 0
        self.first: weakref.ref[Optimizer] | None = None
        self.is_over = False
        self.marks = 0
        # The script decides how long its modules and optimizers live.
        self.optimizers: WeakSet[Optimizer] = WeakSet()
        self.known = Known()
        self.ends_s: list[float] = []
        self.ended_s = self.step_s = 0.0
        self.named: list[Named] = []
        self.residents: dict[int, Resident] = {}
        self.calls = 0
        self.process = os.getpid()
        self.is_recording = True
        self.interrupted_by = ""
        self.record: torch.profiler.profile | None = None
        self.open = contextlib.ExitStack()
        self.stepping = contextlib.ExitStack()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        hooks = (
            register_optimizer_step_pre_hook(self.before),
            register_optimizer_step_post_hook(self.after),
        )
        try:
            # One mode from the first step on: another mode would recompile compiled code.
            with (
                _without_warning_of_hooks(),
                running_anywhere(self.known),
                noting_in(self.known.running, self.noted, self.is_noted),
            ):
                self.record = self.open.enter_context(recording(self.give_way))
                yield
        finally:
            self.stepping.close()
            self.open.close()
            for hook in hooks:
                hook.remove()

    def before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.optimizers.add(optimizer)
        if self.is_over or not self.is_recording:
            return None
        self.know_gradients()
        self.stepping.enter_context(note(f"{SPAN_PREFIX}{Phase.OPTIMIZER.value}"))
        itself, *others = args
        return (
            (itself, *(self.as_forward(one) if callable(one) else one for one in others)),
            {name: self.as_forward(one) if callable(one) else one for name, one in kwargs.items()},
        )

    def as_forward(self, closure: Callable[[], object]) -> Callable[[], object]:
        """A closure of an optimizer, recorded as forward, not as the optimizer's own work."""

        def called() -> object:
            with note(f"{SPAN_PREFIX}{Phase.FORWARD.value}"):
                result = closure()
            self.know_gradients()
            return result

        return called

    def is_noted(self) -> bool:
        """Tell whether to record: not in data loaders, which start as copies of this process."""
        return not self.is_over and os.getpid() == self.process

    def noted(self, text: str) -> AbstractContextManager[object]:
        self.calls += 1
        if self.calls == _MOST_CALLS and self.count < self.step - 2:
            self.interrupt(f"the script made {_MOST_CALLS} calls")
        return note(text)

    def give_way(self) -> None:
        self.interrupt("memplan measured kernels, or a step,")

    def interrupt(self, reason: str) -> None:
        """End the recording for this reason."""
        if self.is_over:
            return
        self.open.close()
        self.is_recording = False
        self.named.clear()
        self.interrupted_by = reason

    def after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        del args, kwargs
        self.stepping.close()
        self.first = self.first or weakref.ref(optimizer)
        if optimizer is not self.first():
            return
        self.count += 1
        if not self.is_over:
            self.ends_s.append(time.perf_counter())
        if self.count == 1:
            self.know_others()
        if self.count == self.step - 2:
            gc.collect()
            if not self.is_recording:
                self.record = self.open.enter_context(recording(self.give_way))
                self.is_recording = True
                warnings.warn(
                    f"{self.interrupted_by} before step {self.count} had ended: of what was made "
                    "until then, only what Python sees is counted",
                    stacklevel=2,
                )
            mark("before")
        elif self.count == self.step - 1:
            mark("start")
            self.know_gradients()
            self.residents = self.held()
        elif self.count == self.step:
            mark("end")
            self.is_over = True
            self.open.close()
            self.ended_s = time.perf_counter()
        elif self.count > self.step:
            self.step_s = self.step_s or time.perf_counter() - self.ended_s
            raise _Done

    def know_others(self) -> None:
        """Learn trained modules that were never called, except through ``forward``."""
        objects = gc.get_objects()
        modules = [one for one in objects if issubclass(type(one), nn.Module)]
        inside = {child for one in modules for child in one.children()}
        trained = {
            id(parameter)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for root in modules:
            is_new = root not in inside and root not in self.known.fqns
            if is_new and any(id(parameter) in trained for parameter in root.parameters()):
                self.known.learn(root)

    def know_gradients(self) -> None:
        if not self.is_recording:
            return
        self.marks += 1
        text = f"gradients {self.marks}"
        mark(text)
        names = {
            address: f"{prefix}.{name}" if prefix else name
            for root, prefix in self.known.roots.items()
            for address, name in gradients_at(root, address_of).items()
        }
        self.named.append(Named(text, Role.GRADIENT.value, names))

    def held(self) -> dict[int, Resident]:
        """Storages that Python sees, by address."""
        named = [
            (Role.PARAMETER if is_parameter else Role.BUFFER, name, tensor)
            for root, prefix in self.known.roots.items()
            for is_parameter, tensors in (
                (True, root.named_parameters(prefix=prefix)),
                (False, root.named_buffers(prefix=prefix)),
            )
            for name, tensor in tensors
        ]
        names = {id(tensor): name for role, name, tensor in named if role is Role.PARAMETER}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                named += [(Role.PARAMETER, "", parameter) for parameter in group["params"]]
            for parameter, state in optimizer.state.items():
                for tensor in tensors_in(state, but=[parameter]):
                    # LBFGS keeps its global state at its first parameter.
                    is_its_own = tensor.numel() <= parameter.numel()
                    name = names.get(id(parameter), "") if is_its_own else ""
                    named.append((Role.OPTIMIZER_STATE, name, tensor))
        objects = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
        with_data = [one for one in objects if not (is_fake(one) or one.is_meta)]
        named += [(Role.INPUT, HELD, tensor) for tensor in with_data]
        first: dict[int, tuple[int, Resident]] = {}
        for role, name, whole in named:
            for tensor in stored_in(whole):
                if tensor.device.type == self.device():
                    nbytes = tensor.untyped_storage().nbytes()
                    resident = Resident(name, nbytes, role.value)
                    first.setdefault(storage_key(tensor), (address_of(tensor), resident))
        return dict(first.values())

    def profile(self) -> ScriptProfile:
        assert self.record is not None
        if not self.is_recording:
            raise MemplanError(
                f"{self.interrupted_by} before step {self.step}, which is recorded, had ended; "
                "torch has but one profiler. Record another step with --step"
            )
        found = recorded(self.record, self.device())
        if not {"before", "start", "end", *(one.mark for one in self.named)} <= found.marks.keys():
            raise MemplanError(
                "nothing was recorded of the step: the script runs torch's profiler itself, of "
                "which only one can run; turn it off"
            )
        whole = attributed(
            found, (), self.named, device=self.device(), otherwise=Phase.FORWARD.value
        )
        start_ns, end_ns = found.marks["start"], found.marks["end"]
        first = sum(event.time_ns <= start_ns for event in found.events)
        last = sum(event.time_ns <= end_ns for event in found.events)
        before = sum(event.time_ns <= found.marks["before"] for event in found.events)
        addresses = [event.address for event in found.events]
        whole, residents = settled(whole, self.residents, addresses, (before, first, last))
        recorded_s = [b - a for a, b in zip(self.ends_s, self.ends_s[1:], strict=False)]
        trace = replace(cut(whole, first, last), residents=residents)
        return ScriptProfile(trace, self.step_s or median(recorded_s), self.step)

    def device(self) -> str:
        tensors = [p for root in self.known.roots for p in root.parameters()]
        return next((tensor.device.type for tensor in tensors), "cpu")
