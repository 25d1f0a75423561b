"""LoRA adapters in peft's files: written for peft, and read from it.

peft's format holds the adapters and whole modules trained beside them, nothing finer. In peft
LoRA-FA is an optimizer, and its files are LoRA's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memplan.analysis import is_conv1d
from memplan.errors import MemplanError
from memplan.passes.lora.layer import LoraLayer, LoraSettings
from memplan.passes.lora.lora import add_lora, lora_of
from memplan.passes.lora.peft_format import read_adapter, read_config, write_adapter
from memplan.transforms.passes import Pass
from memplan.with_loss import WithLoss

if TYPE_CHECKING:
    from memplan.runtime.module import PlannedModule


_OTHER_WEIGHTS = frozenset({"pissa", "olora", "loftq", "corda"})


def save_lora(planned: PlannedModule, folder: str | Path, *, inside: str | None = None) -> None:
    """Write the adapters for ``peft.PeftModel.from_pretrained(model, folder)``.

    Args:
        planned: a module planned with ``add_lora``.
        folder: the folder to write to; created if missing.
        inside: FQN of the module that peft will wrap; None: the planned module's original, or the
            model inside it if that is a ``WithLoss``.

    Raises:
        MemplanError: if there are no adapters, or peft's format cannot hold what is trained.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.branch = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        ...     def forward(self, x):
        ...         return x + self.branch(x)
        >>> blocks = nn.Sequential(*(Block() for _ in range(4)))
        >>> model = memplan.WithLoss(blocks, nn.functional.mse_loss)
        >>> batch = torch.randn(64, 32), torch.randn(64, 32)
        >>> import tempfile
        >>> planned = memplan.optimize(model, batch, passes=[memplan.passes.add_lora(rank=4)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     memplan.passes.save_lora(planned, folder)
        ...     memplan.passes.load_lora(planned, folder)
    """
    lora, prefix = lora_of(planned), _prefix(planned.original, inside)
    tensors, targets = {}, []
    for name in lora.names:
        targets.append(_without(prefix, name))
        layer = planned.original.get_submodule(name)
        for key, tensor in _tensors(lora.layer(name), layer).items():
            tensors[f"{targets[-1]}.{key}"] = tensor
    whole = _trained_modules(planned)
    for name in whole:
        for key, parameter in planned.original.get_submodule(name).named_parameters():
            tensors[f"{_without(prefix, name)}.{key}"] = parameter
    layers = [planned.original.get_submodule(name) for name in lora.names]
    saved = [_without(prefix, name) for name in whole]
    config = _config(lora.settings, targets, saved, any(map(is_conv1d, layers)))
    write_adapter(Path(folder), tensors, config)


def load_lora(planned: PlannedModule, folder: str | Path, *, inside: str | None = None) -> None:
    """Load adapters that ``save_lora`` or peft wrote into a planned module.

    Args:
        planned: planned with ``add_lora`` of the same rank, scale and targets; see ``lora_like``.
        folder: the folder of the adapters.
        inside: as in ``save_lora``.

    Raises:
        MemplanError: if they are not for this module, naming the first difference.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.branch = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        ...     def forward(self, x):
        ...         return x + self.branch(x)
        >>> blocks = nn.Sequential(*(Block() for _ in range(4)))
        >>> model = memplan.WithLoss(blocks, nn.functional.mse_loss)
        >>> batch = torch.randn(64, 32), torch.randn(64, 32)
        >>> import tempfile
        >>> planned = memplan.optimize(model, batch, passes=[memplan.passes.add_lora(rank=4)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     memplan.passes.save_lora(planned, folder)
        ...     memplan.passes.load_lora(planned, folder)
    """
    lora, prefix = lora_of(planned), _prefix(planned.original, inside)
    lora.require_apart()
    settings, theirs = lora.settings, _settings(read_config(Path(folder)))
    for name in ("rank", "alpha", "scale"):
        if getattr(settings, name) != theirs[name]:
            raise MemplanError(
                f"the adapter in {folder} has {name} {theirs[name]}, this module "
                f"{getattr(settings, name)}: plan it with memplan.passes.lora_like({str(folder)!r})"
            )
    given = read_adapter(Path(folder))
    wanted: dict[str, torch.Tensor] = {}
    for name in lora.names:
        layer = planned.original.get_submodule(name)
        for key, tensor in _tensors(lora.layer(name), layer).items():
            wanted[f"{_without(prefix, name)}.{key}"] = tensor
    for name in _trained_modules(planned):
        for key, parameter in planned.original.get_submodule(name).named_parameters():
            wanted[f"{_without(prefix, name)}.{key}"] = parameter
    # peft adds the model's own embeddings where one is adapted.
    unknown = [one for one in given if one not in wanted and ".base_layer." not in one]
    for problem, names in (("misses", wanted.keys() - given.keys()), ("has, besides,", unknown)):
        if names:
            raise MemplanError(f"the adapter in {folder} {problem} {min(names)!r}")
    for name, tensor in wanted.items():
        if tensor.shape != given[name].shape:
            raise MemplanError(
                f"{name!r} is {tuple(given[name].shape)} in {folder}, expected "
                f"{tuple(tensor.shape)}"
            )
    for name, tensor in wanted.items():
        tensor.detach().copy_(given[name])


def lora_like(folder: str | Path, **changes: Any) -> Pass:
    """Make the ``add_lora`` that fits an adapter written by peft or ``save_lora``.

    Args:
        folder: the folder of the adapter.
        changes: arguments of ``add_lora`` to override.

    Returns:
        A pass of effect ``RESTRICTED``.

    Raises:
        MemplanError: if its configuration has something that ``add_lora`` lacks.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.branch = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
        ...     def forward(self, x):
        ...         return x + self.branch(x)
        >>> blocks = nn.Sequential(*(Block() for _ in range(4)))
        >>> model = memplan.WithLoss(blocks, nn.functional.mse_loss)
        >>> batch = torch.randn(64, 32), torch.randn(64, 32)
        >>> import tempfile
        >>> planned = memplan.optimize(model, batch, passes=[memplan.passes.add_lora(rank=4)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     memplan.passes.save_lora(planned, folder)
        ...     memplan.passes.lora_like(folder).arguments["rank"]
        4
    """
    config = read_config(Path(folder))
    settings, names = _settings(config), list(read_adapter(Path(folder)))
    targets = [
        f"name:{found[1]}"
        for name in names
        if (found := re.fullmatch(r"(.+)\.lora_(?:embedding_A|A\.weight)", name))
    ]
    whole = (name for name in names if ".lora_" not in name and ".base_layer." not in name)
    also = sorted({f"name:{name.rpartition('.')[0]}" for name in whole})
    arguments = {name: settings[name] for name in ("rank", "alpha", "dropout", "variant")}
    return add_lora(**{**arguments, "targets": targets, "also_train": also, **changes})


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings in peft's configuration, in our terms.

    Raises:
        MemplanError: if it has something that ``add_lora`` lacks.
    """
    for name in ("rank_pattern", "alpha_pattern", "layers_to_transform", "target_parameters"):
        if config.get(name):
            raise MemplanError(f"the adapter's {name} is not supported: {config[name]}")
    if config.get("init_lora_weights") in _OTHER_WEIGHTS:
        raise MemplanError(
            f"the adapter was made with init_lora_weights={config['init_lora_weights']!r}, which "
            "changes the weights of the model itself; merge it with peft"
        )
    variant = "rslora" if config.get("use_rslora") else "lora"
    if config.get("use_dora"):
        variant = "dora"
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    dropout = float(config.get("lora_dropout", 0.0))
    scale = LoraSettings(rank, alpha, dropout, (), variant, ()).scale
    return {"rank": rank, "alpha": alpha, "dropout": dropout, "variant": variant, "scale": scale}


def _config(
    settings: LoraSettings, targets: list[str], saved: list[str], is_transposed: bool
) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        # A list of names would also match names that end in one.
        "target_modules": "|".join(map(re.escape, targets)),
        "modules_to_save": saved or None,
        "use_rslora": settings.variant == "rslora",
        "use_dora": settings.variant == "dora",
        "fan_in_fan_out": is_transposed,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }


def _tensors(adapter: LoraLayer, layer: nn.Module) -> dict[str, torch.Tensor]:
    """An adapter's tensors, by their names in peft."""
    is_embedding = isinstance(layer, nn.Embedding)
    a, b = (
        ("lora_embedding_A", "lora_embedding_B")
        if is_embedding
        else (
            "lora_A.weight",
            "lora_B.weight",
        )
    )
    tensors: dict[str, torch.Tensor] = {a: adapter.A, b: adapter.B}
    if adapter.magnitude is not None:
        shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        tensors["lora_magnitude_vector"] = adapter.magnitude.view(shape)
    return tensors


def _trained_modules(planned: PlannedModule) -> list[str]:
    """FQNs of the original's modules that are trained whole.

    Raises:
        MemplanError: for a trained parameter in a module that is not trained whole.
    """
    found = []
    for name, module in planned.original.named_modules():
        own = list(module.parameters(recurse=False))
        if any(parameter.requires_grad for parameter in own):
            if not (name and all(one.requires_grad for one in module.parameters())):
                raise MemplanError(
                    f"only a part of {name!r} is trained, which peft's format cannot hold; it "
                    "holds whole modules"
                )
            found.append(name)
    return found


def _prefix(original: nn.Module, inside: str | None) -> str:
    if inside is None:
        inside = "model" if isinstance(original, WithLoss) else ""
    original.get_submodule(inside)
    return f"{inside}." if inside else ""


def _without(prefix: str, name: str) -> str:
    if not name.startswith(prefix):
        raise MemplanError(f"{name!r} is trained, and is not inside of {prefix.rstrip('.')!r}")
    return name.removeprefix(prefix)
