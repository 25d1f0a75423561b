"""The schedule of a step: straight-line steps, the recoveries that they use, and their legality.

No torch here. A schedule says when each op runs, when each copy of a value is freed, and how a
value is restored. It says nothing about how that is emitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Literal, TypeAlias

from memplan.errors import PlanMismatch
from memplan.ir.program import Op, Phase, Program, Role, Value


class Effect(str, Enum):
    """The effect of a pass or a recovery on the result of the step."""

    EXACT = "exact"
    """Same loss and gradients, bit for bit."""
    ROUNDING = "rounding"
    """Same mathematics; differs by float rounding within a stated, measured tolerance."""
    RESTRICTED = "restricted"
    """Exact gradients of fewer or other parameters."""
    STOCHASTIC = "stochastic"
    """An unbiased estimate of the gradient."""
    APPROXIMATE = "approximate"
    """Another gradient or another model."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """One way to restore values.

    Attributes:
        pass_name: the pass that offers it.
        values: the restored values; all are results of one captured op.
        restore_op: restores them; its results are ``values``. Either a captured op, or a new one
            whose id and whose stashed operands lie past the program's.
        stash_op: makes what is ``stashed``: run directly before the producing op, or after it if it
            reads ``values``.
        stashed: the values that are held in their place from then on.
        exactness: ``EXACT`` if the copy has the bits of the original.
        chain: for copies of copies, each with a rounding of its own: the chain of them that this is
            a part of, in words.
        tolerance: the relative error up to which such a copy is good enough.
    """

    pass_name: str
    values: tuple[int, ...]
    restore_op: Op
    stash_op: Op | None = None
    stashed: tuple[Value, ...] = ()
    exactness: Effect = Effect.EXACT
    chain: str = ""
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """Run a captured op in its place.

    Attributes:
        op: its id.
        binds: the results that are held afterwards.
        over: the operand that the result is written over, which ends its copy; or None.
    """

    op: int
    binds: tuple[int, ...]
    over: int | None = None


@dataclass(frozen=True, slots=True)
class Stash:
    """Run a recovery's ``stash_op``. Attributes as in ``Run``."""

    op: int
    binds: tuple[int, ...]
    over: int | None = None


@dataclass(frozen=True, slots=True)
class Restore:
    """Run a recovery's ``restore_op``: from here on ``binds`` name the new copies."""

    op: int
    binds: tuple[int, ...]
    over: int | None = None


@dataclass(frozen=True, slots=True)
class Free:
    """Free the current copy of a value."""

    value: int


Step: TypeAlias = Run | Stash | Restore | Free
Call: TypeAlias = Run | Stash | Restore

