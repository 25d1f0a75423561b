"""Freezing: train biases alone, or all but chosen parameters.

Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", 2022, https://arxiv.org/abs/2106.10199, trains biases alone. The savings beside
gradients and optimizer state depend on the layers around: a linear layer whose weight is frozen
saves no input, but the activation function after it saves its own; a convolution saves its input in
eager torch, but not here (``drop_dead_operands``). Before the first trained layer nothing is saved
at all.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from memplan.analysis import Patterns, as_texts, called_modules, select_parameters
from memplan.errors import MemplanError
from memplan.transforms.passes import Change, Effect, ModelContext, Pass

if TYPE_CHECKING:
    from memplan.runtime.module import PlannedModule


def train_biases_only(also_train: Patterns = ()) -> Pass:
    """Train biases, and freeze every other parameter.

    ``requires_grad`` is set on the model itself; ``unfreeze`` restores it.

    Args:
        also_train: other parameters to train: "norms", "head", or other patterns.

    Returns:
        A pass of effect ``RESTRICTED``.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = memplan.WithLoss(net, nn.functional.cross_entropy)
        >>> batch = torch.randn(4, 8), torch.randint(2, (4,))
        >>> planned = memplan.optimize(model, batch, passes=[memplan.passes.train_biases_only()])
        >>> [name for name, one in planned.named_parameters() if one.requires_grad]
        ['model.0.bias', 'model.2.bias']
    """
    also = as_texts(also_train)
    return Pass(
        "train_biases_only",
        Effect.RESTRICTED,
        {"also_train": list(also)} if also else {},
        change=partial(_train_only, ("biases", *also)),
    )


def freeze(patterns: Patterns = (), blocks: int = 0) -> Pass:
    """Freeze some parameters.

    ``requires_grad`` is set on the model itself; ``unfreeze`` restores it.

    Args:
        patterns: patterns of modules or parameters.
        blocks: freeze so many blocks from the start, all that is called before the next, and
            parameters that the modules around the blocks own directly. Blocks are the members of
            the longest ``nn.ModuleList`` or ``nn.Sequential`` of one type.

    Returns:
        A pass of effect ``RESTRICTED``.

    Raises:
        MemplanError: if nothing is named.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = memplan.WithLoss(net, nn.functional.cross_entropy)
        >>> batch = torch.randn(4, 8), torch.randint(2, (4,))
        >>> planned = memplan.optimize(model, batch, passes=[memplan.passes.freeze("model.0")])
        >>> [name for name, one in planned.named_parameters() if one.requires_grad]
        ['model.2.weight', 'model.2.bias']
    """
    texts = as_texts(patterns)
    if not texts and blocks < 1:
        raise MemplanError(
            'freeze() needs what to freeze: patterns, as in freeze("embeddings"), or blocks=2'
        )
    arguments = {"patterns": list(texts)} if texts else {}
    return Pass(
        "freeze",
        Effect.RESTRICTED,
        {**arguments, "blocks": blocks} if blocks else arguments,
        change=partial(_freeze, texts, blocks),
    )


def unfreeze(planned: PlannedModule) -> nn.Module:
    """Restore the ``requires_grad`` that the original's parameters had before planning.

    The planned module plans again at its next call; an optimizer that it was planned with must
    then hold all trained parameters. Returns the original.

    Returns:
        The original.

    Example:
        >>> import memplan, torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = memplan.WithLoss(net, nn.functional.cross_entropy)
        >>> batch = torch.randn(4, 8), torch.randint(2, (4,))
        >>> planned = memplan.optimize(model, batch, passes=[memplan.passes.freeze("model.0")])
        >>> all(one.requires_grad for one in memplan.passes.unfreeze(planned).parameters())
        True
    """
    named = dict(planned.original.named_parameters())
    for name, required in planned.changed.required_grad.items():
        named[name].requires_grad_(required)
    return planned.original


def _train_only(patterns: tuple[str, ...], model: nn.Module, context: ModelContext) -> Change:
    return Change(trains=select_parameters(model, patterns, context.forward))


def _freeze(
    patterns: tuple[str, ...], blocks: int, model: nn.Module, context: ModelContext
) -> Change:
    found = select_parameters(model, patterns, context.forward)
    if blocks:
        found |= _up_to(model, blocks, context)
    return Change(freezes=found)


def _up_to(model: nn.Module, blocks: int, context: ModelContext) -> frozenset[str]:
    """Parameters of the first blocks, and of all that a forward calls before the next one."""
    chain = _longest_chain(model)
    if blocks > len(chain):
        raise MemplanError(f"blocks={blocks}, and the model has {len(chain)}: {chain[:1]} and on")
    calls = called_modules(model, context.forward)
    later = [calls.index(name) for name in chain[blocks:] or chain[-1:] if name in calls]
    if not later:
        raise MemplanError(f"the forward calls none of {', '.join(chain[blocks:])} as a module")
    before = calls[: min(later)]
    around = {name for name in ("", *before) if not name or chain[0].startswith(f"{name}.")}
    frozen = tuple(f"{name}." for name in {*chain[:blocks], *before} - around)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return frozenset(
        name for name in names if name.startswith(frozen) or name.rpartition(".")[0] in around
    )


def _longest_chain(model: nn.Module) -> list[str]:
    """FQNs of the members of the longest list of modules of one type.

    Raises:
        MemplanError: if none has two or more.
    """
    chains = [
        [f"{name}.{member}" if name else member for member, _ in holder.named_children()]
        for name, holder in model.named_modules()
        if isinstance(holder, nn.ModuleList | nn.Sequential)
        and len({type(child) for child in holder.children()}) == 1
    ]
    longest = max(chains, key=len, default=[])
    if len(longest) < 2:
        raise MemplanError(
            "freeze(blocks=...) found no nn.ModuleList or nn.Sequential of several modules of one "
            "type; name what to freeze instead: freeze(patterns)"
        )
    return longest
