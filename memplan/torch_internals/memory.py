"""Memory of ops, tracked by the lifetimes of storages; tensors without data included."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from memplan.torch_internals.fake import NUMBERS, DispatchMode, fake_mode_of
from memplan.torch_internals.state import storage_key


class Allocations(DispatchMode):
    """Accounts for every storage that an op allocates inside, until it is freed (2.13-2.15).

    A number read from a tensor is taken to be that of a step long under way.

    Attributes:
        current_bytes: bytes of the storages that are alive.
        peak_bytes: the most of these.
        traffic_bytes: bytes of operands and results of all ops.
        num_ops: number of ops.
    """

    def __init__(self, granule_bytes: int = 1) -> None:
        super().__init__()
        self.granule_bytes = granule_bytes
        self.current_bytes = self.peak_bytes = self.traffic_bytes = self.num_ops = 0
        self._live: dict[int, int] = {}

    def start_anew(self) -> None:
        """Reset the peak, the traffic and the ops."""
        self.peak_bytes = self.current_bytes
        self.traffic_bytes = self.num_ops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return NUMBERS.get(args[0].dtype, 1000.0)
        result = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.num_ops += 1
        self.traffic_bytes += sum(t.numel() * t.element_size() for t in (*given, *made))
        known = {storage_key(tensor) for tensor in given}
        for tensor in made:
            if storage_key(tensor) not in known:
                self._add(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live:
            return
        blocks = -(-storage.nbytes() // self.granule_bytes)
        self._live[key] = blocks * self.granule_bytes
        self.current_bytes += self._live[key]
        weakref.finalize(storage, self._remove, key).atexit = False

    def _remove(self, key: int) -> None:
        self.current_bytes -= self._live.pop(key)


def without_data(parameters: Sequence[torch.Tensor]) -> Iterator[nn.Parameter]:
    """Parameters of the same kind without data (torch 2.13-2.15)."""
    with fake_mode_of(parameters):
        for parameter in parameters:
            device = "cpu" if parameter.is_meta else parameter.device
            made = torch.empty_strided(
                parameter.shape, parameter.stride(), dtype=parameter.dtype, device=device
            )
            yield nn.Parameter(made, parameter.requires_grad)


def inner_tensors(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """The tensors that hold a tensor's data: itself, or those that it wraps (torch 2.13-2.15)."""
    if not is_traceable_wrapper_subclass(tensor):
        return (tensor,)
    names, _ = tensor.__tensor_flatten__()
    parts = [getattr(tensor, name) for name in names]
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]  # DTensor names its mesh
    return [inner for part in tensors for inner in inner_tensors(part)]


def stored_in(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """The tensors that own the storages of a tensor: itself, or its parts (torch 2.13-2.15)."""
    for inner in inner_tensors(tensor):
        if inner.layout is torch.strided:
            yield inner
        elif inner.layout is torch.sparse_coo:
            yield from (inner._indices(), inner._values())
        elif inner.layout in (torch.sparse_csr, torch.sparse_bsr):
            yield from (inner.crow_indices(), inner.col_indices(), inner.values())
        elif inner.layout in (torch.sparse_csc, torch.sparse_bsc):
            yield from (inner.ccol_indices(), inner.row_indices(), inner.values())


def requested_bytes(device: torch.device) -> int:
    """The bytes that tensors and kernels hold on a CUDA device now."""
    return int(torch.cuda.memory_stats(device)["requested_bytes.all.current"])


def peak_requested_bytes(device: torch.device) -> int:
    """The most that they held since ``reset_peak_memory_stats``."""
    return int(torch.cuda.memory_stats(device)["requested_bytes.all.peak"])
