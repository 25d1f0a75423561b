"""The blocks of a forward: modules that return what they take, changed on the way."""

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


class NamedAsLayers(nn.Module):
    """A module beside a model's own, whose parts are named as the model's layers."""


@dataclass(frozen=True)
class Block:
    """A module that is called once, with a stream, and returns one of the same shape.

    Attributes:
        name: its FQN.
        stream: the place of the stream among the leaves of the arguments.
        dims: by place among these leaves, the batch dimension of those that depend on the batch.
        tensors: places of all tensors among them.
        result: the place of the stream among the leaves of the output.
        output: these leaves, with None for the stream.
        spec: the structure of the output.
        shape: the shape of the stream.
        branches: the branches inside.
        is_identity: whether the block returns the stream itself if nothing is added to it.
        kind: equal for blocks that compute the same with their own parameters.
        follows: whether it alone reads what the block before it returns.
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
        """The output of the block if it adds nothing."""
        leaves, _ = flatten((args, dict(kwargs)))
        return self.returned(leaves[self.stream])

    def returned(self, stream: torch.Tensor) -> Any:
        """The output of the block, with this stream."""
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
    """The blocks of a forward, in order, and reasons why other modules are none.

    Args:
        model: the model.
        record: of its forward.
        larger: of a forward with a batch larger by one.
        branches: of the forward.
        names: FQNs of the blocks; None: innermost modules with parameters, of which a list of
            modules has several of a type.
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
    """Tell whether one block alone reads what another returns."""
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
    """A module as a block, or the reason why it is none."""
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
    """Tell whether the end is the stream itself if nothing is added to it on the way.

    A ReLU of a ReLU's result changes nothing.
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
    """Parameters and buffers of a block, and of adapters under its name, by FQN."""
    named = (*model.named_parameters(remove_duplicate=False),)
    buffers = (*model.named_buffers(remove_duplicate=False),)
    prefixes = _prefixes(model)
    return {name: one for name, one in (*named, *buffers) if _is_own(name, block, prefixes)}


def _prefixes(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of a layer's name: none, and the names of ``NamedAsLayers`` children."""
    beside = (name for name, child in model.named_children() if isinstance(child, NamedAsLayers))
    return ("", *(f"{name}." for name in beside))


def _is_own(name: str, block: str, prefixes: Sequence[str]) -> bool:
    return any(name.startswith(f"{prefix}{block}.") for prefix in prefixes)


def _renamed(name: str, block: str, prefixes: Sequence[str]) -> str:
    """The FQN of a tensor without the name of its block."""
    for prefix in prefixes:
        if name.startswith(f"{prefix}{block}."):
            return f"{prefix}{name.removeprefix(f'{prefix}{block}')}"
    return name


def _kind(model: nn.Module, record: Record, call: ModuleCall, stream: TensorArg) -> object:
    """All that a block computes, with its parameters by their names inside it."""
    name = call.scope[0]
    own = own_tensors(model, name)
    shared = _shared_outside(model, own)
    if shared:
        return name, shared
    prefixes = _prefixes(model)
    relative = partial(_relative, call, stream, prefixes)
    return (
        tuple(
            (
                _renamed(f"{one.key[0]}.", name, prefixes),
                one.key[1:],
                getattr(one.function, "__qualname__", repr(one.function)),
                tuple((given.place, relative(given), tuple(given.shape)) for given in one.given),
                one.constants,
            )
            for one in (record.calls[number] for number in call.calls)
        ),
        tuple(relative(one) for one in call.results),
        tuple(
            (_renamed(one, name, prefixes), tensor.dtype, tuple(tensor.shape))
            for one, tensor in own.items()
        ),
    )


def _relative(
    call: ModuleCall, stream: TensorArg, prefixes: Sequence[str], one: TensorArg
) -> object:
    """A tensor in terms of its block."""
    if one.is_custom:
        return call.scope[0], "an autograd function, whose backward is not seen"
    if one.name and _is_own(one.name, call.scope[0], prefixes):
        return _renamed(one.name, call.scope[0], prefixes)
    if one.tensor == stream.tensor:
        return "stream"
    if one.tensor[0] in call.calls:
        return one.tensor[0] - call.calls.start, one.tensor[1]
    return one.name or one.tensor


def _shared_outside(model: nn.Module, own: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Names of a block's tensors outside the block."""
    ids = {id(tensor) for tensor in own.values()}
    named: list[tuple[str, torch.Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    return tuple(name for name, tensor in named if id(tensor) in ids and name not in own)
