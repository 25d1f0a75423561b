"""A forward run again as it was recorded, but for its residual branches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from memplan.analysis.branches import Branch
from memplan.analysis.calls import Key, Scopes
from memplan.errors import CaptureError
from memplan.torch_internals import flatten, unflatten


class Replay(Scopes):
    """Inside, branches read other tensors, and their sums are other ones.

    Subclasses say which.

    Args:
        model: whose forward.
        branches: of it.
    """

    def __init__(self, model: nn.Module, branches: Iterable[Branch]) -> None:
        super().__init__(model)
        self.totals = {one.total: one for one in branches}
        self.entries = {
            key: (one, found) for one in self.totals.values() for key, found in one.entries.items()
        }

    def part(self, branch: Branch, x: torch.Tensor, dim: int) -> torch.Tensor:
        """What a branch reads in the place of x, whose dimension of the batch this is."""
        del branch, dim
        return x

    def total(self, branch: Branch, stream: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """The sum of a stream and what a branch makes of it."""
        del branch
        return stream + change

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Watch, and see that all sums were there.

        Raises:
            CaptureError: if they were not.
        """
        self._left = set(self.totals)
        with self.watching():
            yield
        if self._left:
            raise _differs(next(iter(self._left)))

    def called(
        self, key: Key, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if key in self.totals:
            self._left.discard(key)
            branch = self.totals[key]
            if len(args) != 2 or kwargs:
                raise _differs(key)
            total = self.total(branch, args[branch.stream], args[1 - branch.stream])
            is_in_place = function == torch.Tensor.add_ and args[0].shape == total.shape
            return args[0].copy_(total) if is_in_place else total
        if key in self.entries:
            branch, entries = self.entries[key]
            leaves, spec = flatten((args, kwargs))
            for one in entries:
                if one.place >= len(leaves):
                    raise _differs(key)
                # a mask, for one, is not made where it would hide nothing
                if isinstance(leaves[one.place], torch.Tensor):
                    leaves[one.place] = self.part(branch, leaves[one.place], one.dim)
            args, kwargs = unflatten(leaves, spec)
        return function(*args, **kwargs)


def _differs(key: Key) -> CaptureError:
    return CaptureError(
        f"the forward of {key[0]!r} calls other functions when it is captured than when it was "
        "looked at for residual branches, so that its layers cannot be skipped"
    )
