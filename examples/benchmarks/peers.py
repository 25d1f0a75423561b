"""memplan's plans beside the alternatives of a user, measured in one process.

Used by ``planner.py peers``: the untouched module, ``torch.utils.checkpoint`` around every block
and around every sqrt(n) blocks, and torch's ``activation_memory_budget`` (backend ``aot_eager``),
each with its peak, its time in interleaved rounds, and the error of its gradients.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._functorch import config as functorch_config
from torch.utils.checkpoint import checkpoint

import memplan

sys.path.insert(0, str(Path(__file__).parent))
import budgets
import scaled

KNOB = (1.0, 0.6, 0.4, 0.3, 0.2, 0.15, 0.1, 0.08, 0.06, 0.04, 0.02, 0.0)
POINTS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15)
"""Budgets, as shares of what the captured step needs above its residents; those below the smallest
are left out."""

RIGHT = 1e-4
"""Largest error of right gradients, as a share of their largest entry."""

MARGIN = 1.02
"""A plan dominates a point if its peak is no higher, and its time at most this multiple."""


NOT_A_CHAIN = frozenset({"t5", "lstm", "gru", "unet", "counting"})
"""Models whose blocks are not one chain, each taking the output of the one before."""


def every_sqrt(model: nn.Module) -> nn.Module:
    """A copy with runs of about sqrt(n) blocks under one checkpoint each."""
    copied = copy.deepcopy(model)
    lists = [m for m in copied.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    name, blocks = max(
        (
            (name, child)
            for parent in copied.modules()
            for name, child in parent.named_children()
            if child in lists
        ),
        key=lambda pair: len(pair[1]),
    )
    parent = next(m for m in copied.modules() if getattr(m, name, None) is blocks)
    run = max(1, round(math.sqrt(len(blocks))))
    groups = [list(blocks)[i : i + run] for i in range(0, len(blocks), run)]
    if isinstance(blocks, nn.Sequential):
        grouped: nn.Module = nn.Sequential(*(Group(group) for group in groups))
    else:
        grouped = nn.ModuleList(Group(group) for group in groups)
    setattr(parent, name, grouped)
    return copied


class Group(nn.Module):
    """Some blocks under one checkpoint."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The last block's output."""
        return checkpoint(self._run, x, *args, use_reentrant=False, **kwargs)

    def _run(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for block in self.blocks:
            x = block(x, *args, **kwargs)
            x = x[0] if isinstance(x, tuple) else x
        return x


@dataclass(frozen=True)
class Seen:
    """Measurements of a module's step, except its time.

    Attributes:
        peak_bytes: measured peak of the step.
        resident_bytes: bytes alive before and after it.
        gradient_error: the largest difference of any gradient's entry to the untouched module's,
            over the largest entry.
    """

    peak_bytes: int
    resident_bytes: int
    gradient_error: float


@dataclass(frozen=True)
class Reference:
    """The reference that other runs of a model are compared with.

    Attributes:
        name: name of the model.
        model: the untouched module.
        batch: batch of every step.
        buffers: the model's original buffers, with which each step begins.
        gradients: gradients of the untouched module's step.
    """

    name: str
    model: nn.Module
    batch: memplan.Sample
    buffers: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...]

    @staticmethod
    def of(name: str, model: nn.Module, batch: memplan.Sample) -> Reference:
        """The reference of a model as it is."""
        buffers = tuple(buffer.clone() for buffer in model.buffers())
        return Reference(name, model, batch, buffers, _gradients(model, buffers, batch))

    def see(self, run: str, module: nn.Module) -> Seen:
        """Measure a run's peak and the error of its gradients."""
        print(f"{self.name}: measuring {run}", file=sys.stderr)
        found = memplan.profile(module, self.batch, steps=1)
        largest = max(float(gradient.abs().max()) for gradient in self.gradients)
        pairs = zip(self.gradients, _gradients(module, self.buffers, self.batch), strict=True)
        error = max(float((one - other).abs().max()) for one, other in pairs) / largest
        return Seen(found.peak_bytes, found.resident_bytes, error)


