"""Residual branches that run on a random part of the batch; see ``layer_skipping``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from memplan.analysis import Branch, Expected, Key, Record, Replay
from memplan.errors import MemplanError
from memplan.passes.layer_skipping.observe import CHILD, Skipping, around, look
from memplan.transforms.passes import Change, Effect, ModelContext, Pass

_BATCH_NORMS = (torch.batch_norm, nn.functional.batch_norm)


def skip_parts(rate: float, batch_norm: bool) -> Pass:
    """The pass of ``mode="subset"``."""
    return Pass(
        "skip_layers",
        Effect.STOCHASTIC,
        {"mode": "subset", "rate": rate, "batch_norm": batch_norm},
        change=partial(_change, rate, batch_norm),
    )


def _change(rate: float, batch_norm: bool, model: nn.Module, context: ModelContext) -> Change:
    del model, context
    return Change(
        modules={CHILD: SkippedParts(rate, batch_norm)},
        around=around,
        is_for_gradients=True,
        look=look,
    )


class SkippedParts(Skipping):
    """Runs residual branches on a part of the batch.

    Attributes:
        rate: share of the batch that is skipped.
        batch_norm: whether a branch may contain batch norm.
    """

    def __init__(self, rate: float, batch_norm: bool) -> None:
        super().__init__()
        self.rate, self.batch_norm = rate, batch_norm

    def find(self, model: nn.Module, record: Record, larger: Record, context: ModelContext) -> None:
        """Find the branches.

        Raises:
            MemplanError: if there are none, or they cannot run on a part of this batch.
        """
        super().find(model, record, larger, context)
        assert context.batch_size is not None
        self.num_kept(context.batch_size)
        if self.batch_norm or not model.training:
            return
        for branch in self.seen.branches.found:
            for call in (record.calls[number] for number in sorted(branch.inside)):
                if call.function in _BATCH_NORMS and "True" in call.constants:
                    name = call.key[0]
                    raise MemplanError(
                        f"there is batch norm ({name!r}) in the residual branch of "
                        f"{branch.name!r}: its statistics would be of the part of the batch that "
                        'the branch runs on. skip_layers(mode="subset", batch_norm=True) allows '
                        'that; mode="blocks" skips whole blocks instead'
                    )

    def num_kept(self, batch_size: int) -> int:
        """The number of samples of a batch that a branch runs on.

        Raises:
            MemplanError: if the batch has no such part.
        """
        skipped = round(self.rate * batch_size)
        if not 0 < skipped < batch_size:
            raise MemplanError(
                f"the batch is too small: rate={self.rate:g} of {batch_size} samples is "
                f"{'none' if not skipped else 'all'} of them"
            )
        return batch_size - skipped

    def run(self, model: nn.Module, forward: Callable[[], Any]) -> Any:
        if not (torch.is_grad_enabled() and model.training):
            return forward()
        return _Parts(model, self).of(forward)


class _Parts(Replay):
    """Runs each branch on a part of the batch, and adds the result to the same samples."""

    advice = ', or use skip_layers(mode="blocks")'

    def __init__(self, model: nn.Module, skipped: SkippedParts) -> None:
        branches = skipped.seen.branches
        super().__init__(model, branches.found, branches.expected)
        self.left_out = 0
        self.num_kept = skipped.num_kept
        self.chosen: dict[Key, torch.Tensor] = {}
        self.parts: dict[tuple[Key, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def part(self, branch: Branch, x: torch.Tensor, dim: int) -> torch.Tensor:
        if any(x is part for _, part in self.parts.values()):
            return x
        if branch.total not in self.chosen:
            count = x.shape[dim]
            self.left_out = count - self.num_kept(count)
            self.chosen[branch.total] = torch.randperm(count, device=x.device)[
                : self.num_kept(count)
            ]
        key = branch.total, id(x)
        if key not in self.parts:
            self.parts[key] = x, x.index_select(dim, self.chosen[branch.total])
        return self.parts[key][1]

    def num_left_out(self, expected: Expected) -> int:
        return self.left_out if expected.branch is not None else 0

    def total(self, branch: Branch, stream: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        chosen = self.chosen.pop(branch.total)
        self.parts = {key: pair for key, pair in self.parts.items() if key[0] != branch.total}
        scale = stream.shape[branch.dim] / len(chosen)
        kind = torch.result_type(stream, change)
        stream, change = stream.to(kind), change.to(kind)
        return torch.index_add(stream, branch.dim, chosen, change, alpha=scale)
