"""A child module that sees a forward before it is captured: what passes skip is found in that."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from memplan.analysis import Block, Branches, Record, find_branches
from memplan.capture.sample import Sample
from memplan.errors import MemplanError
from memplan.transforms.passes import ModelContext

CHILD = "layer_skipping"


@dataclass
class Seen:
    """What was seen of a forward. An object of its own: a capture puts attributes back.

    Attributes:
        branches: of the forward that was looked at last.
        blocks: of that.
        own: FQNs of the parameters and buffers of each block.
        kinds: for each block, the first that computes the same.
        num_looks: how often blocks were found.
    """

    branches: Branches = field(default_factory=lambda: Branches(()))
    blocks: tuple[Block, ...] = ()
    own: tuple[tuple[str, ...], ...] = ()
    kinds: tuple[int, ...] = ()
    num_looks: int = 0
    watching: int | None = None
    record: Record | None = None

    def __deepcopy__(self, memo: object) -> Seen:
        del memo  # what it holds is never changed
        return replace(self)


class Skipping(nn.Module, ABC):
    """What is skipped of a model; a subclass says what that is.

    Attributes:
        seen: of the model's forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()

    def around(self, model: nn.Module, forward: Callable[[], Any]) -> Any:
        """A forward, as it is to run; if it is watched, as it is."""
        if self.seen.watching != threading.get_ident():
            return self.run(model, forward)
        self.seen.record = Record(model)
        return self.seen.record.of(forward)

    @abstractmethod
    def run(self, model: nn.Module, forward: Callable[[], Any]) -> Any:
        """A forward of which something is skipped."""

    def look(self, model: nn.Module, context: ModelContext) -> None:
        """Look at the changed model's forward before it is captured."""
        first = self._watched(context.forward_with_gradients)
        self.find(model, first, self._watched(_larger(context)), context)

    def look_at_original(self, model: nn.Module, context: ModelContext) -> None:
        """Look at the forward of the model that is to be changed."""
        first, larger = Record(model), Record(model)
        first.of(context.forward_with_gradients)
        larger.of(_larger(context))
        self.find(model, first, larger, context)

    def find(self, model: nn.Module, record: Record, larger: Record, context: ModelContext) -> None:
        """Find the branches.

        Raises:
            MemplanError: if there are none, naming what was looked for.
        """
        if context.batch_size is None:
            raise MemplanError("skip_layers skips a part of a batch, and no input has a dimension")
        branches = find_branches(model, record, larger, context.batch_size)
        if not branches.found:
            raise MemplanError(
                "skip_layers found no residual branch: a sum x + f(x) of two tensors of one shape, "
                "of which one is computed from the other by way of a parameter"
                + _reasons(branches.blocked)
            )
        self.seen.branches = branches

    def _watched(self, forward: Callable[[], Any]) -> Record:
        self.seen.watching = threading.get_ident()
        try:
            forward()
            record = self.seen.record
        finally:
            self.seen.watching = self.seen.record = None
        assert record is not None
        return record


def skipping_of(model: nn.Module) -> Skipping:
    """What is skipped of a changed model."""
    child = model.get_submodule(CHILD)
    assert isinstance(child, Skipping)
    return child


def around(model: nn.Module, sample: Sample, forward: Callable[[], Any]) -> Any:
    """``Change.around``: a forward of which something is skipped."""
    del sample
    return skipping_of(model).around(model, forward)


def look(model: nn.Module, context: ModelContext) -> None:
    """``Change.look``: what can be skipped is found before a capture."""
    skipping_of(model).look(model, context)


def _larger(context: ModelContext) -> Callable[[], Any]:
    def forward() -> Any:
        try:
            return context.forward_with_one_more()
        except MemplanError:
            raise
        except Exception as error:
            raise MemplanError(
                "skip_layers runs the forward once more, without data, with a batch that is larger "
                f"by one, to see what depends on its size, and that fails: {error}"
            ) from error

    return forward


def no_blocks(blocked: Mapping[str, str]) -> MemplanError:
    """There are no blocks, or not those that were named."""
    return MemplanError(
        "skip_layers found no blocks to skip, or not all that at= names: a block is a module of "
        "which there are several of a type in a list of modules, called once, with residual "
        "branches x + f(x) inside, and returns a tensor of the shape that it is given"
        + _reasons(blocked)
    )


def _reasons(blocked: Mapping[str, str]) -> str:
    found = [f"{name or 'the model'}: {why}" for name, why in blocked.items()]
    more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
    return f". What is none, and why: {'; '.join(found[:4])}{more}" if found else ""
