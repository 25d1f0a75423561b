"""Changes to a torch loader that it does not allow after its construction."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch.utils.data import DataLoader, IterableDataset


def is_map_style(loader: DataLoader[Any]) -> bool:
    """Tell whether a loader looks samples up by what its sampler yields."""
    return not isinstance(loader.dataset, IterableDataset)


def indices_of(loader: DataLoader[Any]) -> Iterable[Any]:
    """The indices of each batch or, without batching, of each sample (torch 2.13-2.15)."""
    batches: Iterable[Any] = loader._index_sampler
    return batches


def with_indices(loader: DataLoader[Any], indices: Iterable[Any]) -> DataLoader[Any]:
    """A copy of a loader, of its class and with its settings, for other indices (torch 2.13-2.15).

    The copy has workers of its own.
    """
    made = copy.copy(loader)
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    vars(made)[name] = indices
    made._iterator = None
    return made


def with_collation(loader: DataLoader[Any], collate: Callable[[Any], Any]) -> DataLoader[Any]:
    """A copy of a loader that collates samples in another way (torch 2.13-2.15)."""
    made = copy.copy(loader)
    made.collate_fn = collate
    made._iterator = None
    return made
