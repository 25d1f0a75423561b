"""Devices that a plan can be made for, with the figures that a roofline needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from memplan.errors import MemplanError

_REACHED = 0.7
"""The share of the data sheet's figures that large kernels are taken to reach."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device.

    Attributes:
        name: for reports.
        bytes_per_s: memory bandwidth.
        flops_per_s: arithmetic throughput of matrix products in 32 bits.
        half_flops_per_s: the same in 16 bits.
        launch_s: time of an op that does nothing.
        random_s: time for each random number.
        link_bytes_per_s: bandwidth between its memory and the host's, in one direction.
        granule_bytes: the allocator's blocks are multiples of it.
        is_cuda: whether attention runs as CUDA's fused kernels.
        memory_bytes: the memory that the driver offers; 0 where that is the machine's own.
    """

    name: str
    bytes_per_s: float
    flops_per_s: float
    half_flops_per_s: float
    launch_s: float
    random_s: float = 0.0
    link_bytes_per_s: float = 8e9
    granule_bytes: int = 1
    is_cuda: bool = False
    memory_bytes: int = 0

    def flops_of(self, dtype: torch.dtype) -> float:
        """Throughput for operands of this type."""
        return self.half_flops_per_s if dtype.itemsize == 2 else self.flops_per_s


CPU: Final = Device(
    name="two CPU cores",
    bytes_per_s=8e9,
    flops_per_s=60e9,
    half_flops_per_s=60e9,
    launch_s=4e-6,
    # The CPU's generator is serial.
    random_s=10e-9,
)


def _cuda(
    name: str, gib: float, tb_per_s: float, tflops: tuple[float, float], link_gb_per_s: float
) -> Device:
    return Device(
        name=name,
        bytes_per_s=_REACHED * tb_per_s * 1e12,
        flops_per_s=_REACHED * tflops[0] * 1e12,
        half_flops_per_s=_REACHED * tflops[1] * 1e12,
        launch_s=5e-6,
        link_bytes_per_s=_REACHED * link_gb_per_s * 1e9,
        granule_bytes=512,
        is_cuda=True,
        memory_bytes=int(gib * 2**30),
    )


DEVICES: Final[Mapping[str, Device]] = {
    "cpu": CPU,
    "a100": _cuda("A100 SXM 80 GB", 79.1, 2.04, (19.5, 312), 32),
    "h100": _cuda("H100 SXM 80 GB", 79.1, 3.35, (67, 989), 64),
    "h200": _cuda("H200 SXM 141 GB", 139.8, 4.8, (67, 989), 64),
    "l40s": _cuda("L40S 48 GB", 44.4, 0.864, (91.6, 362), 32),
    "rtx4090": _cuda("GeForce RTX 4090 24 GB", 23.5, 1.008, (82.6, 165), 32),
}
"""Devices by name; bandwidth, dense throughput and half of PCIe's two directions are those of
NVIDIA's data sheets."""


def device_named(name: str) -> Device:
    """The device of this name.

    Raises:
        MemplanError: listing the names, if there is none.
    """
    if name not in DEVICES:
        raise MemplanError(
            f"device {name!r} is not known; there is {', '.join(sorted(DEVICES))}. "
            "Leave it out to plan for the device that the model is on."
        )
    return DEVICES[name]
