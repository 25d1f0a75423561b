"""Six convolutional networks at the sizes for which planners published largest batches.

Layers are those of the published runs (Keras applications 2.x; the segmentation networks have 19
classes): VGG-19, ResNet-50 and MobileNet at 224 x 224; a U-Net and an FCN-8 on VGG-16 and a SegNet
at 416 x 608. Each returns logits; wrap it in ``memplan.WithLoss`` to train it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import nn

CLASSES = 1000
SEGMENTS = 19


class Together(nn.Sequential):
    """Layers that their authors count as one, such as a convolution and its ReLU."""


class Padded(nn.Conv2d):
    """A convolution that pads; its authors count the padding as a layer of its own.

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: width of the square kernel.
        stride: stride of the convolution.
        padding: rows and columns on each side.
        kept: rows and columns of padding that the authors keep, in total.
        groups: groups of the convolution.
        bias: whether it has a bias.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        padding: int = 1,
        kept: int | None = None,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=padding, groups=groups, bias=bias)
        self.kept = 2 * padding if kept is None else kept


class PaddedPool(nn.MaxPool2d):
    """A pooling that pads by one; its authors count the padding as a layer of its own."""

    kept = 2

    def __init__(self) -> None:
        super().__init__(3, 2, padding=1)


class Add(nn.Module):
    """A sum of two branches."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Same shape in and out."""
        return x + y


class Concat(nn.Module):
    """Two branches side by side."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """[batch, c, ...] and [batch, d, ...] to [batch, c + d, ...]."""
        return torch.cat([x, y], dim=1)


class Crop(nn.Module):
    """The upper left corner of an image, as large as another image."""

    def forward(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[batch, c, h, w] to [batch, c, height, width] of ``like``."""
        return x[:, :, : like.shape[2], : like.shape[3]]


def _conv_relu(inputs: int, outputs: int, kernel: int = 3) -> nn.Module:
    return Together(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU())


def _vgg(widths: list[tuple[int, int]]) -> list[nn.Sequential]:
    """The levels of a VGG: each has (width, convolutions), and a pooling."""
    levels, inputs = [], 3
    for width, count in widths:
        convolutions = [_conv_relu(inputs if i == 0 else width, width) for i in range(count)]
        levels.append(nn.Sequential(*convolutions, nn.MaxPool2d(2)))
        inputs = width
    return levels


def vgg19() -> nn.Module:
    """Simonyan and Zisserman, 2014."""
    widths = [(64, 2), (128, 2), (256, 4), (512, 4), (512, 4)]
    return nn.Sequential(
        *_vgg(widths),
        nn.Flatten(),
        Together(nn.Linear(25088, 4096), nn.ReLU()),
        Together(nn.Linear(4096, 4096), nn.ReLU()),
        nn.Linear(4096, CLASSES),
    )


class _Bottleneck(nn.Module):
    """ResNet's block, with its stride in the first convolution."""

    def __init__(self, inputs: int, width: int, stride: int, *, has_shortcut: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1),
            nn.BatchNorm2d(4 * width),
        )
        self.shortcut: nn.Module | None = None
        if has_shortcut:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride), nn.BatchNorm2d(4 * width)
            )
        self.add = Add()
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, inputs, h, w] to [batch, 4 width, h / stride, w / stride]."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.relu(self.add(shortcut, self.body(x)))


def resnet50() -> nn.Module:
    """He et al., 2015; convolutions with biases."""
    layers: list[nn.Module] = [
        Padded(3, 64, 7, 2, padding=3),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        PaddedPool(),
    ]
    inputs = 64
    for level, (width, count) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)]):
        for block in range(count):
            stride = 2 if level > 0 and block == 0 else 1
            layers.append(_Bottleneck(inputs, width, stride, has_shortcut=block == 0))
            inputs = 4 * width
    pooled = Together(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, pooled, nn.Linear(inputs, CLASSES))


