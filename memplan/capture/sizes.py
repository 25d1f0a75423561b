"""Functions whose results have sizes that follow from values, called with the sizes instead.

Each takes ``ask``, which answers a question about tensors, and the user's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Ask = Callable[..., Any]
"""``ask(question, *tensors)``: the question's result for the tensors' values."""


def _one_hot(ask: Ask, function: Callable[..., Any], tensor: Any, num_classes: int = -1) -> Any:
    return function(tensor, num_classes if num_classes >= 0 else ask(_num_classes, tensor))


def _bincount(
    ask: Ask,
    function: Callable[..., Any],
    input: torch.Tensor,
    weights: torch.Tensor | None = None,
    minlength: int = 0,
) -> Any:
    if weights is not None:
        return function(input, weights, minlength)
    size = max(ask(_num_classes, input), minlength)
    counts = torch.zeros(size, dtype=torch.int64, device=input.device)
    return counts.scatter_add(0, input.long(), torch.ones_like(input, dtype=torch.int64))


def _repeat_interleave(
    ask: Ask,
    function: Callable[..., Any],
    input: Any,
    repeats: Any = None,
    dim: int | None = None,
    *,
    output_size: int | None = None,
) -> Any:
    counts = input if repeats is None else repeats
    if not isinstance(counts, torch.Tensor) or output_size is not None:
        return function(input, repeats, dim, output_size=output_size)
    if repeats is None:
        return function(input, output_size=ask(_sum, input))
    if counts.numel() == 1:
        return function(input, ask(_only, counts), dim)
    return function(input, repeats, dim, output_size=ask(_sum, counts))


def _ctc_loss(ask: Ask, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    given = {**_CTC_DEFAULTS, **dict(zip(_CTC_NAMES, args, strict=False)), **kwargs}
    tensor, reduction = given["target_lengths"], given["reduction"]
    for name in ("input_lengths", "target_lengths"):
        if isinstance(given[name], torch.Tensor):
            given[name] = ask(_as_list, given[name])
    if reduction not in ("mean", _MEAN) or not isinstance(tensor, torch.Tensor):
        return function(*(given[name] for name in _CTC_NAMES))
    # The kernel for lists makes a tensor of them, which a trace cannot.
    given["reduction"] = "none" if isinstance(reduction, str) else 0
    losses = function(*(given[name] for name in _CTC_NAMES))
    return (losses / tensor.to(losses.dtype).clamp_min(1)).mean()


_CTC_NAMES = (
    "log_probs",
    "targets",
    "input_lengths",
    "target_lengths",
    "blank",
    "reduction",
    "zero_infinity",
)
_CTC_DEFAULTS = {"blank": 0, "reduction": "mean", "zero_infinity": False}
_MEAN = 1
"""Torch's own code for a reduction by the mean."""


def _tensor_split(
    ask: Ask,
    function: Callable[..., Any],
    input: torch.Tensor,
    indices_or_sections: Any = None,
    dim: int = 0,
    **kwargs: Any,
) -> Any:
    places = kwargs.get("tensor_indices_or_sections", indices_or_sections)
    if isinstance(places, torch.Tensor):
        return function(input, ask(_only if places.dim() == 0 else _as_list, places), dim)
    return function(input, indices_or_sections, dim, **kwargs)


def _masked_select(
    ask: Ask, function: Callable[..., Any], input: torch.Tensor, mask: torch.Tensor
) -> Any:
    input, mask = torch.broadcast_tensors(input, mask)  # type: ignore[no-untyped-call]
    if mask.dim() == 0:
        return function(input, mask)
    places = torch.nonzero_static(mask, size=ask(_count, mask))
    return input[places.unbind(1)]


def _unique(
    ask: Ask, function: Callable[..., Any], input: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    given = {**_UNIQUE, **dict(zip(_UNIQUE, args, strict=False)), **kwargs}
    is_plain = given["sorted"] and given["dim"] is None and not input.is_floating_point()
    if not is_plain or not input.numel():
        return function(input, **given)
    ordered, order = input.detach().reshape(-1).sort()
    values, run, counts = _runs(ask, ordered)
    inverse = torch.empty_like(run).scatter(0, order, run).view(input.shape)
    return _asked_for(given, values, inverse, counts)


def _unique_consecutive(
    ask: Ask, function: Callable[..., Any], input: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    given = {**_CONSECUTIVE, **dict(zip(_CONSECUTIVE, args, strict=False)), **kwargs}
    if given["dim"] is not None or input.requires_grad or not input.numel():
        return function(input, **given)
    values, run, counts = _runs(ask, input.reshape(-1))
    return _asked_for(given, values, run.view(input.shape), counts)


_CONSECUTIVE = {"return_inverse": False, "return_counts": False, "dim": None}
_UNIQUE = {"sorted": True, **_CONSECUTIVE}


def _runs(ask: Ask, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The value of each run of equal entries, each entry's run number, and the runs' lengths."""
    first = torch.ones(1, dtype=torch.bool, device=row.device)
    begins = torch.cat([first, row[1:] != row[:-1]])
    places = torch.nonzero_static(begins, size=ask(_count, begins)).squeeze(1)
    ends = torch.cat([places[1:], places.new_full((1,), len(row))])
    return row[places], begins.cumsum(0) - 1, ends - places


def _asked_for(
    given: Mapping[str, Any], values: torch.Tensor, inverse: torch.Tensor, counts: torch.Tensor
) -> Any:
    found = [values]
    found += [inverse] if given["return_inverse"] else []
    found += [counts] if given["return_counts"] else []
    return tuple(found) if len(found) > 1 else values


def _count(mask: torch.Tensor) -> int:
    return int(mask.count_nonzero())


def _num_classes(tensor: torch.Tensor) -> int:
    return int(tensor.max()) + 1 if tensor.numel() else 0


def _sum(tensor: torch.Tensor) -> int:
    return int(tensor.sum())


def _only(tensor: torch.Tensor) -> int:
    return int(tensor)


def _as_list(tensor: torch.Tensor) -> list[int]:
    return [int(one) for one in tensor.reshape(-1).tolist()]


SIZED_BY_VALUES: Mapping[str, Callable[..., Any]] = {
    "bincount": _bincount,
    "ctc_loss": _ctc_loss,
    "masked_select": _masked_select,
    "one_hot": _one_hot,
    "repeat_interleave": _repeat_interleave,
    "tensor_split": _tensor_split,
    "unique": _unique,
    "unique_consecutive": _unique_consecutive,
}
"""Replacements, by the name of the called function."""
