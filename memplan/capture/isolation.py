"""State that a capture leaves unchanged."""

from __future__ import annotations

import contextlib
import pickle
import random
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from memplan.capture.module_state import modules_of
from memplan.capture.sample import Sample
from memplan.errors import CaptureError
from memplan.torch_internals import cpu_stand_ins, flatten, stand_ins_without_data, unflatten

ONE_AT_A_TIME = threading.RLock()
"""Lock held while a module is traced and its kernels are measured: torch itself and the user's
classes are changed for it, and random states are the process's."""

_OWN = ("_parameters", "_buffers", "_modules")


@contextlib.contextmanager
def unchanged_randomness() -> Iterator[None]:
    """Restore torch's, numpy's and Python's random states.

    Raises:
        CaptureError: if numpy's or Python's state moved inside: what was drawn would be baked
            into the capture and be the same in every step.
    """
    numpy_state, python_state = np.random.get_state(legacy=False), random.getstate()
    before = _numpy_state()
    with torch.random.fork_rng():
        try:
            yield
            moved = random.getstate() != python_state or before != _numpy_state()
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
    if moved:
        raise CaptureError(
            "the forward draws numbers from numpy.random or random; captured, they would be the "
            "same in every step. Draw them with torch, or outside of the module."
        )


def _numpy_state() -> bytes:
    return pickle.dumps(np.random.get_state(legacy=False))


@contextlib.contextmanager
def without_data_of(
    module: nn.Module, sample: Sample, on_cpu: bool = False
) -> Iterator[tuple[Sample, dict[int, torch.Tensor]]]:
    """Context in which a module's tensors, and what is made of them, have no data.

    Yields the sample, treated alike, and a stand-in for each parameter, by its id. With
    ``on_cpu``, all are on the CPU.
    """
    owners = [child.__dict__[own] for child in module.modules() for own in _OWN[:2]]
    children = [child for _, child in modules_of(module)]
    lists = [c.__dict__["_flat_weights"] for c in children if "_flat_weights" in vars(c)]
    before = [dict(tensors) for tensors in owners]
    lists_before = [list(one) for one in lists]
    tensors = [tensor for one in before for tensor in one.values() if tensor is not None]
    parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    with stand_ins_without_data([*tensors, *sample.tensors()], on_cpu) as stand_ins:
        leaves, spec = flatten((sample.args, dict(sample.kwargs)))
        args, kwargs = unflatten([stand_ins.get(id(leaf), leaf) for leaf in leaves], spec)
        for own in owners:
            own.update({name: stand_ins.get(id(tensor), tensor) for name, tensor in own.items()})
        for one in lists:
            one[:] = [stand_ins.get(id(tensor), tensor) for tensor in one]
        try:
            yield Sample(args, kwargs), {id(p): stand_ins[id(p)] for p in parameters}
        finally:
            for own, members in zip(owners, before, strict=True):
                own.update(members)
            for one, list_before in zip(lists, lists_before, strict=True):
                one[:] = list_before


@contextlib.contextmanager
def without_meta(module: nn.Module, sample: Sample) -> Iterator[Sample]:
    """Context in which a module's tensors on the meta device are on the CPU, without data.

    Yields the sample, treated alike. On the meta device itself, other kernels would be traced.
    """
    owners = [child.__dict__[own] for child in module.modules() for own in _OWN[:2]]
    before = [dict(tensors) for tensors in owners]
    tensors = [tensor for one in before for tensor in one.values() if tensor is not None]
    tensors += sample.tensors()
    if not any(tensor.is_meta for tensor in tensors):
        yield sample
        return
    stand_ins = cpu_stand_ins(tensors)
    leaves, spec = flatten((sample.args, dict(sample.kwargs)))
    args, kwargs = unflatten([stand_ins.get(id(leaf), leaf) for leaf in leaves], spec)
    for own, members in zip(owners, before, strict=True):
        own.update({name: stand_ins.get(id(tensor), tensor) for name, tensor in members.items()})
    try:
        yield Sample(args, kwargs)
    finally:
        for own, members in zip(owners, before, strict=True):
            own.update(members)