def mobilenet() -> nn.Module:
    """Howard et al., 2017, width 1."""
    layers: list[nn.Module] = [Padded(3, 32, 3, 2, kept=1, bias=False)]
    layers += [nn.BatchNorm2d(32), nn.ReLU6()]
    width = 32
    for outputs, stride in [
        (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5,
        (1024, 2), (1024, 1),
    ]:  # fmt: skip
        depthwise = (
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
            if stride == 1
            else Padded(width, width, 3, 2, kept=1, groups=width, bias=False)
        )
        layers += [depthwise, nn.BatchNorm2d(width), nn.ReLU6()]
        layers += [nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6()]
        width = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Dropout(1e-3), nn.Conv2d(width, CLASSES, 1), nn.Flatten()]
    return nn.Sequential(*layers, *head)


class UNet(nn.Module):
    """Ronneberger, Fischer and Brox, 2015, with VGG-16 as encoder; half the resolution out."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(_vgg([(64, 2), (128, 2), (256, 3), (512, 3)]))
        self.middle = _padded_norm(512, 512)
        self.up = nn.ModuleList(nn.Upsample(scale_factor=2) for _ in range(3))
        self.concat = nn.ModuleList(Concat() for _ in range(3))
        self.merge = nn.ModuleList(
            [_padded_norm(768, 256), _padded_norm(384, 128), _padded_norm(192, 64)]
        )
        self.head = nn.Sequential(nn.Conv2d(64, SEGMENTS, 3, padding=1), nn.Flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 3, h, w] to [batch, classes, h w / 4]."""
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
        x = self.middle(skips.pop())
        for up, concat, merge in zip(self.up, self.concat, self.merge, strict=True):
            x = merge(concat(up(x), skips.pop()))
        return self.head(x)


def _padded_norm(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(PaddedRelu(inputs, outputs), nn.BatchNorm2d(outputs))


class PaddedRelu(Padded):
    """A padded convolution with a ReLU that counts as part of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, inputs, h, w] to [batch, outputs, h, w]."""
        return super().forward(x).relu()


class FCN8(nn.Module):
    """Long, Shelhamer and Darrell, 2015, on VGG-16."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_vgg([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]))
        self.top = nn.Sequential(
            _conv_relu(512, 4096, 7),
            nn.Dropout(0.5),
            _conv_relu(4096, 4096, 1),
            nn.Dropout(0.5),
            nn.Conv2d(4096, SEGMENTS, 1),
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(SEGMENTS, SEGMENTS, kernel, stride, bias=False)
            for kernel, stride in [(4, 2), (4, 2), (16, 8)]
        )
        self.side = nn.ModuleList([nn.Conv2d(512, SEGMENTS, 1), nn.Conv2d(256, SEGMENTS, 1)])
        self.crop = nn.ModuleList(Crop() for _ in range(2))
        self.add = nn.ModuleList(Add() for _ in range(2))
        self.flatten = nn.Flatten(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 3, h, w] to [batch, classes, (h + 8) (w + 8)]."""
        levels = []
        for level in self.levels:
            x = level(x)
            levels.append(x)
        x = self.top(x)
        for step in range(2):
            side = self.side[step](levels[3 - step])
            x = self.add[step](self.crop[step](self.up[step](x), side), side)
        return self.flatten(self.up[2](x))


def segnet() -> nn.Module:
    """Badrinarayanan, Kendall and Cipolla, 2015, with upsampling instead of unpooling."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in (64, 128, 256, 256):
        layers += [Padded(inputs, width), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        inputs = width
    for width in (512, 256, 128, 64):
        if width < 512:
            layers.append(nn.Upsample(scale_factor=2))
        layers += [Padded(inputs, width), nn.BatchNorm2d(width)]
        inputs = width
    return nn.Sequential(*layers, nn.Conv2d(64, SEGMENTS, 3, padding=1), nn.Flatten(2))


MODELS: Final[dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]]] = {
    "U-Net": (UNet, (416, 608)),
    "FCN8": (FCN8, (416, 608)),
    "SegNet": (segnet, (416, 608)),
    "ResNet-50": (resnet50, (224, 224)),
    "VGG-19": (vgg19, (224, 224)),
    "MobileNet": (mobilenet, (224, 224)),
}
"""Factories of the networks, and the height and width of their images, by name."""
