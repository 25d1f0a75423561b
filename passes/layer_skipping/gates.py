"""Blocks that process a part of the batch, chosen by small gates; see ``layer_skipping``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import nn
from torch.nn import functional

from memplan.analysis import Block, Record, find_blocks, flops_of, select_modules
from memplan.errors import CaptureError, MemplanError
from memplan.passes.layer_skipping.observe import CHILD, Skipping, around, look, no_blocks
from memplan.transforms.module_hooks import Through, going_through, with_loss
from memplan.transforms.passes import Change, Effect, ModelContext, Pass, arguments_of

if TYPE_CHECKING:
    from memplan.runtime.module import PlannedModule

Gate = Literal["linear", "recurrent"]
GATES: Final = ("linear", "recurrent")

_WIDTH = 10
_MOMENTUM = 0.1
"""Weight of a batch's borders in their running means."""


@dataclass(frozen=True)
class _GateSettings:
    capacity: float
    at: tuple[str, ...]
    gate: Gate
    cost: float


def skip_by_gates(capacity: float, at: tuple[str, ...], gate: Gate, cost: float) -> Pass:
    """The pass of ``mode="gated"``."""
    settings = _GateSettings(capacity, at, gate, cost)
    arguments = {"mode": "gated", **arguments_of(settings)}
    return Pass("skip_layers", Effect.APPROXIMATE, arguments, change=partial(_change, settings))


def _change(settings: _GateSettings, model: nn.Module, context: ModelContext) -> Change:
    names = select_modules(model, settings.at, context.forward) if settings.at else None
    child = GatedBlocks(settings, names)
    with torch.random.fork_rng():
        child.make_gates(model, context)
    return Change(modules={CHILD: child}, around=around, look=look)


class GatedBlocks(Skipping):
    """Gates, one for each block.

    Attributes:
        names: FQNs of the blocks.
        gates: one gate for each block.
        borders: ``[blocks]``, running means of the scores between samples that ran and those that
            did not. Without a batch to rank it in, a sample runs if its score is above.
        rates: ``[blocks]``, the share of samples that ran in the last call without gradients.
        flops: flops of each block's forward, for one sample.
        total_flops: flops of the whole forward, for one sample.
    """

    borders: torch.Tensor
    rates: torch.Tensor

    def __init__(self, settings: _GateSettings, wanted: frozenset[str] | None) -> None:
        super().__init__()
        self.settings, self.wanted = settings, wanted
        self.names: tuple[str, ...] = ()
        self.flops: tuple[float, ...] = ()
        self.total_flops = 0.0

    def make_gates(self, model: nn.Module, context: ModelContext) -> None:
        """Create a gate for each block of a model that has none.

        Raises:
            MemplanError: if there is no block, or the batch is too small.
        """
        self.look_at_original(model, context)
        blocks = self.seen.blocks
        self.names = tuple(one.name for one in blocks)
        assert context.batch_size is not None
        counted = flops_of(model, context.forward)
        self.total_flops = counted.get("", 0) / context.batch_size
        self.flops = tuple(counted.get(name, 0) / context.batch_size for name in self.names)
        device = next(model.parameters()).device
        widths = [width_of(one.shape, one.dims[one.stream]) for one in blocks]
        self.gates = nn.ModuleList(
            nn.Linear(width, _WIDTH if self.settings.gate == "recurrent" else 1) for width in widths
        ).to(device)
        if self.settings.gate == "recurrent":
            self.cell = nn.Linear(2 * _WIDTH, 4 * _WIDTH).to(device)
            self.last = nn.Linear(_WIDTH, 1).to(device)
        self.register_buffer("borders", torch.zeros(len(self.names), device=device))
        rates = torch.ones(len(self.names), device=device)
        self.register_buffer("rates", rates, persistent=False)

    def find(self, model: nn.Module, record: Record, larger: Record, context: ModelContext) -> None:
        """Find the blocks, and check that they are those of the gates.

        Raises:
            MemplanError: if they are not, or the batch is too small.
        """
        super().find(model, record, larger, context)
        branches = self.seen.branches.found
        found, blocked = find_blocks(model, record, larger, branches, self.wanted)
        if not found or (self.wanted is not None and len(found) < len(self.wanted)):
            raise no_blocks(blocked)
        before = self.seen.blocks
        if before and [one.name for one in found] != [one.name for one in before]:
            raise MemplanError(
                "the blocks of the forward are others than when the model was planned: plan it "
                "again, memplan.optimize(planned.original, ...)"
            )
        assert context.batch_size is not None
        self.num_kept(context.batch_size)
        # arguments that were passed at another time may be passed again
        nothing: tuple[dict[int, int], frozenset[int]] = {}, frozenset()
        dims = [(dict(one.dims), one.tensors) for one in before] or [nothing] * len(found)
        self.seen.blocks = tuple(
            replace(one, dims={**known, **one.dims}, tensors=one.tensors | tensors)
            for one, (known, tensors) in zip(found, dims, strict=True)
        )

    def num_kept(self, batch_size: int) -> int:
        """The number of samples of a batch that go through a block in training.

        Raises:
            MemplanError: if there would be none.
        """
        kept = round(self.settings.capacity * batch_size)
        if not kept:
            raise MemplanError(
                f"the batch is too small: capacity={self.settings.capacity:g} of {batch_size} "
                "samples is none of them"
            )
        return kept

    def run(self, model: nn.Module, forward: Callable[[], Any]) -> Any:
        scores = _Scores(self)
        through = {
            name: _Gated(self, scores, number, block)
            for number, (name, block) in enumerate(zip(self.names, self.seen.blocks, strict=True))
        }
        with going_through(model, through):
            output = forward()
        if not torch.is_grad_enabled():
            return output
        if model.training:
            borders = torch.stack(scores.borders).to(self.borders)
            self.borders.copy_(torch.lerp(self.borders, borders, _MOMENTUM))
        if not (self.settings.cost and model.training):
            return output
        cost = self.settings.cost * torch.stack(scores.losses).mean()
        added: list[torch.Tensor] = []

        def with_cost(loss: torch.Tensor) -> torch.Tensor:
            added.append(loss)
            return loss + cost.to(loss.dtype)

        result = with_loss(output, with_cost)
        if len(added) != 1:
            raise MemplanError(
                f"the gates have a loss of their own, which is added to the model's, and "
                f"{type(model).__name__} returns {len(added) or 'no'} scalars (tensors of shape "
                "[]): memplan.WithLoss(model, loss_fn) adds one, cost=0 leaves the gates' out"
            )
        return result


