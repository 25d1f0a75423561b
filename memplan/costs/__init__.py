"""What each op costs: seconds, flops and workspace."""

from memplan.costs.analytic import analytic_costs
from memplan.costs.cache import CostCache, cache_folder
from memplan.costs.devices import CPU, DEVICES, Device, device_named
from memplan.costs.measured import measured_costs

__all__ = [
    "CPU",
    "DEVICES",
    "CostCache",
    "Device",
    "analytic_costs",
    "cache_folder",
    "device_named",
    "measured_costs",
]
