"""What a capture would lose in silence is refused, by name."""

from __future__ import annotations

import torch
from torch import nn

from memplan.errors import CaptureError
from memplan.sample import Sample
from memplan.torch_internals import Joint, has_hooks, is_plain_tensor


def refuse_before(module: nn.Module, sample: Sample) -> None:
    """Refuse hooks of modules, and subclasses of tensors.

    Raises:
        CaptureError: naming the first.
    """
    for name, child in module.named_modules():
        if has_hooks(child):
            where = f"module {name!r}" if name else "the module"
            raise CaptureError(
                f"{where} ({type(child).__name__}) has hooks, which a captured step would not "
                "run. Remove them, or leave this module unplanned."
            )
    named = [*module.named_parameters(), *module.named_buffers()]
    named += [(f"input {index}", tensor) for index, tensor in enumerate(sample.tensors())]
    for name, tensor in named:
        if not is_plain_tensor(tensor):
            raise CaptureError(
                f"{name} is a {type(tensor).__name__}, a tensor subclass; a captured step would "
                "lose what it does. Pass a plain tensor: tensor.as_subclass(torch.Tensor)."
            )


def refuse_after(joint: Joint) -> None:
    """Refuse sparse tensors, and gradients that would reach no parameter.

    Raises:
        CaptureError: naming the first.
    """
    for node in joint.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.layout != torch.strided:
            raise CaptureError(
                f"{node.target} makes a sparse tensor, of which memplan does not know the memory. "
                "For embeddings: sparse=False."
            )
    for name, constant in joint.constants.items():
        if constant.requires_grad:
            raise CaptureError(
                f"the forward uses a tensor that requires a gradient and that is no parameter of "
                f"the module (shape {tuple(constant.shape)}, {name}); register it as a parameter, "
                "or as a submodule what holds it"
            )
