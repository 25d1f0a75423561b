"""Which nodes of a joint graph share memory, and who reads it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from memplan.torch_internals import is_backward, storage_key


def memory_of(node: fx.Node) -> int | None:
    """Equal for nodes whose tensors share memory; None for what is no tensor."""
    value = node.meta.get("val")
    return storage_key(value) if isinstance(value, torch.Tensor) else None


def given_memory(graph: fx.Graph) -> frozenset[int]:
    """The memory of what the step is given: parameters, buffers, inputs."""
    found = (memory_of(node) for node in graph.nodes if node.op == "placeholder")
    return frozenset(key for key in found if key is not None)


def backward_readers(graph: fx.Graph) -> Mapping[int, frozenset[fx.Node]]:
    """Memory to the backward's calls that read it; views of it are not among them.

    What the step returns is read by the graph's output.
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
