"""An optimizer's cost in the steady state: its state, temporaries, and time.

It steps on copies of the parameters, so that neither they nor its state change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memplan.capture import unchanged_randomness
from memplan.costs import CostCache, Device
from memplan.errors import MemplanError
from memplan.gc_pause import paused_collector
from memplan.ir.program import OpCost
from memplan.optimizer.cache_key import parameter_key, update_key
from memplan.optimizer.clone import (
    duplicate,
    group_of,
    parameters_of,
    state_bytes,
    step,
    step_one,
    tensors_in,
)
from memplan.rng import random_states, set_random_states
from memplan.torch_internals import (
    Allocations,
    fake_mode_of,
    phase,
    recording,
    span_peaks,
    spans,
    version_of,
    without_autocast,
    without_data,
)

_STEPS = 7
"""Steps examined, after one that makes the state: RAdam needs more memory after the fifth."""


@dataclass(frozen=True)
class UpdateCost:
    """An optimizer's step in the steady state.

    Attributes:
        name: class of the optimizer.
        state_bytes: of its state.
        cost: of its whole step; the workspace is its temporaries.
        each: cost of the step of one parameter alone, by name; empty unless asked for.
        source: "measured", or "analytic" where nothing was run.
    """

    name: str
    state_bytes: int
    cost: OpCost
    each: Mapping[str, OpCost] = field(default_factory=dict)
    source: str = "measured"


def update_cost(
    optimizer: Optimizer,
    trained: Mapping[str, nn.Parameter],
    *,
    one_by_one: bool = False,
    device: Device | None = None,
) -> UpdateCost:
    """Measure steps on copies; where there is no data, follow what they would allocate.

    Args:
        optimizer: the user's.
        trained: the parameters that have a gradient when it steps, by name.
        one_by_one: whether to examine the step of each parameter alone, too.
        device: the device to estimate for, without data; None: measure.

    Raises:
        MemplanError: if the optimizer needs a closure, or changes the parameters that it was built
            with when a copy of it steps; with ``one_by_one``, if that gives other bits.
    """
    versions = [version_of(parameter) for parameter in parameters_of(optimizer)]
    try:
        with unchanged_randomness(), paused_collector(), without_autocast():
            if device is None:
                made = _cached(optimizer, trained, one_by_one)
            else:
                made = _followed(optimizer, trained, one_by_one, device)
    except MemplanError:
        raise
    except Exception as error:
        raise MemplanError(
            f"the optimizer ({type(optimizer).__name__}) fails when it steps on copies of the "
            f"parameters, to be measured: {error}"
        ) from error
    if versions != [version_of(parameter) for parameter in parameters_of(optimizer)]:
        raise MemplanError(
            f"a copy of the optimizer ({type(optimizer).__name__}) changes the parameters of the "
            "original; it cannot be measured"
        )
    return made


def _cached(
    optimizer: Optimizer, trained: Mapping[str, nn.Parameter], one_by_one: bool
) -> UpdateCost:
    """The cost as measured before, or now."""
    key = update_key(optimizer, trained)
    if key is None:
        return _measured(optimizer, trained, one_by_one)
    numbers = _group_numbers(optimizer)
    names = {
        name: parameter_key(key, numbers[id(parameter)], parameter)
        for name, parameter in trained.items()
        if one_by_one
    }
    cache = CostCache.load(torch.device("cpu"))
    if not {key, *names.values()} <= cache.entries.keys():
        made = _measured(optimizer, trained, one_by_one)
        whole = replace(made.cost, result_bytes=(made.state_bytes,))
        cache.updated({key: whole, **{names[name]: cost for name, cost in made.each.items()}})
        return made
    each = {name: cache.entries[alone] for name, alone in names.items()}
    whole = cache.entries[key]
    cost = replace(whole, result_bytes=())
    return UpdateCost(type(optimizer).__name__, whole.result_bytes[0], cost, each)


def _measured(
    optimizer: Optimizer, trained: Mapping[str, nn.Parameter], one_by_one: bool
) -> UpdateCost:
    if one_by_one and not _is_known_to_be_separate(optimizer):
        _require_separate(optimizer, trained)
    made, copies = _with_data(optimizer, trained)
    step(made)
    alone = _distinct(made, {name: copies[id(p)] for name, p in trained.items()}, one_by_one)
    groups = group_of(made)
    with recording() as profile:
        for number in range(_STEPS):
            with phase(f"whole {number}"):
                step(made)
            for index, parameters in enumerate(alone):
                with phase(f"{index} {number}"):
                    step_one(made, parameters[0][1], groups[id(parameters[0][1])])
    kinds = ["whole", *map(str, range(len(alone)))]
    names = {kind: [f"{kind} {number}" for number in range(_STEPS)] for kind in kinds}
    peaks, times = span_peaks(profile, chain.from_iterable(names.values())), spans(profile)

    def cost(kind: str) -> OpCost:
        seconds = median((times[name][1] - times[name][0]) / 1e9 for name in names[kind])
        return OpCost(seconds, workspace_bytes=max(peaks[name] for name in names[kind]))

    each = {
        name: cost(str(index)) for index, parameters in enumerate(alone) for name, _ in parameters
    }
    return UpdateCost(type(optimizer).__name__, state_bytes(made), cost("whole"), each)


def _followed(
    optimizer: Optimizer, trained: Mapping[str, nn.Parameter], one_by_one: bool, device: Device
) -> UpdateCost:
    originals = parameters_of(optimizer)
    copies = dict(zip(map(id, originals), without_data(originals), strict=True))
    with fake_mode_of(copies.values()):
        made = duplicate(optimizer, copies)
        for parameter in trained.values():
            copies[id(parameter)].grad = torch.empty_like(copies[id(parameter)])
        for group in made.param_groups:
            if device.is_cuda and group.get("foreach") is None and not group.get("fused"):
                # Torch's own choice there.
                group.update({"foreach": True} if "foreach" in group else {})
        alone = _distinct(made, {name: copies[id(p)] for name, p in trained.items()}, one_by_one)
        groups = group_of(made)
        with Allocations(device.granule_bytes) as seen:

            def cost(run: Any, *arguments: Any) -> OpCost:
                workspace = 0
                for _ in range(_STEPS):
                    before = seen.current_bytes
                    seen.start_anew()
                    run(*arguments)
                    workspace = max(workspace, seen.peak_bytes - before)
                seconds = seen.num_ops * device.launch_s + seen.traffic_bytes / device.bytes_per_s
                return OpCost(seconds, workspace_bytes=workspace)

            step(made)
            whole = cost(step, made)
            each: dict[str, OpCost] = {}
            for parameters in alone:
                parameter = parameters[0][1]
                one = cost(step_one, made, parameter, groups[id(parameter)])
                each |= dict.fromkeys((name for name, _ in parameters), one)
        nbytes = state_bytes(made, device.granule_bytes)
    return UpdateCost(type(optimizer).__name__, nbytes, whole, each, "analytic")


def _with_data(
    optimizer: Optimizer, trained: Mapping[str, nn.Parameter]
) -> tuple[Optimizer, dict[int, nn.Parameter]]:
    """An optimizer over copies of the parameters with made-up gradients, and the copies."""
    copies = {
        id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for p in parameters_of(optimizer)
    }
    for parameter in trained.values():
        copy = copies[id(parameter)]
        copy.grad = torch.randn_like(copy).mul_(1e-3)
    return duplicate(optimizer, copies), copies


def _distinct(
    made: Optimizer, trained: Mapping[str, nn.Parameter], one_by_one: bool
) -> list[list[tuple[str, nn.Parameter]]]:
    """Groups of parameters that cost the same."""
    numbers = _group_numbers(made)
    alike: dict[object, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in trained.items() if one_by_one else ():
        layout = (parameter.shape, parameter.stride(), parameter.dtype)
        alike.setdefault((numbers[id(parameter)], layout), []).append((name, parameter))
    return list(alike.values())


def _group_numbers(optimizer: Optimizer) -> dict[int, int]:
    groups = enumerate(optimizer.param_groups)
    return {id(parameter): number for number, group in groups for parameter in group["params"]}


def _is_known_to_be_separate(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim.")


def _require_separate(optimizer: Optimizer, trained: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer whose steps of one parameter at a time give other bits.

    Raises:
        MemplanError: naming it.
    """
    random = random_states()
    together, others = _with_data(optimizer, trained)
    set_random_states(random)
    apart, copies = _with_data(optimizer, trained)
    groups = group_of(apart)
    for number in range(_STEPS):
        # Some optimizers look at all gradients only where these are large.
        scale = 10.0 ** (number % 4)
        for parameter in trained.values():
            for gradient in (copies[id(parameter)].grad, others[id(parameter)].grad):
                assert gradient is not None
                gradient.mul_(scale)
        step(together)
        for parameter in reversed(list(trained.values())):
            copy = copies[id(parameter)]
            step_one(apart, copy, groups[id(copy)])
    mine, theirs = (_tensors(one) for one in (together, apart))
    if len(mine) != len(theirs) or not all(map(torch.equal, mine, theirs)):
        raise MemplanError(
            f"{type(optimizer).__name__} does not treat parameters separately: one at a time, "
            "they get other values. Leave Options(update_in_backward=True) out."
        )


def _tensors(optimizer: Optimizer) -> list[torch.Tensor]:
    """All tensors of an optimizer, by parameter: its state is in the order of the steps."""
    parameters = parameters_of(optimizer)
    held = [optimizer.state.get(parameter) for parameter in parameters]
    others = {name: value for name, value in optimizer.__dict__.items() if name != "state"}
    return [*parameters, *tensors_in([*held, others], but=parameters)]
