"""A second optimizer that steps on copies, and steps of one parameter at a time."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memplan.errors import MemplanError
from memplan.torch_internals import (
    attributes_without_hooks,
    defined_step,
    inner_tensors,
    is_fake,
    storage_key,
)


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def duplicate(optimizer: Optimizer, copies: Mapping[int, nn.Parameter]) -> Optimizer:
    """The same optimizer over other parameters, by the ids of its own.

    Its state is copied as well, unless the others have no data; its hooks are not.
    """
    own = attributes_without_hooks(optimizer)
    if any(map(is_fake, copies.values())):
        own["state"] = defaultdict(dict)
    made: Optimizer = object.__new__(type(optimizer))
    made.__dict__.update(copy.deepcopy(own, dict(copies)))
    return made


def like(optimizer: Optimizer) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """A factory of optimizers of the same kind, with its first group's settings and no state."""
    own = {**attributes_without_hooks(optimizer), "state": None, "param_groups": None}
    settings = {key: one for key, one in optimizer.param_groups[0].items() if key != "params"}

    def make(parameters: Iterable[nn.Parameter]) -> Optimizer:
        made: Optimizer = object.__new__(type(optimizer))
        made.__dict__.update(copy.deepcopy(own))
        made.state = defaultdict(dict)
        made.param_groups = [{**copy.deepcopy(settings), "params": list(parameters)}]
        return made

    return make


def duplicate_over(optimizer: Optimizer, stand_ins: Mapping[int, torch.Tensor]) -> Optimizer:
    """The same optimizer over stand-ins for its parameters, by their ids, without its state.

    Raises:
        MemplanError: if it has a parameter that nothing stands for.
    """
    copies = {
        id(parameter): stand_ins[id(parameter)]
        for parameter in parameters_of(optimizer)
        if id(parameter) in stand_ins
    }
    if len(copies) < len(parameters_of(optimizer)):
        raise MemplanError("the optimizer has parameters that are not the model's")
    return duplicate(optimizer, {k: v for k, v in copies.items() if isinstance(v, nn.Parameter)})


def step(optimizer: Optimizer) -> None:
    """Run one step, as the class defines it.

    Raises:
        MemplanError: if it needs a closure.
    """
    try:
        defined_step(optimizer)(optimizer)
    except TypeError as error:
        if "closure" not in str(error):
            raise
        raise MemplanError(
            f"{type(optimizer).__name__}.step needs a closure, which runs the model again; "
            "memplan plans steps whose optimizer is called without one"
        ) from error


def step_one(optimizer: Optimizer, parameter: nn.Parameter, group: dict[str, Any]) -> None:
    """Step one parameter alone, under its own group's present settings.

    Raises:
        MemplanError: if the optimizer keeps account of more than this parameter.
    """
    alone: Optimizer = object.__new__(type(optimizer))
    settings = {**group, "params": [parameter]}
    alone.__dict__.update({**attributes_without_hooks(optimizer), "param_groups": [settings]})
    step(alone)
    changed = [name for name in group if name != "params" and settings[name] is not group[name]]
    if changed:
        raise MemplanError(
            f"{type(optimizer).__name__} changes {changed[0]!r} of a group in each step; it does "
            "not treat parameters separately"
        )


def group_of(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """Each parameter's group, by id."""
    return {
        id(parameter): group for group in optimizer.param_groups for parameter in group["params"]
    }


def state_tensors(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """All tensors that an optimizer holds, except parameters and gradients."""
    return tensors_in(optimizer.__dict__, but=parameters_of(optimizer))


def tensors_in(container: object, but: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """All tensors in containers, each once, in a fixed order.

    Wrappers of tensors, such as low-bit states, are looked into.
    """
    stack: list[object] = [container]
    seen = set(map(id, but))
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield from inner_tensors(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set):
            stack.extend(item)


def state_bytes(optimizer: Optimizer, granule_bytes: int = 1) -> int:
    """Bytes of the state, each storage once and in whole blocks of the allocator."""
    sizes = {
        storage_key(tensor): tensor.untyped_storage().nbytes()
        for tensor in state_tensors(optimizer)
    }
    return sum(-(-size // granule_bytes) * granule_bytes for size in sizes.values())
