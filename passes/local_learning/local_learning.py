"""Block-wise local learning: each part of a model learns from a loss of its own.

The forward is cut into parts; no gradient passes a cut. At the end of each part but the last, a
small head predicts the target from the part's output, and its loss trains the part: Belilovsky et
al., "Decoupled Greedy Learning of CNNs", 2019, https://arxiv.org/abs/1901.08164. If the input is
reconstructed as well, the early parts keep more of what later ones need: Wang et al., "Revisiting
Locally Supervised Learning", 2021, https://arxiv.org/abs/2101.10832.

The gradients of parts do not meet, so a fused step completes one part, and frees what it saved,
before the next begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import nn

from memplan.analysis import Cut, Patterns, as_texts, balanced, find_cuts, select_modules
from memplan.errors import MemplanError
from memplan.passes.local_learning.heads import (
    HEADS,
    Head,
    HeadKind,
    like,
    local_loss,
    reconstructing,
)
from memplan.passes.local_learning.masked_images import MaskedImage
from memplan.transforms.module_hooks import after_calls, detached, first_tensor, with_loss
from memplan.transforms.passes import Change, Effect, ModelContext, Pass, arguments_of

if TYPE_CHECKING:
    from memplan.analysis.cuts import BlockChain
    from memplan.capture.sample import Sample

_CHILD: Final = "local_losses"
_OWN: Final = "a callable"


def learn_locally(
    blocks: int | Literal["fit"] = 4,
    head: HeadKind | Head = "linear",
    at: Patterns = (),
    *,
    weights: Sequence[float] = (1.0, 1.0),
    reconstruction: float = 0.0,
    mask_ratio: float = 0.75,
) -> Pass:
    """Train the parts of a model one after the other, each with a loss of its own.

    Calls with gradients return the sum of all losses; each loss is in
    ``planned.local_losses.last``. Without gradients the model is unchanged. Heads are parameters
    named ``local_losses.<part>`` beside the model's own, and an optimizer must hold them:
    ``memplan.optimize(..., optimizer=AdamW)``, or one over ``planned.parameters()``.

    Args:
        blocks: number of parts, cut between blocks so that what each saves is balanced in bytes;
            "fit": the fewest that keep the budget.
        head: "linear": pooled, and one linear layer (for tokens, one for each of them); "conv": a
            small convolutional one. Both predict what the model predicts, and need a model wrapped
            in ``memplan.WithLoss``. "masked_image": a light decoder for a masked autoencoder (BIM)
            that is called with images and noise. Or a callable that takes a part's output, as an
            example without data, and the part's number, and returns a function or module from the
            output and the model's inputs to a scalar.
        at: cut after these modules instead (names, globs or types).
        weights: weights of the first and the last head's loss; linear between. The model's own
            loss has weight 1.
        reconstruction: weight of the first part's error in reconstructing the input (an image);
            it falls to zero at the model's own loss.
        mask_ratio: for "masked_image": the model's share of hidden patches.

    Returns:
        A pass of effect ``APPROXIMATE``: early parts do not learn what later ones would need.

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
        >>> one = memplan.passes.learn_locally(blocks=2)
        >>> planned = memplan.optimize(model, batch, passes=[one])
        >>> planned(*batch).backward()
        >>> len(planned.local_losses.last)
        2
    """
    if blocks != "fit" and not (isinstance(blocks, int) and blocks >= 1):
        raise MemplanError(f'blocks is a number of at least 1, or "fit", got {blocks!r}')
    if isinstance(head, str) and head.startswith(_OWN):
        raise MemplanError(
            "the plan was made with a head of your own, which is not saved: plan anew, with "
            "learn_locally(head=...)"
        )
    if isinstance(head, str) and head not in HEADS:
        raise MemplanError(
            f"head is one of {', '.join(HEADS)}, or a callable that makes a loss, got {head!r}"
        )
    if not 0 < mask_ratio < 1:
        raise MemplanError(f"mask_ratio is a share between 0 and 1, got {mask_ratio!r}")
    if not isinstance(weights, Sequence) or len(weights) != 2 or not min(weights) >= 0:
        raise MemplanError(f"weights are the first head's and the last's, got {weights!r}")
    if not reconstruction >= 0:
        raise MemplanError(f"reconstruction is a weight of at least 0, got {reconstruction!r}")
    if blocks == "fit" and as_texts(at):
        raise MemplanError('blocks="fit" chooses the cuts, and at= names them: give one of the two')
    settings = _LocalSettings(
        0 if blocks == "fit" else blocks,
        head,
        as_texts(at),
        (float(weights[0]), float(weights[1])),
        float(reconstruction),
        float(mask_ratio),
    )
    if blocks == "fit":
        return Pass(
            "learn_locally",
            Effect.APPROXIMATE,
            candidates=partial(_candidates, settings),
            is_ordered=False,
            is_fused=True,
        )
    return _made(settings)


@dataclass(frozen=True, slots=True)
class _LocalSettings:
    blocks: int
    head: HeadKind | Head
    at: tuple[str, ...]
    weights: tuple[float, float]
    reconstruction: float
    mask_ratio: float


def _made(settings: _LocalSettings) -> Pass:
    head = settings.head
    name = head if isinstance(head, str) else f"{_OWN}, {getattr(head, '__name__', '')}"
    arguments = {**arguments_of(settings), "head": name}
    return Pass(
        "learn_locally",
        Effect.APPROXIMATE,
        arguments,
        change=partial(_change, settings),
        is_fused=True,
    )


def _candidates(
    settings: _LocalSettings, model: nn.Module, context: ModelContext
) -> tuple[Pass, ...]:
    """Passes from the most parts possible down to one; heads take memory, so more may not fit."""
    most = len(_allowed(find_cuts(model, context.forward_with_gradients))) + 1
    return tuple(_made(replace(settings, blocks=blocks)) for blocks in range(most, 0, -1))


def _change(settings: _LocalSettings, model: nn.Module, context: ModelContext) -> Change:
    chain = find_cuts(model, context.forward_with_gradients)
    cuts = _chosen(settings, model, context, chain)
    with torch.random.fork_rng():
        losses = [_loss(settings, model, chain, cuts, number) for number in range(len(cuts))]
    names = tuple(cut.name for cut in cuts)
    modules = {_CHILD: LocalLosses(names, losses, _weights(settings, len(cuts)), chain.device)}
    return Change(modules=modules, around=_locally, is_for_gradients=True)


def _loss(
    settings: _LocalSettings, model: nn.Module, chain: BlockChain, cuts: Sequence[Cut], number: int
) -> nn.Module:
    example = cuts[number].example
    if settings.head == "masked_image":
        return like(model, MaskedImage(example, chain.inputs, settings.mask_ratio))
    loss = local_loss(settings.head, model, example, number, chain.outputs.get("model"))
    if not settings.reconstruction:
        return loss
    weight = settings.reconstruction * (1 - number / len(cuts))
    return like(model, reconstructing(loss, example, chain.inputs[0], weight))


def _allowed(chain: BlockChain) -> tuple[Cut, ...]:
    """Cuts between blocks.

    Raises:
        MemplanError: if there are none, or only those that tie parameters.
    """
    untied = tuple(cut for cut in chain.blocks if not cut.ties)
    if not untied and chain.blocks:
        raise _tied(chain.blocks[0])
    if not untied:
        name, reason = next(iter(chain.blocked.items()), ("", ""))
        raise MemplanError(
            "the forward is no chain of blocks: after none of its modules does all that follows "
            "depend on their output alone"
            + (f" (after {name!r}, for one, {reason})" if name else "")
        )
    return untied


def _tied(cut: Cut) -> MemplanError:
    return MemplanError(
        f"{', '.join(map(repr, cut.ties))} is used before and after {cut.name!r}, and the parts "
        "would train it against each other: untie it (in transformers: "
        "tie_word_embeddings=False), or freeze it"
    )


def _chosen(
    settings: _LocalSettings, model: nn.Module, context: ModelContext, chain: BlockChain
) -> tuple[Cut, ...]:
    if settings.at:
        return _named(settings.at, model, context, chain)
    if settings.blocks == 1:
        return ()
    allowed = _allowed(chain)
    if settings.blocks - 1 > len(allowed):
        places = ", ".join(cut.name for cut in allowed[:4])
        raise MemplanError(
            f"blocks={settings.blocks}, and the forward has {len(allowed) + 1} blocks: it can be "
            f"cut after {places}{', ...' if len(allowed) > 4 else ''}"
        )
    return balanced(allowed, chain.saved_bytes, settings.blocks)


def _named(
    patterns: tuple[str, ...], model: nn.Module, context: ModelContext, chain: BlockChain
) -> tuple[Cut, ...]:
    wanted = select_modules(model, patterns, context.forward)
    cuts = tuple(cut for cut in chain.cuts if cut.name in wanted)
    for name in sorted(wanted - {cut.name for cut in cuts}):
        reason = chain.blocked.get(name, "it is not called, or ends where another module does")
        raise MemplanError(f"the forward cannot be cut after {name!r}: {reason}")
    for cut in cuts:
        if cut.ties:
            raise _tied(cut)
    return cuts


def _weights(settings: _LocalSettings, count: int) -> tuple[float, ...]:
    """Weights of the heads' losses."""
    first, last = settings.weights
    steps = max(count - 1, 1)
    return tuple(first + number / steps * (last - first) for number in range(count))


