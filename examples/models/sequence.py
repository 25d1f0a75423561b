"""Small models over sequences: a recurrent classifier and a mixture of experts."""

from __future__ import annotations

import torch
from torch import nn


class RecurrentClassifier(nn.Module):
    """Embedding, recurrent layers, linear head.

    Args:
        kind: ``nn.LSTM`` or ``nn.GRU``.
        vocabulary: number of tokens.
        width: width of the hidden state.
        classes: number of output classes.
    """

    def __init__(
        self, kind: type[nn.RNNBase], *, vocabulary: int = 50, width: int = 32, classes: int = 5
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.recurrent = kind(width, width, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens [batch, time] to logits [batch, classes]."""
        states, _ = self.recurrent(self.embedding(tokens))
        return self.head(states[:, -1])


class MixtureOfExperts(nn.Module):
    """A dense mixture: every expert runs on every token, weighted by a softmax gate."""

    def __init__(self, width: int = 32, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape in and out: [batch, time, width]."""
        weights = self.gate(x).softmax(dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return x + (outputs * weights.unsqueeze(-2)).sum(dim=-1)
