"""The signature of a captured step: all that it depends on. A new one is captured anew."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from memplan.capture import attributes_of
from memplan.capture.sample import Sample
from memplan.errors import CaptureError, PlanMismatch
from memplan.torch_internals import enabled_attention, flatten, has_hooks, storage_key
from memplan.transforms.passes import CallChoice

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class State:
    """A module's tensors at one call.

    Attributes:
        parameters: by FQN, tied ones under each of their names.
        buffers: by FQN.
        choice: what the call runs, where a pass lets it vary.
    """

    parameters: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    choice: CallChoice = field(default_factory=CallChoice)

    @classmethod
    def of(cls, module: nn.Module) -> State:
        """The module's current tensors."""
        return cls(
            dict(module.named_parameters(remove_duplicate=False)),
            dict(module.named_buffers(remove_duplicate=False)),
        )

    def chosen(self, choice: CallChoice) -> State:
        """The tensors by their names in the program of a choice."""
        others = choice.tensors
        if not others:
            return replace(self, choice=choice)
        return State(
            {name: self.parameters[others.get(name, name)] for name in self.parameters},
            {name: self.buffers[others.get(name, name)] for name in self.buffers},
            choice,
        )


def signature_of(module: nn.Module, state: State, sample: Sample) -> Hashable:
    """Everything that a capture bakes in: inputs, modes, tensors, hooks and numeric flags.

    Raises:
        PlanMismatch: for an input that is neither a tensor nor a plain value.
    """
    leaves, spec = flatten((sample.args, dict(sample.kwargs)))
    owners: dict[int, int] = {}
    return (
        state.choice.program,
        str(spec),
        tuple(_leaf(leaf) for leaf in leaves),
        # The id of a replaced module may be reused; steps know their own modules.
        tuple((id(child), child.training, has_hooks(child)) for child in module.modules()),
        tuple(
            (name, _tensor(tensor), tensor.grad is not None, owners.setdefault(id(tensor), number))
            for number, (name, tensor) in enumerate(state.parameters.items())
        ),
        tuple((name, _tensor(tensor)) for name, tensor in state.buffers.items()),
        # Last, because it fails on an uninitialized parameter.
        _sharing([*leaves, *state.parameters.values(), *state.buffers.values()]),
        _flags(),
    )


def _tensor(tensor: torch.Tensor) -> Hashable:
    if nn.parameter.is_lazy(tensor):
        raise CaptureError(
            "a parameter is not initialized (a lazy module); run the untouched model once, then "
            "plan it"
        )
    if tensor.layout != torch.strided:
        raise CaptureError(
            f"an input, a parameter or a buffer is sparse ({tensor.layout}), and memplan does not "
            "know the memory of what is; pass a dense tensor: tensor.to_dense()"
        )
    return (
        type(tensor),
        tensor.shape,
        tensor.stride(),
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def _leaf(leaf: object) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return _tensor(leaf), attributes_of(leaf)
    if isinstance(leaf, _PLAIN):
        # Floats as text, so that 0.0 is not -0.0, and NaN is NaN.
        return (type(leaf), repr(leaf) if isinstance(leaf, float | complex) else leaf)
    raise PlanMismatch(
        f"an input is a {type(leaf).__name__}; a planned module takes tensors and plain values "
        "(numbers, strings, None) in tuples, lists and dicts"
    )


def _sharing(leaves: list[object]) -> tuple[tuple[int, int], ...]:
    """For each tensor that shares memory, the first one with that memory, and its offset there."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    first: dict[int, int] = {}
    owners = [first.setdefault(storage_key(t), number) for number, t in enumerate(tensors)]
    shared = {owner for number, owner in enumerate(owners) if owner != number}
    return tuple(
        (owner, int(tensor.storage_offset())) if owner in shared else (-1, 0)
        for owner, tensor in zip(owners, tensors, strict=True)
    )


def _flags() -> Hashable:
    return (
        *(
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
        ),
        torch.is_autocast_cache_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        enabled_attention(),
        torch.backends.mha.get_fastpath_enabled(),
    )
