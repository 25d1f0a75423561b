"""A sample of a model's inputs, and inputs and outputs as flat lists of leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from memplan.torch_internals import flatten


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
        """A mapping is keyword arguments, a tuple or list positional ones, else one argument."""
        if isinstance(sample, Sample):
            return sample
        if isinstance(sample, Mapping):
            return cls(kwargs=dict(sample))
        if isinstance(sample, tuple | list):
            return cls(args=tuple(sample))
        return cls(args=(sample,))

    def leaves(self) -> list[Any]:
        """All leaves, positional arguments first."""
        return flatten((self.args, dict(self.kwargs)))[0]

    def tensors(self) -> list[torch.Tensor]:
        """The leaves that are tensors."""
        return [leaf for leaf in self.leaves() if isinstance(leaf, torch.Tensor)]
