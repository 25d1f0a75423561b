"""Bytes that a step would not hold if a part of the model were frozen. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from memplan.ir.liveness import ScheduledStep
from memplan.ir.program import Op, Phase, Program, Role

_MOST = 12
_HELD = frozenset({Role.TANGENT, Role.OUTPUT, Role.GRADIENT})


@dataclass(frozen=True, slots=True)
class Part:
    """The parameters of one part of the model, and the bytes that their training takes.

    Attributes:
        name: names of modules, with a star for the number of a block.
        parameter_bytes: of the trained parameters.
        gradient_bytes: of their gradients.
        activation_bytes: saved for these gradients alone, where nothing is recomputed. An op that
            is still needed for another gradient counts as reading all that it reads.
    """

    name: str
    parameter_bytes: int
    gradient_bytes: int
    activation_bytes: int


def parts(step: ScheduledStep, gradients: Mapping[str, int]) -> tuple[Part, ...]:
    """The parts whose freezing would free most, the largest first.

    Args:
        step: the step, with nothing recomputed.
        gradients: name of a parameter to the value of its gradient.
    """
    program = step.program
    sizes = {v.name: v.nbytes for v in program.values if v.role is Role.PARAMETER}
    saved = {
        id for id in step.saved if id < len(program.values) and program.values[id].role not in _HELD
    }
    members: dict[str, list[str]] = {}
    for name in gradients:
        members.setdefault(_part_of(name), []).append(name)
    found = []
    for part, names in members.items():
        own = {gradients[name] for name in names}
        read = _read_without(program, own)
        found.append(
            Part(
                part,
                sum(sizes.get(name, 0) for name in names),
                sum(program.values[id].nbytes for id in own),
                sum(program.values[id].nbytes for id in saved - read),
            )
        )
    found.sort(key=lambda one: (-one.gradient_bytes - one.activation_bytes, one.name))
    return tuple(found[:_MOST])


def _part_of(parameter: str) -> str:
    """The part of a parameter: two names deep, and one below the number of a block."""
    path = ["*" if part.isdigit() else part for part in parameter.split(".")[:-1]]
    depth = path.index("*") + 2 if "*" in path else 2
    return re.sub(r"^$", "the root", ".".join(path[:depth]))


def _read_without(program: Program, gradients: set[int]) -> set[int]:
    """Values that the backward reads if some gradients are not computed."""
    wanted = set(program.outputs) - gradients
    read: set[int] = set()
    for op in reversed(program.ops):
        if op.phase is Phase.BACKWARD and _is_needed(op, wanted, gradients):
            wanted.update(op.operands)
            read.update(op.operands)
    return read


def _is_needed(op: Op, wanted: set[int], gradients: set[int]) -> bool:
    if op.mutates:
        return not gradients.issuperset(op.mutates)
    return not wanted.isdisjoint(op.results)
