"""Low-rank adapters: train a small change of a layer's weight, and freeze the rest.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
https://arxiv.org/abs/2106.09685: ``y = x W^T + scale (x A^T) B^T``. Variants: rsLoRA scales by
``alpha / sqrt(rank)`` (Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732); LoRA-FA freezes A,
so x is not saved for it (Zhang et al., 2023, https://arxiv.org/abs/2308.03303); DoRA trains the
magnitude of each output separately from its direction (Liu et al., 2024,
https://arxiv.org/abs/2402.09353, equation 5, the norm a constant).

The adapters are parameters of the planned module, beside the model's own. The model is unchanged
except for ``requires_grad``: only the planned module's forward includes the adapters. Weights
are cast to the type of x where theirs differs, never x to theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import nn

from memplan.analysis import (
    NamedAsLayers,
    Patterns,
    as_texts,
    select_parameters,
    targeted_layers,
)
from memplan.errors import CaptureError, MemplanError
from memplan.passes.lora.layer import (
    LoraLayer,
    LoraSettings,
    can_be_adapted,
    oriented,
    weight_of,
)
from memplan.transforms.module_hooks import after_calls, hang
from memplan.transforms.passes import Change, Effect, ModelContext, Pass, arguments_of

if TYPE_CHECKING:
    from memplan.capture.sample import Sample
    from memplan.runtime.module import PlannedModule

Variant = Literal["lora", "rslora", "lora_fa", "dora"]
VARIANTS: Final = ("lora", "rslora", "lora_fa", "dora")
_CHILD = "lora"


def add_lora(
    rank: int | Literal["fit"] = 8,
    alpha: float = 16.0,
    *,
    dropout: float = 0.0,
    targets: Patterns = "linear",
    variant: Variant = "lora",
    also_train: Patterns = (),
) -> Pass:
    """Train low-rank adapters of layers, and freeze every other parameter.

    Adapters start as no change. They are named ``lora.<layer>.A`` and ``.B`` in the planned
    module, in float32 where the model has 16 bits. ``requires_grad`` is set on the model itself;
    ``unfreeze`` restores it.

    Args:
        rank: rank of a weight's change; "fit": the largest that keeps the budget.
        alpha: scale of the change, times ``1 / rank`` (for rsLoRA: ``1 / sqrt(rank)``).
        dropout: dropout of the adapters' input, in training.
        targets: the layers to adapt: "linear" for all linear ones but the output head; or patterns.
            Linear, Conv2d, Embedding and transformers' Conv1D can be adapted.
        variant: "lora", "rslora", "lora_fa" or "dora".
        also_train: the model's own parameters to train as well: "head", "norms", "biases", ...

    Returns:
        A pass of effect ``RESTRICTED``.

    Raises:
        MemplanError: naming the invalid argument.

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
        >>> planned = memplan.optimize(model, batch, passes=[memplan.passes.add_lora(rank=4)])
        >>> trained = [name for name, p in planned.named_parameters() if p.requires_grad]
        >>> {name.partition(".")[0] for name in trained}
        {'lora'}
    """
    if rank != "fit" and not (isinstance(rank, int) and rank >= 1):
        raise MemplanError(f'rank is a number of at least 1, or "fit", got {rank!r}')
    if not 0 <= dropout < 1:
        raise MemplanError(f"dropout is a probability below 1, got {dropout!r}")
    if variant not in VARIANTS:
        raise MemplanError(f"variant is one of {', '.join(VARIANTS)}, got {variant!r}")
    settings = LoraSettings(
        0 if rank == "fit" else rank,
        float(alpha),
        float(dropout),
        as_texts(targets),
        variant,
        as_texts(also_train),
    )
    if rank == "fit":
        return Pass("add_lora", Effect.RESTRICTED, candidates=partial(_candidates, settings))
    return _made(settings)


def _made(settings: LoraSettings) -> Pass:
    change = partial(_change, settings)
    return Pass("add_lora", Effect.RESTRICTED, arguments_of(settings), change=change)


def _candidates(
    settings: LoraSettings, model: nn.Module, context: ModelContext
) -> tuple[Pass, ...]:
    """The pass at every rank that all layers allow."""
    names = targeted_layers(model, settings.targets, context.forward, can_be_adapted)
    layers = map(model.get_submodule, names)
    largest = min(min(oriented(layer).flatten(1).shape) for layer in layers)
    return tuple(_made(replace(settings, rank=rank)) for rank in range(1, largest + 1))


def _change(settings: LoraSettings, model: nn.Module, context: ModelContext) -> Change:
    names = targeted_layers(model, settings.targets, context.forward, can_be_adapted)
    return Change(
        trains=select_parameters(model, settings.also_train, context.forward),
        modules={_CHILD: Lora(model, names, settings)},
        around=_adapted,
    )


def _adapted(model: nn.Module, sample: Sample, forward: Callable[[], Any]) -> Any:
    """Run a forward in which adapters change the outputs of their layers."""
    del sample
    lora = lora_of(model)
    if lora.merged and torch.is_grad_enabled():
        raise CaptureError(
            "the adapters are merged into the weights: call the module under torch.no_grad(), or "
            "memplan.passes.unmerge_lora(planned) before you train on"
        )
    names = () if lora.merged else lora.names
    with after_calls(model, {name: lora.get_submodule(name) for name in names}):
        return forward()


def lora_of(model: nn.Module) -> Lora:
    """The adapters of a planned module.

    Raises:
        MemplanError: if it has none.
    """
    for name, child in model.named_children():
        if name == _CHILD and isinstance(child, Lora):
            return child
    raise MemplanError("the module has no adapters; plan it with memplan.passes.add_lora()")


class Lora(NamedAsLayers):
    """The adapters of a model, under the names of their layers.

    Attributes:
        names: FQNs of the layers.
        settings: the settings of the adapters.
        merged: the original weights of the layers, if the adapters are merged into them.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...], settings: LoraSettings) -> None:
        super().__init__()
        self.names = names
        self.settings = settings
        self.merged: dict[str, torch.Tensor] = {}
        with torch.random.fork_rng():
            layers = {name: LoraLayer(name, model.get_submodule(name), settings) for name in names}
        hang(self, layers)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The adapters' state, if they are not merged."""
        self.require_apart()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the adapters, if they are not merged."""
        self.require_apart()
        return super().load_state_dict(*args, **kwargs)

    def require_apart(self) -> None:
        """Refuse if the adapters are merged into the weights."""
        if self.merged:
            raise MemplanError(
                "the adapters are merged into the weights: take planned.original.state_dict(), or "
                "memplan.passes.unmerge_lora(planned) first"
            )

    def layer(self, name: str) -> LoraLayer:
        """The adapter of a layer."""
        found = self.get_submodule(name)
        assert isinstance(found, LoraLayer)
        return found


def merge_lora(planned: PlannedModule) -> nn.Module:
    """Add the adapters to the weights of the original, which then computes the same without them.

    The original weights are kept for ``unmerge_lora``. Returns the original.

    Returns:
        The original.

    Raises:
        MemplanError: if there are no adapters, or they are merged already.

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
        >>> planned = memplan.optimize(model, batch, passes=[memplan.passes.add_lora(rank=4)])
        >>> memplan.passes.merge_lora(planned) is model
        True
    """
    lora = lora_of(planned)
    if lora.merged:
        raise MemplanError("the adapters are merged already: memplan.passes.unmerge_lora(planned)")
    for name in lora.names:
        if "weight" not in dict(planned.original.get_submodule(name).named_parameters()):
            raise MemplanError(f"the weight of {name!r} is computed, and cannot be merged into")
    for name in lora.names:
        layer = planned.original.get_submodule(name)
        weight = weight_of(layer).detach()
        lora.merged[name] = weight.clone()
        weight.copy_(lora.layer(name).merged_weight(layer))
    planned.recapture()
    return planned.original


def unmerge_lora(planned: PlannedModule) -> nn.Module:
    """Restore, bit for bit, the weights that ``merge_lora`` changed. Returns the original.

    Returns:
        The original.

    Raises:
        MemplanError: if there are no adapters, or they are not merged.

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
        >>> planned = memplan.optimize(model, batch, passes=[memplan.passes.add_lora(rank=4)])
        >>> _ = memplan.passes.merge_lora(planned)
        >>> memplan.passes.unmerge_lora(planned) is model
        True
    """
    lora = lora_of(planned)
    if not lora.merged:
        raise MemplanError("the adapters are not merged: memplan.passes.merge_lora(planned)")
    for name, weight in lora.merged.items():
        weight_of(planned.original.get_submodule(name)).detach().copy_(weight)
    lora.merged.clear()
    planned.recapture()
    return planned.original
