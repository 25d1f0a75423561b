"""Reversible residual blocks: streams restored from later ones."""

from memplan.passes.reversible.invert import check_drift, invert_couplings
from memplan.passes.reversible.two_streams import make_reversible

__all__ = ["check_drift", "invert_couplings", "make_reversible"]
