"""The local loss of a part of a model: a small head, and a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from memplan.errors import MemplanError
from memplan.with_loss import WithLoss

if TYPE_CHECKING:
    from memplan.capture.sample import Sample

HeadKind = Literal["linear", "conv", "masked_image"]
HEADS: Final = ("linear", "conv", "masked_image")
Head: TypeAlias = Callable[[torch.Tensor, int], Callable[..., torch.Tensor]]
"""Takes a part's output without data, and its number; returns the function of the part's loss."""

_HIDDEN = 128
_DECODER = 12


class Own(nn.Module):
    """A user's own loss."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor, sample: Sample) -> torch.Tensor:
        """The function's value for the part's output and the model's inputs."""
        return self.function(x, *sample.args, **sample.kwargs)


class Supervised(nn.Module):
    """The model's loss on a head's prediction."""

    def __init__(self, head: nn.Module, loss_fn: Callable[[Any, Any], torch.Tensor]) -> None:
        super().__init__()
        self.head = head
        # a loss may be a module, and must not appear among the heads
        self.loss_fn = (loss_fn,)

    def forward(self, x: torch.Tensor, sample: Sample) -> torch.Tensor:
        """``loss_fn(head(x), target)``, the target being the model's last argument."""
        return self.loss_fn[0](self.head(x), sample.args[-1])


class Reconstructing(nn.Module):
    """Another loss, plus the error of reconstructing the model's first input, an image."""

    def __init__(self, loss: nn.Module, decoder: nn.Module, weight: float) -> None:
        super().__init__()
        self.loss = loss
        self.decoder = decoder
        self.weight = weight

    def forward(self, x: torch.Tensor, sample: Sample) -> torch.Tensor:
        """The loss plus the weighted error."""
        image = sample.args[0]
        resized = functional.interpolate(x, image.shape[-2:], mode="bilinear")
        error = functional.mse_loss(self.decoder(resized), image)
        loss: torch.Tensor = self.loss(x, sample)
        return loss + self.weight * error


def local_loss(
    head: HeadKind | Head,
    model: nn.Module,
    example: torch.Tensor,
    number: int,
    predicted: object,
) -> nn.Module:
    """The loss of one part: a module from the part's output and the sample to a scalar.

    Args:
        head: the kind of head.
        model: the whole model.
        example: the part's output, without data.
        number: number of the part.
        predicted: the output of the model inside ``WithLoss``, without data.

    Raises:
        MemplanError: if there is no such head for this model.
    """
    if not isinstance(head, str):
        made = head(example, number)
        if not callable(made):
            raise MemplanError(f"head(example, {number}) returned {made!r}, which is no function")
        return Own(made)
    if not isinstance(model, WithLoss) or not isinstance(predicted, torch.Tensor):
        raise MemplanError(
            f"head={head!r} predicts what the model predicts, and is judged by the model's loss: "
            "pass memplan.WithLoss(model, loss_fn), with a model that returns one tensor; or a "
            "callable as head"
        )
    layers = _conv(example, predicted) if head == "conv" else _linear(example, predicted)
    return Supervised(like(model, layers), model.loss_fn)


def reconstructing(
    loss: nn.Module, example: torch.Tensor, image: object, weight: float
) -> nn.Module:
    """A loss with a reconstruction added: two convolutions over the enlarged output.

    Raises:
        MemplanError: if the part's output or the model's first input is no image.
    """
    is_image = isinstance(image, torch.Tensor) and image.dim() == 4
    if not is_image or example.dim() != 4:
        raise MemplanError(
            "reconstruction is of images: it needs [batch, channels, height, width] as the "
            f"model's first input and from each part, and a part returns {list(example.shape)}"
        )
    assert isinstance(image, torch.Tensor)
    decoder = nn.Sequential(
        nn.Conv2d(example.shape[1], _DECODER, 3, padding=1),
        nn.BatchNorm2d(_DECODER),
        nn.ReLU(),
        nn.Conv2d(_DECODER, image.shape[1], 3, padding=1),
    )
    return Reconstructing(loss, decoder, weight)


def like(model: nn.Module, layers: nn.Module) -> nn.Module:
    """Layers with the device and type of a model's first floating-point parameter."""
    one = next(one for one in model.parameters() if one.is_floating_point())
    return layers.to(one.device, one.dtype)


class Mean(nn.Module):
    """The mean over some dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean, without these dimensions."""
        return x.mean(self.dims)


def _linear(example: torch.Tensor, predicted: torch.Tensor) -> nn.Module:
    """Pooling to as many dimensions as the prediction has, a norm, and one linear layer."""
    classes = predicted.shape[-1]
    match example.dim(), predicted.dim():
        case 4, 2:
            return nn.Sequential(Mean(2, 3), nn.Linear(example.shape[1], classes))
        case 3, 2:
            width = example.shape[2]
            return nn.Sequential(Mean(1), nn.LayerNorm(width), nn.Linear(width, classes))
        case (3, 3) | (2, 2):
            width = example.shape[-1]
            return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
    raise _no_head("linear", example, predicted)


def _conv(example: torch.Tensor, predicted: torch.Tensor) -> nn.Module:
    """A convolution of stride 2, pooling, and two linear layers ("1c2f" of InfoPro)."""
    if (example.dim(), predicted.dim()) != (4, 2):
        raise _no_head("conv", example, predicted)
    channels = example.shape[1]
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride=2, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        Mean(2, 3),
        nn.Linear(channels, _HIDDEN),
        nn.ReLU(),
        nn.Linear(_HIDDEN, predicted.shape[1]),
    )


def _no_head(kind: str, example: torch.Tensor, predicted: torch.Tensor) -> MemplanError:
    return MemplanError(
        f"head={kind!r} cannot predict {list(predicted.shape)} from what a part returns, "
        f"{list(example.shape)}: cut elsewhere (at=...), or pass a callable as head"
    )
