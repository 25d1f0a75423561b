"""``x.data = y`` in a forward: what a trace would lose.

It puts another storage below a tensor, unseen by autograd. For a buffer that is a new content; the
memory of anything else may have been saved for the backward, which then reads it or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from memplan.errors import CaptureError
from memplan.torch_internals import leaves_of, storage_key

_ASSIGN: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class AssignedData(TorchFunctionMode):
    """Inside, buffers that are given other data are written, and nothing else may be given any."""

    def __init__(self, buffers: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().__init__()
        self._names = {storage_key(buffer): name for name, buffer in buffers}
        self._read: set[int] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function, or write a buffer."""
        del types
        if func == _ASSIGN:
            return self._assign(*args)
        result = func(*args, **(kwargs or {}))
        if self._names and any(one.requires_grad for one in _strided(result)):
            keys = {storage_key(one) for one in _strided((args, kwargs))}
            self._read |= keys & self._names.keys()
        return result

    def _assign(self, tensor: torch.Tensor, data: torch.Tensor) -> None:
        """Write a buffer.

        Raises:
            CaptureError: for any other tensor, and where eager's backward might read either.
        """
        name = self._names.get(storage_key(tensor), "").partition(".")[2]
        if not name or (tensor.shape, tensor.dtype) != (data.shape, data.dtype):
            raise CaptureError(
                f"the forward assigns to .data of a tensor ({tensor.dtype}, {tuple(tensor.shape)}) "
                f"what is {data.dtype}, {tuple(data.shape)}. A planned step can do so for buffers, "
                "in their own shape and dtype; make a new tensor, x = ..., or write "
                "x.data.copy_(...)."
            )
        if storage_key(tensor) in self._read:
            raise CaptureError(
                f"the forward assigns to .data of buffer {name!r} after it has computed with it; "
                "whether the backward then reads the old or the new data depends on torch's "
                f"kernels. Assign the buffer itself, self.{name} = ..., or assign it first."
            )
        tensor.data.copy_(data)  # no write that autograd sees


def _strided(tree: object) -> list[torch.Tensor]:
    """The tensors of a tree that have a storage."""
    tensors = [leaf for leaf in leaves_of(tree) if isinstance(leaf, torch.Tensor)]
    return [tensor for tensor in tensors if tensor.layout == torch.strided]
