"""Linearity of gradients in the gradient that arrives at the loss, in every bit.

Those of torch's own functions are. A backward of the user's own, or a hook that clamps gradients,
need not be; and in float16 a scale decides what underflows on the way.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable

import torch
from torch import fx

from memplan.capture.node_info import source_of, target_name
from memplan.torch_internals import OpOverload


def _names(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text))


_MOVES = _names("""
    view _unsafe_view reshape permute transpose t expand squeeze unsqueeze slice select clone copy
    _to_copy alias detach as_strided split split_with_sizes unbind index index_select gather
    diagonal flip roll repeat unfold contiguous constant_pad_nd slice_backward select_backward
    diagonal_backward unfold_backward neg sum mean cumsum tril triu view_as_real view_as_complex
    zeros_like ones_like new_zeros new_ones new_empty_strided new_full full_like empty_like
""")
"""Ops on one tensor; each entry of the result is a sum of its entries or independent of them."""

_JOINS = _names("""
    cat stack scatter scatter_add index_put _unsafe_index_put index_add slice_scatter
    select_scatter as_strided_scatter
""")
"""Ops on several tensors, whose entries the result has."""

_PRODUCTS = _names("mul mm bmm matmul dot mv convolution linear")
_SUMS = _names("add sub")
_SUMS_OF_PRODUCTS = _names("addmm baddbmm addmv")
_ZEROS = _names("zeros zeros_like new_zeros")
_SAME = _names("view expand reshape _to_copy clone alias unsqueeze")


def why_not_linear(nodes: Iterable[fx.Node], follows: frozenset[fx.Node]) -> str:
    """The first op that makes gradients not linear in the incoming one; "" if there is none.

    Args:
        nodes: of a joint graph, in order.
        follows: those that depend on the incoming gradient.
    """
    for node in nodes:
        if node not in follows or node.op != "call_function":
            continue
        value = node.meta.get("val")
        name = f"{target_name(node)} (at {source_of(node) or 'an unknown line'})"
        if isinstance(value, torch.Tensor) and value.dtype == torch.float16:
            return f"gradients are in float16, where a scale decides what underflows: {name}"
        if not _is_linear(node, follows):
            return f"a gradient is computed by what need not be linear: {name}"
    return ""


def _is_linear(node: fx.Node, follows: frozenset[fx.Node]) -> bool:
    if node.target is operator.getitem:
        return True
    name = _name(node)
    following = [one for one in node.all_input_nodes if one in follows]
    is_of_first = following == list(node.args[:1])
    if name in _MOVES or name == "div" or name.endswith(("_backward", "_backward_data")):
        return is_of_first
    if name == "masked_fill":
        return is_of_first and _is_number_zero(node.args[2])
    if name in _PRODUCTS:
        return len(following) == 1
    return _is_sum(node, name, follows)


def _is_sum(node: fx.Node, name: str, follows: frozenset[fx.Node]) -> bool:
    """Tell whether all terms of a sum follow, or are zero; conditions and factors must not."""
    if name in _SUMS:
        terms: Iterable[object] = node.args[:2]
    elif name in _JOINS:
        terms = [one for one in node.all_input_nodes if _is_real(one)]
    elif name in _SUMS_OF_PRODUCTS and sum(one in follows for one in node.args[1:3]) == 1:
        terms = node.args[:1]
    elif name == "where" and node.args[0] not in follows:
        terms = node.args[1:]
    else:
        return False
    return all(one in follows or _is_zero(one) for one in terms)


def _is_real(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_zero(term: object) -> bool:
    """Tell whether a term is zero whatever its inputs are."""
    if not isinstance(term, fx.Node):
        return _is_number_zero(term)
    name = _name(term)
    if name in _SAME:
        return _is_zero(term.args[0])
    if name in ("full", "full_like", "new_full", "scalar_tensor"):
        return _is_number_zero(term.args[0 if name == "scalar_tensor" else -1])
    return name in _ZEROS


def _is_number_zero(value: object) -> bool:
    return isinstance(value, int | float) and value == 0


def _name(node: fx.Node) -> str:
    """The op's name without namespace and overload; "" if it is not torch's."""
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return ""
    return str(target._schema.name).partition("::")[2]
