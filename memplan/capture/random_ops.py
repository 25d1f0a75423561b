"""Calls that draw random numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from memplan.rng import OWN_DRAWS
from memplan.torch_internals import OpOverload


def schema_arguments(node: fx.Node) -> Mapping[str, object]:
    """The arguments of a call, by their names in the op's schema."""
    target = node.target
    if not isinstance(target, OpOverload):
        return {}
    names = [argument.name for argument in target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def is_random(node: fx.Node) -> bool:
    """Tell whether a call draws numbers: its op may, and its dropout probability is not 0."""
    target = node.target
    if target in OWN_DRAWS.values():
        return True
    if not isinstance(target, OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    arguments = schema_arguments(node)
    if any(argument.name == "dropout_p" for argument in target._schema.arguments):
        return arguments.get("dropout_p", 0.0) != 0.0
    return True
