"""A small vision transformer."""

from __future__ import annotations

import torch
from torch import nn

from models.masked import block


class VisionTransformer(nn.Module):
    """Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020, with the mean of all tokens.

    Args:
        depth: number of blocks.
        width: channels of a token.
        heads: number of heads of each attention.
        image: side of an image in pixels.
        patch: side of a patch in pixels.
        channels: channels of the images.
        classes: number of labels.
    """

    def __init__(
        self,
        depth: int = 8,
        width: int = 64,
        heads: int = 4,
        *,
        image: int = 32,
        patch: int = 8,
        channels: int = 1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((image // patch) ** 2, width))
        self.blocks = nn.ModuleList(block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images [batch, channels, height, width] to logits [batch, classes]."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        for layer in self.blocks:
            tokens = layer(tokens)
        return self.head(self.norm(tokens).mean(1))
