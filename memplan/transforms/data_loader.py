"""Batches of a loader, of which some are skipped before they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from memplan.torch_internals import (
    indices_of,
    is_map_style,
    version_of,
    with_collation,
    with_indices,
)

Numbered: TypeAlias = "Iterator[tuple[int, Any]]"
"""Batches with their places in the epoch, counted from 0."""

IsWanted: TypeAlias = Callable[[int], bool]
"""Takes a batch's place in the epoch; tells whether it is wanted."""

_SHARED = "torch"
_RANDOM = RandomSampler | SubsetRandomSampler | WeightedRandomSampler


class PassingLoader:
    """Goes through the batches of a loader, and loads only those that are wanted.

    Of a map-style data set, skipped samples are never looked up. Of an iterable one they are
    taken, but not made into a batch if the loader has no workers. Of any other iterable, skipped
    batches are taken and dropped.

    Args:
        loader: any iterable of batches.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self._indices: _Indices | None = None
        if isinstance(loader, DataLoader) and is_map_style(loader):
            self._indices = _Indices(indices_of(loader))
            self._copy = with_indices(loader, self._indices)

    def epoch(
        self, is_wanted: IsWanted, start: int = 0, order: Mapping[str, torch.Tensor] | None = None
    ) -> Numbered:
        """The wanted batches of one epoch.

        Args:
            is_wanted: asked for each batch, in order; with workers, before its turn.
            start: the place to begin at.
            order: random states from the start of an epoch, to repeat its order; the shared state
                is then left as if nothing were drawn for it.
        """
        if self._indices is None:
            yield from self._taken(is_wanted, start, order)
            return
        now = torch.random.get_rng_state()
        if order is not None:
            torch.random.set_rng_state(order[_SHARED])
            self.set_own_states(order)
        self._indices.begin(is_wanted, start)
        batches = iter(self._copy)
        self._indices.draw()
        if order is not None:
            torch.random.set_rng_state(now)
        for number, batch in enumerate(batches):
            yield self._indices.places[number], batch

    def _taken(
        self, is_wanted: IsWanted, start: int, order: Mapping[str, torch.Tensor] | None
    ) -> Numbered:
        loader = self.loader
        collate: Callable[[Any], Any] = _as_they_are
        if isinstance(loader, DataLoader) and _makes_batches_as_usual(loader):
            collate = loader.collate_fn
            loader = with_collation(loader, _as_they_are)
        now = torch.random.get_rng_state()
        if order is not None:
            torch.random.set_rng_state(order[_SHARED])
            self.set_own_states(order)
        batches = iter(loader)
        for _ in zip(range(start), batches, strict=False):
            pass
        if order is not None:
            torch.random.set_rng_state(now)
        for place, batch in enumerate(batches, start):
            if is_wanted(place):
                yield place, collate(batch)

    def random_states(self) -> dict[str, torch.Tensor]:
        """Random states that an epoch's order is drawn from: torch's, and the loader's own."""
        return {_SHARED: torch.random.get_rng_state()} | {
            name: generator.get_state() for name, generator in self._generators().items()
        }

    def set_own_states(self, states: Mapping[str, torch.Tensor]) -> None:
        """Set the loader's own generators, not torch's state."""
        for name, generator in self._generators().items():
            if name in states:
                generator.set_state(states[name])

    def _generators(self) -> dict[str, torch.Generator]:
        if not isinstance(self.loader, DataLoader):
            return {}
        found = {"loader": self.loader.generator}
        batches = self.loader.batch_sampler
        inside = batches.sampler if isinstance(batches, BatchSampler) else None
        for name, sampler in (("sampler", self.loader.sampler), ("inside", inside)):
            if isinstance(sampler, _RANDOM):
                found[name] = sampler.generator
        return {name: one for name, one in found.items() if isinstance(one, torch.Generator)}


class _Indices:
    """The indices of wanted batches.

    Attributes:
        places: of the batches asked for so far.
    """

    def __init__(self, every: Iterable[Any]) -> None:
        self._every = every

    def begin(self, is_wanted: IsWanted, start: int) -> None:
        """Go to the next epoch."""
        self.places: list[int] = []
        self._first: list[Any] = []
        self._wanted: Iterator[Any] | None = None
        self._is_wanted, self._start = is_wanted, start

    def draw(self) -> None:
        """Look up the first, if not done yet, so that the order's random numbers are drawn."""
        if self._wanted is None:
            self._wanted = self._choose()
            self._first = [one for _, one in zip(range(1), self._wanted, strict=False)]

    def __iter__(self) -> Iterator[Any]:
        self.draw()
        assert self._wanted is not None
        yield from self._first
        yield from self._wanted

    def __len__(self) -> int:
        return len(self._every)  # type: ignore[arg-type]

    def _choose(self) -> Iterator[Any]:
        for place, indices in enumerate(self._every):
            if place >= self._start and self._is_wanted(place):
                self.places.append(place)
                yield indices


class Updates:
    """Tells whether gradients wait for an update.

    Args:
        parameters: of the model.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = tuple(one for one in parameters if one.requires_grad)
        self.note()

    def note(self) -> None:
        """Begin to watch for an update."""
        self._versions = [version_of(one) for one in self._parameters]

    def are_due(self) -> bool:
        """Tell whether there are gradients, and no parameter was written since ``note``.

        Gradients that are all zero do not count.
        """
        pairs = zip(self._parameters, self._versions, strict=True)
        gradients = [one.grad for one in self._parameters if one.grad is not None]
        if not gradients or any(version_of(one) != version for one, version in pairs):
            return False
        return any(bool(one.any()) for one in gradients)


def _makes_batches_as_usual(loader: DataLoader[Any]) -> bool:
    """Tell whether batches are made in this process, and come as they are made."""
    is_plain = type(loader).__iter__ is DataLoader.__iter__
    return is_plain and not loader.num_workers and not loader.pin_memory


def _as_they_are(samples: Any) -> Any:
    return samples
