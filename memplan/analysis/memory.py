"""Memory that nodes of a joint graph share, and its readers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from memplan.torch_internals import is_backward, storage_key


def memory_of(node: fx.Node) -> int | None:
    """A key, equal for nodes whose tensors share memory; None for what is no tensor."""
    value = node.meta.get("val")
    return storage_key(value) if isinstance(value, torch.Tensor) else None


def views_of(
    graph: fx.Graph, replaced: Mapping[fx.Node, torch.Tensor], memory: int | None
) -> dict[fx.Node, Any] | None:
    """Values of all views of a memory, if some of them are replaced by other tensors.

    Lists of views, such as ``split`` returns, are among them. None if a view is impossible on its
    new operands.
    """
    values: dict[fx.Node, Any] = dict(replaced)

    def value(node: fx.Node) -> Any:
        return values[node] if node in values else node.meta["val"]

    for node in graph.nodes:
        is_view = node.op == "call_function" and memory in _memories(node)
        if not is_view or node in values or values.keys().isdisjoint(node.all_input_nodes):
            continue
        try:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            values[node] = node.target(*args, **kwargs)
        except RuntimeError:
            return None
    return values


def _memories(node: fx.Node) -> set[int]:
    value = node.meta.get("val")
    items = value if isinstance(value, list | tuple) else [value]
    return {storage_key(item) for item in items if isinstance(item, torch.Tensor)}


def given_memory(graph: fx.Graph) -> frozenset[int]:
    """The memory of what the step takes: parameters, buffers, inputs."""
    found = (memory_of(node) for node in graph.nodes if node.op == "placeholder")
    return frozenset(key for key in found if key is not None)


def backward_readers(graph: fx.Graph) -> Mapping[int, frozenset[fx.Node]]:
    """The backward's calls that read each memory, without views of it.

    The graph's output reads what the step returns.
    """
    readers: dict[int, set[fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "output" and not is_backward(node):
            continue
        own = memory_of(node)
        for source in node.all_input_nodes:
            key = memory_of(source)
            if key is not None and key != own:
                readers.setdefault(key, set()).add(node)
    return {key: frozenset(nodes) for key, nodes in readers.items()}
