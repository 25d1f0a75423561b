"""A colour for each category, the same in every figure."""

from __future__ import annotations

from memplan.ir.memory_trace import SAVED, TEMPORARY, UNEXPLAINED, WORKSPACE
from memplan.ir.program import Role

# the large categories use Okabe and Ito's palette, which colour-blind readers can tell apart
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
"""Colours on a light background."""

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
"""Colours on a dark background."""

INK = ("#1b1f24", "#e4e7eb")
"""Text colours, on a light and on a dark background."""

GROUND = ("#ffffff", "#16191d")
"""A light and a dark background."""


def css_class(category: str) -> str:
    """A category's class name in a style sheet."""
    return category.replace(" ", "-")
