"""What a pass is: a frozen value, made by a factory in ``memplan.passes``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from memplan.schedule import Effect, Recovery

if TYPE_CHECKING:
    from torch import fx, nn

    from memplan.capture import Captured
    from memplan.sample import Sample

__all__ = [
    "Around",
    "Change",
    "Choice",
    "Effect",
    "InPlace",
    "Loop",
    "ModelContext",
    "Pass",
    "RecoveryContext",
    "Schedule",
]

Around: TypeAlias = "Callable[[nn.Module, Sample, Callable[[], Any]], Any]"
"""Takes the changed model, what it is called with, and its forward; runs that, and returns what the
model is to return."""


class Schedule(Protocol):
    """A learning-rate schedule."""

    def step(self) -> object:
        """Go to the next iteration."""


Loop: TypeAlias = "Callable[[nn.Module, Iterable[Any], int | None, Schedule | None], Iterable[Any]]"
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
class Choice:
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
    choose: Callable[[nn.Module, bool], Choice] | None = None


@dataclass(frozen=True, slots=True)
class RecoveryContext:
    """What a pass is told when it offers recoveries.

    Attributes:
        first_op: the first id that a new op may have.
        first_value: the first id that a new value may have.
    """

    first_op: int
    first_value: int


@dataclass(frozen=True, slots=True)
class InPlace:
    """A call that writes an op's result into the memory of one of its operands, bit for bit.

    In a node's ``meta["in_place"]`` these stand under the positions of the arguments that they
    write over. Which of them are possible (same layout, memory of its own) is found by the reader,
    and where one is worth it by the planner.

    Attributes:
        target: called with the op's arguments.
        out: the keyword that takes the argument to write over; "" if the target does so by itself.
    """

    target: Callable[..., object]
    out: str = ""


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
    notes: Callable[[Captured], tuple[str, ...]] | None = None
