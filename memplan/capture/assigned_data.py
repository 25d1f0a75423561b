"""Assignments ``x.data = y`` in a forward, which a trace would lose.

They put another storage below a tensor, unseen by autograd. For a buffer, that is new content; any
other tensor's memory may have been saved for the backward, which may or may not read it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from memplan.errors import CaptureError
from memplan.torch_internals import FunctionMode, leaves_of, storage_key

_ASSIGN: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class AssignedData(FunctionMode):
    """Mode in which assigning data to a buffer writes it; for other tensors, it is refused."""

    def __init__(self, buffers: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().__init__()
        named = list(buffers)
        self._names = {id(buffer): name for name, buffer in named}
        self._keys = Counter(storage_key(buffer) for _, buffer in named)
        self._read: set[int] = set()
        self._views: list[tuple[int, weakref.ref[torch.Tensor]]] = []

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function, or write a buffer."""
        if func == _ASSIGN:
            return self._assign(*args)
        result = func(*args, **kwargs)
        if self._keys:
            self._note(_strided((args, kwargs)), _strided(result))
        return result

    def _note(self, given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> None:
        """Note the buffers that are computed with, and their views."""
        if any(one.requires_grad for one in made):
            self._read |= {storage_key(one) for one in given} & self._keys.keys()
        for one in made:
            if (key := storage_key(one)) in self._keys and id(one) not in self._names:
                self._views.append((key, weakref.ref(one)))

    def _assign(self, tensor: torch.Tensor, data: torch.Tensor) -> None:
        """Write a buffer.

        Raises:
            CaptureError: for other tensors, and where eager's backward might read either data.
        """
        name, key = self._names.get(id(tensor), "").partition(".")[2], storage_key(tensor)
        if not name or (tensor.shape, tensor.dtype) != (data.shape, data.dtype):
            raise CaptureError(
                f"the forward assigns to .data of a tensor ({tensor.dtype}, {tuple(tensor.shape)}) "
                f"what is {data.dtype}, {tuple(data.shape)}. A planned step can do so for buffers, "
                "in their own shape and dtype; make a new tensor, x = ..., or write "
                "x.data.copy_(...)."
            )
        has_views = any(own == key and view() is not None for own, view in self._views)
        if key in self._read or has_views or self._keys[key] > 1:
            raise CaptureError(
                f"the forward assigns to .data of buffer {name!r} after it has computed with it, "
                "or while another tensor has its memory; what the backward and the other then "
                f"read depends on torch's kernels. Assign the buffer itself, self.{name} = ..., or "
                "assign it first."
            )
        tensor.data.copy_(data)  # no write that autograd sees


def _strided(tree: object) -> list[torch.Tensor]:
    """The tensors of a tree that have a storage."""
    tensors = [leaf for leaf in leaves_of(tree) if isinstance(leaf, torch.Tensor)]
    return [tensor for tensor in tensors if tensor.layout == torch.strided]
