"""The laws, as checks of one planned module against the untouched one."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import memplan
from memplan.planner import solve
from memplan.profiler.step import preserved, run_step
from memplan.rng import RandomStates, random_states
from memplan.runtime.outcome import same_bits


def loss_of(module: nn.Module, sample: memplan.Sample) -> torch.Tensor:
    """The only scalar that a call returns."""
    leaves, _ = memplan.torch_internals.flatten(module(*sample.args, **sample.kwargs))
    losses = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim() == 0]
    assert len(losses) == 1
    return losses[0]


@dataclass(frozen=True)
class Outcome:
    """All that a step leaves behind."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]
    rng: RandomStates


def step(module: nn.Module, sample: Any, seed: int = 1) -> Outcome:
    """One step from a fixed random state; the module is as before afterwards."""
    with preserved(module):
        torch.manual_seed(seed)
        result = run_step(module, memplan.Sample.of(sample))
        return Outcome(
            loss=result.loss.detach().clone(),
            gradients={name: p.grad for name, p in module.named_parameters()},
            buffers={name: buffer.clone() for name, buffer in module.named_buffers()},
            rng=random_states(),
        )


def assert_same_bits(mine: Outcome, theirs: Outcome) -> None:
    """Law 1: loss, every gradient, every buffer and the random state."""
    assert same_bits(mine.loss, theirs.loss)
    assert mine.gradients.keys() == theirs.gradients.keys()
    for name, gradient in mine.gradients.items():
        assert same_bits(gradient, theirs.gradients[name]), name
    for name, buffer in mine.buffers.items():
        assert same_bits(buffer, theirs.buffers[name]), name
    assert all(map(torch.equal, mine.rng, theirs.rng))


def assert_within_budget(planned: memplan.PlannedModule, sample: Any) -> int:
    """Law 2: measured <= predicted <= budget, and predicted within 1 % above resident.

    Returns the measured peak in bytes.
    """
    measured = memplan.profile(planned, sample, steps=1)
    plan = planned.plan
    assert plan.resident_bytes == measured.resident_bytes
    assert measured.peak_bytes <= plan.peak_bytes
    if plan.budget_bytes is not None:
        assert plan.peak_bytes <= plan.budget_bytes
    above = plan.peak_bytes - plan.resident_bytes
    assert plan.peak_bytes - measured.peak_bytes <= 0.01 * above
    return measured.peak_bytes


def error(mine: Outcome, theirs: Outcome) -> float:
    """The largest difference of any gradient, over the largest entry of any gradient."""
    pairs = [
        (mine.gradients[name], gradient)
        for name, gradient in theirs.gradients.items()
        if gradient is not None
    ]
    scale = max(float(gradient.abs().max()) for _, gradient in pairs)
    return max(float((one - other).abs().max()) for one, other in pairs) / scale


def assert_close(mine: Outcome, theirs: Outcome, tolerance: float = 1e-5) -> None:
    """Equal up to rounding: relative to the largest entry of any gradient; same random state."""
    scale = max(float(g.abs().max()) for g in mine.gradients.values() if g is not None)
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=tolerance, atol=0.0)
    for name, gradient in mine.gradients.items():
        other = theirs.gradients[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            assert float((gradient - other).abs().max()) <= tolerance * scale, name
    assert all(map(torch.equal, mine.rng, theirs.rng))


def assert_near_64_bits(module: nn.Module, model: nn.Module, sample: Any) -> None:
    """Law 9: gradients are as near to those in 64 bits as the untouched model's in 32.

    At most 30 times as far where it is worst, and 3 times in the median.
    """
    batch = memplan.Sample.of(sample)
    wide = [one.double() if one.is_floating_point() else one for one in batch.args]
    exact = step(copy.deepcopy(model).double(), tuple(wide)).gradients
    scales = {name: float(gradient.abs().max()) for name, gradient in exact.items()}
    least = 1e-6 * max(scales.values())  # a bias before a norm has no gradient but rounding

    def errors(one: nn.Module) -> list[float]:
        """Of each gradient: the largest difference over the largest entry."""
        found = step(one, sample).gradients
        return [
            float((found[name] - exact[name]).abs().max()) / scale
            for name, scale in scales.items()
            if scale > least
        ]

    plain, mine = errors(model), errors(module)
    assert max(plain) < 0.3  # a ReLU may flip; other random numbers would be above 1
    assert max(mine) <= 30 * max(plain)
    assert statistics.median(mine) <= 3 * statistics.median(plain)


def assert_searched_again(module: memplan.PlannedModule, sample: Any) -> None:
    """Law 6, of the search: from equal costs the same solution, for a budget or for none."""
    step, plan = module.prepare(memplan.Sample.of(sample)), module.plan
    solutions = [
        solve(
            step.captured.program,
            step.costs,
            step.recoveries,
            budget_bytes=plan.budget_bytes,
            original_seconds=plan.original_seconds,
        )
        for _ in range(2)
    ]
    assert solutions[0] == solutions[1]
