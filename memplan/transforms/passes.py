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
"""Takes the changed model, its arguments and its forward; runs that, and returns the output of the
model."""


class LRSchedule(Protocol):
    """A learning-rate schedule."""

    def step(self) -> object:
        """Go to the next iteration."""


Loop: TypeAlias = (
    "Callable[[nn.Module, Iterable[Any], int | None, LRSchedule | None], Iterable[Any]]"
)
"""Takes the changed model, batches, the number of batches per update (None: unspecified), and a
schedule; returns the batches that are trained on."""


@dataclass(frozen=True, slots=True)
class ModelContext:
    """The context of the model that a pass is to change.

    Attributes:
        forward: runs one forward of it without data and gradients, to be watched; returns its
            output.
        forward_with_gradients: the same with gradients, so that autograd's graph can be examined.
        forward_with_one_more: that, with a batch larger by one.
        batch_size: the first dimension of the first input that has one.
    """

    forward: Callable[[], Any]
    forward_with_gradients: Callable[[], Any]
    forward_with_one_more: Callable[[], Any]
    batch_size: int | None


@dataclass(frozen=True, slots=True)
class CallChoice:
    """The choice of one training call, of what a pass lets vary from call to call.

    Attributes:
        program: calls of equal programs share one.
        tensors: for FQNs of parameters and buffers in the program, those of the tensors that this
            call runs on, where they differ.
        unused: FQNs, in the program, of parameters that it does not use.
    """

    program: Hashable = None
    tensors: Mapping[str, str] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Change:
    """The change of a model by a pass, before its step is captured.

    The union of several passes' ``trains`` is trained, less what any of them ``freezes``, and less
    what required no gradient before.

    Attributes:
        trains: names of the model's parameters that stay trainable; None: all.
        freezes: names of parameters that do not.
        modules: children that the changed model has besides the model's own, by name.
        around: runs each forward, in training and in evaluation, and changes what it computes.
        is_for_gradients: whether ``around`` leaves forwards without gradients as they are.
        loop: chooses batches in the training loop.
        look: gets the changed model before each capture, to watch its forwards.
        choose: says what a training call of the changed model runs. True: for a call; False: for
            a look at the next one. It makes the forward that of the chosen program.
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
    """The context in which a pass offers recoveries.

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
        """A recovery of one value from a stash in its place.

        Args:
            pass_name: the pass that offers it.
            op: the captured op that makes the value.
            value: the value.
            nbytes: of the stash.
            stash: target of the op that makes the stash from the value, right after ``op``.
            restore: target of the op that restores the value from the stash.
            device: the stash's memory; on a step that is not a GPU's it makes no difference.
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
    """The fields of a factory's settings, as JSON.

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
        effect: its effect on the result of a step.
        arguments: the arguments of the factory, as JSON.
        candidates: for a pass that stands for the largest that fits the budget: passes to choose
            from, the most wanted one last.
        is_ordered: whether a candidate fits no better than those before it.
        change: its change of the model; called once, before anything is captured.
        is_optional: whether its rewrite may cost more than it frees: a plan is made with and
            without it, and the better one taken.
        is_fused: whether its step is to be fused (``Options.fused``).
        rewrite_joint: changes the joint forward-backward graph in place. New nodes carry ``val``
            and ``partitioner_tag`` in their ``meta``; ``in_place`` there offers ``InPlace`` calls.
        recoveries: offers ways to restore values.
        lowerings: calls of the ops that its recoveries add, by target.
        notes: for people, what it applies to, and what it left alone and why.
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
