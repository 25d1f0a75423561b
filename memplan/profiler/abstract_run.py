"""A prediction of a step, followed on tensors without data: nothing is allocated or computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from memplan.capture import (
    CudaDropout,
    as_on_cuda,
    unchanged_attributes,
    users_place,
    without_data_of,
)
from memplan.capture.sample import Sample
from memplan.costs import CPU, Device, KernelMemory
from memplan.errors import MemplanError
from memplan.gc_pause import paused_collector
from memplan.ir.memory_trace import MemoryTrace, Resident
from memplan.ir.program import Phase, Role
from memplan.optimizer import duplicate_over
from memplan.profiler.attribution import Named, attributed
from memplan.profiler.step import clear_gradients, restored_randomness, run_step
from memplan.profiler.tracing import gradients_at, noting, residents_of
from memplan.torch_internals import (
    SPAN_PREFIX,
    Followed,
    Following,
    KernelCall,
    flatten,
    seeming_real,
    with_kernels,
    without_log_of_failures,
)


@dataclass(frozen=True)
class FollowedStep:
    """A step of an untouched module, followed without data.

    Attributes:
        followed: its events and kernel calls.
        residents: storages alive before it.
        named: storages known at the end of a phase.
        device: the device that it is for.
    """

    followed: Followed
    residents: tuple[Resident, ...]
    named: tuple[Named, ...]
    device: Device

    @property
    def calls(self) -> list[KernelCall]:
        """All kernel calls, in order."""
        return [call for _, call in self.followed.calls]

    def trace(self, memory: Callable[[KernelCall], KernelMemory]) -> MemoryTrace:
        """The step as a trace, if its kernels take so much memory."""
        found = with_kernels(
            self.followed,
            lambda call: memory(call).workspace_bytes,
            lambda call: memory(call).result_bytes,
        )
        return attributed(
            found, self.residents, self.named, device=self.device.name, kind="predicted"
        )


def follow_step(
    module: nn.Module,
    sample: object,
    *,
    optimizer: Optimizer | None = None,
    device: Device | None = None,
) -> FollowedStep:
    """Follow a training step of a module; gradients are None at its start.

    Python runs as it does in training, on tensors that have a shape and no data. The optimizer
    has its state.

    Args:
        module: returns its loss, alone or among other outputs. It may have data, or none (made on
            the meta device or under a fake mode).
        sample: one batch, as in ``memplan.optimize``.
        optimizer: its step is part of it.
        device: the device whose kernels are followed; it need not be present.

    Raises:
        MemplanError: naming the code that needs data.
    """
    device = CPU if device is None else device
    with (
        restored_randomness(),
        unchanged_attributes(module),
        without_data_of(module, Sample.of(sample), device.is_cuda) as (batch, copies),
        contextlib.ExitStack() as stack,
    ):
        stepped = None if optimizer is None else duplicate_over(optimizer, copies)
        if device.is_cuda:
            stack.enter_context(as_on_cuda(batch))
            stack.enter_context(CudaDropout())
        stack.enter_context(without_log_of_failures())
        try:
            return _follow(module, batch, stepped, device)
        except MemplanError:
            raise
        except Exception as error:
            raise MemplanError(
                f"{type(module).__name__}'s step cannot be followed without data "
                f"({_cause(error)}); measure it instead, with memplan profile"
            ) from error
        finally:
            clear_gradients(module)


def _cause(error: Exception) -> str:
    """One line on the error and its place in the user's code."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}{f': {text}' if text else ''}{users_place(error)}"


def _follow(
    module: nn.Module, sample: Sample, optimizer: Optimizer | None, device: Device
) -> FollowedStep:
    if optimizer is not None:
        with seeming_real(), Following():
            run_step(module, sample, optimizer)
        clear_gradients(module)
    residents = residents_of(module, sample, optimizer, device.granule_bytes)
    following = Following(device.granule_bytes)
    named: list[Named] = []

    @contextlib.contextmanager
    def during(name: str) -> Iterator[None]:
        with following.note(f"{SPAN_PREFIX}{name}"):
            yield
        if name == Phase.BACKWARD.value:
            following.mark(name)
            found = gradients_at(module, following.block_of)
            named.append(Named(name, Role.GRADIENT.value, found))

    with paused_collector(), seeming_real(), following, noting(module, following.note):
        kept = run_step(module, sample, optimizer, during)
    leaves = [leaf for leaf in flatten(kept.output)[0] if isinstance(leaf, torch.Tensor)]
    following.mark("outputs")
    named.append(
        Named("outputs", Role.OUTPUT.value, dict.fromkeys(map(following.block_of, leaves), ""))
    )
    return FollowedStep(following.followed(), residents, tuple(named), device)
