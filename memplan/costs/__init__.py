"""The cost of each op: seconds, flops and workspace."""

from memplan.costs.analytic import analytic_costs
from memplan.costs.cache import CostCache, cache_folder, write_whole
from memplan.costs.devices import CPU, DEVICES, Device, device_named
from memplan.costs.kernels import KernelMemory, least_memory, measured_memory, most_memory
from memplan.costs.measured import measured_costs

__all__ = [
    "CPU",
    "DEVICES",
    "CostCache",
    "Device",
    "KernelMemory",
    "analytic_costs",
    "cache_folder",
    "device_named",
    "least_memory",
    "measured_costs",
    "measured_memory",
    "most_memory",
    "write_whole",
]
