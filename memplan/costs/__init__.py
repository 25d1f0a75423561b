"""What each op costs: seconds, flops and workspace."""

from memplan.costs.analytic import CPU, Device, analytic_costs
from memplan.costs.cache import cache_folder
from memplan.costs.measured import measured_costs

__all__ = ["CPU", "Device", "analytic_costs", "cache_folder", "measured_costs"]
