"""The models of the law table: each row makes a module in training mode and a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

import memplan

transformers.utils.logging.set_verbosity_error()

Made = tuple[nn.Module, Any]


def gpt2() -> Made:
    """Twelve layers of small width, dropout everywhere, tied embedding; returns loss and logits."""
    config = transformers.GPT2Config(
        n_layer=12,
        n_embd=64,
        n_head=4,
        vocab_size=256,
        n_positions=64,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    tokens = torch.randint(0, 256, (4, 64))
    model = transformers.GPT2LMHeadModel(config)
    return model.train(), {"input_ids": tokens, "labels": tokens.clone()}


def vit() -> Made:
    """Four layers, dropout everywhere; returns loss and logits."""
    config = transformers.ViTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=48,
        patch_size=8,
        num_labels=10,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    batch = {"pixel_values": torch.randn(8, 3, 48, 48), "labels": torch.randint(0, 10, (8,))}
    return transformers.ViTForImageClassification(config).train(), batch


def mlp() -> Made:
    """A plain ``nn.Sequential`` with dropout."""
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(128, 128), nn.GELU(), nn.Dropout(0.1)]
    model = memplan.WithLoss(
        nn.Sequential(*layers, nn.Linear(128, 10)), nn.functional.cross_entropy
    )
    return model, (torch.randn(512, 128), torch.randint(0, 10, (512,)))


def resnet() -> Made:
    """Batch norm: statistics are written in the forward."""
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=10
    )
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.randint(0, 10, (4,))}
    return transformers.ResNetForImageClassification(config).train(), batch


MODELS: dict[str, Callable[[], Made]] = {"gpt2": gpt2, "vit": vit, "mlp": mlp, "resnet": resnet}
