"""Replay of a recorded forward, with other residual branches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from memplan.analysis.branches import Branch, Expected
from memplan.analysis.calls import Key, Scopes, numbers_of
from memplan.errors import CaptureError
from memplan.torch_internals import flatten, unflatten


class Replay(Scopes):
    """Runs a forward in which branches read other tensors, and have other sums.

    Subclasses say which.

    Args:
        model: the model.
        branches: of its forward.
        expected: arguments of calls with the whole batch.
    """

    advice = ""
    """Words on what else can be done where the forward is refused."""

    def __init__(
        self, model: nn.Module, branches: Iterable[Branch], expected: Iterable[Expected] = ()
    ) -> None:
        super().__init__(model)
        self.totals = {one.total: one for one in branches}
        self.entries = {
            key: (one, found) for one in self.totals.values() for key, found in one.entries.items()
        }
        self.expected = {one.key: one for one in expected}
        self._left: set[Key] = set()
        self._stale: list[torch.Tensor] = []

    def part(self, branch: Branch, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The tensor that a branch reads instead of x, whose batch dimension is ``dim``."""
        del branch, dim
        return x

    def total(self, branch: Branch, stream: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """The sum of a stream and a branch's change."""
        del branch
        return stream + change

    def num_left_out(self, expected: Expected) -> int:
        """The number of samples that a call's batch lacks."""
        del expected
        return 0

    def of(self, forward: Callable[[], Any]) -> Any:
        """Run a forward; return its output.

        Raises:
            CaptureError: if it is not the recorded one.
        """
        self._left = set(self.totals)
        with self.watching():
            output = forward()
        if self._left:
            raise _differs(next(iter(self._left)))
        self._check_stale(flatten(output)[0], "the model")
        return output

    def called(
        self, key: Key, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        leaves, spec = flatten((args, kwargs))
        self._check_stale(leaves, key[0])
        if key in self.totals:
            return self._summed(key, function, args, kwargs)
        if key in self.entries:
            branch, entries = self.entries[key]
            for one in entries:
                if one.place >= len(leaves):
                    raise _differs(key)
                # a mask, for one, is not made where it would hide nothing
                if isinstance(leaves[one.place], torch.Tensor):
                    leaves[one.place] = self.part(branch, leaves[one.place], one.dim)
            args, kwargs = unflatten(leaves, spec)
        if key in self.expected:
            self._check(self.expected[key], leaves)
        return function(*args, **kwargs)

    def _summed(
        self, key: Key, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._left.discard(key)
        branch = self.totals[key]
        if len(args) != 2 or kwargs:
            raise _differs(key)
        total = self.total(branch, args[branch.stream], args[1 - branch.stream])
        if function != torch.Tensor.add_:
            return total
        if args[0].shape == total.shape:
            return args[0].copy_(total)
        self._stale.append(args[0])  # `out += x` goes on with what is returned
        return total

    def _check(self, expected: Expected, leaves: list[Any]) -> None:
        missing = self.num_left_out(expected)
        shapes = [tuple(one.shape) for one in leaves if isinstance(one, torch.Tensor)]
        wanted = expected.shapes(missing)
        if len(shapes) == len(wanted) and (
            shapes != wanted or numbers_of(leaves) != expected.numbers(missing)
        ):
            raise CaptureError(
                f"a size that depends on the batch is used in {expected.key[0]!r} both inside a "
                "residual branch and outside: ask for it where it is used (x.shape of what is "
                f"computed there){self.advice}"
            )

    def _check_stale(self, leaves: list[Any], name: str) -> None:
        if any(leaf is one for leaf in leaves for one in self._stale):
            raise CaptureError(
                f"{name!r} adds the stream to a branch in place, and goes on with the tensor that "
                "it has written: write x + f(x), or out += x"
            )


def _differs(key: Key) -> CaptureError:
    return CaptureError(
        f"the forward of {key[0]!r} calls other functions when it is captured than when it was "
        "looked at for residual branches, so that its layers cannot be skipped"
    )
