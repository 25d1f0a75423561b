"""A child module that sees a forward before it is captured, to find what passes can skip."""

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
    """Observations of a forward. An object of its own: a capture restores attributes.

    Attributes:
        branches: branches of the last forward observed.
        blocks: its blocks.
        own: FQNs of the parameters and buffers of each block.
        kinds: for each block, the first that computes the same.
        num_looks: number of times that blocks were found.
    """

    branches: Branches = field(default_factory=lambda: Branches(()))
    blocks: tuple[Block, ...] = ()
    own: tuple[tuple[str, ...], ...] = ()
    kinds: tuple[int, ...] = ()
    num_looks: int = 0
    watching: int | None = None
    record: Record | None = None

    def __deepcopy__(self, memo: object) -> Seen:
        del memo  # its contents are never changed
        return replace(self)


class Skipping(nn.Module, ABC):
    """Base of the modules that skip parts of a model.

    Attributes:
        seen: observations of the model's forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()

    def around(self, model: nn.Module, forward: Callable[[], Any]) -> Any:
        """Run a forward with skipping; if it is watched, run it as it is."""
        if self.seen.watching != threading.get_ident():
            return self.run(model, forward)
        self.seen.record = Record(model)
        return self.seen.record.of(forward)

    @abstractmethod
    def run(self, model: nn.Module, forward: Callable[[], Any]) -> Any:
        """Run a forward with some of it skipped."""

    def look(self, model: nn.Module, context: ModelContext) -> None:
        """Observe the changed model's forward before it is captured."""
        first = self._watched(context.forward_with_gradients)
        self.find(model, first, self._watched(_larger(context)), context)

    def look_at_original(self, model: nn.Module, context: ModelContext) -> None:
        """Observe the forward of the model that is to be changed."""
        first, larger = Record(model), Record(model)
        first.of(context.forward_with_gradients)
        larger.of(_larger(context))
        self.find(model, first, larger, context)

    def find(self, model: nn.Module, record: Record, larger: Record, context: ModelContext) -> None:
        """Find the branches.

        Raises:
            MemplanError: if there are none, naming what was sought.
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
    """The skipping module of a changed model."""
    child = model.get_submodule(CHILD)
    assert isinstance(child, Skipping)
    return child


def around(model: nn.Module, sample: Sample, forward: Callable[[], Any]) -> Any:
    """Run a forward with some of it skipped: ``Change.around``."""
    del sample
    return skipping_of(model).around(model, forward)


def look(model: nn.Module, context: ModelContext) -> None:
    """Find what can be skipped, before a capture: ``Change.look``."""
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
    """Make the error for missing blocks, or for some of those named."""
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
