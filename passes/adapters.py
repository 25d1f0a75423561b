"""Bottleneck adapters: small modules after sublayers, trained in place of the model.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019,
https://arxiv.org/abs/1902.00751: ``y + up(f(down(y)))`` on the output ``y`` of each sublayer,
before it is added to the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import nn
from torch.nn import functional

from memplan.analysis import (
    NamedAsLayers,
    Patterns,
    as_texts,
    is_conv1d,
    last_layers,
    select_parameters,
    targeted_layers,
)
from memplan.errors import MemplanError
from memplan.transforms.module_hooks import after_calls, hang
from memplan.transforms.passes import Change, Effect, ModelContext, Pass, arguments_of

if TYPE_CHECKING:
    from memplan.capture.sample import Sample

_CHILD = "adapters"
_SUBLAYERS = "sublayers"
_SPREAD = 0.01
_ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


def add_adapters(
    size: int = 64,
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu",
    *,
    targets: Patterns = _SUBLAYERS,
    also_train: Patterns = (),
) -> Pass:
    """Train bottlenecks after layers, and freeze every other parameter.

    Adapters start as the identity. They are named ``adapters.<layer>`` in the planned module, in
    float32 where the model has 16 bits. ``requires_grad`` is set on the model itself; ``unfreeze``
    restores it.

    Args:
        size: features of the bottleneck.
        activation: "gelu", "relu", "silu" or "tanh".
        targets: the linear layers to adapt: "sublayers" for those that end a residual branch; or
            patterns.
        also_train: the model's own parameters to train as well: "head", "norms", ...

    Returns:
        A pass of effect ``RESTRICTED``.

    Raises:
        MemplanError: naming the invalid argument.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.branch = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        ...     def forward(self, x):
        ...         return x + self.branch(x)
        >>> blocks = nn.Sequential(*(Block() for _ in range(4)))
        >>> model = memplan.WithLoss(blocks, nn.functional.mse_loss)
        >>> batch = torch.randn(64, 32), torch.randn(64, 32)
        >>> planned = memplan.optimize(model, batch, passes=[memplan.passes.add_adapters(size=4)])
        >>> trained = [name for name, p in planned.named_parameters() if p.requires_grad]
        >>> {name.partition(".")[0] for name in trained}
        {'adapters'}
    """
    if not isinstance(size, int) or size < 1:
        raise MemplanError(f"size is a number of at least 1, got {size!r}")
    if activation not in _ACTIVATIONS:
        raise MemplanError(f"activation is one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    settings = _AdapterSettings(size, activation, as_texts(targets), as_texts(also_train))
    change = partial(_change, settings)
    return Pass("add_adapters", Effect.RESTRICTED, arguments_of(settings), change=change)


@dataclass(frozen=True, slots=True)
class _AdapterSettings:
    size: int
    activation: str
    targets: tuple[str, ...]
    also_train: tuple[str, ...]


def _change(settings: _AdapterSettings, model: nn.Module, context: ModelContext) -> Change:
    targets = settings.targets
    if _SUBLAYERS in targets:
        ends = last_layers(model, context.forward)
        if not ends:
            raise MemplanError(
                "the forward has no residual branch that ends with a linear layer; name targets"
            )
        targets = (*ends, *(one for one in targets if one != _SUBLAYERS))
    names = targeted_layers(model, targets, context.forward, _can_be_adapted)
    tree = NamedAsLayers()
    with torch.random.fork_rng():
        layers = {
            name: Bottleneck(model.get_submodule(name), settings.size, settings.activation)
            for name in names
        }
    hang(tree, layers)
    return Change(
        trains=select_parameters(model, settings.also_train, context.forward),
        modules={_CHILD: tree},
        around=partial(_adapted, names),
    )


def _can_be_adapted(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def _adapted(
    names: tuple[str, ...], model: nn.Module, sample: Sample, forward: Callable[[], Any]
) -> Any:
    del sample
    with after_calls(model, {name: model.get_submodule(f"{_CHILD}.{name}") for name in names}):
        return forward()


class Bottleneck(nn.Module):
    """``y + up(f(down(y)))``.

    Attributes:
        down: ``[size, features]``, small at first.
        down_bias: ``[size]``.
        up: ``[features, size]``, zeros at first.
        up_bias: ``[features]``.
    """

    def __init__(self, layer: nn.Module, size: int, activation: str) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        features = weight.shape[1 if is_conv1d(layer) else 0]
        dtype = torch.float32 if weight.dtype.itemsize < 4 else weight.dtype
        new = partial(weight.detach().new_zeros, dtype=dtype)
        self.down = nn.Parameter(nn.init.normal_(new((size, features)), std=_SPREAD))
        self.down_bias = nn.Parameter(new((size,)))
        self.up = nn.Parameter(new((features, size)))
        self.up_bias = nn.Parameter(new((features,)))
        self.activation = activation

    def forward(self, layer: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The adapted layer's output, from the layer's own."""
        del layer, x
        dtype = y.dtype
        inner = functional.linear(y, self.down.to(dtype), self.down_bias.to(dtype))
        inner = _ACTIVATIONS[self.activation](inner)
        return y + functional.linear(inner, self.up.to(dtype), self.up_bias.to(dtype))