class _Scores:
    """The scores of one forward: the preference of each sample for each block.

    Attributes:
        losses: losses of the gates so far: cross entropy with the choices.
        borders: borders of the blocks so far: between chosen samples and the rest.
    """

    def __init__(self, gated: GatedBlocks) -> None:
        self.gated = gated
        self.losses: list[torch.Tensor] = []
        self.borders: list[torch.Tensor] = []
        self.state: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, number: int, stream: torch.Tensor, dim: int) -> torch.Tensor:
        """``[batch]``, higher for samples that should go through a block."""
        gate = self.gated.gates[number]
        pooled = pool(stream.detach(), dim).to(next(gate.parameters()).dtype)
        features: torch.Tensor = gate(pooled)
        if self.gated.settings.gate == "recurrent":
            self.state = _lstm(self.gated.cell, features, self.state)
            features = self.gated.last(self.state[0])
        return features.squeeze(1).float()


def _lstm(
    cell: nn.Module, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden state and memory after one more input."""
    hidden, memory = state or (torch.zeros_like(x), torch.zeros_like(x))
    given, forget, update, out = cell(torch.cat([x, hidden], 1)).chunk(4, 1)
    memory = forget.sigmoid() * memory + given.sigmoid() * update.tanh()
    return out.sigmoid() * memory.tanh(), memory


@dataclass
class _Gated(Through):
    """Sends a part of the batch through one block."""

    gated: GatedBlocks
    scores: _Scores
    number: int
    block: Block

    def given(self, leaves: list[Any]) -> list[Any]:
        self.check_arguments(leaves)
        dim = self.block.dims[self.block.stream]
        self.stream = leaves[self.block.stream]
        scores = self.scores.of(self.number, self.stream, dim)
        if torch.is_grad_enabled():
            count = self.gated.num_kept(len(scores))
            values, order = scores.detach().sort(descending=True)
            self.chosen = order[:count]
            below = values[count] if count < len(values) else values[-1] - 1
            self.scores.borders.append((values[count - 1] + below) / 2)
            wanted = torch.zeros_like(scores).index_fill(0, self.chosen, 1.0)
            loss = functional.binary_cross_entropy_with_logits(scores, wanted)
            self.scores.losses.append(loss)
            self.open = scores.sigmoid().index_select(0, self.chosen)
        else:
            border = self.gated.borders[self.number]
            runs = (scores > border) | (self.gated.settings.capacity == 1)
            self.chosen = runs.nonzero().flatten()
            self.gated.rates[self.number] = max(len(self.chosen), 1) / len(scores)
        # many reshapes fail on an empty batch: then the first sample runs, for nothing
        part = self.chosen if len(self.chosen) else self.chosen.new_zeros(1)
        for place, own in self.block.dims.items():
            if isinstance(leaves[place], torch.Tensor):
                leaves[place] = leaves[place].index_select(own, part)
        self.part = leaves[self.block.stream]
        return leaves

    def returned(self, leaves: list[Any]) -> list[Any]:
        dim, made = self.block.dims[self.block.stream], leaves[self.block.result]
        if made.shape[dim] != self.part.shape[dim]:
            raise CaptureError(f"{self.block.name!r} returns another batch than it is given")
        made = made.narrow(dim, 0, len(self.chosen))
        kind = torch.result_type(self.stream, made)
        self.stream, self.part, made = (x.to(kind) for x in (self.stream, self.part, made))
        if torch.is_grad_enabled():
            # one, with the gate's gradient: straight-through
            weight = (1 + self.open - self.open.detach()).to(made.dtype)
            shape = [-1 if place == dim else 1 for place in range(made.dim())]
            made = torch.lerp(self.part, made, weight.view(shape))
        leaves[self.block.result] = self.stream.index_copy(dim, self.chosen, made)
        del self.stream, self.part, self.chosen  # or an evaluation would hold those of all blocks
        return leaves

    def check_arguments(self, leaves: list[Any]) -> None:
        """Refuse tensors that may or may not be of the batch.

        Raises:
            CaptureError: if there are any.
        """
        places = {place for place, one in enumerate(leaves) if isinstance(one, torch.Tensor)}
        if not places <= self.block.tensors:
            raise CaptureError(
                f"{self.block.name!r} is given a tensor that it was not given when the model was "
                "planned (a mask?): plan it with a batch that has all of them"
            )


def pool(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``[batch, features]``: means over all other dimensions; ``dim`` is the batch dimension.

    Features are in the last dimension, or, for images (4 dimensions and more), in the second.
    """
    x = x.movedim(dim, 0)
    if x.dim() > 3:
        return x.flatten(2).mean(2)
    return x.mean(1) if x.dim() == 3 else x


def width_of(shape: torch.Size, dim: int) -> int:
    """The number of features that ``pool`` returns."""
    rest = [size for place, size in enumerate(shape) if place != dim]
    return rest[0] if len(shape) > 3 else rest[-1]


def skipped_flops(planned: PlannedModule) -> float:
    """The share of the forward's flops that the last call without gradients skipped.

    Returns:
        A share, from 0 to 1.

    Raises:
        MemplanError: if the module has no gates.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.branch = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        ...     def forward(self, x):
        ...         return x + self.branch(x)
        >>> blocks = nn.Sequential(*(Block() for _ in range(4)))
        >>> model = memplan.WithLoss(blocks, nn.functional.mse_loss)
        >>> batch = torch.randn(64, 32), torch.randn(64, 32)
        >>> one = memplan.passes.skip_layers("gated", capacity=0.5)
        >>> planned = memplan.optimize(model, batch, passes=[one]).eval()
        >>> with torch.no_grad():
        ...     _ = planned(*batch)
        >>> 0 <= memplan.passes.skipped_flops(planned) <= 1
        True
    """
    for name, child in planned.named_children():
        if name == CHILD and isinstance(child, GatedBlocks):
            pairs = zip(child.rates.tolist(), child.flops, strict=True)
            saved = sum((1 - rate) * flops for rate, flops in pairs)
            return float(saved / child.total_flops) if child.total_flops else 0.0
    raise MemplanError('the module has no gates; plan it with skip_layers(mode="gated")')
