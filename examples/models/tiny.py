"""A tiny model of any architecture of transformers, and a batch for it, by one recipe."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

SMALL: Mapping[str, int] = {
    r"num_(key_value|kv)_heads|num_(kv|key_value)_groups|multi_query_group_num|n_kv_heads": 2,
    r".*(attention_heads|n_head|num_heads|n_heads|num_query_heads|linear_num_.*_heads)": 4,
    r".*(hidden_layers|encoder_layers|decoder_layers|num_layers|n_layers?|num_blocks)": 2,
    r".*(kv_lora_rank|q_lora_rank)": 16,
    r".*(head_dim|d_kv|dim_head|attention_head_size)": 8,
    r".*(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|d_inner|dim_feedforward)": 64,
    r".*(hidden_size|d_model|n_embd|hidden_dim|embed_dim|embedding_size|projection_dim|dim)": 32,
    r".*vocab.*size": 128,
    r".*(max_position_embeddings|n_positions|max_seq_len|n_ctx)": 64,
    r".*(max_source_positions|max_target_positions)": 64,
    r".*(image_size|input_size)": 32,
    r"patch_size": 8,
    r".*(num_experts|n_routed_experts|num_local_experts)": 4,
    r".*(num_experts_per_tok|n_shared_experts|moe_topk)": 2,
    r"(n_group|topk_group)": 1,
}
"""Largest values of configuration fields, by name; the first match counts."""

TASKS = (
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "CTC",
    "TIME_SERIES_PREDICTION",
)
"""Heads with a loss, in order of preference; else the bare model is used."""

_FOLLOW_OTHER_FIELDS = frozenset({"layer_types", "mlp_layer_types", "dtype", "architectures"})
_MOST_PARAMETERS = 20_000_000


class RecipeError(Exception):
    """An architecture for which the recipe makes no model."""


def model_types() -> list[str]:
    """All architectures, in alphabetical order."""
    return sorted(CONFIG_MAPPING_NAMES, key=str.lower)


class Trainable(nn.Module):
    """Returns the loss of a model, or, where it has none, the mean square of its first output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        """The loss."""
        output = self.model(**batch)
        loss = output.get("loss")
        if loss is not None:
            return loss
        return next(
            tensor.square().mean()
            for tensor in output.to_tuple()
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad
        )


def tiny_model(model_type: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model in training mode that returns its loss, and a batch.

    Raises:
        RecipeError: if the architecture has no model of its own, or is still large.
        Exception: any error of transformers at incompatible sizes.
    """
    config = _shrunk(transformers.AutoConfig.for_model(model_type))
    if "use_cache" in config.to_dict():
        config.use_cache = False
    for task in (*TASKS, ""):
        classes = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING" if task else "MODEL_MAPPING")
        if type(config) in classes:
            break
    else:
        raise RecipeError("no model of its own: a part of others")
    found = classes[type(config)]
    with torch.device("meta"):
        large = (found[0] if isinstance(found, tuple) else found)(config)
    if sum(parameter.numel() for parameter in large.parameters()) > _MOST_PARAMETERS:
        raise RecipeError("the recipe does not make it small")
    model = type(large)(config)
    return Trainable(model).train(), _batch(model, config, task)


def _shrunk(config: Any) -> Any:
    """The same configuration with small sizes."""
    changed: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        held = getattr(config, name, None)
        if isinstance(held, transformers.PretrainedConfig):
            changed[name] = _shrunk(held).to_dict()
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            sizes = [size for pattern, size in SMALL.items() if re.fullmatch(pattern, name)]
            if sizes:
                changed[name] = min(sizes[0], value)
            elif name.endswith("_token_id") and value >= 128:
                changed[name] = 1
    return type(config)(**{n: v for n, v in changed.items() if n not in _FOLLOW_OTHER_FIELDS})


def _batch(model: nn.Module, config: Any, task: str) -> dict[str, torch.Tensor]:
    """The inputs of the model's forward, by the names of its arguments."""
    names = inspect.signature(model.forward).parameters
    vocabulary = getattr(config.get_text_config(), "vocab_size", 128)
    tokens = torch.randint(2, max(vocabulary - 2, 3), (2, 16))
    vision = getattr(config, "vision_config", config)
    image_size = getattr(vision, "image_size", 32)
    height = image_size if isinstance(image_size, int) else image_size[0]
    channels = getattr(vision, "num_channels", 3)
    made = {
        "input_ids": tokens,
        "pixel_values": torch.randn(2, channels, height, height),
        "input_values": torch.randn(2, 4000),
        "input_features": torch.randn(2, getattr(config, "num_mel_bins", 80), 128),
        "labels": tokens.clone(),
    }
    if task.endswith("CLASSIFICATION"):
        made["labels"] = torch.randint(0, config.num_labels, (2,))
    if "labels" not in names:
        made["decoder_input_ids"] = tokens.clone()
    return {name: tensor for name, tensor in made.items() if name in names}
