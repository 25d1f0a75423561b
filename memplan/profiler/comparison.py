"""Two modules on one sample, side by side: their bits, their memory, their time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memplan.capture.sample import Sample
from memplan.errors import MemplanError
from memplan.profiler.measure import Profile, describe, read_memory, time_step
from memplan.profiler.step import preserved, run_step, unchanged_inputs
from memplan.rng import RandomStates, random_states, set_random_states
from memplan.runtime.module import PlannedModule
from memplan.runtime.outcome import same_bits
from memplan.tables import ShownAsTables, Table, said_of_bits
from memplan.torch_internals import SpentGradient
from memplan.units import format_bytes

_LOG = logging.getLogger("memplan")


@dataclass(frozen=True, repr=False)
class Comparison(ShownAsTables):
    """Two modules on one sample under one random state.

    Attributes:
        original: the untouched module's profile.
        planned: the other module's profile.
        time_ratio: planned over original; the median over interleaved rounds.
        loss_equal: whether the losses have the same bits.
        gradients_equal: whether all gradients have, those that are None included.
        buffers_equal: whether all buffers have, after the step.
        parameters_equal: whether all parameters have, after the optimizer's step if there is one.
        rng_equal: whether torch's random states are the same after the step.
        max_gradient_error: the largest difference of any entry over the largest gradient entry
            of the original. Where the backward consumes gradients, updated parameters are compared
            instead.
        losses: the two losses.
        untrained: parameters that get a gradient in the original, and by design none in the other.
            Gradients and parameters are compared without them, and without those that passes add.
    """

    original: Profile
    planned: Profile
    time_ratio: float
    loss_equal: bool
    gradients_equal: bool
    buffers_equal: bool
    parameters_equal: bool
    rng_equal: bool
    max_gradient_error: float
    losses: tuple[float, float]
    untrained: int = 0

    @property
    def peak_ratio(self) -> float:
        """Planned peak over the original's, both above resident bytes."""
        above = self.original.peak_bytes - self.original.resident_bytes
        return (self.planned.peak_bytes - self.planned.resident_bytes) / above if above else 1.0

    @property
    def is_exact(self) -> bool:
        """Tell whether loss, gradients, buffers, parameters and random state have the same bits."""
        tensors_equal = self.gradients_equal and self.buffers_equal and self.parameters_equal
        return self.loss_equal and tensors_equal and self.rng_equal

    def __str__(self) -> str:
        same = "same bits" if self.is_exact else f"error {self.max_gradient_error:.1e}"
        same += f", {self.untrained} parameters not trained" if self.untrained else ""
        return (
            f"Comparison: peak {format_bytes(self.original.peak_bytes)} -> "
            f"{format_bytes(self.planned.peak_bytes)} ({self.peak_ratio:.0%} of what is above "
            f"resident), time x{self.time_ratio:.3f}, {same}"
        )

    def tables(self) -> list[Table]:
        """A table of memory, time and bits, side by side."""
        both = (self.original, self.planned)
        peaks = [profile.peak_bytes for profile in both]
        above = [profile.peak_bytes - profile.resident_bytes for profile in both]
        times = [f"{profile.step_s * 1e3:.1f} ms" for profile in both]
        rows = (
            ("peak memory", *map(format_bytes, peaks), f"{peaks[1] / peaks[0]:.3f}"),
            ("above resident", *map(format_bytes, above), f"{self.peak_ratio:.3f}"),
            ("step time", *times, f"{self.time_ratio:.3f}"),
            ("results", "", "", said_of_bits(self.is_exact)),
        )
        headers = ("", "original", "planned", "planned / original")
        return [Table("One training step, measured", headers, rows, frozenset({1, 2, 3}))]


@dataclass(frozen=True)
class _Outcome:
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    rng: RandomStates


def compare(
    original: nn.Module, planned: nn.Module, sample: object, *, steps: int = 3
) -> Comparison:
    """Run two modules on one sample; compare their bits, memory and time.

    Args:
        original: the untouched module.
        planned: the module in its place, usually from ``memplan.optimize(original, ...)``. If it
            was planned with an optimizer, that is part of both steps. Where its passes freeze
            parameters, the original runs with them as they were.
        sample: one batch.
        steps: how many interleaved rounds to time.

    Returns:
        Both profiles, and which results have the same bits.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> layers = [layer for _ in range(9) for layer in (nn.Linear(64, 64), nn.ReLU())]
        >>> model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
        >>> batch = torch.randn(256, 64), torch.randn(256, 64)
        >>> planned = memplan.optimize(model, batch, budget="80%")
        >>> memplan.compare(model, planned, batch).is_exact
        True
    """
    batch = Sample.of(sample)
    optimizer = planned.optimizer if isinstance(planned, PlannedModule) else None
    if optimizer is not None and not {id(p) for p in original.parameters()} <= {
        id(p) for p in planned.parameters()
    }:
        raise MemplanError(
            "the optimizer is for the planned module's parameters, and the original has others; "
            "compare with planned.original"
        )
    before = _as_before(original, planned)
    with preserved(original, optimizer), preserved(planned, optimizer), unchanged_inputs(batch):
        _LOG.debug("comparing loss and gradients")
        random = random_states()
        with before():
            mine = _outcome(original, batch, optimizer, random)
        theirs = _outcome(planned, batch, optimizer, random)
        differences = _differences(*_trained_alike(original, planned, mine, theirs))
        del mine, theirs
        readings = []
        for module, name, state in (
            (original, "original", before),
            (planned, "planned", nullcontext),
        ):
            _LOG.debug("measuring the %s step's memory", name)
            with state():
                readings.append(read_memory(module, batch, optimizer))
        times: list[tuple[float, float]] = []
        for number in range(max(1, steps)):
            _LOG.debug("timing, round %d of %d", number + 1, max(1, steps))
            with before():
                original_s = time_step(original, batch, optimizer)
            times.append((original_s, time_step(planned, batch, optimizer)))
        step_s = [median(each) for each in zip(*times, strict=True)]
        return Comparison(
            original=describe(original, batch, optimizer, readings[0], step_s[0]),
            planned=describe(planned, batch, optimizer, readings[1], step_s[1]),
            time_ratio=median(b / a for a, b in times),
            **differences,
        )


