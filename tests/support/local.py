"""Models that are chains of blocks, and what learning in parts is in eager."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import cross_entropy

import memplan

SMALLEST = memplan.Options(on_infeasible="smallest")


class Residual(nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return x + self.inside(x)


def conv_block(channels=8):
    return Residual(
        nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )
    )


class ResNet(nn.Module):
    """Blocks with batch norm; the second half at half the resolution."""

    def __init__(self, depth):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Sequential(*[conv_block() for _ in range(depth // 2)])
        self.pool = nn.MaxPool2d(2)
        self.second = nn.ModuleList([conv_block() for _ in range(depth - depth // 2)])
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.pool(self.first(self.stem(x)))
        for block in self.second:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Logits(nn.Module):
    """A model of transformers that returns logits alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def resnet(depth=8):
    batch = (torch.randn(4, 3, 32, 32), torch.randint(10, (4,)))
    return memplan.WithLoss(ResNet(depth), cross_entropy), batch


def vit(depth=4):
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=10,
        hidden_dropout_prob=0.1,
    )
    model = Logits(transformers.ViTForImageClassification(config))
    batch = (torch.randn(4, 3, 32, 32), torch.randint(10, (4,)))
    return memplan.WithLoss(model, cross_entropy).train(), batch


def next_token(logits, tokens):
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gpt(depth=4, tied=False):
    config = transformers.GPT2Config(
        n_layer=depth,
        n_embd=32,
        n_head=4,
        vocab_size=64,
        n_positions=32,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=tied,
    )
    tokens = torch.randint(0, 64, (4, 32))
    model = Logits(transformers.GPT2LMHeadModel(config))
    return memplan.WithLoss(model, next_token).train(), (tokens, tokens)


MODELS = {"resnet": resnet, "vit": vit, "gpt": gpt}


def made(name, **settings):
    torch.manual_seed(0)
    return MODELS[name](**settings)


def in_eager(planned, batch, seed=1):
    """The sum of the detached local losses, and these: by hooks of torch's own, without memplan."""
    model, heads = planned.original, planned.local_losses
    losses = []

    def end(number):
        def hook(module, args, output):
            first = output[0] if isinstance(output, tuple) else output
            losses.append(heads.get_submodule(str(number))(first, memplan.Sample.of(batch)))
            if isinstance(output, tuple):
                return tuple(one.detach() for one in output)
            return output.detach()

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(end(number))
        for number, name in enumerate(heads.names)
    ]
    torch.manual_seed(seed)
    own = model(*batch)
    for handle in handles:
        handle.remove()
    total = own
    for weight, loss in zip(heads.weights, losses, strict=True):
        total = total + weight * loss
    return total, [*losses, own]


def assert_as_in_eager(planned, batch, seed=1):
    """Law 1: the loss, all gradients, the buffers and the random state."""
    other = copy.deepcopy(planned)
    planned.zero_grad()
    other.zero_grad()
    total, losses = in_eager(other, batch, seed)
    total.backward()
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    mine = planned(*batch)
    mine.backward()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(mine, total)
    for (name, one), two in zip(planned.named_parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        assert one.grad is None or torch.equal(one.grad, two.grad), name
    for (name, one), two in zip(planned.named_buffers(), other.named_buffers(), strict=True):
        if not name.startswith("local_losses"):
            assert torch.equal(one, two[1]), name
    assert torch.equal(planned.local_losses.last, torch.stack(losses).detach())


def refused(message):
    return pytest.raises(memplan.MemplanError, match=message)
