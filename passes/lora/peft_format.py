"""Adapters on disk in peft's format: ``adapter_model.safetensors`` and ``adapter_config.json``.

Compatible with peft 0.19.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memplan.errors import MemplanError

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object]
) -> None:
    """Write tensors, by their names in the model that peft wraps, and the configuration."""
    contents = {
        f"{_PREFIX}{name}": tensor.detach().cpu().contiguous().clone()
        for name, tensor in tensors.items()
    }
    safetensors = _safetensors()
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(contents, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by their names in the model that peft wraps.

    Raises:
        MemplanError: if there is none.
    """
    _require(folder / _WEIGHTS)
    contents = _safetensors().load_file(folder / _WEIGHTS)
    return {name.removeprefix(_PREFIX): tensor for name, tensor in contents.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter.

    Raises:
        MemplanError: if there is none, or it is not for LoRA.
    """
    _require(folder / _CONFIG)
    config = json.loads((folder / _CONFIG).read_text())
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise MemplanError(f"{folder / _CONFIG} is no configuration of LoRA")
    return config


def _require(path: Path) -> None:
    if not path.is_file():
        raise MemplanError(f"{path} is missing; an adapter is a folder with {_WEIGHTS}, {_CONFIG}")


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise MemplanError(
            "adapter files need safetensors: pip install 'memplan[adapters]'"
        ) from error
