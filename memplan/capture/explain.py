"""Explanations of why a module cannot be captured."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import torch
from torch import nn

_DATA_DEPENDENT = frozenset(
    {"GuardOnDataDependentSymNode", "DataDependentOutputException", "DynamicOutputShapeException"}
)
"""Names of torch's errors for code that needs the values of tensors."""

_NO_DATA = ("its data is not allocated yet", ".tolist() is not supported for tensor subclasses")
"""Texts of the errors of code that reads values itself."""


def is_data_dependent(error: BaseException) -> bool:
    """Tell whether an error means that code asked for tensors' values where there are none."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & _DATA_DEPENDENT) or any(text in str(error) for text in _NO_DATA)


def _is_the_users(file: Path) -> bool:
    """Tell whether code is neither memplan's, nor torch's, nor Python's own."""
    own = (Path(__file__).parent.parent, Path(torch.__file__).parent)
    is_pythons = Path(os.__file__).parent in file.parents and "site-packages" not in file.parts
    return not (str(file).startswith("<") or is_pythons or any(one in file.parents for one in own))


def explain(error: Exception, module: nn.Module) -> str:
    """The failure, its place in the user's code, and a remedy."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if _is_the_users(Path(frame.filename))
    ]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    text = str(error).strip()
    cause = text.splitlines()[0].rstrip(".") if text else type(error).__name__
    advice = "Does the untouched module run on this sample? If it does, please report this."
    if "set_" in cause:
        cause = "the forward gives a tensor the memory of another (set_), which a trace cannot hold"
        advice = "Write into the tensor, x.copy_(...), or make a new one, x = ..."
    if is_data_dependent(error):
        cause = "this needs the values of tensors that follow from parameters or random numbers"
        if "dynamic" in type(error).__name__.lower():
            cause = f"the size of what {text} returns depends on the values of tensors"
        advice = (
            "A captured forward must not branch on such values, nor use them as sizes; rewrite "
            "that line, or plan a part of the model."
        )
    return f"{type(module).__name__} cannot be captured{where}: {cause}. {advice}"
