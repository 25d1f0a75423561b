"""A forward that computes nothing, for code that watches its calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from memplan.capture.explain import is_data_dependent
from memplan.capture.isolation import unchanged_randomness, without_data_of
from memplan.capture.module_state import unchanged_attributes, unchanged_tensors
from memplan.capture.sample import Sample


def run_without_data(model: nn.Module, sample: Sample, *, with_gradients: bool = False) -> Any:
    """Run one forward without data, or with data if it asks for values; return its output.

    The model is unchanged.
    """
    with (
        torch.set_grad_enabled(with_gradients),
        unchanged_randomness(),
        unchanged_tensors(model),
        unchanged_attributes(model),
    ):
        try:
            with without_data_of(model, sample) as (given, _):
                return model(*given.args, **given.kwargs)
        except Exception as error:
            if not is_data_dependent(error):
                raise
            return model(*sample.args, **sample.kwargs)
