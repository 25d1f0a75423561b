"""The drift of values restored with rounding, and the values to keep because of it.

Copies of copies drift: each adds a rounding of its own, and a coefficient other than 1 multiplies
the earlier error. So the first call with gradients runs the step twice, once as planned and once
with exact recoveries only, leaves no trace, and compares the values themselves and the gradients.
Evenly spread elements represent each tensor, so that this fits into the budget.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from memplan.capture.sample import Sample
from memplan.emit.emit import Emitted, emit
from memplan.emit.segment import Probe
from memplan.errors import PlanMismatch
from memplan.ir.program import Phase
from memplan.ir.schedule import Effect, Recovery, Schedule
from memplan.rng import random_states, set_random_states
from memplan.runtime.signature import State
from memplan.runtime.step import PlannedStep
from memplan.torch_internals import without_autocast

_LOG = logging.getLogger("memplan")
_ELEMENTS = 4096
"""The most elements that represent a tensor."""

_ROUNDS = 4
"""The most rounds of keeping streams by their measured drift, before all are kept."""


@dataclass(frozen=True, slots=True)
class ChainDrift:
    """The drift of values restored from each other.

    Attributes:
        name: their place in the model; "" for values that are not restored from copies.
        errors: relative error, in the 2-norm, of each restored value, in order of the restores.
        tolerance: the allowed error.
    """

    name: str
    errors: tuple[float, ...]
    tolerance: float

    @property
    def worst(self) -> float:
        """The largest error."""
        return max(self.errors, default=0.0)

    def __str__(self) -> str:
        return f"{self.worst:.1e} of {self.tolerance:g} allowed over {len(self.errors)} " + (
            f"streams ({self.name})" if self.name else "values"
        )


@dataclass(frozen=True)
class Drift:
    """The drift measured on one batch.

    Attributes:
        chains: one for each chain; none if nothing is restored with rounding.
        gradient_error: relative difference, in the 2-norm over all, from the gradients of the step
            without rounding; None where that does not fit into the budget, or where parameters are
            updated in the backward.
    """

    chains: tuple[ChainDrift, ...]
    gradient_error: float | None
    by_value: Mapping[int, float] = field(default_factory=dict, repr=False)

    @property
    def worst(self) -> float:
        """The largest error of any chain."""
        return max((chain.worst for chain in self.chains), default=0.0)

    @property
    def is_within_tolerance(self) -> bool:
        """Tell whether every chain is within its tolerance."""
        return all(chain.worst <= chain.tolerance for chain in self.chains)

    def __str__(self) -> str:
        if not self.chains:
            return "no drift: nothing comes back by rounding"
        gradients = (
            "not compared (a step without rounding does not fit, or they are used up)"
            if self.gradient_error is None
            else f"{self.gradient_error:.1e} off"
        )
        chains = "; ".join(str(chain) for chain in self.chains)
        return f"drift {chains}; gradients {gradients}"


@dataclass(frozen=True)
class DriftCheck:
    """Settles a step whose copies drift.

    Attributes:
        again: builds the step anew, with some values kept.
        reference: a schedule of exact recoveries within the same budget, or None.
        is_fixed: whether the schedule is a saved one, which is not searched anew.
    """

    again: Callable[[frozenset[int]], BuiltStep]
    reference: Callable[[], Schedule | None]
    is_fixed: bool

    def measure(self, step: PlannedStep, state: State, sample: Sample) -> Drift:
        """The drift on a batch; the step leaves nothing behind."""
        if not rounded(step.recoveries, step.plan.schedule):
            return Drift((), 0.0)
        _LOG.info("measuring the drift of what comes back by rounding")
        return measure_drift(step, self.reference(), state, sample)

    def settle(self, built: BuiltStep, state: State, sample: Sample) -> BuiltStep:
        """The step, or one with more values kept, whose drift is within the tolerance.

        Raises:
            InfeasibleBudget: if what must be kept does not fit.
            PlanMismatch: if the schedule is a saved one, and drifts too far.
        """
        anchors: frozenset[int] = frozenset()
        worst = 0.0
        for _ in range(_ROUNDS):
            drift = measure_drift(built.step, None, state, sample)
            if drift.is_within_tolerance:
                break
            worst = max(worst, drift.worst)
            if self.is_fixed:
                raise PlanMismatch(
                    f"the saved plan drifts too far on this batch: {drift}. Plan this model anew, "
                    "or raise the tolerance"
                )
            anchors |= _to_keep(built.step, drift)
            _LOG.info("%s; keeping %d values", drift, len(anchors))
            built = self.again(anchors)
        else:
            anchors = frozenset(
                value
                for one in built.step.recoveries
                if one.exactness is not Effect.EXACT
                for value in one.values
            )
            built = self.again(anchors)
        notes = [str(self.measure(built.step, state, sample))]
        if anchors:
            found = f"{len(anchors)} values do not come back by rounding"
            notes.append(f"{found}: the drift was {worst:.1e}")
        return replace(built, step=_noted(built.step, notes), is_settled=True)


def _noted(step: PlannedStep, notes: Iterable[str]) -> PlannedStep:
    """The step with its measured drift in place of the note that it is unmeasured."""
    before = unmeasured(rounded(step.recoveries, step.plan.schedule))
    others = (note for note in step.plan.notes if note != before)
    return replace(step, plan=replace(step.plan, notes=(*others, *notes)))


@dataclass(frozen=True)
class BuiltStep:
    """A step that runs a plan, and the check that is due before it trains.

    Attributes:
        step: the step.
        drift_check: measures the drift of copies, where any are restored with rounding.
        is_settled: whether that was done, with a drift within the tolerance.
    """

    step: PlannedStep
    drift_check: DriftCheck | None = None
    is_settled: bool = False

    def settled(self, state: State, sample: Sample) -> BuiltStep:
        """The step with values kept that would drift too far; itself where that is known."""
        if self.drift_check is None or self.is_settled:
            return self
        return self.drift_check.settle(self, state, sample)

    def drift(self, state: State, sample: Sample) -> Drift:
        """The drift of restored values on a batch."""
        if self.drift_check is None:
            return Drift((), 0.0)
        return self.drift_check.measure(self.step, state, sample)


def rounded(recoveries: Iterable[Recovery], schedule: Schedule) -> tuple[Recovery, ...]:
    """The recoveries of a schedule that do not restore the exact bits."""
    used = set(schedule.restored_ops)
    return tuple(
        one for one in recoveries if one.restore_op.id in used and one.exactness is not Effect.EXACT
    )


def unmeasured(inexact: Sequence[Recovery]) -> str:
    """The note of a plan whose drift is not known yet."""
    return (
        f"drift unmeasured: {len(inexact)} values come back by rounding; the first training call "
        "measures it, as does memplan.passes.check_drift(planned, batch)"
    )


def measure_drift(
    step: PlannedStep, reference: Schedule | None, state: State, sample: Sample
) -> Drift:
    """Compare a step with the same without rounding; buffers and random states are put back.

    Args:
        step: the planned step.
        reference: a schedule of exact recoveries, or None: gradients are not compared.
        state: the model's tensors.
        sample: one batch.
    """
    inexact = rounded(step.recoveries, step.plan.schedule)
    if not inexact:
        return Drift((), 0.0)
    copies = _Copies()
    probe = copies.probe(frozenset(value for one in inexact for value in one.values))
    gradients = _run(step, step.plan.schedule, state, sample, probe)
    error = None
    if reference is not None and gradients:
        others = _run(step, reference, state, sample, None)
        error = _relative(gradients, others)
    chain_of = {value: one for one in inexact for value in one.values}
    errors: dict[tuple[str, float], list[float]] = {}
    for value, found in copies.errors.items():
        one = chain_of[value]
        errors.setdefault((one.chain, one.tolerance), []).append(found)
    chains = tuple(
        ChainDrift(name, tuple(found), tolerance) for (name, tolerance), found in errors.items()
    )
    return Drift(chains, error, dict(copies.errors))


class _Copies:
    """Compares restored values with their originals."""

    def __init__(self) -> None:
        self.originals: dict[int, torch.Tensor] = {}
        self.errors: dict[int, float] = {}

    def probe(self, values: frozenset[int]) -> Probe:
        def look(value: int, tensor: torch.Tensor) -> None:  # generated code calls functions
            self.compare(value, tensor)

        return Probe(values, look)

    def compare(self, value: int, tensor: torch.Tensor) -> None:
        seen = _elements(tensor)
        if value not in self.originals:
            self.originals[value] = seen
            return
        error = _relative([seen], [self.originals[value]])
        self.errors[value] = max(error, self.errors.get(value, 0.0))


def _run(
    step: PlannedStep, schedule: Schedule, state: State, sample: Sample, probe: Probe | None
) -> list[torch.Tensor]:
    """Elements of the gradients of one step that leaves nothing behind."""

    def leave(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        del parameter, gradient

    emitted = emit(step.captured, step.recoveries, schedule, leave, probe)
    primals = step.primals(state, sample)
    with _unchanged(step, primals), torch.no_grad(), without_autocast():
        return _gradients(step, emitted, primals)


class _Existing:
    """Stand-in for an existing gradient: samples what is added, without keeping the whole."""

    def add_(self, gradient: torch.Tensor) -> None:
        self.elements = _elements(gradient)


def _gradients(
    step: PlannedStep, emitted: Emitted, primals: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    results = emitted.forward([primals[position] for position in emitted.forward_primals])
    kept = results[emitted.num_outputs :]
    del results
    tangents = [torch.ones_like(_real(node.meta["val"])) for _, node in step.captured.tangents]
    given = [primals[position] for position in emitted.backward_primals]
    existing = {position: _Existing() for position in emitted.accumulated}
    arguments = [*kept, *given, *tangents, *existing.values()]
    del kept
    finished = zip(emitted.gradient_primals, emitted.backward(arguments), strict=True)
    return [
        existing[position].elements if gradient is None else _elements(gradient)
        for position, gradient in finished
    ]


def _real(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


@contextmanager
def _unchanged(step: PlannedStep, primals: Sequence[torch.Tensor]) -> Iterator[None]:
    """Put back the tensors that the forward writes, and the random states."""
    written = {
        value
        for op in step.captured.program.ops
        if op.phase is Phase.FORWARD
        for value in op.mutates
    }
    storage = step.captured.storage
    tensors = [
        tensor
        for primal, tensor in zip(step.given_primals, primals, strict=True)
        if storage[primal.node] in written
    ]
    before = [tensor.detach().clone() for tensor in tensors]
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
        for tensor, content in zip(tensors, before, strict=True):
            tensor.detach().copy_(content)


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """Evenly spread elements of a tensor, as a copy in 64 bits."""
    flat = tensor.detach().reshape(-1)
    stride = max(1, flat.numel() // _ELEMENTS) | 1
    return flat[::stride].to(torch.float64, copy=True)


def _relative(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    difference = sum(float((a - b).square().sum()) for a, b in zip(mine, theirs, strict=True))
    size = sum(float(b.square().sum()) for b in theirs)
    error = math.sqrt(difference / size) if size else math.sqrt(difference)
    return error if math.isfinite(error) else math.inf


def _to_keep(step: PlannedStep, drift: Drift) -> frozenset[int]:
    """Values to keep: where a chain's error exceeds its tolerance, and as often from there on.

    Two at a time, one of each stream: later values start without an error. A value outside every
    chain is kept where its own error is too large.
    """
    by_chain: dict[str, list[tuple[int, float, float]]] = {}
    inexact = rounded(step.recoveries, step.plan.schedule)
    chain_of = {value: one for one in inexact for value in one.values}
    for value, error in drift.by_value.items():
        one = chain_of[value]
        by_chain.setdefault(one.chain, []).append((value, error, one.tolerance))
    kept: set[int] = set()
    kept |= {value for value, error, tolerance in by_chain.pop("", ()) if error > tolerance}
    for rows in by_chain.values():
        first = next((i for i, (_, error, tolerance) in enumerate(rows) if error > tolerance), None)
        if first is None:
            continue
        for position, (value, _, _) in enumerate(rows):
            is_due = position >= first - 1 and (position - first) % (first + 1) in (0, first)
            if is_due:
                kept.add(value)
    return frozenset(kept)
