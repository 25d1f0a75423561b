"""Layer skipping: residual branches that are neither computed nor stored.

Three ways, all with shapes that do not depend on data, so that the plan stays exact:

* "subset": each branch runs on a random part of the batch (Oquab et al., "DINOv2", 2023,
  https://arxiv.org/abs/2304.07193, section 5, efficient stochastic depth);
* "blocks": of L blocks a random m are skipped in a step (after Huang et al., "Deep Networks with
  Stochastic Depth", 2016, https://arxiv.org/abs/1603.09382, whose number of blocks is random);
* "gated": a small gate for each block picks the samples that go through it (Wang et al., "SkipNet",
  2018, https://arxiv.org/abs/1711.09485; Wang et al., "E2-Train", 2019,
  https://arxiv.org/abs/1910.13349, section 3.2), here a fixed number of each batch (Raposo et al.,
  "Mixture-of-Depths", 2024, https://arxiv.org/abs/2404.02258).
"""

from __future__ import annotations

from typing import Final, Literal

from memplan.analysis import Patterns, as_texts
from memplan.errors import MemplanError
from memplan.passes.layer_skipping.batch_subset import skip_parts
from memplan.passes.layer_skipping.block_skipping import skip_blocks
from memplan.passes.layer_skipping.gates import GATES, Gate, skip_by_gates
from memplan.transforms.passes import Effect, Pass

Mode = Literal["subset", "blocks", "gated"]
MODES: Final = ("subset", "blocks", "gated")
_RATES: Final = {"subset": 0.4, "blocks": 0.5}


def skip_layers(
    mode: Mode = "subset",
    rate: float | None = None,
    *,
    capacity: float | None = None,
    at: Patterns = (),
    batch_norm: bool = False,
    linear_decay: bool = False,
    seed: int = 0,
    gate: Gate = "linear",
    cost: float = 0.01,
) -> Pass:
    """Skip a part of the work of residual networks in training.

    Calls without gradients, and in evaluation, are those of the original in the modes "subset" and
    "blocks". With gates, evaluation skips too: each sample on its own.

    Args:
        mode: "subset", "blocks" or "gated".
        rate: share that is skipped: of the batch (0.4 by default), or of the blocks (0.5). 0 is the
            unchanged model.
        capacity: for "gated": share of the batch that goes through a block (0.5).
        at: for "blocks" and "gated": the blocks, as names, globs or types. By default modules of
            which a list of modules has several of a type.
        batch_norm: for "subset": allow batch norm in a branch, with statistics of the part that it
            runs on.
        linear_decay: for "blocks": the later a block, the more often it is skipped.
        seed: for "blocks": seed of the choices.
        gate: for "gated": "linear" (pooled, one linear layer), or "recurrent" (pooled, and a small
            LSTM that all blocks share).
        cost: for "gated": weight of the gates' own loss, the cross entropy with the choices, which
            moves them towards the capacity.

    Returns:
        A pass of effect ``STOCHASTIC``, or, with gates, ``APPROXIMATE``.

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
        >>> one = memplan.passes.skip_layers("subset", rate=0.5)
        >>> planned = memplan.optimize(model, batch, passes=[one])
        >>> planned.plan.peak_bytes < memplan.plan(model, batch).peak_bytes
        True
    """
    if mode not in MODES:
        raise MemplanError(f"mode is one of {', '.join(MODES)}, got {mode!r}")
    if mode == "gated":
        _refuse("rate", rate is not None, mode, "capacity is the share that is not skipped")
    else:
        _refuse("capacity", capacity is not None, mode, "rate is the share that is skipped")
        rate = _share(_RATES[mode] if rate is None else rate)
    _refuse("batch_norm", batch_norm and mode != "subset", mode)
    _refuse("linear_decay", linear_decay and mode != "blocks", mode)
    _refuse("at", bool(as_texts(at)) and mode == "subset", mode)
    if rate == 0:
        return Pass("skip_layers", Effect.EXACT, {"mode": mode, "rate": 0.0})
    if mode == "subset":
        assert rate is not None
        return skip_parts(rate, batch_norm)
    if mode == "blocks":
        assert rate is not None
        return skip_blocks(rate, as_texts(at), linear_decay, seed)
    if gate not in GATES:
        raise MemplanError(f"gate is one of {', '.join(GATES)}, got {gate!r}")
    if not cost >= 0:
        raise MemplanError(f"cost is a weight of at least 0, got {cost!r}")
    capacity = 0.5 if capacity is None else capacity
    if not 0 < capacity <= 1:
        raise MemplanError(f"capacity is a share, 0 < capacity <= 1, got {capacity!r}")
    return skip_by_gates(float(capacity), as_texts(at), gate, float(cost))


def _share(rate: float) -> float:
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise MemplanError(f"rate is the share that is skipped, 0 <= rate < 1, got {rate!r}")
    return float(rate)


def _refuse(name: str, is_given: bool, mode: str, reason: str = "") -> None:
    if is_given:
        raise MemplanError(
            f"{name} does not go with mode={mode!r}{f': there, {reason}' if reason else ''}"
        )
