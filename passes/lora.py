"""Low-rank adapters: train a small change of a layer's weight, and freeze the rest.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
https://arxiv.org/abs/2106.09685: ``y = x W^T + scale (x A^T) B^T``. Variants: rsLoRA scales by
``alpha / sqrt(rank)`` (Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732); LoRA-FA freezes A,
so that x is not kept for it (Zhang et al., 2023, https://arxiv.org/abs/2308.03303); DoRA trains the
magnitude of each output apart from its direction (Liu et al., 2024,
https://arxiv.org/abs/2402.09353, equation 5, the norm a constant).

The adapters are parameters of the planned module, beside the model's own. The model is not changed
but for ``requires_grad``: only the planned module's forward has the adapters' part in it. Weights
are cast to the type of x where that is another, never x to theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import nn
from torch.nn import functional

from memplan.adapting import after_calls, hang
from memplan.analysis import Patterns, as_texts, is_conv1d, select_parameters, targeted_layers
from memplan.errors import CaptureError, MemplanError
from memplan.passing import Change, Effect, ModelContext, Pass

if TYPE_CHECKING:
    from memplan.module import PlannedModule

Variant = Literal["lora", "rslora", "lora_fa", "dora"]
VARIANTS: Final = ("lora", "rslora", "lora_fa", "dora")
_CHILD = "lora"


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What ``add_lora`` was asked for."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    variant: str
    also_train: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied by."""
        is_root = self.variant == "rslora"
        return self.alpha / (math.sqrt(self.rank) if is_root else self.rank)


def add_lora(
    rank: int | Literal["fit"] = 8,
    alpha: float = 16.0,
    *,
    dropout: float = 0.0,
    targets: Patterns = "linear",
    variant: Variant = "lora",
    also_train: Patterns = (),
) -> Pass:
    """Train low-rank adapters of layers, and freeze every other parameter.

    Adapters begin as no change. They are named ``lora.<layer>.A`` and ``.B`` in the planned
    module, in float32 where the model has 16 bits. ``requires_grad`` is set on the model given;
    ``unfreeze`` puts it back.

    Args:
        rank: of the change of a weight; "fit": the largest with which the budget can be kept.
        alpha: its scale, times ``1 / rank`` (of rsLoRA: ``1 / sqrt(rank)``).
        dropout: of the adapters' input, in training.
        targets: which layers: "linear" for all linear ones but the output head; or patterns.
            Linear, Conv2d, Embedding and transformers' Conv1D can be adapted.
        variant: "lora", "rslora", "lora_fa" or "dora".
        also_train: what of the model itself is trained as well: "head", "norms", "biases", ...

    Returns:
        A pass of effect ``RESTRICTED``.

    Raises:
        MemplanError: naming the argument that makes no sense.
    """
    if rank != "fit" and not (isinstance(rank, int) and rank >= 1):
        raise MemplanError(f'rank is a number of at least 1, or "fit", got {rank!r}')
    if not 0 <= dropout < 1:
        raise MemplanError(f"dropout is a probability below 1, got {dropout!r}")
    if variant not in VARIANTS:
        raise MemplanError(f"variant is one of {', '.join(VARIANTS)}, got {variant!r}")
    settings = LoraSettings(
        0 if rank == "fit" else rank,
        float(alpha),
        float(dropout),
        as_texts(targets),
        variant,
        as_texts(also_train),
    )
    if rank == "fit":
        return Pass("add_lora", Effect.RESTRICTED, candidates=partial(_candidates, settings))
    return _made(settings)


def _made(settings: LoraSettings) -> Pass:
    arguments = {
        name: list(one) if isinstance(one, tuple) else one for name, one in asdict(settings).items()
    }
    return Pass("add_lora", Effect.RESTRICTED, arguments, change=partial(_change, settings))


def _candidates(
    settings: LoraSettings, model: nn.Module, context: ModelContext
) -> tuple[Pass, ...]:
    """The pass at every rank that all layers have."""
    names = targeted_layers(model, settings.targets, context.forward, _can_be_adapted)
    layers = map(model.get_submodule, names)
    largest = min(min(_oriented(layer).flatten(1).shape) for layer in layers)
    return tuple(_made(replace(settings, rank=rank)) for rank in range(1, largest + 1))


def _change(settings: LoraSettings, model: nn.Module, context: ModelContext) -> Change:
    names = targeted_layers(model, settings.targets, context.forward, _can_be_adapted)
    return Change(
        trains=select_parameters(model, settings.also_train, context.forward),
        modules={_CHILD: Lora(model, names, settings)},
        around=_adapted,
    )


def _can_be_adapted(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding) or is_conv1d(layer)


@contextmanager
def _adapted(model: nn.Module) -> Iterator[None]:
    """Inside, the layers of a model that has adapters return what those make of their outputs."""
    lora = lora_of(model)
    if lora.merged and torch.is_grad_enabled():
        raise CaptureError(
            "the adapters are merged into the weights: call the module under torch.no_grad(), or "
            "memplan.passes.unmerge_lora(planned) before you train on"
        )
    names = () if lora.merged else lora.names
    with after_calls(model, {name: lora.get_submodule(name) for name in names}):
        yield


def lora_of(model: nn.Module) -> Lora:
    """The adapters of a planned module.

    Raises:
        MemplanError: if it has none.
    """
    for name, child in model.named_children():
        if name == _CHILD and isinstance(child, Lora):
            return child
    raise MemplanError("the module has no adapters; plan it with memplan.passes.add_lora()")


