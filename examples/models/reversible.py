"""Residual networks for small images, plain and reversible, and a reversible vision transformer.

Gomez, Ren, Urtasun and Grosse, "The Reversible Residual Network", 2017,
https://arxiv.org/abs/1707.04585; Mangalam et al., "Reversible Vision Transformers", 2022,
https://arxiv.org/abs/2302.04869. A reversible network carries two streams; each residual function
reads one of them and is added to the other, so that its sum can be inverted. The modules are plain
PyTorch: autograd saves all activations, and ``memplan.passes.invert_couplings`` need not.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, pad

WIDTHS = (16, 32, 64)
"""Channels of the three stages."""


def residual(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Two 3x3 convolutions, each after batch norm and ReLU."""
    return nn.Sequential(
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
    )


def bottleneck(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """1x1, 3x3 and 1x1 convolutions, each after batch norm and ReLU; narrow in the middle."""
    middle = outputs // 4
    return nn.Sequential(
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, middle, 1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, middle, 3, stride, 1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(),
        nn.Conv2d(middle, outputs, 1, bias=False),
    )


def resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A stream as large as another: averaged over space, and padded with zero channels."""
    if x.shape == like.shape:
        return x
    stride = x.shape[-1] // like.shape[-1]
    x = avg_pool2d(x, stride) if stride > 1 else x
    return pad(x, (0, 0, 0, 0, 0, like.shape[1] - x.shape[1]))


def as_stream(x: torch.Tensor) -> torch.Tensor:
    """The tensor in at least 32 bits, under autocast too: 16-bit sums cannot be inverted."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Stages(nn.Module):
    """The parts that plain and reversible networks share: stem, residual functions, head.

    Args:
        depth: number of layers with weights: 6 n + 2, with bottlenecks 9 n + 2.
        channels: channels of the images.
        classes: number of labels.
        width: a factor for the number of channels.
        has_bottlenecks: whether the residual functions are narrow in the middle.
        streams: 1 or 2.
    """

    def __init__(
        self,
        depth: int,
        channels: int,
        classes: int,
        *,
        width: float,
        has_bottlenecks: bool,
        streams: int,
    ) -> None:
        super().__init__()
        function, layers, widening = (bottleneck, 9, 4) if has_bottlenecks else (residual, 6, 1)
        if (depth - 2) % layers:
            raise ValueError(f"a depth of {layers} n + 2 is needed, got {depth}")
        widths = [int(width * w) * widening for w in WIDTHS]
        self.stem = nn.Conv2d(channels, streams * widths[0], 3, 1, 1, bias=False)
        functions = []
        before = widths[0]
        for stage, after in enumerate(widths):
            for number in range((depth - 2) // layers):
                is_first = number == 0
                functions.append(function(before, after, 2 if is_first and stage else 1))
                before = after
        self.functions = nn.ModuleList(functions)
        self.norm = nn.BatchNorm2d(streams * widths[-1])
        self.head = nn.Linear(streams * widths[-1], classes)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Features [batch, channels, height, width] to logits [batch, classes]."""
        return self.head(torch.relu(self.norm(x)).mean((2, 3)))


class ResNet(_Stages):
    """He et al., "Identity Mappings in Deep Residual Networks", 2016, for small images."""

    def __init__(
        self,
        depth: int,
        channels: int = 3,
        classes: int = 10,
        *,
        width: float = 1.0,
        has_bottlenecks: bool = False,
    ) -> None:
        super().__init__(
            depth, channels, classes, width=width, has_bottlenecks=has_bottlenecks, streams=1
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, channels, height, width] to logits [batch, classes]."""
        x = self.stem(x)
        for function in self.functions:
            change = function(x)
            x = resized(x, change) + change
        return self.classify(x)


class RevNet(_Stages):
    """The same residual functions on two streams, each as wide as the plain network."""

    def __init__(
        self,
        depth: int,
        channels: int = 3,
        classes: int = 10,
        *,
        width: float = 1.0,
        has_bottlenecks: bool = False,
    ) -> None:
        super().__init__(
            depth, channels, classes, width=width, has_bottlenecks=has_bottlenecks, streams=2
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, channels, height, width] to logits [batch, classes]."""
        one, other = as_stream(self.stem(x)).chunk(2, dim=1)
        for function in self.functions:
            change = function(other)
            one, other = other, resized(one, change) + change
        return self.classify(torch.cat([resized(one, other), other], dim=1))


class Attention(nn.Module):
    """Multi-head self-attention after layer norm."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, tokens, width)))


def perceptron(width: int, dropout: float = 0.0) -> nn.Sequential:
    """Two linear layers with GELU between them, after layer norm."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width),
        nn.GELU(),
        nn.Linear(4 * width, width),
        nn.Dropout(dropout),
    )


class RevViT(nn.Module):
    """A vision transformer whose attentions and perceptrons act on two streams.

    Args:
        depth: blocks, each of an attention and a perceptron.
        width: channels of a token in each stream.
        heads: number of heads of each attention.
        patch: side of a patch in pixels.
        image: side of an image in pixels.
        channels: channels of the images.
        classes: number of labels.
        dropout: probability, after each attention and perceptron.
    """

    def __init__(
        self,
        depth: int = 6,
        width: int = 96,
        heads: int = 4,
        *,
        patch: int = 4,
        image: int = 32,
        channels: int = 3,
        classes: int = 10,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((image // patch) ** 2, width))
        functions: Iterable[nn.Module] = (
            function
            for _ in range(depth)
            for function in (Attention(width, heads, dropout), perceptron(width, dropout))
        )
        self.functions = nn.ModuleList(functions)
        self.norm = nn.LayerNorm(2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, channels, height, width] to logits [batch, classes]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        one = other = as_stream(tokens)
        for function in self.functions:
            one, other = other, one + function(other)
        return self.head(self.norm(torch.cat([one, other], dim=-1)).mean(1))
