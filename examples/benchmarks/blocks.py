"""Single blocks of real models with a loss: programs small enough for a proof."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import memplan

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from support import rows

Made = tuple[nn.Module, Any]
_TEXT = {"vocab_size": 128, "use_cache": False}


def _language(model: nn.Module) -> Made:
    tokens = torch.randint(0, 128, (8, 64))
    return model.train(), {"input_ids": tokens, "labels": tokens.clone()}


def gpt2_block() -> Made:
    """One layer of GPT-2 with dropout, and its head."""
    config = transformers.GPT2Config(
        n_layer=1, n_embd=128, n_head=4, bos_token_id=0, eos_token_id=0,
        loss_type="ForCausalLM", **_TEXT,
    )  # fmt: skip
    return _language(transformers.GPT2LMHeadModel(config))


def llama_block() -> Made:
    """One layer of Llama, and its head."""
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=128, num_attention_heads=4, intermediate_size=344,
        bos_token_id=0, eos_token_id=0, **_TEXT,
    )  # fmt: skip
    return _language(transformers.LlamaForCausalLM(config))


def bert_block() -> Made:
    """One layer of BERT with dropout, and its head."""
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=128, num_attention_heads=4, intermediate_size=512,
        vocab_size=128,
    )  # fmt: skip
    return _language(transformers.BertForMaskedLM(config))


def vit_block() -> Made:
    """One layer of a ViT, and its head."""
    config = transformers.ViTConfig(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=512,
        image_size=64, patch_size=8, num_labels=10,
    )  # fmt: skip
    images = torch.randn(8, 3, 64, 64)
    labels = torch.randint(0, 10, (8,))
    model = transformers.ViTForImageClassification(config).train()
    return model, {"pixel_values": images, "labels": labels}


def residual_blocks() -> Made:
    """Two bottlenecks of a ResNet."""
    config = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[64], depths=[2], layer_type="bottleneck", num_labels=10
    )
    images, labels = torch.randn(4, 3, 64, 64), torch.randint(0, 10, (4,))
    model = transformers.ResNetForImageClassification(config).train()
    return model, {"pixel_values": images, "labels": labels}


def mlp() -> Made:
    """Eight linear layers with dropout."""
    layers = [x for _ in range(8) for x in (nn.Linear(256, 256), nn.GELU(), nn.Dropout(0.1))]
    model = memplan.WithLoss(nn.Sequential(*layers), nn.functional.mse_loss)
    return model, (torch.randn(1024, 256), torch.randn(1024, 256))


BLOCKS: dict[str, Callable[[], Made]] = {
    made.__name__: made
    for made in (
        gpt2_block, llama_block, bert_block, vit_block, residual_blocks, mlp, rows.experts,
        rows.autoencoder, rows.frozen,
    )
}  # fmt: skip