def _gradients(
    module: nn.Module, buffers: Iterable[torch.Tensor], batch: memplan.Sample
) -> tuple[torch.Tensor, ...]:
    """Gradients of a step from these buffers and a fixed random state."""
    for buffer, value in zip(module.buffers(), buffers, strict=True):
        buffer.copy_(value)
    torch.manual_seed(1)
    budgets.run_step(module, batch)
    gradients = [p.grad for p in module.parameters() if p.requires_grad]
    budgets.clear_gradients(module)
    assert all(gradient is not None for gradient in gradients)
    return tuple(gradient for gradient in gradients if gradient is not None)


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """Measure peak, time and gradients of memplan's plans and of all alternatives."""
    torch.manual_seed(0)
    model, sample, per_block = scaled.MODELS[name]()
    batch = memplan.Sample.of(sample)
    modules: dict[str, nn.Module] = {"untouched": model, "checkpoint per block": per_block}
    if name not in NOT_A_CHAIN:
        modules["checkpoint every sqrt(n)"] = every_sqrt(model)
    plans: dict[str, memplan.Plan] = {}

    def plan(label: str, budget: str | int) -> memplan.Plan:
        options = memplan.Options(on_infeasible="smallest", with_bound=True, solver_limit_s=2)
        planned = memplan.optimize(model, sample, budget=budget, options=options)
        modules[f"memplan {label}"], plans[f"memplan {label}"] = planned, planned.plan
        return planned.plan

    smallest = plan("smallest", "1 B")
    resident = smallest.resident_bytes
    plan("1.1 smallest", resident + int(1.1 * (smallest.peak_bytes - resident)))
    for share in POINTS:
        budget = resident + int(share * (smallest.original_peak_bytes - resident))
        if budget > smallest.peak_bytes:
            plan(f"{share:.0%}", budget)
    reference = Reference.of(name, model, batch)
    seen = {key: reference.see(key, module) for key, module in modules.items()}
    rows = _rows(name, seen, plans, budgets._interleaved(modules, batch, rounds, name))
    for knob in KNOB:
        known = {row["peak_bytes"] for row in rows if row["run"].startswith("torch ")}
        rows += _knob_rows(reference, seen["untouched"], knob, rounds=rounds, known=known)
    return [{**row, "dominated_by": _dominating(row, rows)} for row in rows]


def _knob_rows(
    reference: Reference, untouched: Seen, knob: float, *, rounds: int, known: set[int]
) -> list[dict[str, Any]]:
    """Rows for torch's knob at one value; none if a larger one gave the same peak to the byte.

    Each value is compiled afresh: torch would reuse one copy's code for the others. Where gradients
    are wrong, times are of one round: nobody would use them.
    """
    torch._dynamo.reset()
    with functorch_config.patch(activation_memory_budget=knob):
        compiled = torch.compile(reference.model, backend="aot_eager")
        assert isinstance(compiled, nn.Module)
        run = f"torch {knob}"
        seen = reference.see(run, compiled)
        if seen.peak_bytes in known:
            print(f"{reference.name}: {run} is as a larger value", file=sys.stderr)
            return []
        pair = {"untouched": reference.model, run: compiled}
        its_rounds = rounds if seen.gradient_error <= RIGHT else 1
        times = budgets._interleaved(pair, reference.batch, its_rounds, reference.name)
    return _rows(reference.name, {"untouched": untouched, run: seen}, {}, times)[1:]


def _rows(
    name: str, seen: dict[str, Seen], plans: dict[str, memplan.Plan], times: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """Rows of runs that were timed together, the untouched module's first."""
    first = times.get("memplan 100%")
    return [
        {
            "model": name,
            "run": key,
            "peak_bytes": seen[key].peak_bytes,
            "above_bytes": seen[key].peak_bytes - seen["untouched"].resident_bytes,
            "predicted_bytes": plans[key].peak_bytes if key in plans else None,
            "floor_bytes": plans[key].floor_bytes if key in plans else None,
            "predicted_slowdown": plans[key].slowdown if key in plans else None,
            "slowdown_bound": plans[key].slowdown_bound if key in plans else None,
            "time_ratio": median(b / a for a, b in zip(times["untouched"], spent, strict=True)),
            "to_memplan_100": first and median(b / a for a, b in zip(first, spent, strict=True)),
            "step_s": median(spent),
            "gradient_error": seen[key].gradient_error,
        }
        for key, spent in times.items()
    ]


def is_right(row: dict[str, Any]) -> bool:
    """Tell whether a row's gradients are right."""
    return bool(row["gradient_error"] <= RIGHT)


def _dominating(row: dict[str, Any], rows: list[dict[str, Any]]) -> str | None:
    """The fastest plan that dominates a point: no higher peak, and about its time or less."""
    plans = [
        other
        for other in rows
        if other["run"].startswith("memplan")
        and other["peak_bytes"] <= row["peak_bytes"]
        and other["time_ratio"] <= MARGIN * row["time_ratio"]
    ]
    best = min(plans, key=lambda other: other["time_ratio"], default=None)
    return None if best is None else str(best["run"])
