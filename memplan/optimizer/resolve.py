"""Check of the user's optimizer."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from memplan.errors import MemplanError


def resolve_optimizer(model: nn.Module, given: object) -> Optimizer | None:
    """An optimizer over exactly the model's parameters, made if ``given`` is a callable.

    Raises:
        MemplanError: naming a trainable parameter that it misses, or saying what else is wrong.
    """
    if given is None:
        return None
    if not isinstance(given, Optimizer) and callable(given):
        given = given(model.parameters())
    if not isinstance(given, Optimizer):
        raise MemplanError(
            "optimizer must be a torch.optim.Optimizer over model.parameters(), or a callable that "
            f"makes one of them, got {type(given).__name__}"
        )
    kind = type(given).__name__
    held = {id(parameter) for group in given.param_groups for parameter in group["params"]}
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in held
    ]
    if missing:
        raise MemplanError(
            f"the optimizer ({kind}) misses {len(missing)} trainable parameters, the first of them "
            f"{missing[0]!r}; build it over model.parameters(), or set requires_grad to False "
            "where nothing is to be trained. Where a pass adds parameters, hand over a callable: "
            f"optimizer=torch.optim.{kind}"
        )
    foreign = held - {id(parameter) for parameter in model.parameters()}
    if foreign:
        raise MemplanError(
            f"the optimizer ({kind}) holds {len(foreign)} parameters that are not the model's; "
            "their gradients and state would be outside of the budget. Build one optimizer for "
            "each model."
        )
    return given
