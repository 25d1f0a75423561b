"""The models of the law table: each row makes a module in training mode and a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

import memplan

from models.sequence import MixtureOfExperts, RecurrentClassifier
from models.vision import Autoencoder, MobileNet, UNet

transformers.utils.logging.set_verbosity_error()

Made = tuple[nn.Module, Any]


def gpt2(layers: int = 3) -> Made:
    """Small width, dropout everywhere, tied embedding; returns loss and logits."""
    config = transformers.GPT2Config(
        n_layer=layers,
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


def vit(layers: int = 2) -> Made:
    """Dropout everywhere; returns loss and logits."""
    config = transformers.ViTConfig(
        hidden_size=96,
        num_hidden_layers=layers,
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


def bert(layers: int = 2) -> Made:
    """Encoder with a masked-language head; dropout; decoder tied to the embedding."""
    config = transformers.BertConfig(
        num_hidden_layers=layers,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=128,
        vocab_size=128,
        max_position_embeddings=64,
    )
    tokens = torch.randint(0, 128, (4, 48))
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    return transformers.BertForMaskedLM(config).train(), batch


def llama(layers: int = 2) -> Made:
    """Grouped-query attention, rotary embedding, RMS norm, gated MLP; no dropout."""
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=128,
        max_position_embeddings=64,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    tokens = torch.randint(0, 128, (4, 64))
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    return transformers.LlamaForCausalLM(config).train(), batch


def t5() -> Made:
    """Encoder and decoder with cross attention, relative positions and dropout."""
    config = transformers.T5Config(
        num_layers=2,
        d_model=48,
        d_kv=12,
        num_heads=4,
        d_ff=96,
        vocab_size=96,
        use_cache=False,
        decoder_start_token_id=0,
    )
    batch = {
        "input_ids": torch.randint(0, 96, (4, 32)),
        "labels": torch.randint(0, 96, (4, 24)),
    }
    return transformers.T5ForConditionalGeneration(config).train(), batch


def convnext() -> Made:
    """Depthwise convolutions, channels-last layer norm, layer scale."""
    config = transformers.ConvNextConfig(
        hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], num_labels=10
    )
    batch = {"pixel_values": torch.randn(4, 3, 64, 64), "labels": torch.randint(0, 10, (4,))}
    return transformers.ConvNextForImageClassification(config).train(), batch


def _classifier(model: nn.Module, *inputs: torch.Tensor, classes: int) -> Made:
    target = torch.randint(0, classes, (inputs[0].shape[0],))
    return memplan.WithLoss(model, nn.functional.cross_entropy), (*inputs, target)


def mobilenet() -> Made:
    """Depthwise convolutions with batch norm."""
    return _classifier(MobileNet(), torch.randn(4, 3, 32, 32), classes=10)


def lstm() -> Made:
    """Two recurrent layers."""
    model = RecurrentClassifier(nn.LSTM)
    return _classifier(model, torch.randint(0, 50, (8, 8)), classes=5)


def gru() -> Made:
    """Two recurrent layers."""
    model = RecurrentClassifier(nn.GRU)
    return _classifier(model, torch.randint(0, 50, (8, 8)), classes=5)


def experts() -> Made:
    """A dense mixture of experts."""
    model = nn.Sequential(MixtureOfExperts(), MixtureOfExperts())
    x = torch.randn(8, 16, 32)
    return memplan.WithLoss(model, nn.functional.mse_loss), (x, torch.randn_like(x))


def unet() -> Made:
    """Long skips, batch norm, ReLU in place."""
    target = torch.randint(0, 4, (2, 32, 32))
    model = memplan.WithLoss(UNet(), nn.functional.cross_entropy)
    return model, (torch.randn(2, 3, 32, 32), target)


def autoencoder() -> Made:
    """Strided and transposed convolutions."""
    return Autoencoder(), torch.randn(4, 3, 32, 32)


def frozen() -> Made:
    """Frozen convolutions and norms over one that trains; pooling and padding of what ends."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)]
    for step in range(4):
        layers += [nn.Conv2d(16, 16, 3, padding=1, bias=step == 0), nn.BatchNorm2d(16), nn.SiLU()]
    layers += [nn.ReflectionPad2d(1), nn.Conv2d(16, 8, 1), nn.SiLU(), nn.MaxPool2d(2), nn.SiLU()]
    layers += [nn.AvgPool2d(2), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)]
    body = nn.Sequential(*layers).train()
    for layer in body[2:-1]:
        layer.eval().requires_grad_(False)
    return _classifier(body, torch.randn(4, 3, 32, 32), classes=10)


class Counting(nn.Module):
    """Writes two buffers in its forward and reads one of them; ties two layers' weights."""

    def __init__(self, wrap: Callable[[torch.Tensor, torch.Tensor], Any], width: int = 32) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(width, width) for _ in range(3))
        self.third.weight = self.first.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.ones(width))
        self.wrap = wrap

    def forward(self, x: torch.Tensor) -> Any:
        """What ``wrap`` makes of loss and states."""
        self.calls += 1
        states = torch.tanh(self.first(x))
        self.average.mul_(0.9).add_(states.detach().mean(0), alpha=0.1)
        states = torch.tanh(self.second(states * self.average))
        states = self.third(torch.nn.functional.dropout(states, 0.1))
        return self.wrap(states.square().mean(), states)


@dataclass
class LossAndStates:
    """What a model may return."""

    loss: torch.Tensor
    states: torch.Tensor


def returns_tuple() -> Made:
    """Loss and more in a tuple."""
    return Counting(lambda loss, states: (states, loss, None)), torch.randn(64, 32)


def returns_dict() -> Made:
    """Loss and more in a dict."""
    return Counting(lambda loss, states: {"loss": loss, "states": states}), torch.randn(64, 32)


def returns_dataclass() -> Made:
    """Loss and more in a dataclass that torch does not know."""
    return Counting(LossAndStates), torch.randn(64, 32)


MODELS: dict[str, Callable[[], Made]] = {
    made.__name__: made
    for made in (
        gpt2, bert, vit, llama, t5, resnet, convnext, mobilenet, lstm, gru, experts, unet,
        autoencoder, mlp, frozen, returns_tuple, returns_dict, returns_dataclass,
    )
}  # fmt: skip

DEEP: dict[str, Callable[[], Made]] = {
    "gpt2": lambda: gpt2(layers=12),
    "bert": lambda: bert(layers=3),
    "vit": lambda: vit(layers=4),
    "llama": lambda: llama(layers=4),
}
"""Rows as deep as the published models, for what takes long and for benchmarks."""
