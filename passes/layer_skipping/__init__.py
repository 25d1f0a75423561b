"""Layers that some samples, or some calls, skip."""

from memplan.passes.layer_skipping.gates import skipped_flops
from memplan.passes.layer_skipping.layer_skipping import skip_layers

__all__ = ["skip_layers", "skipped_flops"]
