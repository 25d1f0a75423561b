"""The adapter of one layer: its settings, its arithmetic, and its use of layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from memplan.analysis import is_conv1d
from memplan.errors import MemplanError


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The settings of ``add_lora``."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    variant: str
    also_train: tuple[str, ...]

    @property
    def scale(self) -> float:
        """The factor of the product of B and A."""
        is_root = self.variant == "rslora"
        return self.alpha / (math.sqrt(self.rank) if is_root else self.rank)


class LoraLayer(nn.Module):
    """The adapter of one layer: the change of its weight is ``scale B A``.

    Attributes:
        A: ``[rank, inputs]``, for convolutions with the kernel's size.
        B: ``[outputs, rank]``, for convolutions with a kernel of size one.
        magnitude: ``[outputs]`` norms of the weight's rows, for DoRA; else None.
        scale: factor of the change.
        dropout: dropout of the input.
    """

    def __init__(self, name: str, layer: nn.Module, settings: LoraSettings) -> None:
        super().__init__()
        self.scale, self.dropout = settings.scale, settings.dropout
        weight = oriented(layer)
        _check(name, layer, weight, settings)
        dtype = torch.float32 if weight.dtype.itemsize < 4 else weight.dtype
        ones = (1,) * (weight.dim() - 2)
        a = weight.detach().new_empty((settings.rank, *weight.shape[1:]), dtype=dtype)
        b = weight.detach().new_zeros((weight.shape[0], settings.rank, *ones), dtype=dtype)
        with torch.no_grad():
            if isinstance(layer, nn.Embedding):
                nn.init.normal_(b)
                a.zero_()
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.A = nn.Parameter(a, requires_grad=settings.variant != "lora_fa")
        self.B = nn.Parameter(b)
        self.magnitude: nn.Parameter | None = None
        if settings.variant == "dora":
            rows = weight.detach().to(dtype).flatten(1)
            self.magnitude = nn.Parameter(torch.linalg.vector_norm(rows, dim=1))

    def forward(self, layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The adapted layer's output for ``x``, from the layer's own."""
        is_dropped = self.dropout > 0 and layer.training
        if is_dropped:
            x = functional.dropout(x, self.dropout)
        down = _apply(layer, x, self.A.to(y.dtype)) * self.scale
        b = self.B.to(y.dtype)
        change = functional.conv2d(down, b) if b.dim() == 4 else functional.linear(down, b)
        if self.magnitude is None:
            return y + change
        factor = _along_outputs(self.magnitude / self.norms(layer), layer)
        base = _apply(layer, x, oriented(layer)) if is_dropped else _without_bias(layer, y)
        return y + (factor - 1).to(y.dtype) * base + factor.to(y.dtype) * change

    def norms(self, layer: nn.Module) -> torch.Tensor:
        """``[outputs]`` norms of the rows of the changed weight, a constant of the backward."""
        with torch.no_grad():
            rows = oriented(layer).flatten(1) + self.change()
            norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
            return norms

    def change(self) -> torch.Tensor:
        """``scale B A``, as ``[outputs, inputs]``."""
        return self.scale * (self.B.flatten(1) @ self.A.flatten(1))

    @torch.no_grad()
    def merged_weight(self, layer: nn.Module) -> torch.Tensor:
        """The layer's weight with the change applied."""
        weight = oriented(layer)
        merged = weight.flatten(1) + self.change()
        if self.magnitude is not None:
            merged *= (self.magnitude / self.norms(layer)).unsqueeze(1)
        merged = merged.reshape(weight.shape).to(weight.dtype)
        return merged.t() if _is_transposed(layer) else merged


def _is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding) or is_conv1d(layer)


def oriented(layer: nn.Module) -> torch.Tensor:
    """A layer's weight, with outputs first."""
    weight = weight_of(layer)
    return weight.t() if _is_transposed(layer) else weight


def weight_of(layer: nn.Module) -> torch.Tensor:
    """A layer's weight, unchanged."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _apply(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A layer's output with another weight, outputs first, and no bias."""
    if isinstance(layer, nn.Conv2d):
        y: torch.Tensor = layer._conv_forward(x, weight, None)
        return y
    if isinstance(layer, nn.Embedding):
        return functional.embedding(x, weight.t(), layer.padding_idx)
    return functional.linear(x, weight)


def _along_outputs(values: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """``[outputs]`` values, shaped to broadcast over a layer's output."""
    return values.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else values


def _without_bias(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
    bias = None if isinstance(layer, nn.Embedding) else layer.bias
    return y if not isinstance(bias, torch.Tensor) else y - _along_outputs(bias, layer).to(y.dtype)


def _check(name: str, layer: nn.Module, weight: torch.Tensor, settings: LoraSettings) -> None:
    largest = min(weight.flatten(1).shape)
    if settings.rank > largest:
        raise MemplanError(
            f"rank={settings.rank} is larger than {name!r} has: its weight is "
            f"{tuple(weight.shape)}, of rank {largest} at most. Take a smaller rank, or leave it "
            "out of targets"
        )
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise MemplanError(f"{name!r} is a convolution in groups, which cannot be adapted")
    if isinstance(layer, nn.Embedding) and settings.dropout:
        raise MemplanError(f"{name!r} is an embedding, whose input has no dropout: dropout=0")


def can_be_adapted(layer: nn.Module) -> bool:
    """Tell whether a layer can have an adapter."""
    return isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding) or is_conv1d(layer)