class LocalLosses(nn.Module):
    """The heads of a model's parts, numbered from 0.

    Attributes:
        names: FQNs of the modules after which the forward is cut.
        weights: weights of the heads' losses.
        last: ``[parts]``, the losses of the last call with gradients, unweighted; the model's own
            comes last.
    """

    last: torch.Tensor

    def __init__(
        self,
        names: tuple[str, ...],
        losses: Sequence[nn.Module],
        weights: tuple[float, ...],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.names = names
        self.weights = weights
        for number, one in enumerate(losses):
            self.add_module(str(number), one)
        self.register_buffer("last", torch.zeros(len(names) + 1, device=device), persistent=False)

    def loss_of(self, number: int, x: torch.Tensor, sample: Sample) -> torch.Tensor:
        """The loss of one part.

        Raises:
            MemplanError: if it is not a scalar.
        """
        loss = self.get_submodule(str(number))(x, sample)
        if not isinstance(loss, torch.Tensor) or loss.dim() or not loss.is_floating_point():
            found = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise MemplanError(
                f"the head of part {number} (after {self.names[number]!r}) must return a scalar "
                f"loss, a tensor of shape [], and returned {found}"
            )
        return loss


def _locally(model: nn.Module, sample: Sample, forward: Callable[[], Any]) -> Any:
    """Run a forward with cuts, and return the sum of all losses."""
    if not torch.is_grad_enabled():
        return forward()
    heads = model.get_submodule(_CHILD)
    assert isinstance(heads, LocalLosses)
    found: list[torch.Tensor] = []

    def end(layer: nn.Module, x: torch.Tensor, output: Any) -> Any:
        del layer, x
        found.append(heads.loss_of(len(found), first_tensor(output), sample))
        return detached(output)

    def add(loss: torch.Tensor) -> torch.Tensor:
        heads.last.copy_(torch.stack([one.detach().to(heads.last) for one in (*found, loss)]))
        for weight, one in zip(heads.weights, found, strict=True):
            loss = loss + (one if weight == 1 else weight * one)
        return loss

    with after_calls(model, dict.fromkeys(heads.names, end)):
        output = forward()
    return with_loss(output, add)
