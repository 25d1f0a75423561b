"""The blocks of a forward: modules that return what they are given, and change it on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from memplan.analysis.branches import Branch
from memplan.analysis.calls import ModuleCall, Record, TensorArg, TensorRef
from memplan.analysis.selecting import list_members
from memplan.torch_internals import TreeSpec, flatten, unflatten

ADAPTERS = ("lora", "adapters")
"""Children that passes add, in which modules stand under the names of those that they adapt."""


@dataclass(frozen=True)
class Block:
    """A module that is called once, with a stream, and returns a stream of its shape.

    Attributes:
        name: its FQN.
        stream: the place of the stream among the leaves of the arguments.
        dims: by place among these leaves, the dimension of the batch of what depends on it.
        tensors: places of all tensors among them.
        result: the place of the stream among the leaves of what is returned.
        output: these leaves, with None for the stream.
        spec: of what is returned.
        shape: of the stream.
        branches: those inside.
        is_identity: whether the block returns the stream itself if nothing is added to it.
        kind: equal for blocks that compute the same with their own parameters.
        follows: whether it is given what the block before it returns, which nothing else reads.
    """

    name: str
    stream: int
    dims: Mapping[int, int]
    tensors: frozenset[int]
    result: int
    output: tuple[object, ...]
    spec: TreeSpec
    shape: torch.Size
    branches: tuple[Branch, ...]
    is_identity: bool
    kind: object
    follows: bool = False

    def passed_on(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the block returns if it adds nothing."""
        leaves, _ = flatten((args, dict(kwargs)))
        return self.returned(leaves[self.stream])

    def returned(self, stream: torch.Tensor) -> Any:
        """What the block returns, with this stream."""
        output = list(self.output)
        output[self.result] = stream
        return unflatten(output, self.spec)


def find_blocks(
    model: nn.Module,
    record: Record,
    larger: Record,
    branches: Sequence[Branch],
    names: frozenset[str] | None = None,
) -> tuple[tuple[Block, ...], dict[str, str]]:
    """The blocks of a forward, in order, and why other modules are none.

    Args:
        model: whose forward.
        record: of the forward.
        larger: of a forward with a batch that is larger by one.
        branches: of the forward.
        names: FQNs of the blocks; None: innermost modules of which there are several of a type in
            a list of modules, and which have parameters.
    """
    times = Counter(call.scope[0] for call in record.modules)
    others = {call.scope: call for call in larger.modules}
    wanted = list_members(model) if names is None else names
    found: list[tuple[ModuleCall, Block]] = []
    blocked: dict[str, str] = {}
    for call in record.modules:
        name = call.scope[0]
        if name not in wanted or not any(True for _ in model.get_submodule(name).parameters()):
            continue
        if times[name] > 1:
            blocked[name] = "it is called more than once"
            continue
        if any(one.calls.start >= call.calls.start for one, _ in found):
            continue  # blocks are inside
        made = _block(model, record, call, others.get(call.scope), branches)
        if isinstance(made, str):
            blocked[name] = made
        else:
            follows = bool(found) and _follows(record, found[-1][0], call, made.stream)
            found.append((call, replace(made, follows=follows)))
    return tuple(one for _, one in found), blocked


def _follows(record: Record, before: ModuleCall, call: ModuleCall, stream: int) -> bool:
    """Whether one block alone reads what another returns."""
    (end,) = {one.tensor for one in before.results}
    taken = next(one.tensor for one in call.given if one.place == stream)
    readers = (
        number
        for number, other in enumerate(record.calls)
        if other.results and any(one.tensor == end for one in other.given)
    )
    is_returned = any(one.tensor == end for one in record.returned)
    return taken == end and not is_returned and all(n in call.calls for n in readers)


def _block(
    model: nn.Module,
    record: Record,
    call: ModuleCall,
    larger: ModuleCall | None,
    branches: Sequence[Branch],
) -> Block | str:
    """The block that a module is, or why it is none."""
    if larger is None or len(larger.given) != len(call.given):
        return "with another batch it is called otherwise"
    dims: dict[int, int] = {}
    for one, other in zip(call.given, larger.given, strict=True):
        dim = _batch_dim(one, other)
        if isinstance(dim, str):
            return dim
        if dim is not None:
            dims[one.place] = dim
    moving = [one for one in call.results if one.tensor[0] in call.calls]
    if len(moving) != 1 or len(call.results) > 1:
        return "it returns more than one tensor, or none that it computes"
    streams = [one for one in call.given if one.place in dims and one.shape == moving[0].shape]
    if not streams:
        return "it is given no tensor of the shape that it returns"
    inside = tuple(one for one in branches if one.number in call.calls)
    stream = streams[0]
    if not inside:
        return "it has no residual branch x + f(x) inside"
    return Block(
        name=call.scope[0],
        stream=stream.place,
        dims=dims,
        tensors=frozenset(one.place for one in call.given),
        result=moving[0].place,
        output=call.output,
        spec=call.spec,
        shape=stream.shape,
        branches=inside,
        is_identity=_is_identity(record, moving[0].tensor, stream.tensor, inside),
        kind=_kind(model, record, call, stream),
    )


