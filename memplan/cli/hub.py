"""``hf:config.json``: a transformers model from a configuration file, without weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from memplan.cli.failures import described
from memplan.torch_internals import is_fake

HUB = "hf:"

_BATCH_SIZE = 1
_SEQ_LEN = 512


def model_of_config(
    path: Path, arguments: Mapping[str, object]
) -> tuple[nn.Module, dict[str, torch.Tensor], None]:
    """The architecture named by a configuration, in training mode, and a batch for it.

    Args:
        path: a ``config.json`` as transformers saves it.
        arguments: ``batch_size`` (1), ``seq_len`` (512) or fields of the configuration.

    Raises:
        click.UsageError: if the file is missing, corrupt, or names no architecture.
    """
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{path} cannot be read as a configuration: {error}") from error
    transformers = _transformers()
    names = fields.get("architectures") if isinstance(fields, dict) else None
    if not names or "model_type" not in fields:
        raise click.UsageError(
            f"{path} needs the fields 'model_type' and 'architectures', as in "
            '"architectures": ["LlamaForCausalLM"]'
        )
    kind = getattr(transformers, str(names[0]), None)
    if kind is None:
        raise click.UsageError(f"{path}: transformers has no architecture {names[0]!r}")
    given = {"use_cache": False, **arguments}
    batch_size, seq_len = (
        _size(given.pop(name, default), name)
        for name, default in (("batch_size", _BATCH_SIZE), ("seq_len", _SEQ_LEN))
    )
    try:
        config = transformers.AutoConfig.for_model(**{**fields, **given})
    except Exception as error:
        raise click.UsageError(f"{path}: {described(error)}") from error
    # Weights without data are not initialised; some initialisers read their values.
    is_without_data = is_fake(torch.empty(0))
    skip = transformers.initialization.no_init_weights
    with skip() if is_without_data else contextlib.nullcontext():
        model = kind(config).train()
    return model, _batch(config, batch_size, seq_len, str(names[0])), None


def _transformers() -> Any:
    try:
        import transformers  # noqa: PLC0415 - for this kind of target alone
    except ImportError as error:
        raise click.UsageError("hf: needs transformers; pip install transformers") from error
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    return transformers


def _size(value: object, name: str) -> int:
    if not isinstance(value, int) or value < 1:
        raise click.UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def _batch(config: Any, batch_size: int, seq_len: int, name: str) -> dict[str, torch.Tensor]:
    fields = config.to_dict()
    if "vocab_size" in fields:
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.long)
        is_classifier = name.endswith("ForSequenceClassification")
        labels = torch.zeros(batch_size, dtype=torch.long) if is_classifier else tokens.clone()
        return {"input_ids": tokens, "labels": labels}
    if "num_channels" in fields:
        size = fields.get("image_size") or 224
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        pixels = torch.zeros(batch_size, int(fields["num_channels"]), *sides)
        return {"pixel_values": pixels, "labels": torch.zeros(batch_size, dtype=torch.long)}
    raise click.UsageError(
        f"memplan knows no batch for {name}; write a factory that returns (model, batch)"
    )