_KINDS: dict[str, type[Run] | type[Stash] | type[Restore]] = {
    "run": Run,
    "prepare": Stash,  # the name that saved plans have
    "restore": Restore,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


@dataclass(frozen=True)
class Schedule:
    """A whole step: the forward's steps, then the backward's, with the optimizer's at its end."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """Both segments, one after the other."""
        return self.forward + self.backward

    @property
    def restored_ops(self) -> tuple[int, ...]:
        """Ops that run to restore something, once for each run."""
        return tuple(step.op for step in self.steps if isinstance(step, Restore))

    def to_json(self) -> dict[Literal["forward", "backward"], list[list[object]]]:
        """The schedule as plain lists; ``from_json`` returns an equal one."""
        return {
            "forward": [_step_to_json(step) for step in self.forward],
            "backward": [_step_to_json(step) for step in self.backward],
        }

    @classmethod
    def from_json(cls, data: object) -> Schedule:
        """Read what ``to_json`` wrote.

        Raises:
            PlanMismatch: if the data is not a schedule.
        """
        if not isinstance(data, Mapping) or set(data) != {"forward", "backward"}:
            raise PlanMismatch('a schedule must have exactly "forward" and "backward"')
        return cls(
            forward=tuple(_step_from_json(step) for step in _as_list(data["forward"])),
            backward=tuple(_step_from_json(step) for step in _as_list(data["backward"])),
        )


def _step_to_json(step: Step) -> list[object]:
    if isinstance(step, Free):
        return ["free", step.value]
    over = [] if step.over is None else [step.over]
    return [_NAMES[type(step)], step.op, list(step.binds), *over]


def _as_list(data: object) -> list[object]:
    if not isinstance(data, list):
        raise PlanMismatch(f"a schedule's segment must be a list, got {type(data).__name__}")
    return data


def _step_from_json(data: object) -> Step:
    match data:
        case ["free", int(value)]:
            return Free(value)
        case [str(kind), int(op), [*binds]] if kind in _KINDS:
            return _KINDS[kind](op, tuple(_as_id(value) for value in binds))
        case [str(kind), int(op), [*binds], int(over)] if kind in _KINDS:
            return _KINDS[kind](op, tuple(_as_id(value) for value in binds), over)
    raise PlanMismatch(f"not a step of a schedule: {str(data)[:80]!r}")


def _as_id(data: object) -> int:
    if not isinstance(data, int) or isinstance(data, bool):
        raise PlanMismatch(f"not the id of a value: {str(data)[:80]!r}")
    return data


def start_of_backward(program: Program, schedule: Schedule) -> int:
    """Position of the first step for an op that is not the forward's: its gradient is alive."""
    if program.num_fused is None:
        return len(schedule.forward)
    last = -1
    for position, step in enumerate(schedule.steps):
        if isinstance(step, Run) and step.op >= program.turn:
            break
        if isinstance(step, Run) and step.op == program.turn - 1:
            last = position
    # what is freed or stashed after the forward's last op belongs to it
    following = schedule.steps[last + 1 :]
    calls = (k for k, step in enumerate(following) if isinstance(step, Run | Restore))
    return last + 1 + next(calls, len(following))


@dataclass(frozen=True)
class Catalog:
    """Every op and value that a schedule may name: the program's and its recoveries'."""

    ops: Mapping[int, Op]
    values: Mapping[int, Value]

    @classmethod
    def of(cls, program: Program, recoveries: Iterable[Recovery]) -> Catalog:
        """Merge; ids of recoveries' new ops and values must not repeat."""
        recoveries = tuple(recoveries)
        new_ops = [op for r in recoveries for op in (r.stash_op, r.restore_op) if op is not None]
        return cls(
            ops={op.id: op for op in chain(program.ops, new_ops)},
            values={
                value.id: value
                for value in chain(program.values, *(recovery.stashed for recovery in recoveries))
            },
        )


def check_schedule(program: Program, recoveries: Sequence[Recovery], schedule: Schedule) -> None:
    """Refuse a schedule that does not run this program.

    Legal means: every captured op runs once, in captured order and in its own segment; each op
    finds its operands alive, and not overwritten since; only what a recovery offers is restored;
    nothing is bound twice or freed twice; what the caller holds stays alive, and nothing else does.

    Raises:
        PlanMismatch: naming the first step that is not legal.
    """
    catalog = Catalog.of(program, recoveries)
    restoring = {recovery.restore_op.id for recovery in recoveries}
    stashing = {recovery.stash_op.id for recovery in recoveries if recovery.stash_op is not None}
    live = {value.id for value in program.values if value.role.is_resident}
    overwritten: set[int] = set()
    next_op = position = 0
    start = start_of_backward(program, schedule)
    for segment, steps in (
        (Phase.FORWARD, schedule.forward),
        (Phase.BACKWARD, schedule.backward),
    ):
        for step in steps:
            if position == start:
                live |= {value.id for value in program.values if value.role is Role.TANGENT}
            position += 1
            if isinstance(step, Free):
                _check_end(program, catalog, step.value, live)
                continue
            if isinstance(step, Run):
                is_due = step.op == next_op < len(program.ops)
                _require(is_due, f"runs op {step.op} where op {next_op} is due")
                in_place = (step.op < program.num_forward) == (segment is Phase.FORWARD)
                _require(in_place, f"runs op {step.op} in the wrong segment")
                next_op += 1
            elif isinstance(step, Restore):
                _require(step.op in restoring, f"restores by op {step.op}, which nothing offers")
            else:
                _require(step.op in stashing, f"stashes by op {step.op}, which nothing offers")
            _check_call(program, catalog, step, live, overwritten)
    _require(next_op == len(program.ops), f"stops before op {next_op}")
    tangents = {value.id for value in program.values if value.role.value == "tangent"}
    residents = {value.id for value in program.values if value.role.is_resident}
    _require(live - residents - tangents == program.held, "leaves other values alive at its end")


def _check_end(program: Program, catalog: Catalog, value: int, live: set[int]) -> None:
    _require(value in live, f"frees value {value}, which is not alive")
    is_own = value in catalog.values and value not in program.held
    is_own = is_own and catalog.values[value].role is not Role.TANGENT
    is_own = is_own and not catalog.values[value].role.is_resident
    _require(is_own, f"frees value {value}, which is not the schedule's to free")
    live.discard(value)


def _check_call(
    program: Program, catalog: Catalog, step: Call, live: set[int], overwritten: set[int]
) -> None:
    op = catalog.ops[step.op]
    missing = [value for value in op.operands if value not in live]
    _require(not missing, f"runs op {op.id} ({op.target}) while values {missing} are not alive")
    stale = overwritten.intersection(op.operands)
    _require(not stale, f"runs op {op.id} ({op.target}) after values {sorted(stale)} changed")
    overwritten.update(op.mutates)
    if step.over is not None:
        is_offered = step.over in op.may_overwrite
        _require(is_offered, f"writes op {op.id} over value {step.over}, which nothing offers")
        _check_end(program, catalog, step.over, live)
    _require(set(step.binds) <= set(op.results), f"binds what op {op.id} does not make")
    _require(len(set(step.binds)) == len(step.binds), f"binds a result of op {op.id} twice")
    again = [value for value in step.binds if value in live]
    _require(not again, f"binds values {again}, which are alive already")
    live.update(step.binds)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise PlanMismatch(f"illegal schedule: it {what}; plan this model again")
