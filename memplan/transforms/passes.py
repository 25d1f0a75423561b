"""A pass: a frozen value, made by a factory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from memplan.errors import MemplanError
from memplan.ir.program import Memory, Op, Phase, Role, Value
from memplan.ir.schedule import Effect, Recovery

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from torch import fx, nn

    from memplan.capture import Captured, Lowering
    from memplan.capture.sample import Sample

__all__ = [
    "Around",
    "CallChoice",
    "Change",
    "Effect",
    "LRSchedule",
    "Loop",
    "ModelContext",
    "Pass",
    "RecoveryContext",
]

Around: TypeAlias = "Callable[[nn.Module, Sample, Callable[[], Any]], Any]"
"""Takes the changed model, what it is called with, and its forward; runs that, and returns what the
model is to return."""


class LRSchedule(Protocol):
    """A learning-rate schedule."""

    def step(self) -> object:
        """Go to the next iteration."""


Loop: TypeAlias = (
    "Callable[[nn.Module, Iterable[Any], int | None, LRSchedule | None], Iterable[Any]]"
)
"""Takes the changed model, batches, how many of them one update is made of (None: it was not said),
and a schedule; returns the batches that are trained on."""


@dataclass(frozen=True, slots=True)
class ModelContext:
    """What a pass is told of the model that it is to change.

    Attributes:
        forward: runs one forward of it without data and gradients, for whoever watches; returns
            its output.
        forward_with_gradients: the same with gradients, so that autograd's graph can be looked at.
        forward_with_one_more: that with a batch that is larger by one.
        batch_size: the first dimension of the first input that has one.
    """

    forward: Callable[[], Any]
    forward_with_gradients: Callable[[], Any]
    forward_with_one_more: Callable[[], Any]
    batch_size: int | None


@dataclass(frozen=True, slots=True)
class CallChoice:
    """What one call that trains runs, of what a pass lets vary from call to call.

    Attributes:
        program: calls of equal programs share one.
        tensors: for FQNs of parameters and buffers in the program, those of the tensors that it
            runs on in this call, where these are others.
        unused: FQNs, in the program, of parameters that have no part in it.
    """

    program: Hashable = None
    tensors: Mapping[str, str] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Change:
    """What a pass makes of a model before its step is captured.

    Of several passes' ``trains`` the union is trained, less what any of them ``freezes``, and less
    what required no gradient before.

    Attributes:
        trains: names of the model's parameters that stay trainable; None: all.
        freezes: names of parameters that do not.
        modules: children that the changed model has besides the model's own, by name.
        around: runs each forward, in training and in evaluation, and changes what it computes.
        is_for_gradients: whether ``around`` leaves forwards without gradients as they are.
        loop: chooses batches in the training loop.
        look: told of the changed model before each capture, whose forwards are then watched.
        choose: says for the changed model what a call that trains runs. True: for a call; False:
            for a look at the next one. It sees to it that the forward is of that program.
    """

    trains: frozenset[str] | None = None
    freezes: frozenset[str] = frozenset()
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    around: Around | None = None
    is_for_gradients: bool = False
    loop: Loop | None = None
    look: Callable[[nn.Module, ModelContext], None] | None = None
    choose: Callable[[nn.Module, bool], CallChoice] | None = None


@dataclass(frozen=True, slots=True)
class RecoveryContext:
    """What a pass is told when it offers recoveries.

    Attributes:
        op_ids: ids for new ops.
        value_ids: ids for new values.
    """

    op_ids: Iterator[int]
    value_ids: Iterator[int]

    def stash(
        self,
        pass_name: str,
        op: Op,
        value: int,
        nbytes: int,
        *,
        stash: str,
        restore: str,
        device: Memory = Memory.DEVICE,
        exactness: Effect = Effect.EXACT,
        tolerance: float = 0.0,
    ) -> Recovery:
        """A recovery of one value from something that is stashed in its place.

        Args:
            pass_name: the pass that offers it.
            op: the captured op that makes the value.
            value: the value.
            nbytes: of what is stashed.
            stash: target of the op that makes what is stashed from the value, right after ``op``.
            restore: target of the op that makes the value from what was stashed.
            device: where it is stashed; on a step that is not a GPU's it makes no difference.
            exactness: as in ``Recovery``.
            tolerance: as in ``Recovery``; for what is not exact, above 0.

        Raises:
            MemplanError: if a recovery that rounds does not say how much it may.
        """
        if exactness is not Effect.EXACT and not tolerance > 0:
            raise MemplanError(
                f"the pass {pass_name} offers a recovery that is not exact; say how large the "
                "relative error may be: stash(..., tolerance=1e-2)"
            )
        which = str(op.results.index(value)) if len(op.results) > 1 else ""
        stashed, made_by = next(self.value_ids), next(self.op_ids)
        to = op.variant(made_by, stash, [value], [stashed], phase=Phase.FORWARD, settings=which)
        back = op.variant(next(self.op_ids), restore, [stashed], [value], settings=which)
        kept = Value(stashed, nbytes, Role.KEPT, made_by, op.module, device=device)
        return Recovery(pass_name, (value,), back, to, (kept,), exactness, tolerance=tolerance)


def arguments_of(settings: DataclassInstance) -> dict[str, object]:
    """The fields of what a factory was called with, as JSON.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Settings:
    ...     rank: int
    ...     targets: tuple[str, ...]
    >>> arguments_of(Settings(8, ("linear",)))
    {'rank': 8, 'targets': ['linear']}
    """
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {name: list(one) if isinstance(one, tuple) else one for name, one in values.items()}


@dataclass(frozen=True)
class Pass:
    """One memory technique.

    A pass only offers; the planner chooses.

    Attributes:
        name: the name of its factory, a key of ``memplan.passes.PASSES``.
        effect: what it does to the result of a step.
        arguments: what the factory was called with, as JSON.
        candidates: for a pass that stands for the largest that fits the budget: passes to choose
            from, the one that is wanted most at the end.
        is_ordered: whether a candidate fits no better than those before it.
        change: says what it makes of the model; once, before anything is captured.
        is_optional: whether its rewrite may cost more than it frees: a plan is made with and
            without it, and the better one taken.
        is_fused: whether its step is to be fused (``Options.fused``).
        rewrite_joint: changes the joint forward-backward graph in place. New nodes carry ``val``
            and ``partitioner_tag`` in their ``meta``; ``in_place`` there offers ``InPlace`` calls.
        recoveries: offers ways to get values back.
        lowerings: by target, how the ops that its recoveries add are called.
        notes: what it found, and what it left alone and why, for people.
    """

    name: str
    effect: Effect
    arguments: Mapping[str, object] = field(default_factory=dict)
    candidates: Callable[[nn.Module, ModelContext], tuple[Pass, ...]] | None = None
    is_ordered: bool = True
    change: Callable[[nn.Module, ModelContext], Change] | None = None
    is_optional: bool = False
    is_fused: bool = False
    rewrite_joint: Callable[[fx.Graph], None] | None = None
    recoveries: Callable[[Captured, RecoveryContext], tuple[Recovery, ...]] | None = None
    lowerings: Mapping[str, Lowering] = field(default_factory=dict)
    notes: Callable[[Captured], tuple[str, ...]] | None = None
