"""A step of a whole training script, unmodified, measured while it trains."""

from __future__ import annotations

import contextlib
import gc
import runpy
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from memplan.capture import running_anywhere
from memplan.errors import MemplanError
from memplan.profiler.attribution import Named, attributed
from memplan.profiler.tracing import address_of, gradients_at, noting_in
from memplan.program import Phase, Role
from memplan.torch_internals import (
    SPAN_PREFIX,
    is_fake,
    mark,
    note,
    recorded,
    recording,
    storage_key,
)
from memplan.trace import Block, MemoryTrace, Resident, spans_of
from memplan.update import tensors_in

_HELD = "held by the script"


@dataclass(frozen=True)
class ScriptProfile:
    """A step of a script.

    Attributes:
        trace: the step, from the end of one optimizer step to the end of the next.
        step_s: time of a step; the median of those before the record.
        step: which step it was, counted from 1.
    """

    trace: MemoryTrace
    step_s: float
    step: int


class _Done(BaseException):
    """Ends a script whose step was recorded; scripts do not catch it by accident."""


def profile_script(path: Path, arguments: Sequence[str], *, step: int = 4) -> ScriptProfile:
    """Run a script until its optimizer has made so many steps, and account for the last of them.

    Steps are those of the optimizer that steps first. The script is not told: its code runs as it
    is, and is stopped after that step. What it prints goes to stderr.

    Args:
        path: the script.
        arguments: what it finds in ``sys.argv``.
        step: which step to record; the one before it is recorded too, to know what is left of it.

    Raises:
        MemplanError: if the script ends before that.
    """
    if step < 3:
        raise MemplanError(f"the step to record must be the third or a later one, got {step}")
    recorder = _Recorder(step)
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
    raise MemplanError(
        f"{path} made {recorder.count} optimizer steps, and {step} are needed: {ended}. Let it "
        "train longer, or record an earlier step with --step"
    )


class _Recorder:
    """Counts optimizer steps; records the last two, and stops the script."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.count = 0
        self.first: weakref.ref[Optimizer] | None = None
        self.is_over = False
        self.marks = 0
        # The script's modules and optimizers live no longer than it lets them.
        self.optimizers: WeakSet[Optimizer] = WeakSet()
        self.roots: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self.ends_s: list[float] = []
        self.named: list[Named] = []
        self.residents: tuple[Resident, ...] = ()
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
            with running_anywhere(self.roots) as names:
                self.names = names
                yield
        finally:
            self.stepping.close()
            self.open.close()
            for hook in hooks:
                hook.remove()

    def before(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        del args, kwargs
        self.optimizers.add(optimizer)
        if self.record is None:
            return
        self.know_gradients()
        self.stepping.enter_context(note(f"{SPAN_PREFIX}{Phase.OPTIMIZER.value}"))

    def after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        del args, kwargs
        self.stepping.close()
        if self.is_over:
            raise _Done
        self.first = self.first or weakref.ref(optimizer)
        if optimizer is not self.first():
            return
        self.count += 1
        if self.count <= self.step - 2:
            self.ends_s.append(time.perf_counter())
        if self.count == self.step - 2:
            gc.collect()
            self.record = self.open.enter_context(recording())
            self.open.enter_context(noting_in(self.names))
        elif self.count == self.step - 1:
            mark("start")
            self.know_gradients()
            self.residents = self.held()
        elif self.count == self.step:
            mark("end")
            self.is_over = True
            self.open.close()
            raise _Done

    def know_gradients(self) -> None:
        self.marks += 1
        text = f"gradients {self.marks}"
        mark(text)
        names = {
            address: f"{prefix}.{name}" if prefix else name
            for root, prefix in self.roots.items()
            for address, name in gradients_at(root, address_of).items()
        }
        self.named.append(Named(text, Role.GRADIENT.value, names))

    def held(self) -> tuple[Resident, ...]:
        """Storages that were there before the record."""
        named = [
            (Role.PARAMETER if is_parameter else Role.BUFFER, name, tensor)
            for root, prefix in self.roots.items()
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
                name = names.get(id(parameter), "")
                own = tensors_in(state, but=[parameter])
                named += [(Role.OPTIMIZER_STATE, name, tensor) for tensor in own]
        objects = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
        with_data = [one for one in objects if not (is_fake(one) or one.is_meta)]
        named += [(Role.INPUT, _HELD, tensor) for tensor in with_data]
        first: dict[int, tuple[int, Resident]] = {}
        for role, name, tensor in named:
            if tensor.device.type != self.device() or tensor.layout is not torch.strided:
                continue
            nbytes = tensor.untyped_storage().nbytes()
            resident = Resident(name, nbytes, role.value)
            first.setdefault(storage_key(tensor), (address_of(tensor), resident))
        self.addresses = [address for address, _ in first.values()]
        return tuple(resident for _, resident in first.values())

    def profile(self) -> ScriptProfile:
        assert self.record is not None
        found = recorded(self.record, self.device())
        if not {"start", "end", *(one.mark for one in self.named)} <= found.marks.keys():
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
        carried = {found.events[block.made].address for block in whole.live(first - 1)}
        residents = tuple(
            resident
            for address, resident in zip(self.addresses, self.residents, strict=True)
            if address not in carried
        )
        intervals = [b - a for a, b in zip(self.ends_s, self.ends_s[1:], strict=False)]
        trace = replace(_cut(whole, first, last), residents=residents)
        return ScriptProfile(trace, median(intervals) if intervals else 0.0, self.step)

    def device(self) -> str:
        tensors = [p for root in self.roots for p in root.parameters()]
        return next((tensor.device.type for tensor in tensors), "cpu")


def _cut(trace: MemoryTrace, first: int, last: int) -> MemoryTrace:
    """The events from ``first`` to before ``last``, after one for what is there already."""

    def moved(block: Block) -> Block:
        freed = block.freed
        return replace(
            block,
            made=max(0, block.made - first + 1),
            freed=None if freed is None or freed >= last else freed - first + 1,
        )

    blocks = [
        moved(block)
        for block in trace.blocks
        if block.made < last and (block.freed is None or block.freed >= first)
    ]
    every = [span.phase for span in trace.spans for _ in range(span.first, span.end)]
    phases = every[first:last]
    times = trace.times_s[first:last]
    start_s = times[0] if times else 0.0
    return replace(
        trace,
        blocks=tuple(blocks),
        times_s=(0.0, *(when - start_s for when in times)),
        spans=spans_of([phases[0] if phases else "", *phases]),
    )