class Lora(nn.Module):
    """The adapters of a model, under the names of their layers.

    Attributes:
        names: FQNs of the layers.
        settings: what was asked for.
        merged: the weights of the layers as they were, if the adapters are merged into them.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], settings: LoraSettings) -> None:
        super().__init__()
        self.names = names
        self.settings = settings
        self.merged: dict[str, torch.Tensor] = {}
        with torch.random.fork_rng():
            layers = {name: LoraLayer(name, model.get_submodule(name), settings) for name in names}
        hang(self, layers)

    def layer(self, name: str) -> LoraLayer:
        """The adapter of a layer."""
        found = self.get_submodule(name)
        assert isinstance(found, LoraLayer)
        return found


class LoraLayer(nn.Module):
    """The adapter of one layer: the change of its weight is ``scale B A``.

    Attributes:
        A: ``[rank, inputs]``, for convolutions with the size of the kernel.
        B: ``[outputs, rank]``, for convolutions with a kernel of one.
        magnitude: ``[outputs]`` norms of the weight's rows, for DoRA; else None.
        scale: of the change.
        dropout: of the input.
    """

    def __init__(self, name: str, layer: nn.Module, settings: LoraSettings) -> None:
        super().__init__()
        self.scale, self.dropout = settings.scale, settings.dropout
        weight = _oriented(layer)
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
        """What the adapted layer returns for ``x``, given what the layer itself does."""
        is_dropped = self.dropout > 0 and layer.training
        if is_dropped:
            x = functional.dropout(x, self.dropout)
        down = _apply(layer, x, self.A.to(y.dtype)) * self.scale
        b = self.B.to(y.dtype)
        change = functional.conv2d(down, b) if b.dim() == 4 else functional.linear(down, b)
        if self.magnitude is None:
            return y + change
        factor = _along_outputs((self.magnitude / self.norms(layer)).to(y.dtype), y, layer)
        base = _apply(layer, x, _oriented(layer)) if is_dropped else _without_bias(layer, y)
        return y + (factor - 1) * base + factor * change

    def norms(self, layer: nn.Module) -> torch.Tensor:
        """``[outputs]`` norms of the rows of the changed weight, a constant of the backward."""
        with torch.no_grad():
            rows = _oriented(layer).flatten(1) + self.change()
            norms: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
            return norms

    def change(self) -> torch.Tensor:
        """``scale B A``, as ``[outputs, inputs]``."""
        return self.scale * (self.B.flatten(1) @ self.A.flatten(1))

    @torch.no_grad()
    def merged_weight(self, layer: nn.Module) -> torch.Tensor:
        """The layer's weight with the change in it."""
        weight = _oriented(layer)
        merged = weight.flatten(1) + self.change()
        if self.magnitude is not None:
            merged *= (self.magnitude / self.norms(layer)).unsqueeze(1)
        merged = merged.reshape(weight.shape).to(weight.dtype)
        return merged.t() if _is_transposed(layer) else merged


def _is_transposed(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding) or is_conv1d(layer)


def _oriented(layer: nn.Module) -> torch.Tensor:
    """A layer's weight, outputs first."""
    weight = _weight(layer)
    return weight.t() if _is_transposed(layer) else weight


def _weight(layer: nn.Module) -> torch.Tensor:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _apply(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What a layer would return with another weight, outputs first, and no bias."""
    if isinstance(layer, nn.Conv2d):
        y: torch.Tensor = layer._conv_forward(x, weight, None)
        return y
    if isinstance(layer, nn.Embedding):
        return functional.embedding(x, weight.t(), layer.padding_idx)
    return functional.linear(x, weight)


def _along_outputs(values: torch.Tensor, y: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """``[outputs]`` values as they are broadcast over a layer's output."""
    return values.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else values


def _without_bias(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
    bias = None if isinstance(layer, nn.Embedding) else layer.bias
    return y if not isinstance(bias, torch.Tensor) else y - _along_outputs(bias, y, layer)


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


def merge_lora(planned: PlannedModule) -> nn.Module:
    """Add the adapters to the weights of the original, which then computes the same without them.

    The weights as they were are kept for ``unmerge_lora``. Returns the original.

    Raises:
        MemplanError: if there are no adapters, or they are merged already.
    """
    lora = lora_of(planned)
    if lora.merged:
        raise MemplanError("the adapters are merged already: memplan.passes.unmerge_lora(planned)")
    for name in lora.names:
        layer = planned.original.get_submodule(name)
        weight = _weight(layer).detach()
        lora.merged[name] = weight.clone()
        weight.copy_(lora.layer(name).merged_weight(layer))
    planned.recapture()
    return planned.original


def unmerge_lora(planned: PlannedModule) -> nn.Module:
    """Put back, bit for bit, the weights that ``merge_lora`` changed. Returns the original.

    Raises:
        MemplanError: if there are no adapters, or they are not merged.
    """
    lora = lora_of(planned)
    if not lora.merged:
        raise MemplanError("the adapters are not merged: memplan.passes.merge_lora(planned)")
    for name, weight in lora.merged.items():
        _weight(planned.original.get_submodule(name)).detach().copy_(weight)
    lora.merged.clear()
    planned.recapture()
    return planned.original
