"""The techniques, one file each. A pass is made by its factory: ``add_lora(rank=8)``."""

from collections.abc import Callable
from typing import Final

from memplan.passes.checkpointing import checkpoint_activations
from memplan.passes.dead_operands import drop_dead_operands
from memplan.passes.dropout import split_dropout
from memplan.passes.in_place import reuse_operands
from memplan.passes.packed_masks import pack_masks
from memplan.passes.reversible import check_drift, invert_couplings
from memplan.passes.two_streams import make_reversible
from memplan.passing import Pass

PASSES: Final[dict[str, Callable[..., Pass]]] = {
    "checkpoint_activations": checkpoint_activations,
    "drop_dead_operands": drop_dead_operands,
    "invert_couplings": invert_couplings,
    "make_reversible": make_reversible,
    "pack_masks": pack_masks,
    "reuse_operands": reuse_operands,
    "split_dropout": split_dropout,
}
"""Every factory by name."""

DEFAULT_PASSES: Final[tuple[str, ...]] = (
    "split_dropout",
    "drop_dead_operands",
    "reuse_operands",
    "checkpoint_activations",
    "pack_masks",
)
"""The EXACT passes that run unless they are turned off, in order."""

__all__ = [
    "DEFAULT_PASSES",
    "PASSES",
    "check_drift",
    "checkpoint_activations",
    "drop_dead_operands",
    "invert_couplings",
    "make_reversible",
    "pack_masks",
    "reuse_operands",
    "split_dropout",
]
