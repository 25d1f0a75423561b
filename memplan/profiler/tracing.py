"""A step run with every allocator event recorded, together with its origin."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memplan.capture import running, users_line
from memplan.capture.sample import Sample
from memplan.gc_pause import paused_collector
from memplan.ir.memory_trace import MemoryTrace, Resident
from memplan.ir.program import Phase, Role
from memplan.optimizer import state_tensors, tensors_in
from memplan.profiler.attribution import Named, attributed
from memplan.profiler.step import clear_gradients, preserved, run_step, unchanged_inputs
from memplan.torch_internals import (
    SPAN_PREFIX,
    FunctionMode,
    Origin,
    flatten,
    is_noting_planned,
    mark,
    note,
    noting_planned,
    recorded,
    recording,
    storage_key,
    stored_in,
)


def trace_memory(
    module: nn.Module, sample: object, *, optimizer: Optimizer | None = None
) -> MemoryTrace:
    """Measure a training step, after one to warm up, and account for every byte.

    Gradients are None at its start, and the optimizer has its state. Parameters, buffers,
    gradients, the optimizer's state and random states are restored afterwards.

    Args:
        module: returns its loss, alone or among other outputs.
        sample: one batch, as in ``memplan.optimize``.
        optimizer: its step is part of it.
    """
    batch = Sample.of(sample)
    with preserved(module, optimizer), unchanged_inputs(batch):
        run_step(module, batch, optimizer)
        clear_gradients(module)
        residents = residents_of(module, batch, optimizer)
        named: list[Named] = []

        @contextlib.contextmanager
        def during(name: str) -> Iterator[None]:
            with note(f"{SPAN_PREFIX}{name}"):
                yield
            if name == Phase.BACKWARD.value:
                mark(name)
                named.append(Named(name, Role.GRADIENT.value, gradients_at(module, address_of)))

        gc.collect()
        with paused_collector(), recording() as profile:
            with noting(module):
                kept = run_step(module, batch, optimizer, during)
            leaves = [leaf for leaf in flatten(kept.output)[0] if isinstance(leaf, torch.Tensor)]
            outputs = dict.fromkeys(map(address_of, leaves), "")
            mark("outputs")
            del kept, leaves
        named.append(Named("outputs", Role.OUTPUT.value, outputs))
        clear_gradients(module)
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        found = recorded(profile, device.type)
        return attributed(found, residents, named, device=str(device))


@contextlib.contextmanager
def noting(
    module: nn.Module, note: Callable[[str], AbstractContextManager[object]] = note
) -> Iterator[None]:
    """Record the calls of torch's functions inside, with their module and the user's line."""
    open_notes: list[AbstractContextManager[object]] = []

    def changed(names: Sequence[str]) -> None:
        # Recomputation in the backward, and calls from C++, reach no function that is noted.
        if len(names) > len(open_notes):
            open_notes.append(note(Origin(module=names[-1]).as_note()))
            open_notes[-1].__enter__()
        else:
            open_notes.pop().__exit__(None, None, None)

    with (
        running(module, changed) as names,
        noting_in(lambda: names[-1] if names else "", note),
    ):
        yield


@contextlib.contextmanager
def noting_in(
    running: Callable[[], str],
    note: Callable[[str], AbstractContextManager[object]] = note,
    is_on: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """The same while ``is_on``; ``running`` names the innermost module."""
    with noting_planned(note, is_on), _Notes(running, note, is_on):
        yield


class _Notes(FunctionMode):
    def __init__(
        self,
        running: Callable[[], str],
        note: Callable[[str], AbstractContextManager[object]],
        is_on: Callable[[], bool],
    ) -> None:
        super().__init__()
        self.running = running
        self.note = note
        self.is_on = is_on

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or is_noting_planned() or not self.is_on():
            return func(*args, **kwargs)
        place = users_line()
        origin = Origin(
            module=self.running(),
            source="" if place is None else f"{place[0]}:{place[1]}",
            function=getattr(func, "__name__", ""),
        )
        with self.note(origin.as_note()):
            return func(*args, **kwargs)


def residents_of(
    module: nn.Module, sample: Sample, optimizer: Optimizer | None, granule_bytes: int = 1
) -> tuple[Resident, ...]:
    """Parameters, buffers, inputs and the optimizer's state, each storage once.

    Sizes are rounded up to multiples of ``granule_bytes``, as the allocator hands them out.
    """
    state = [] if optimizer is None else _named_state(module, optimizer)
    tensors = [
        *((Role.PARAMETER, name, parameter) for name, parameter in module.named_parameters()),
        *((Role.BUFFER, name, buffer) for name, buffer in module.named_buffers()),
        *((Role.INPUT, f"input {n}", tensor) for n, tensor in enumerate(sample.tensors())),
        *((Role.OPTIMIZER_STATE, name, tensor) for name, tensor in state),
    ]
    first: dict[int, Resident] = {}
    for role, name, tensor in tensors:
        nbytes = -(-tensor.untyped_storage().nbytes() // granule_bytes) * granule_bytes
        first.setdefault(storage_key(tensor), Resident(name, nbytes, role.value))
    return tuple(first.values())


def _named_state(module: nn.Module, optimizer: Optimizer) -> list[tuple[str, torch.Tensor]]:
    """An optimizer's state, by the parameter that it is for; "" for global state."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    named = [
        (names.get(id(parameter), ""), tensor)
        for parameter, held in optimizer.state.items()
        for tensor in tensors_in(held, but=[parameter])
    ]
    return [*named, *(("", tensor) for tensor in state_tensors(optimizer))]


def gradients_at(module: nn.Module, address: Callable[[torch.Tensor], int]) -> dict[int, str]:
    """The address of each parameter's gradient, with the parameter's name."""
    return {
        address(stored): name
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
        for stored in stored_in(parameter.grad)
    }


def address_of(tensor: torch.Tensor) -> int:
    """The address of a tensor's memory."""
    return tensor.untyped_storage().data_ptr()
