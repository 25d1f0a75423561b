"""The techniques, one file each. A pass is made by its factory: ``add_lora(rank=8)``."""

from collections.abc import Callable
from typing import Final

from memplan.passes.checkpointing import checkpoint_activations
from memplan.passes.dropout import speed_up_dropout
from memplan.passing import Pass

PASSES: Final[dict[str, Callable[..., Pass]]] = {
    "checkpoint_activations": checkpoint_activations,
    "speed_up_dropout": speed_up_dropout,
}
"""Every factory by name."""

DEFAULT_PASSES: Final[tuple[str, ...]] = ("speed_up_dropout", "checkpoint_activations")
"""The EXACT passes that run unless they are turned off, in order."""

__all__ = ["DEFAULT_PASSES", "PASSES", "checkpoint_activations", "speed_up_dropout"]
