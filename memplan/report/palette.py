"""A colour for each category, the same in every figure."""

from __future__ import annotations

from memplan.ir.memory_trace import SAVED, TEMPORARY, UNEXPLAINED, WORKSPACE
from memplan.ir.program import Role

# those that are large are of Okabe and Ito's palette, which the colour-blind can tell apart too
LIGHT = {
    Role.PARAMETER.value: "#0072b2",
    Role.BUFFER.value: "#4b5f9e",
    Role.CONSTANT.value: "#8a8f98",
    Role.INPUT.value: "#7a5195",
    Role.OPTIMIZER_STATE.value: "#cc79a7",
    Role.EXISTING_GRADIENT.value: "#8f3d00",
    Role.GRADIENT.value: "#d55e00",
    Role.OUTPUT.value: "#5b6770",
    Role.TANGENT.value: "#b0a58b",
    SAVED: "#56b4e9",
    Role.KEPT.value: "#009e73",
    TEMPORARY: "#e69f00",
    WORKSPACE: "#f0e442",
    UNEXPLAINED: "#1b1f24",
}
"""On a light ground."""

DARK = {
    **LIGHT,
    Role.PARAMETER.value: "#1f78b8",
    Role.BUFFER.value: "#7f93d6",
    Role.INPUT.value: "#a67fc4",
    Role.EXISTING_GRADIENT.value: "#b8622a",
    Role.OUTPUT.value: "#93a1ab",
    WORKSPACE: "#d9ce3f",
    UNEXPLAINED: "#f2f4f7",
}
"""On a dark ground."""

INK = ("#1b1f24", "#e4e7eb")
"""Of text, on a light and on a dark ground."""

GROUND = ("#ffffff", "#16191d")
"""A light and a dark one."""


def css_class(category: str) -> str:
    """The name of a category in a style sheet."""
    return category.replace(" ", "-")
