"""A masked autoencoder of images: He et al., "Masked Autoencoders Are Scalable Vision Learners"."""

from __future__ import annotations

import torch
from torch import nn


def block(width: int, heads: int) -> nn.TransformerEncoderLayer:
    """A pre-norm transformer block without dropout."""
    return nn.TransformerEncoderLayer(
        width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
    )


class MaskedAutoencoder(nn.Module):
    """Predicts the hidden patches of an image from the visible ones.

    Args:
        depth: blocks of the encoder; the decoder has one.
        width: channels of a token in the encoder.
        heads: number of heads of each attention.
        decoder_width: channels of a token in the decoder.
        image: side of an image in pixels.
        patch: side of a patch in pixels.
        channels: channels of the images.
        mask_ratio: share of hidden patches.
    """

    def __init__(
        self,
        depth: int = 8,
        width: int = 128,
        heads: int = 4,
        *,
        decoder_width: int = 64,
        image: int = 32,
        patch: int = 4,
        channels: int = 1,
        mask_ratio: float = 0.75,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.num_patches = (image // patch) ** 2
        self.num_visible = int(self.num_patches * (1 - mask_ratio))
        self.embed = nn.Linear(channels * patch**2, width)
        self.positions = nn.Parameter(0.02 * torch.randn(self.num_patches, width))
        self.blocks = nn.ModuleList(block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.narrow = nn.Linear(width, decoder_width)
        self.hidden = nn.Parameter(0.02 * torch.randn(decoder_width))
        self.decoder_positions = nn.Parameter(0.02 * torch.randn(self.num_patches, decoder_width))
        self.decoder = block(decoder_width, heads)
        self.predict = nn.Sequential(
            nn.LayerNorm(decoder_width), nn.Linear(decoder_width, channels * patch**2)
        )

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """Images [batch, channels, height, width] to [batch, patches, pixels]."""
        return nn.functional.unfold(images, self.patch, stride=self.patch).transpose(1, 2)

    def features(self, images: torch.Tensor, depth: int) -> torch.Tensor:
        """Features [batch, width] of whole images after some blocks: the mean of all tokens."""
        tokens = self.embed(self.patches(images)) + self.positions
        for layer in self.blocks[:depth]:
            tokens = layer(tokens)
        return tokens.mean(1)

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The mean squared error of the hidden patches: those of most noise, [batch, patches]."""
        order = noise.argsort(dim=1)
        back = order.argsort(dim=1)
        tokens = self.embed(self.patches(images)) + self.positions
        seen = order[:, : self.num_visible, None].expand(-1, -1, tokens.shape[2])
        tokens = tokens.gather(1, seen)
        for layer in self.blocks:
            tokens = layer(tokens)
        tokens = self.narrow(self.norm(tokens))
        hidden = self.hidden.expand(len(tokens), self.num_patches - self.num_visible, -1)
        tokens = torch.cat([tokens, hidden], dim=1)
        tokens = tokens.gather(1, back[..., None].expand(-1, -1, tokens.shape[2]))
        predicted = self.predict(self.decoder(tokens + self.decoder_positions))
        error = (predicted - self.patches(images)).square().mean(2)
        is_hidden = (back >= self.num_visible).to(error.dtype)
        return (error * is_hidden).sum() / is_hidden.sum()
