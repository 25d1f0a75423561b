"""A module as a function from tensors to tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from memplan.capture.assigned_data import AssignedData
from memplan.capture.casts import CastOnce
from memplan.capture.draws import DrawsInPlace
from memplan.capture.input_guards import Decision, replayed
from memplan.capture.losses import LossesAsEager
from memplan.capture.module_state import unchanged_attributes
from memplan.capture.python_state import Reads, noting, with_attributes_of
from memplan.capture.sample import Sample
from memplan.capture.unsupported import refused_seeds
from memplan.errors import CaptureError
from memplan.torch_internals import Autocast, TreeSpec, flatten, leads_to, unflatten

Differentiable = Literal["all"] | tuple[int, ...] | None
"""Outputs that gradients arrive at: all, some by position among the output's leaves, or None:
the loss alone if there is exactly one, else all."""

_PREFIX = "wrapped."


@dataclass(frozen=True)
class OutputLeaf:
    """One leaf of what the module returns.

    Attributes:
        position: among the tensors returned, or None for a constant.
        constant: the constant.
    """

    position: int | None
    constant: object = None


@dataclass(frozen=True)
class Output:
    """The output of the module.

    Attributes:
        spec: its structure.
        leaves: its leaves, in order.
        requires_grad: of each tensor among them, in the untouched module.
        differentiable: positions of the tensors that gradients may arrive at.
        leads_to: for each of them, names of the parameters and positions of the inputs to which a
            gradient that arrives there flows.
        is_loss: whether ``differentiable`` was narrowed to the only scalar.
    """

    spec: TreeSpec
    leaves: tuple[OutputLeaf, ...]
    requires_grad: tuple[bool, ...]
    differentiable: frozenset[int]
    leads_to: Mapping[int, frozenset[str | int]]
    is_loss: bool


class Flat(nn.Module):
    """Takes the tensors among the sample's leaves; returns those among the output's.

    Attributes:
        seen: the output of the last call.
        changed: names of attributes that it has changed, each with whether it seems to be set
            once; they are restored after each call.
        reads: the attributes that it has read.
        decisions: values of tensors that the forward asks for, in order; None: let it ask.
    """

    def __init__(self, module: nn.Module, sample: Sample, differentiable: Differentiable) -> None:
        super().__init__()
        self.wrapped = module
        self.sample_leaves, self.sample_spec = flatten((sample.args, dict(sample.kwargs)))
        self.asked = differentiable
        self.seen: Output | None = None
        self.decisions: tuple[Decision, ...] | None = None
        self.changed: dict[str, bool] = {}
        self.reads = Reads(module)
        self.ties = _ties(module)
        self.autocast = Autocast.here()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter under one name: gradients of tied ones are summed inside the trace."""
        del remove_duplicate
        return super().named_parameters(prefix, recurse)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Each buffer under one name."""
        del remove_duplicate
        return super().named_buffers(prefix, recurse)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the module; outputs that no gradient arrives at are detached."""
        given = iter(tensors)
        leaves = [
            with_attributes_of(leaf, next(given)) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in self.sample_leaves
        ]
        args, kwargs = unflatten(leaves, self.sample_spec)
        replay = contextlib.nullcontext() if self.decisions is None else replayed(self.decisions)
        with (
            CastOnce(self._leaves(tensors)),
            self.autocast.again(),
            unchanged_attributes(self.wrapped) as changed,
            _tied(self.ties),
            _buffers_written_in_place(self.wrapped),
            refused_seeds(),
            replay,
            AssignedData(self.named_buffers()),
            DrawsInPlace(),
            LossesAsEager(),
            noting(self.reads),
        ):
            outputs, spec = flatten(self.wrapped(*args, **kwargs))
        self.changed |= changed
        kept: list[torch.Tensor] = []
        described: list[OutputLeaf] = []
        for leaf in outputs:
            if isinstance(leaf, torch.Tensor):
                described.append(OutputLeaf(len(kept)))
                kept.append(leaf)
            elif leaf is None or isinstance(leaf, bool | int | float | complex | str):
                described.append(OutputLeaf(None, leaf))
            else:
                raise CaptureError(_unknown_output(self.wrapped, leaf))
        wanted, is_loss = _choose_differentiable(kept, described, self.asked)
        required = tuple(tensor.requires_grad for tensor in kept)
        leads = {position: self._led_to(kept[position], tensors) for position in wanted}
        self.seen = Output(spec, tuple(described), required, wanted, leads, is_loss)
        own = {id(tensor) for tensor in (*tensors, *self.parameters(), *self.buffers())}
        return tuple(
            tensor if position in wanted or id(tensor) in own else tensor.detach()
            for position, tensor in enumerate(kept)
        )

    def _led_to(
        self, output: torch.Tensor, tensors: Sequence[torch.Tensor]
    ) -> frozenset[str | int]:
        """Parameters by name, and inputs by position, that autograd's graph leads to."""
        named: dict[str | int, torch.Tensor] = {
            own_name(name): parameter for name, parameter in self.named_parameters()
        }
        named |= dict(enumerate(tensors))
        found = leads_to(output, named.values())
        return frozenset(name for name, tensor in named.items() if id(tensor) in found)

    def _leaves(self, tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Stand-ins for autograd's leaves that need a gradient."""
        yield from (parameter for parameter in self.parameters() if parameter.requires_grad)
        leaves = (leaf for leaf in self.sample_leaves if isinstance(leaf, torch.Tensor))
        for tensor, leaf in zip(tensors, leaves, strict=True):
            if leaf.is_leaf and leaf.requires_grad:
                yield tensor


def own_name(name: str) -> str:
    """The module's own FQN of a parameter or buffer of ``Flat``."""
    return name.removeprefix(_PREFIX)


@dataclass(frozen=True)
class _Tie:
    """A parameter or buffer that has a second name; a place is a module's dict and a key."""

    second: tuple[dict[str, Any], str]
    first: tuple[dict[str, Any], str]


def _ties(module: nn.Module) -> list[_Tie]:
    places: dict[int, tuple[dict[str, Any], str]] = {}
    ties = []
    for child in module.modules():
        for tensors in (child.__dict__["_parameters"], child.__dict__["_buffers"]):
            for name, tensor in tensors.items():
                if tensor is not None and (first := places.get(id(tensor))) is not None:
                    ties.append(_Tie((tensors, name), first))
                elif tensor is not None:
                    places[id(tensor)] = (tensors, name)
    return ties


@contextlib.contextmanager
def _tied(ties: Sequence[_Tie]) -> Iterator[None]:
    """Put the stand-in under a tensor's first name under its other names, too."""
    before = [tie.second[0][tie.second[1]] for tie in ties]
    for tie in ties:
        (tensors, name), (others, other) = tie.second, tie.first
        tensors[name] = others[other]
    try:
        yield
    finally:
        for tie, tensor in zip(ties, before, strict=True):
            tensors, name = tie.second
            tensors[name] = tensor


@contextlib.contextmanager
def _buffers_written_in_place(module: nn.Module) -> Iterator[None]:
    """Write a buffer in place where the forward replaces it by assignment."""
    before = {child: dict(child.named_buffers(recurse=False)) for child in module.modules()}
    parameters = {child: dict(child.named_parameters(recurse=False)) for child in module.modules()}
    yield
    for child, owned in parameters.items():
        now = dict(child.named_parameters(recurse=False))
        if any(now.get(name) is not parameter for name, parameter in owned.items()):
            raise CaptureError(
                f"the forward replaces a parameter of a {type(child).__name__}, which a planned "
                "step cannot"
            )
    for child, buffers in before.items():
        for name, buffer in buffers.items():
            now = getattr(child, name)
            if now is not buffer:
                if now is None or now.shape != buffer.shape or now.dtype != buffer.dtype:
                    raise CaptureError(
                        f"the forward gives buffer {name!r} of a {type(child).__name__} another "
                        "shape or dtype, which a planned step cannot"
                    )
                with torch.no_grad():
                    buffer.copy_(now)
                setattr(child, name, buffer)


def _choose_differentiable(
    tensors: Sequence[torch.Tensor], leaves: Sequence[OutputLeaf], asked: Differentiable
) -> tuple[frozenset[int], bool]:
    able = {position for position, tensor in enumerate(tensors) if tensor.requires_grad}
    if not able:
        raise CaptureError(
            "no output depends on a parameter or input that requires a gradient; there is no "
            "backward to plan"
        )
    if asked == "all":
        return frozenset(able), False
    if isinstance(asked, tuple):
        chosen = {leaves[leaf].position for leaf in asked if leaf in range(len(leaves))}
        if len(chosen) != len(set(asked)) or not chosen <= able:
            raise CaptureError(
                f"differentiable_outputs={asked!r} must name leaves of the output that require a "
                f"gradient; there are {len(leaves)} leaves"
            )
        return frozenset(position for position in chosen if position is not None), False
    scalars = {position for position in able if tensors[position].dim() == 0}
    return (frozenset(scalars), True) if len(scalars) == 1 else (frozenset(able), False)


def _unknown_output(module: nn.Module, leaf: object) -> str:
    return (
        f"{type(module).__name__} returns a {type(leaf).__name__}, which is no container of "
        "tensors that torch knows. Return tensors, tuples, lists or dicts (for Hugging Face "
        "models: set config.use_cache = False), or register it with torch.utils._pytree."
    )
