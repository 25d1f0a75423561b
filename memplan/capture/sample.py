"""A sample of a model's inputs, and inputs and outputs as flat lists of leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from memplan.torch_internals import flatten, unflatten


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of a model.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, sample: object) -> Sample:
        """Take a mapping as keyword arguments, a tuple or list as positional, else one argument."""
        if isinstance(sample, Sample):
            return sample
        if isinstance(sample, Mapping):
            return cls(kwargs=dict(sample))
        if isinstance(sample, tuple | list):
            return cls(args=tuple(sample))
        return cls(args=(sample,))

    @property
    def batch_size(self) -> int | None:
        """The first dimension of the first tensor that has one; None if there is none."""
        return next((tensor.shape[0] for tensor in self.tensors() if tensor.dim()), None)

    @property
    def with_one_more(self) -> Sample:
        """A batch larger by one; its last sample repeats the first."""
        leaves, spec = flatten((self.args, dict(self.kwargs)))
        args, kwargs = unflatten([_longer(leaf, self.batch_size) for leaf in leaves], spec)
        return Sample(args, kwargs)

    def leaves(self) -> list[Any]:
        """All leaves, positional arguments first."""
        return flatten((self.args, dict(self.kwargs)))[0]

    def tensors(self) -> list[torch.Tensor]:
        """The leaves that are tensors."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, torch.Tensor)]


def _longer(leaf: object, batch_size: int | None) -> object:
    if not isinstance(leaf, torch.Tensor) or not leaf.dim() or leaf.shape[0] != batch_size:
        return leaf
    return torch.cat([leaf, leaf[:1]]).detach().requires_grad_(leaf.requires_grad)
