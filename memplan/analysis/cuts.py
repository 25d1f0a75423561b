"""Cuts of a forward: after modules on whose output alone all that follows depends.

They are looked up in autograd's graph of one forward: behind the output of such a module, no other
path leads back to what was computed before it. Between two cuts lies a block, whatever the model's
code looks like.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from memplan.analysis.selecting import list_members
from memplan.errors import MemplanError
from memplan.torch_internals import around_calls, flatten, order_of_making, storage_key


@dataclass(frozen=True)
class Cut:
    """A place where the forward can be cut.

    Attributes:
        name: FQN of the module after whose call it is.
        saved_bytes: bytes that the forward has saved until then.
        example: the first tensor that the module returns with a gradient, without data.
        ties: parameters that are used before it and after it.
        is_member: whether the module is one of several of a type in a list of modules.
    """

    name: str
    saved_bytes: int
    example: torch.Tensor
    ties: tuple[str, ...]
    is_member: bool


@dataclass(frozen=True)
class BlockChain:
    """The cuts of one forward.

    Attributes:
        cuts: in the order of the forward; one after an activation stands for the block before it.
        saved_bytes: bytes that the whole forward saves.
        outputs: of the modules called once, by FQN.
        inputs: the tensors that the model was called with, without data.
        device: the device of the loss.
        blocked: by FQN of a module, the reason why no cut is possible after it.
    """

    cuts: tuple[Cut, ...]
    saved_bytes: int
    outputs: Mapping[str, object]
    inputs: tuple[torch.Tensor, ...]
    device: torch.device
    blocked: Mapping[str, str]

    @property
    def blocks(self) -> tuple[Cut, ...]:
        """Cuts after blocks: modules of one type in a list, or all cuts if there are none.

        There is none after the last block, whose part goes on to the loss.
        """
        members = tuple(cut for cut in self.cuts if cut.is_member)
        return (members or self.cuts)[:-1]


@dataclass
class _Call:
    """One call of a module."""

    name: str
    output: object
    end: frozenset[Any]
    example: torch.Tensor
    saved_bytes: int


@dataclass
class _Watch:
    """The calls of a forward, and what it has saved so far."""

    calls: list[_Call] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    held: list[object] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    saved_bytes: int = 0
    inputs: tuple[torch.Tensor, ...] = ()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the stand-ins for parameters and inputs in this forward."""
        self.inputs = tuple(_tensors((args, dict(kwargs))))
        for name, parameter in module.named_parameters():
            self.names[id(parameter)] = name
            self.seen.add(storage_key(parameter))
            self.held.append(parameter)

    def save(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count what autograd saves: each storage once, and no parameters."""
        key = storage_key(tensor)
        if key not in self.seen:
            self.seen.add(key)
            self.held.append(tensor)
            self.saved_bytes += tensor.untyped_storage().nbytes()
        return tensor

    def end(self, name: str, output: object) -> None:
        """Note a call."""
        # now: an operation in place would give the output another node
        ends = [one for one in _tensors(output) if one.grad_fn is not None]
        example = ends[0].detach() if ends else torch.empty(0)
        self.calls.append(_Call(name, output, _nodes(ends), example, self.saved_bytes))


def find_cuts(model: nn.Module, forward: Callable[[], object]) -> BlockChain:
    """The places where a model's forward can be cut, in its order.

    Args:
        model: the model.
        forward: calls it once, with gradients, and returns its output.

    Raises:
        MemplanError: if the output holds no loss.
    """
    watch = _Watch()
    parts = {name: module for name, module in model.named_modules() if name}
    with (
        around_calls({"": model}, before=lambda name, *given: watch.begin(model, *given)),
        around_calls(parts, after=lambda name, args, kwargs, output: watch.end(name, output)),
        torch.autograd.graph.saved_tensors_hooks(watch.save, lambda tensor: tensor),
    ):
        output = forward()
    losses = [one for one in _tensors(output) if not one.dim() and one.grad_fn is not None]
    if len(losses) != 1:
        raise MemplanError(
            f"local learning needs a model that returns its loss, one scalar, and "
            f"{type(model).__name__} returns {len(losses) or 'no'} scalars (tensors of shape []): "
            "memplan.WithLoss(model, loss_fn) adds one"
        )
    cuts, blocked = _cuts(model, watch, _nodes(losses))
    times = Counter(call.name for call in watch.calls)
    outputs = {call.name: call.output for call in watch.calls if times[call.name] == 1}
    return BlockChain(
        cuts=tuple(cuts),
        saved_bytes=watch.saved_bytes,
        outputs=outputs,
        inputs=watch.inputs,
        device=losses[0].device,
        blocked=blocked,
    )


def _cuts(
    model: nn.Module, watch: _Watch, losses: frozenset[Any]
) -> tuple[list[Cut], dict[str, str]]:
    members = list_members(model)
    times = Counter(call.name for call in watch.calls)
    whole = _reached(losses, without=frozenset())
    cuts: dict[frozenset[Any], Cut] = {}
    blocked: dict[str, str] = {}
    for call in watch.calls:
        end, is_member = call.end, call.name in members
        has_parameters = next(model.get_submodule(call.name).parameters(), None) is not None
        if not (has_parameters or is_member) or (end in cuts and not is_member):
            continue
        if times[call.name] > 1:
            blocked[call.name] = "it is called more than once"
        elif not end:
            blocked[call.name] = "no gradient goes back through what it returns"
        elif not end <= whole:
            blocked[call.name] = "the loss does not depend on what it returns"
        elif isinstance(ties := _ties(losses, end, watch.names), str):
            blocked[call.name] = ties
        else:
            if not has_parameters:
                if not cuts or not next(reversed(cuts.values())).is_member:
                    continue
                cuts.popitem()  # an activation belongs to the block before it
            cuts[end] = Cut(call.name, call.saved_bytes, call.example, ties, is_member)
    return list(cuts.values()), blocked


def _ties(
    losses: frozenset[Any], end: frozenset[Any], names: Mapping[int, str]
) -> tuple[str, ...] | str:
    """Names of what is used before and after an end, or why there can be no cut."""
    after = _reached(losses, without=end)
    first = min(map(order_of_making, end))
    if any(node.next_functions and order_of_making(node) < first for node in after):
        return "what follows also depends on what was computed before its end"
    if all(node.next_functions for node in after):
        return "nothing that is trained follows"
    common = after & _reached(end, without=frozenset())
    leaves = [node for node in common if not node.next_functions]
    return tuple(sorted(names.get(id(node.variable), "an input") for node in leaves))


def _reached(start: Iterable[Any], *, without: frozenset[Any]) -> frozenset[Any]:
    """Nodes of autograd's graph reached from some nodes, towards the leaves."""
    seen = set(start) - without
    stack = list(seen)
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None and node not in seen and node not in without:
                seen.add(node)
                stack.append(node)
    return frozenset(seen)


def _nodes(tensors: Iterable[torch.Tensor]) -> frozenset[Any]:
    return frozenset(one.grad_fn for one in tensors if one.grad_fn is not None)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    leaves, _ = flatten(value)
    yield from (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))


def balanced(cuts: Sequence[Cut], total_bytes: int, parts: int) -> tuple[Cut, ...]:
    """The cuts into a number of parts of which the largest saves the fewest bytes."""
    ends = [cut.saved_bytes for cut in cuts]

    def largest(before: tuple[int, int, tuple[int, ...]], size: int) -> tuple[int, int]:
        return max(before[0], size), before[1] + size * size

    # by number of cuts so far and last cut: the largest part, the sum of squares, and the cuts
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {-1: (0, 0, ())}
    for _ in range(parts - 1):
        longer: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for place, end in enumerate(ends):
            found = [
                (*largest(before, end - (ends[last] if last >= 0 else 0)), (*before[2], place))
                for last, before in best.items()
                if last < place
            ]
            if found:
                longer[place] = min(found)
        best = longer
    whole = [
        (*largest(before, total_bytes - (ends[last] if last >= 0 else 0)), before[2])
        for last, before in best.items()
    ]
    return tuple(cuts[place] for place in min(whole)[2])