def _batch_dim(one: TensorArg, other: TensorArg) -> int | str | None:
    differing = [d for d, size in enumerate(one.shape) if other.shape[d : d + 1] != (size,)]
    if not differing:
        return None
    if len(differing) > 1 or other.shape[differing[0]] != one.shape[differing[0]] + 1:
        return "the batch is no dimension of its own in what it is given"
    return differing[0]


_RELUS = (torch.relu, torch.Tensor.relu, torch.relu_, torch.Tensor.relu_, nn.functional.relu)


def _is_identity(
    record: Record, end: TensorRef, stream: TensorRef, branches: Sequence[Branch]
) -> bool:
    """Whether the end is the stream itself if nothing is added to it on the way.

    A ReLU of what is a ReLU's result already changes nothing.
    """
    totals = {one.number: one for one in branches}
    relus = 0
    while end != stream:
        if end[0] < 0:
            return False
        call = record.calls[end[0]]
        if end[0] in totals:
            end = call.given[totals[end[0]].stream].tensor
        elif call.function in _RELUS and len(call.given) == 1:
            relus, end = relus + 1, call.given[0].tensor
        else:
            return False
    before = record.calls[end[0]].function if end[0] >= 0 else None
    return bool(totals) and (not relus or before in _RELUS)


def own_tensors(model: nn.Module, block: str) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a block, by FQN, and what adapters have under its name."""
    named = (*model.named_parameters(remove_duplicate=False),)
    buffers = (*model.named_buffers(remove_duplicate=False),)
    return {name: one for name, one in (*named, *buffers) if _is_own(name, block)}


def _is_own(name: str, block: str) -> bool:
    return name.startswith(f"{block}.") or any(
        name.startswith(f"{adapters}.{block}.") for adapters in ADAPTERS
    )


def renamed(name: str, block: str, other: str) -> str:
    """The FQN of what another block has in the place of a tensor."""
    for prefix in ("", *(f"{adapters}." for adapters in ADAPTERS)):
        if name.startswith(f"{prefix}{block}."):
            return f"{prefix}{other}{name.removeprefix(f'{prefix}{block}')}"
    return name


def _kind(model: nn.Module, record: Record, call: ModuleCall, stream: TensorArg) -> object:
    """All that a block computes, with its parameters by their names inside."""
    name = call.scope[0]
    own = own_tensors(model, name)
    shared = _shared_outside(model, own)
    if shared:
        return name, shared
    relative = partial(_relative, call, stream)
    return (
        tuple(
            (
                renamed(f"{one.key[0]}.", name, ""),
                one.key[1:],
                getattr(one.function, "__qualname__", repr(one.function)),
                tuple((given.place, relative(given), tuple(given.shape)) for given in one.given),
                one.constants,
            )
            for one in (record.calls[number] for number in call.calls)
        ),
        tuple(relative(one) for one in call.results),
        tuple(
            (renamed(one, name, ""), tensor.dtype, tuple(tensor.shape))
            for one, tensor in own.items()
        ),
    )


def _relative(call: ModuleCall, stream: TensorArg, one: TensorArg) -> object:
    """A tensor in the terms of its block."""
    if one.is_custom:
        return call.scope[0], "an autograd function, whose backward is not seen"
    if one.name and _is_own(one.name, call.scope[0]):
        return renamed(one.name, call.scope[0], "")
    if one.tensor == stream.tensor:
        return "stream"
    if one.tensor[0] in call.calls:
        return one.tensor[0] - call.calls.start, one.tensor[1]
    return one.name or one.tensor


def _shared_outside(model: nn.Module, own: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Names that a block's tensors have besides its own."""
    ids = {id(tensor) for tensor in own.values()}
    named: list[tuple[str, torch.Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    return tuple(name for name, tensor in named if id(tensor) in ids and name not in own)
