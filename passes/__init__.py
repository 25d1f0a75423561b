"""The techniques, one file or folder each. A factory makes each pass: ``add_lora(rank=8)``."""

from collections.abc import Callable
from typing import Final

from memplan.passes.adapters import add_adapters
from memplan.passes.checkpointing import checkpoint_activations
from memplan.passes.dead_operands import drop_dead_operands
from memplan.passes.dropout import split_dropout
from memplan.passes.freezing import freeze, train_biases_only, unfreeze
from memplan.passes.in_place import reuse_operands
from memplan.passes.layer_skipping import skip_layers, skipped_flops
from memplan.passes.local_learning import learn_locally
from memplan.passes.lora import (
    add_lora,
    load_lora,
    lora_like,
    merge_lora,
    save_lora,
    unmerge_lora,
)
from memplan.passes.minibatch_dropping import drop_minibatches
from memplan.passes.packed_masks import pack_masks
from memplan.passes.reversible import check_drift, invert_couplings, make_reversible
from memplan.passes.signs import keep_signs
from memplan.transforms.passes import Pass

PASSES: Final[dict[str, Callable[..., Pass]]] = {
    "add_adapters": add_adapters,
    "add_lora": add_lora,
    "checkpoint_activations": checkpoint_activations,
    "drop_dead_operands": drop_dead_operands,
    "drop_minibatches": drop_minibatches,
    "freeze": freeze,
    "invert_couplings": invert_couplings,
    "keep_signs": keep_signs,
    "learn_locally": learn_locally,
    "make_reversible": make_reversible,
    "pack_masks": pack_masks,
    "reuse_operands": reuse_operands,
    "skip_layers": skip_layers,
    "split_dropout": split_dropout,
    "train_biases_only": train_biases_only,
}
"""All factories by name."""

DEFAULT_PASSES: Final[tuple[str, ...]] = (
    "split_dropout",
    "drop_dead_operands",
    "keep_signs",
    "reuse_operands",
    "checkpoint_activations",
    "pack_masks",
)
"""The EXACT passes that run unless they are turned off, in order."""

__all__ = [
    "DEFAULT_PASSES",
    "PASSES",
    "add_adapters",
    "add_lora",
    "check_drift",
    "checkpoint_activations",
    "drop_dead_operands",
    "drop_minibatches",
    "freeze",
    "invert_couplings",
    "keep_signs",
    "learn_locally",
    "load_lora",
    "lora_like",
    "make_reversible",
    "merge_lora",
    "pack_masks",
    "reuse_operands",
    "save_lora",
    "skip_layers",
    "skipped_flops",
    "split_dropout",
    "train_biases_only",
    "unfreeze",
    "unmerge_lora",
]