def _as_before(
    original: nn.Module, planned: nn.Module
) -> Callable[[], AbstractContextManager[None]]:
    """Context for steps of the original, whose parameters the planned module's passes freeze."""
    if isinstance(planned, PlannedModule) and planned.original is original:
        return planned.changed.as_before
    return nullcontext


def _trained_alike(
    original: nn.Module, planned: nn.Module, mine: _Outcome, theirs: _Outcome
) -> tuple[_Outcome, _Outcome, int]:
    """Two outcomes without the parameters that, by design, only one module trains.

    The last item is how many of those the original trains.
    """
    if not isinstance(planned, PlannedModule) or planned.original is not original:
        return mine, theirs, 0
    before = planned.changed.required_grad
    trained = {name for name, p in planned.named_parameters() if p.requires_grad}
    left_out = (before.keys() - trained) | (trained - before.keys())
    untrained = sum(before[name] for name in left_out & before.keys())
    added = {name for name, _ in planned.named_parameters()} - before.keys()
    return (*(_without(one, left_out | added) for one in (mine, theirs)), untrained)  # type: ignore[return-value]


def _without(outcome: _Outcome, names: Set[str]) -> _Outcome:
    return replace(
        outcome,
        gradients={name: g for name, g in outcome.gradients.items() if name not in names},
        parameters={name: p for name, p in outcome.parameters.items() if name not in names},
    )


def _differences(mine: _Outcome, theirs: _Outcome, untrained: int) -> dict[str, Any]:
    """The fields of a comparison that are about results."""
    pairs = (mine.gradients, theirs.gradients)
    if any(isinstance(gradient, SpentGradient) for gradient in theirs.gradients.values()):
        pairs = ({**mine.parameters}, {**theirs.parameters})
    return {
        "loss_equal": same_bits(mine.loss, theirs.loss),
        "gradients_equal": _all_equal(*pairs),
        "buffers_equal": _all_equal(mine.buffers, theirs.buffers),
        "parameters_equal": _all_equal(mine.parameters, theirs.parameters),
        "rng_equal": all(map(torch.equal, mine.rng, theirs.rng)),
        "max_gradient_error": _error(*pairs),
        "losses": (mine.loss.item(), theirs.loss.item()),
        "untrained": untrained,
    }


def _outcome(
    module: nn.Module, sample: Sample, optimizer: Optimizer | None, random: RandomStates
) -> _Outcome:
    """The outcome of one step under a random state; all its changes are restored."""
    with preserved(module, optimizer):
        set_random_states(random)
        result = run_step(module, sample)
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        if optimizer is not None:
            optimizer.step()
        return _Outcome(
            loss=result.loss.detach().clone(),
            gradients=gradients,
            buffers={name: buffer.detach().clone() for name, buffer in module.named_buffers()},
            parameters={name: p.detach().clone() for name, p in module.named_parameters()},
            rng=random_states(),
        )


def _all_equal(
    mine: dict[str, torch.Tensor] | dict[str, torch.Tensor | None],
    theirs: dict[str, torch.Tensor] | dict[str, torch.Tensor | None],
) -> bool:
    if mine.keys() != theirs.keys():
        return False
    return all(same_bits(mine[name], theirs[name]) for name in mine)


def _error(mine: dict[str, torch.Tensor | None], theirs: dict[str, torch.Tensor | None]) -> float:
    """The largest difference over the largest entry; a missing gradient counts as zeros."""
    present = [g for g in mine.values() if g is not None and g.numel()]
    scale = max((float(g.abs().max()) for g in present), default=0.0)
    worst = 0.0
    for name in mine.keys() | theirs.keys():
        a, b = mine.get(name), theirs.get(name)
        if a is None and b is None:
            continue
        difference = b if a is None else a if b is None else a - b
        assert difference is not None
        if not difference.numel():
            continue
        worst = max(worst, float(difference.abs().max()))
    return worst / scale if scale else worst
