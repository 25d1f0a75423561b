"""Stand-in for a gradient that was used up."""

from __future__ import annotations

from typing import Any

import torch

from memplan.errors import PlanMismatch


class SpentGradient(torch.Tensor):
    """A gradient's shape without memory; reading or writing it raises why (torch 2.13-2.15)."""

    def __new__(cls, parameter: torch.Tensor) -> SpentGradient:
        made: SpentGradient = torch.Tensor._make_wrapper_subclass(
            cls, parameter.shape, dtype=parameter.dtype, device=parameter.device
        )
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "a gradient that was used in the backward"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise PlanMismatch(
            f"{func} needs gradients that are gone: with Options(update_in_backward=True) each "
            "parameter is updated inside backward(), and its gradient freed. Clipping by the norm "
            "of all gradients, a GradScaler, and whatever else looks at them, need that option "
            "left out."
        )
