"""The savings from training less: each part of a model frozen, or adapted, and planned for."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from memplan.analysis import parts_of
from memplan.capture import ONE_AT_A_TIME
from memplan.capture.sample import Sample
from memplan.compiler.lower import LoweredStep, lower
from memplan.compiler.request import Request, make_request
from memplan.errors import MemplanError
from memplan.ir.liveness import ScheduledStep
from memplan.ir.program import Phase, Program, Role
from memplan.optimizer import like
from memplan.options import Options
from memplan.planner.summarize import unplanned_step
from memplan.transforms.apply import changing
from memplan.transforms.passes import Pass

_LOG = logging.getLogger("memplan")
_HELD = frozenset({Role.TANGENT, Role.OUTPUT, Role.GRADIENT})


@dataclass(frozen=True, slots=True)
class FreezingChoice:
    """The bytes of a step if parts of a model are frozen or adapted, and nothing is recomputed.

    Attributes:
        name: description of the choice.
        option: its command-line option, after ``--pass``; "" for all trained.
        trained_bytes: bytes of the trained parameters.
        gradient_bytes: bytes of their gradients.
        state_bytes: bytes of the optimizer's state; 0 without an optimizer.
        activation_bytes: bytes saved by the forward for the backward.
        peak_bytes: peak of the step.
        kept_for: kernels of the backward and the bytes saved for them, the most first; a value read
            by several counts for each.
    """

    name: str
    option: str
    trained_bytes: int
    gradient_bytes: int
    state_bytes: int
    activation_bytes: int
    peak_bytes: int
    kept_for: tuple[tuple[str, int], ...]


def compare_choices(
    model: nn.Module,
    sample: object,
    *,
    optimizer: object = None,
    options: Options | None = None,
    passes: Mapping[str, Pass] | None = None,
) -> list[FreezingChoice]:
    """The savings from freezing parts, training biases alone, and adapters. Never runs the model.

    Args:
        model: the module.
        sample: one batch.
        optimizer: its state is part of the step. Adapters are stepped by one like it.
        options: further settings.
        passes: passes to try instead, by the text that follows ``--pass``.

    Returns:
        The model as it is, then each choice. Those that do not apply are left out.
    """
    batch = Sample.of(sample)
    optimizer = like(optimizer) if isinstance(optimizer, Optimizer) else optimizer

    def request(*passes: Pass) -> Request:
        return make_request(
            model,
            passes=passes,
            optimizer=optimizer,
            options=options,
        )

    found = [_choice(model, batch, request(), "as it is")]
    for option, one in (_choices(model) if passes is None else passes).items():
        _LOG.debug("planning with %s", option)
        try:
            found.append(_choice(model, batch, request(one), _words(one), option))
        except MemplanError as error:
            _LOG.debug("%s does not apply: %s", option, error)
    return found


def _choices(model: nn.Module) -> dict[str, Pass]:
    # Imported late: the passes import the kernel, so the kernel cannot import them at load time.
    from memplan.passes import (  # noqa: PLC0415
        add_adapters,
        add_lora,
        freeze,
        train_biases_only,
    )

    return {
        **{f"freeze:patterns={part}": freeze(part) for part in parts_of(model)},
        "train_biases_only": train_biases_only(),
        "add_lora": add_lora(),
        "add_lora:variant=lora_fa": add_lora(variant="lora_fa"),
        "add_adapters": add_adapters(),
    }


def _words(one: Pass) -> str:
    patterns = one.arguments.get("patterns", ())
    if one.name == "freeze" and isinstance(patterns, list):
        return ", ".join(patterns)
    variant = one.arguments.get("variant")
    words = {
        "train_biases_only": "biases alone",
        "add_lora": f"{variant}, rank {one.arguments.get('rank')}",
        "add_adapters": f"bottlenecks of {one.arguments.get('size')}",
    }
    return words.get(one.name, one.name)


def _choice(
    model: nn.Module, sample: Sample, request: Request, name: str, option: str = ""
) -> FreezingChoice:
    with ONE_AT_A_TIME, changing(model, sample, request.passes) as changed:
        trained = [one for one in changed.model.parameters() if one.requires_grad]
        trained_bytes = sum(one.untyped_storage().nbytes() for one in trained)
        step = lower(changed, sample, request.with_optimizer_of(changed.model))
    return _described(name, option, trained_bytes, step)


def _described(name: str, option: str, trained_bytes: int, step: LoweredStep) -> FreezingChoice:
    program = step.captured.program
    kept = unplanned_step(program, step.costs)
    of_role: Counter[Role] = Counter()
    for value in program.values:
        of_role[value.role] += value.nbytes
    saved = _saved(kept)
    return FreezingChoice(
        name,
        option,
        trained_bytes,
        of_role[Role.GRADIENT] + of_role[Role.EXISTING_GRADIENT],
        of_role[Role.OPTIMIZER_STATE],
        sum(saved.values()),
        kept.peak_bytes,
        _kept_for(program, saved),
    )


def _saved(kept: ScheduledStep) -> dict[int, int]:
    """Activations saved when the forward ends, with their bytes."""
    values = kept.program.values
    return {id: values[id].nbytes for id in kept.saved if values[id].role not in _HELD}


def _kept_for(program: Program, saved: Mapping[int, int]) -> tuple[tuple[str, int], ...]:
    found: Counter[str] = Counter()
    for id, nbytes in saved.items():
        found.update(
            {
                op.target: nbytes
                for op in program.ops
                if op.phase is Phase.BACKWARD and id in op.operands
            }
        )
    return tuple(found.most_common())
