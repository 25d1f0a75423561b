"""Networks that are chains of blocks, each a module of its own."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Residual(nn.Module):
    """``relu(shortcut(x) + inside(x))``: He et al., "Deep Residual Learning", 2015, basic block.

    Args:
        inputs: input channels.
        outputs: output channels.
        stride: stride of the first convolution; the shortcut then takes every other pixel, and
            zeros for new channels (option A).
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.new_channels = outputs - inputs
        self.stride = stride
        self.inside = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images to images, reduced by the stride."""
        y = self.inside(x)
        if self.stride > 1 or self.new_channels:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        return functional.relu(x + y)


class ResNet(nn.Module):
    """He et al.'s network for small images: three stages of ``(depth - 2) / 6`` blocks.

    Args:
        depth: 20, 32, 44, 56, 110, ...
        channels: channels of the images.
        classes: number of labels.
        width: channels of the first stage; doubled twice.
    """

    def __init__(
        self, depth: int = 20, channels: int = 1, classes: int = 10, *, width: int = 16
    ) -> None:
        super().__init__()
        if depth % 6 != 2:
            raise ValueError(f"depth must be 6 n + 2, got {depth}")
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        last = width
        for stage in range(3):
            for number in range((depth - 2) // 6):
                stride = 2 if stage and not number else 1
                blocks.append(Residual(last, width * 2**stage, stride))
                last = width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(last, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, channels, height, width] to logits [batch, classes]."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Stack(nn.Module):
    """A convolution, equal blocks, and a linear layer.

    Args:
        num_blocks: number of blocks.
        channels: channels of the images.
        classes: number of labels.
        width: channels inside the blocks.
    """

    def __init__(
        self, num_blocks: int = 16, channels: int = 3, classes: int = 10, *, width: int = 32
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*[Residual(width, width) for _ in range(num_blocks)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [batch, channels, height, width] to logits [batch, classes]."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
