"""Residual networks whose skipping can be written down by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import memplan
from memplan.passes import skip_layers

from support.local import SMALLEST

DEPTH = 4

MODES = {
    "subset": {"mode": "subset", "rate": 0.4},
    "blocks": {"mode": "blocks", "rate": 0.5},
    "decaying": {"mode": "blocks", "rate": 0.5, "linear_decay": True},
    "gated": {"mode": "gated", "capacity": 0.5},
    "recurrent": {"mode": "gated", "capacity": 0.25, "gate": "recurrent"},
}


class Attention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    """Two branches."""

    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.attention = Attention(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x)


class Net(nn.Module):
    """Tokens to classes."""

    def __init__(self, depth=DEPTH, width=16, dropout=0.0):
        super().__init__()
        self.stem = nn.Linear(8, width)
        self.blocks = nn.ModuleList([Block(width, dropout) for _ in range(depth)])
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def net_and_batch(depth=DEPTH, width=16, dropout=0.1, batch=8, tokens=5):
    torch.manual_seed(0)
    model = memplan.WithLoss(Net(depth, width, dropout), cross_entropy).train()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, tokens, 8, generator=generator)
    return model, (x, torch.randint(4, (batch,), generator=generator))


def on_parts(model, batch, rate):
    """DINOv2's way: each branch on a random part of the batch."""
    x, labels = batch
    net, count = model.model, len(x)
    kept = count - round(rate * count)

    def added(x, function):
        chosen = torch.randperm(count)[:kept]
        return torch.index_add(x, 0, chosen, function(x[chosen]), alpha=count / kept)

    x = net.stem(x)
    for block in net.blocks:
        x = added(added(x, block.attention), block.mlp)
    return cross_entropy(net.head(x.mean(1)), labels)


def without(model, batch, skipped, scales):
    """The blocks that are not skipped, their branches scaled."""
    x, labels = batch
    net = model.model
    x = net.stem(x)
    for number, block in enumerate(net.blocks):
        if f"model.blocks.{number}" not in skipped:
            x = torch.add(x, block.attention(x), alpha=scales[number])
            x = torch.add(x, block.mlp(x), alpha=scales[number])
    return cross_entropy(net.head(x.mean(1)), labels)


def through_gates(planned, batch, capacity, cost):
    """Each block on the samples with the highest scores, gradients straight through."""
    x, labels = batch
    net, child = planned.original.model, planned.layer_skipping
    count = round(capacity * len(x))
    x = net.stem(x)
    losses, state = [], None
    for gate, block in zip(child.gates, net.blocks, strict=True):
        scores = gate(x.detach().mean(1))
        if child.settings.gate == "recurrent":
            hidden, memory = state or (torch.zeros_like(scores), torch.zeros_like(scores))
            i, f, g, o = child.cell(torch.cat([scores, hidden], 1)).chunk(4, 1)
            memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
            state = (o.sigmoid() * memory.tanh(), memory)
            scores = child.last(state[0])
        scores = scores[:, 0]
        chosen = scores.topk(count).indices
        mask = torch.zeros(len(x)).index_fill(0, chosen, 1.0)
        losses.append(nn.functional.binary_cross_entropy_with_logits(scores, mask))
        p = scores.sigmoid()
        hard = mask + p - p.detach()
        every = torch.stack([one if on else x[n] for n, (one, on) in _each(block, x, mask)])
        x = x + hard.view(-1, 1, 1) * mask.view(-1, 1, 1) * (every - x)
    loss = cross_entropy(net.head(x.mean(1)), labels)
    return loss + cost * torch.stack(losses).mean()


def _each(block, x, mask):
    return enumerate((block(x[n : n + 1])[0], bool(mask[n])) for n in range(len(x)))


def planned_net(mode, *, budget=None, dropout=0.1, **others):
    model, batch = net_and_batch(dropout=dropout)
    passes = [skip_layers(**{**MODES[mode], **others})]
    return memplan.optimize(model, batch, budget=budget, passes=passes, options=SMALLEST), batch


class InPlace(nn.Module):
    """Adds the stream to the change in place, as torchvision writes it."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        out = self.two(self.one(x))
        out += x
        return out


def optimized(model, batch, **arguments):
    return memplan.optimize(model, batch, passes=[skip_layers(**arguments)])
