"""Why a module cannot be captured, in words."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import nn

_DATA_DEPENDENT = frozenset(
    {"GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException"}
)
"""Names of torch's errors that mean: this needs the values of tensors."""


def is_data_dependent(error: BaseException) -> bool:
    """Whether an error means that the values of tensors were asked for, where there are none."""
    return any(kind.__name__ in _DATA_DEPENDENT for kind in type(error).__mro__)


def explain(error: Exception, module: nn.Module) -> str:
    """What failed, where in the user's code, and what to do."""
    own = Path(__file__).parent.parent
    site = Path(torch.__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<")
        and own not in Path(frame.filename).parents
        and site not in Path(frame.filename).parents
    ]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    text = str(error).strip()
    cause = text.splitlines()[0].rstrip(".") if text else type(error).__name__
    advice = "Does the untouched module run on this sample?"
    if is_data_dependent(error):
        cause = "this needs the values of tensors that follow from parameters or random numbers"
        if "dynamic" in type(error).__name__.lower():
            cause = f"the size of what {text} returns depends on the values of tensors"
        advice = (
            "A captured forward must not branch on such values, nor use them as sizes; rewrite "
            "that line, or plan a part of the model."
        )
    return f"{type(module).__name__} cannot be captured{where}: {cause}. {advice}"
