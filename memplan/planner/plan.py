"""A plan: the decisions for one step, their costs, and the reasons. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from memplan.errors import PlanMismatch
from memplan.ir.program import Phase, Role
from memplan.ir.schedule import Effect, Schedule
from memplan.planner.frozen_parts import Part
from memplan.tables import ShownAsTables, Table
from memplan.units import format_bytes

SCHEMA_VERSION = 5


@dataclass(frozen=True, slots=True)
class PassRecord:
    """A pass that took part.

    Attributes:
        name: the name of its factory.
        arguments: what the factory was called with.
        effect: what it does to the result.
    """

    name: str
    arguments: Mapping[str, object]
    effect: Effect


@dataclass(frozen=True, slots=True)
class LiveValue:
    """A value that is alive at the peak.

    Attributes:
        nbytes: its size.
        category: its category, as in ``Plan.categories``.
        target: the op that made it.
        module: FQN of the module that it belongs to.
        source: ``file.py:line``, where known.
    """

    nbytes: int
    category: str
    target: str
    module: str
    source: str


@dataclass(frozen=True, repr=False)
class Plan(ShownAsTables):
    """The way in which one training step runs.

    Attributes:
        peak_bytes: predicted peak of the step, residents included.
        resident_bytes: parameters, buffers, inputs, constants, and gradients present at the call.
        original_peak_bytes: predicted peak of the captured step with nothing recomputed.
        floor_bytes: no schedule of this program in this order has a lower peak.
        saved_bytes: activations held when the forward ends.
        seconds: predicted time of the step.
        original_seconds: predicted time with nothing recomputed.
        slowdown_bound: no plan of these ops in this order within the budget has a lower slowdown;
            None if that was not asked for.
        num_ops: ops that the captured step runs.
        num_restores: runs of ops that restore something.
        categories: bytes by category at the peak.
        phases: the most bytes in each phase: forward, backward, and optimizer if it is included.
        peak_op: the op at the peak, with its module.
        live: the largest values that are alive at the peak.
        budget_bytes: the bound that was asked for, or None.
        costs_source: the source of times and workspace.
        passes: the passes that took part.
        captured_effect: EXACT if the captured step has the untouched module's bits, ROUNDING if it
            is known to differ by float rounding.
        notes: further remarks on that.
        parts: parts of the model, and the bytes that their training takes.
        fingerprint: of the program and the offered recoveries; a plan runs nothing else.
        schedule: the steps.
    """

    peak_bytes: int
    resident_bytes: int
    original_peak_bytes: int
    floor_bytes: int
    saved_bytes: int
    seconds: float
    original_seconds: float
    slowdown_bound: float | None
    num_ops: int
    num_restores: int
    categories: Mapping[str, int]
    phases: Mapping[str, int]
    peak_op: str
    live: tuple[LiveValue, ...]
    budget_bytes: int | None
    costs_source: str
    passes: tuple[PassRecord, ...]
    captured_effect: Effect
    notes: tuple[str, ...]
    parts: tuple[Part, ...]
    fingerprint: str
    schedule: Schedule

    @property
    def peak_phase(self) -> str:
        """The phase of the peak; the first of those that reach it."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def slowdown(self) -> float:
        """Predicted time over that of the captured step."""
        return self.seconds / self.original_seconds if self.original_seconds else 1.0

    @property
    def effects(self) -> tuple[Effect, ...]:
        """The effects of the capture and of the passes that took part, each once."""
        effects = (self.captured_effect, *(record.effect for record in self.passes))
        distinct = dict.fromkeys(effects)
        return tuple(e for e in distinct if e is not Effect.EXACT) or (Effect.EXACT,)

    @property
    def summary(self) -> str:
        """The peak before and after, the time, the budget and the effect on results, in a line."""
        before, after = self.original_peak_bytes, self.peak_bytes
        change = after / before - 1 if before else 0.0
        parts = [
            f"peak: {format_bytes(before)} -> {format_bytes(after)} ({change:+.1%})",
            f"time: {self.slowdown:.2f}x",
        ]
        if self.budget_bytes is not None:
            parts.append(f"budget: {format_bytes(self.budget_bytes)}")
        return " || ".join([*parts, ", ".join(effect.value for effect in self.effects)])

    def __str__(self) -> str:
        above = self.original_peak_bytes - self.resident_bytes
        share = (self.peak_bytes - self.resident_bytes) / above if above else 1.0
        budget = (
            "" if self.budget_bytes is None else f" of {format_bytes(self.budget_bytes)} allowed"
        )
        unknown = ", kernels' workspace unknown" if self.costs_source.startswith("analytic") else ""
        effects = ", ".join(effect.value for effect in self.effects)
        bound = "" if self.slowdown_bound is None else f" (at least {self.slowdown_bound:.3f}x)"
        return (
            f"Plan: peak {format_bytes(self.peak_bytes)}{budget} "
            f"({format_bytes(self.original_peak_bytes)} unplanned; {share:.0%} of what is above "
            f"{format_bytes(self.resident_bytes)} resident), {self.slowdown:.3f}x the time{bound}, "
            f"{self.num_restores} of {self.num_ops} ops run again, {effects}{unknown}"
        )

    def tables(self) -> list[Table]:
        """Tables of a plan's needs, and of the values alive at its peak."""
        return [_totals(self), _at_the_peak(self)]

    def explain(self) -> str:
        """A text for people: the peaks, the values alive at the highest, the floor, and advice."""
        lines = [str(self), self._phases(), f"At the peak ({self.peak_op}):"]
        for category, nbytes in sorted(self.categories.items(), key=lambda item: -item[1]):
            lines.append(f"  {format_bytes(nbytes):>12}  {category}")
        lines.append("Largest values alive there:")
        for value in self.live:
            where = value.module or "the root module"
            lines.append(
                f"  {format_bytes(value.nbytes):>12}  {value.category}: {value.target} in {where}"
            )
        lines.append(
            f"Floor of this step, whatever is recomputed: {format_bytes(self.floor_bytes)}. "
            f"Costs: {self.costs_source}."
        )
        lines += self._parts()
        lines += [self.advice] if self.advice else []
        lines += [f"Note: {note}." for note in self.notes]
        return "\n".join(lines)

    def _parts(self) -> list[str]:
        """Lines on the trained parts, for people."""
        if not self.parts:
            return []
        rows = [
            (one.name, *map(format_bytes, (one.gradient_bytes, one.activation_bytes)))
            for one in self.parts
        ]
        width = max(len(name) for name, *_ in rows)
        return [
            "Freezing a part frees its gradients, its optimizer state, and, where nothing is "
            "recomputed, at least these activations:",
            *(
                f"  {name:<{width}}  {gradients:>12} gradients  {activations:>12} activations"
                for name, gradients, activations in rows
            ),
        ]

    def _phases(self) -> str:
        peaks = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in self.phases.items())
        return f"Peaks: {peaks}."

    @property
    def advice(self) -> str:
        """Advice where no recomputation helps, or ""."""
        if self.peak_phase != Phase.OPTIMIZER.value:
            return ""
        temporaries = format_bytes(self.categories.get("workspace", 0))
        gradients = format_bytes(self.categories.get(Role.GRADIENT.value, 0))
        return (
            f"The optimizer's update is the peak: beside the gradients ({gradients}) it keeps "
            f"{temporaries} of temporaries. Update each parameter in the backward, with "
            "Options(update_in_backward=True), which needs neither; or choose fused=True, which "
            "has no temporaries, or foreach=False, which has those of one parameter at a time."
        )

    def to_json(self) -> str:
        """The plan as plain data; ``from_json`` returns an equal one."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["categories"] = dict(self.categories)
        data["phases"] = dict(self.phases)
        data["live"] = [asdict(value) for value in self.live]
        data["parts"] = [asdict(part) for part in self.parts]
        data["passes"] = [
            {"name": p.name, "arguments": dict(p.arguments), "effect": p.effect.value}
            for p in self.passes
        ]
        data["captured_effect"] = self.captured_effect.value
        data["schedule"] = self.schedule.to_json()
        return json.dumps({"schema_version": SCHEMA_VERSION, **data})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what ``to_json`` wrote.

        Raises:
            PlanMismatch: if the text is not a plan of this schema version.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanMismatch(f"not a plan: {error}") from error
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            found = data.get("schema_version") if isinstance(data, dict) else None
            raise PlanMismatch(
                f"not a plan of schema version {SCHEMA_VERSION} (found {found!r}); make it again "
                "with memplan.plan"
            )
        del data["schema_version"]
        return cls(**_checked(data))


_INTS = (
    "peak_bytes",
    "resident_bytes",
    "original_peak_bytes",
    "floor_bytes",
    "saved_bytes",
    "num_ops",
    "num_restores",
)


def _checked(data: dict[str, Any]) -> dict[str, Any]:
    """A plan's fields from JSON, each of the right type."""
    expected = {f.name for f in fields(Plan)}
    if set(data) != expected:
        raise PlanMismatch(f"a plan has other fields: {sorted(set(data) ^ expected)}")
    try:
        for name in _INTS:
            _require(type(data[name]) is int, name)
        for name in ("seconds", "original_seconds"):
            _require(type(data[name]) in (int, float), name)
        for name in ("peak_op", "costs_source", "fingerprint"):
            _require(type(data[name]) is str, name)
        is_number = type(data["slowdown_bound"]) in (int, float, type(None))
        _require(is_number, "slowdown_bound")
        _require(data["budget_bytes"] is None or type(data["budget_bytes"]) is int, "budget_bytes")
        for name in ("categories", "phases"):
            pairs = data[name].items()
            _require(all(type(k) is str and type(v) is int for k, v in pairs), name)
        live = tuple(LiveValue(**value) for value in data["live"])
        for value in live:
            _require(type(value.nbytes) is int, "live")
            texts = (value.category, value.target, value.module, value.source)
            _require(all(type(text) is str for text in texts), "live")
        parts = tuple(Part(**part) for part in data["parts"])
        for part in parts:
            sizes = (part.parameter_bytes, part.gradient_bytes, part.activation_bytes)
            is_right = type(part.name) is str and all(type(size) is int for size in sizes)
            _require(is_right, "parts")
        effect = Effect(data["captured_effect"])
        _require(isinstance(data["notes"], list), "notes")
        notes = tuple(str(note) for note in data["notes"])
        passes = tuple(
            PassRecord(str(p["name"]), dict(p["arguments"]), Effect(p["effect"]))
            for p in data["passes"]
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise PlanMismatch(f"a plan's fields cannot be read: {error}") from error
    schedule = Schedule.from_json(data["schedule"])
    read = {
        "live": live,
        "parts": parts,
        "passes": passes,
        "captured_effect": effect,
        "notes": notes,
    }
    return {**data, **read, "schedule": schedule}


def _require(condition: bool, name: str) -> None:
    if not condition:
        raise PlanMismatch(f"a plan's {name!r} is of the wrong type")


_MOST_LIVE = 8


def _totals(plan: Plan) -> Table:
    peaks = [plan.original_peak_bytes, plan.peak_bytes]
    above = [peak - plan.resident_bytes for peak in peaks]
    rows: list[tuple[str, ...]] = []
    for name, (before, after) in (("peak memory", peaks), ("  above resident", above)):
        ratio = f"{after / before:.3f}" if before else ""
        rows.append((name, format_bytes(before), format_bytes(after), ratio))
    for name, nbytes in plan.phases.items():
        rows.append((f"  in {name}", "", format_bytes(nbytes), ""))
    rows += [
        ("step time", "", "", f"{plan.slowdown:.3f}"),
        ("ops run again", "", f"{plan.num_restores} of {plan.num_ops}", ""),
        ("smallest possible peak", "", f">= {format_bytes(plan.floor_bytes)}", ""),
    ]
    if plan.budget_bytes is not None:
        rows.append(("budget", "", format_bytes(plan.budget_bytes), ""))
    rows.append(("results", "", ", ".join(effect.value for effect in plan.effects), ""))
    headers = ("", "unplanned", "planned", "planned / unplanned")
    title = "One training step, predicted"
    return Table(title, headers, tuple(rows), frozenset({1, 2, 3}), frozenset({2, 3}))


def _at_the_peak(plan: Plan) -> Table:
    rows: list[tuple[str, ...]] = [
        (format_bytes(nbytes), category, "")
        for category, nbytes in sorted(plan.categories.items(), key=lambda item: -item[1])
        if nbytes
    ]
    rows.append(())
    for value in plan.live[:_MOST_LIVE]:
        where = value.module or "the root module"
        made = f"{value.target} in {where}" if value.target else where
        rows.append((format_bytes(value.nbytes), value.category, made))
    return Table(
        f"At the peak: {plan.peak_op}",
        ("bytes", "what", "made by"),
        tuple(rows),
        frozenset({0}),
        frozenset({2}),
    )
