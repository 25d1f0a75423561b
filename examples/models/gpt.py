"""A character-level GPT in plain torch, with dropout."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Pre-norm attention and MLP.

    Args:
        width: width of the residual stream.
        heads: number of attention heads.
        dropout: probability, in attention and on both branches.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape [batch, time, width] to the same."""
        batch, time, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        probability = self.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=probability
        )
        attended = attended.transpose(1, 2).reshape(batch, time, width)
        x = x + functional.dropout(self.projection(attended), self.dropout, self.training)
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Next-character prediction; returns the loss.

    Args:
        vocabulary: number of characters.
        context: length of the longest sequence.
        depth: number of blocks.
        width: width of the residual stream.
        heads: number of attention heads.
        dropout: probability.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        *,
        depth: int = 6,
        width: int = 192,
        heads: int = 6,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of ``targets`` [batch, time] given ``tokens`` [batch, time]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token(tokens) + self.position(positions))
        logits = self.head(self.norm(self.blocks(x)))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
