"""A fixed number of blocks skipped in each step; see ``layer_skipping``.

Blocks that compute the same, each with its own parameters, are slots of one program: each call
chooses the blocks that fill the slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from random import Random
from typing import Any

import torch
from torch import nn

from memplan.analysis import (
    Block,
    Branch,
    Record,
    Replay,
    find_blocks,
    own_tensors,
    select_modules,
)
from memplan.errors import MemplanError
from memplan.passes.layer_skipping.observe import (
    CHILD,
    Skipping,
    around,
    look,
    no_blocks,
    skipping_of,
)
from memplan.transforms.data_loader import Updates
from memplan.transforms.module_hooks import standing_in
from memplan.transforms.passes import CallChoice, Change, Effect, ModelContext, Pass, arguments_of


@dataclass(frozen=True)
class _BlockSettings:
    rate: float
    at: tuple[str, ...]
    linear_decay: bool
    seed: int


def skip_blocks(rate: float, at: tuple[str, ...], linear_decay: bool, seed: int) -> Pass:
    """The pass of ``mode="blocks"``."""
    settings = _BlockSettings(rate, at, linear_decay, seed)
    arguments = {"mode": "blocks", **arguments_of(settings)}
    return Pass("skip_layers", Effect.STOCHASTIC, arguments, change=partial(_change, settings))


def _change(settings: _BlockSettings, model: nn.Module, context: ModelContext) -> Change:
    names = select_modules(model, settings.at, context.forward) if settings.at else None
    child = SkippedBlocks(settings, names)
    child.begin(model, context)
    return Change(
        modules={CHILD: child},
        around=around,
        is_for_gradients=True,
        look=look,
        choose=_choose,
    )


def _choose(model: nn.Module, is_call: bool) -> CallChoice:
    child = skipping_of(model)
    assert isinstance(child, SkippedBlocks)
    return child.choose(model, is_call)


class SkippedBlocks(Skipping):
    """Chooses the blocks of each step.

    Attributes:
        count: number of blocks that a step skips.
        kept: FQNs of the blocks in the program of the step.
        skipped: FQNs of the blocks that the last step skipped.
        drawn: ``[]``, number of choices so far; it goes into ``state_dict``.
    """

    drawn: torch.Tensor

    def __init__(self, settings: _BlockSettings, names: frozenset[str] | None) -> None:
        super().__init__()
        self.settings, self.names = settings, names
        self.count = 0
        self.kept: frozenset[str] = frozenset()
        self.skipped: tuple[str, ...] = ()
        self._updates: Updates | None = None
        self.register_buffer("drawn", torch.zeros((), dtype=torch.int64))

    def begin(self, model: nn.Module, context: ModelContext) -> None:
        """Find the blocks of a model that is to be changed, and make the first choice.

        Raises:
            MemplanError: if a step cannot skip that many of them.
        """
        self.look_at_original(model, context)
        number, first = len(self.found), self.found[0].name
        self.count = round(self.settings.rate * number)
        if not 0 < self.count < number:
            raise MemplanError(
                f"rate={self.settings.rate:g} of {number} blocks ({first}, ...) is "
                f"{'none' if not self.count else 'all'} of them"
            )
        chances = self.chances()
        if self.settings.linear_decay:
            device = next(model.parameters()).device
            for place, chance in enumerate(chances):
                scale = torch.tensor(1 / float(chance), device=device)
                self.register_buffer(_scale(place), scale, persistent=False)
        self.choose(model, is_call=False)

    @property
    def found(self) -> tuple[Block, ...]:
        """All blocks that can be skipped, in order."""
        return self.seen.blocks

    def find(self, model: nn.Module, record: Record, larger: Record, context: ModelContext) -> None:
        """Find the blocks.

        Raises:
            MemplanError: if there are none, or they differ from those before.
        """
        super().find(model, record, larger, context)
        branches = self.seen.branches.found
        blocks, blocked = find_blocks(model, record, larger, branches, self.names)
        others = [one.name for one in blocks if not one.is_identity]
        blocked |= dict.fromkeys(others, "what follows its last sum would be left out with it")
        found = tuple(one for one in blocks if one.is_identity)
        if not found or (self.names is not None and len(found) < len(self.names)):
            raise no_blocks(blocked)
        # the first look is at the original; other passes may have changed more since
        if self.seen.num_looks > 1 and _chain(found) != _chain(self.found):
            raise MemplanError(
                f"the blocks of the forward ({', '.join(_names(found))}) are others than at first, "
                "or other ones of them are alike: were some set to evaluation, or changed? Plan "
                "the model as it is, memplan.optimize(planned.original, ...)"
            )
        self.seen.num_looks += 1
        self.seen.blocks, self.seen.kinds = found, _kinds(found)
        self.seen.own = tuple(tuple(own_tensors(model, one.name)) for one in found)

    def chances(self) -> list[Fraction]:
        """The probability that each block is kept.

        Raises:
            MemplanError: if linear decay would always skip the last block.
        """
        number = len(self.found)
        if not self.settings.linear_decay:
            return [1 - Fraction(self.count, number)] * number
        slope = Fraction(2 * self.count, number * (number + 1))
        if slope * number >= 1:
            raise MemplanError(
                f"linear_decay=True with rate={self.settings.rate:g} would skip the last of "
                f"{number} blocks in every step: less than {(number + 1) / 2 / number:.2f} goes"
            )
        return [1 - slope * (place + 1) for place in range(number)]

    def run(self, model: nn.Module, forward: Callable[[], Any]) -> Any:
        if not (torch.is_grad_enabled() and model.training):
            return forward()
        with ExitStack() as stack:
            for one in self.found:
                if one.name not in self.kept:
                    block = model.get_submodule(one.name)
                    stack.enter_context(standing_in(block, one.passed_on))
            return _Scaled(model, self._scales()).of(forward)

    def _scales(self) -> Iterator[tuple[Branch, float | torch.Tensor]]:
        """The factors of the branches of kept blocks."""
        for number, one in enumerate(self.found):
            scale: float | torch.Tensor = len(self.found) / (len(self.found) - self.count)
            if self.settings.linear_decay:
                scale = self.get_buffer(_scale(number))
            if one.name in self.kept:
                yield from ((branch, scale) for branch in one.branches)

    def choose(self, model: nn.Module, is_call: bool) -> CallChoice:
        """The blocks of the next step, and the tensors that fill the slots of its program.

        While gradients wait for an update, the blocks are those of the last call.
        """
        if not model.training:
            return CallChoice()
        number = int(self.drawn)
        named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        named |= model.named_buffers(remove_duplicate=False)
        if is_call:
            if self._updates is not None and self._updates.are_due():
                number -= 1
            else:
                self.drawn += 1
                self._fill_gradients(named)
            self._updates = Updates(model.parameters())
        groups = self._groups(named)
        random = Random(f"skip_layers {self.settings.seed} {number}")
        chosen = _drawn(random, groups, self.chances())
        self.kept, tensors = self._slots(groups, chosen)
        names = _names(self.found)
        if is_call:
            self.skipped = tuple(n for place, n in enumerate(names) if place not in chosen)
        unused = {
            own
            for name, mine in zip(names, self.seen.own, strict=True)
            if name not in self.kept
            for own in mine
            if isinstance(named[own], nn.Parameter)
        }
        return CallChoice(tuple(sorted(self.kept)), tensors, frozenset(unused))

    def _groups(self, named: Mapping[str, torch.Tensor]) -> list[list[int]]:
        """Runs of blocks that compute the same and are trained alike, by number."""
        groups: list[list[int]] = []
        last: object = None
        for number, names in enumerate(self.seen.own):
            trained = tuple(named[name].requires_grad for name in names)
            like = self.seen.kinds[number], trained
            if self.found[number].follows and like == last:
                groups[-1].append(number)
            else:
                groups.append([number])
            last = like
        return groups

    def _slots(
        self, groups: Sequence[Sequence[int]], chosen: frozenset[int]
    ) -> tuple[frozenset[str], dict[str, str]]:
        """The blocks in the program, and the name that replaces each tensor's in it.

        It holds the first blocks of each group; the chosen ones take their places, in order.
        """
        kept: list[str] = []
        tensors: dict[str, str] = {}
        for group in groups:
            mine = [number for number in group if number in chosen]
            others = [number for number in group if number not in chosen]
            kept += [self.found[number].name for number in group[: len(mine)]]
            for place, number in zip(group, [*mine, *others], strict=True):
                if place != number:
                    tensors |= self._renamed(place, number)
        return frozenset(kept), tensors

    def _renamed(self, place: int, number: int) -> dict[str, str]:
        names = dict(zip(self.seen.own[place], self.seen.own[number], strict=True))
        if self.settings.linear_decay:
            names[f"{CHILD}.{_scale(place)}"] = f"{CHILD}.{_scale(number)}"
        return names

    def _fill_gradients(self, named: Mapping[str, torch.Tensor]) -> None:
        """Give every block gradients if some persist between updates: there is one program."""
        tensors = [named[name] for names in self.seen.own for name in names]
        trained = [one for one in tensors if one.requires_grad]
        if any(one.grad is not None for one in trained):
            for one in trained:
                if one.grad is None:
                    one.grad = torch.zeros_like(one)


def _scale(number: int) -> str:
    return f"scale_{number}"


def _names(blocks: Sequence[Block]) -> tuple[str, ...]:
    return tuple(one.name for one in blocks)


def _chain(blocks: Sequence[Block]) -> tuple[object, ...]:
    return _names(blocks), _kinds(blocks), tuple(one.follows for one in blocks)


def _kinds(blocks: Sequence[Block]) -> tuple[int, ...]:
    """For each block, the first that computes the same."""
    kinds = [one.kind for one in blocks]
    return tuple(kinds.index(kind) for kind in kinds)


def _drawn(
    random: Random, groups: Sequence[Sequence[int]], chances: Sequence[Fraction]
) -> frozenset[int]:
    """Draw a fixed number of blocks by their chances: Madow's systematic sampling, 1949.

    Within a group the order is random. The number of each group that is kept depends on one number
    drawn, and takes at most as many values as there are groups.
    """
    reached = Fraction(random.random())
    chosen = []
    for group in groups:
        for number in sorted(group, key=lambda _: random.random()):
            before, reached = reached, reached + chances[number]
            if math.floor(reached) > math.floor(before):
                chosen.append(number)
    return frozenset(chosen)


class _Scaled(Replay):
    """Scales the changes that branches add."""

    def __init__(
        self, model: nn.Module, scales: Iterable[tuple[Branch, float | torch.Tensor]]
    ) -> None:
        by_branch = [(branch, scale) for branch, scale in scales]
        super().__init__(model, [branch for branch, _ in by_branch])
        self.entries = {}
        self.scales = {branch.total: scale for branch, scale in by_branch}

    def total(self, branch: Branch, stream: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        scale = self.scales[branch.total]
        if isinstance(scale, torch.Tensor):
            return stream + change * scale
        return torch.add(stream, change, alpha=scale)
