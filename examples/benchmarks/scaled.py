"""The models of the law table, scaled to steps of about a quarter of a second on two cores.

Each comes with a batch and with the same model under ``torch.utils.checkpoint`` per block, as
do ``budgets.MODELS``, whose four models are the law table's GPT-2, ViT and MLP.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import memplan

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))
import budgets
from budgets import Checkpointed, Scaled

from models.sequence import MixtureOfExperts, RecurrentClassifier
from models.vision import Autoencoder, MobileNet, UNet
from support import rows

_TEXT = {"vocab_size": 2000, "use_cache": False}


def bert() -> Scaled:
    """Six layers of width 192; dropout."""
    config = transformers.BertConfig(
        num_hidden_layers=6, hidden_size=192, num_attention_heads=6, intermediate_size=768,
        vocab_size=2000, max_position_embeddings=128,
    )  # fmt: skip
    return _language(transformers.BertForMaskedLM(config), 10, 128)


def llama() -> Scaled:
    """Eight layers of width 192; no dropout."""
    config = transformers.LlamaConfig(
        num_hidden_layers=8, hidden_size=192, num_attention_heads=6, num_key_value_heads=2,
        intermediate_size=512, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, **_TEXT,
    )  # fmt: skip
    return _language(transformers.LlamaForCausalLM(config), 8, 192)


def t5() -> Scaled:
    """Four layers each of encoder and decoder, width 192; dropout."""
    config = transformers.T5Config(
        num_layers=4, d_model=192, d_kv=32, num_heads=6, d_ff=768, decoder_start_token_id=0, **_TEXT
    )
    return _language(transformers.T5ForConditionalGeneration(config), 6, 128)


def resnet() -> Scaled:
    """Sixteen basic blocks with batch norm."""
    config = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128, 256], depths=[4, 4, 4, 4],
        layer_type="basic", num_labels=10,
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config).train()
    stages = [f"resnet.encoder.stages.{i}.layers" for i in range(4)]
    return _images(model, 24, 128, *stages)


def convnext() -> Scaled:
    """Twelve blocks of depthwise convolutions and layer norms."""
    config = transformers.ConvNextConfig(
        hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 6, 2], num_labels=10
    )
    model = transformers.ConvNextForImageClassification(config).train()
    stages = [f"convnext.encoder.stages.{i}.layers" for i in range(4)]
    return _images(model, 32, 128, *stages)


def mobilenet() -> Scaled:
    """Twelve inverted residuals with batch norm."""
    model, batch = _classifier(MobileNet(24, 12), torch.randn(6, 3, 96, 96), classes=10)
    return model, batch, checkpointed(model, "model.blocks")


def lstm() -> Scaled:
    """Two recurrent layers over 24 tokens."""
    return _recurrent(nn.LSTM, 280)


def gru() -> Scaled:
    """Two recurrent layers over 24 tokens."""
    return _recurrent(nn.GRU, 360)


def experts() -> Scaled:
    """Six dense mixtures of four experts."""
    model = nn.Sequential(*(MixtureOfExperts(128) for _ in range(6)))
    x = torch.randn(28, 128, 128)
    whole = memplan.WithLoss(model, nn.functional.mse_loss)
    return whole, (x, torch.randn_like(x)), checkpointed(whole, "model")


def unet() -> Scaled:
    """Four levels, long skips, batch norm."""
    model = memplan.WithLoss(UNet(width=16, depth=3), nn.functional.cross_entropy)
    batch = (torch.randn(16, 3, 96, 96), torch.randint(0, 4, (16, 96, 96)))
    return model, batch, checkpointed(model, "model.down", "model.merge")


def autoencoder() -> Scaled:
    """Strided and transposed convolutions; a block is a convolution and the layers after it."""
    model = Autoencoder(width=32)
    return model, torch.randn(72, 3, 128, 128), checkpointed(model, "", only=nn.Sequential)


def frozen() -> Scaled:
    """Convolutions and norms, most of them frozen."""
    model, _ = rows.frozen()
    batch = (torch.randn(40, 3, 96, 96), torch.randint(0, 10, (40,)))
    return model, batch, checkpointed(model, "model", only=nn.SiLU | nn.Conv2d | nn.BatchNorm2d)


def counting() -> Scaled:
    """Tied weights, and buffers written in the forward; the whole is one block."""
    model = rows.Counting(lambda loss, states: (states, loss, None), width=512)
    return model, torch.randn(10240, 512), Checkpointed(copy.deepcopy(model))


def checkpointed(model: nn.Module, *paths: str, only: Any = nn.Module) -> nn.Module:
    """A copy with every child of some containers under ``torch.utils.checkpoint``."""
    copied = copy.deepcopy(model)
    for path in paths:
        parent = copied.get_submodule(path)
        for name, child in list(parent.named_children()):
            if isinstance(child, only):
                setattr(parent, name, Checkpointed(child))
    return copied


def _language(model: Any, batch: int, tokens: int) -> Scaled:
    ids = torch.randint(0, 2000, (batch, tokens))
    peer = budgets.hugging_face_peer(model.train())
    return model, {"input_ids": ids, "labels": ids.clone()}, peer


def _images(model: nn.Module, batch: int, size: int, *stages: str) -> Scaled:
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    sample = {"pixel_values": images, "labels": labels}
    return model, sample, checkpointed(model, *stages)


def _classifier(model: nn.Module, x: torch.Tensor, *, classes: int) -> tuple[nn.Module, Any]:
    target = torch.randint(0, classes, (x.shape[0],))
    return memplan.WithLoss(model, nn.functional.cross_entropy), (x, target)


def _recurrent(kind: type[nn.RNNBase], batch_size: int) -> Scaled:
    model, batch = _classifier(
        RecurrentClassifier(kind, width=256), torch.randint(0, 50, (batch_size, 24)), classes=5
    )
    return model, batch, checkpointed(model, "model", only=nn.RNNBase)


MODELS: dict[str, Callable[[], Scaled]] = {
    **budgets.MODELS,
    **{
        made.__name__: made
        for made in (
            bert, llama, t5, resnet, convnext, mobilenet, lstm, gru, experts, unet, autoencoder,
            frozen, counting,
        )
    },
}  # fmt: skip
