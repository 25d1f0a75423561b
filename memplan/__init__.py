"""Train within the memory that you have: same bits, a hard budget in bytes.

>>> import memplan
>>> memplan.parse_bytes("1.5KiB")
1536
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from pathlib import Path as _Path

from memplan.api import frontier, optimize, plan
from memplan.capture.sample import Sample
from memplan.errors import (
    CaptureError,
    InfeasibleBudget,
    MemplanError,
    NotPlannedYet,
    PlanMismatch,
    UnfaithfulCapture,
    UnitsError,
)
from memplan.ir.program import Costs
from memplan.options import Options
from memplan.planner.plan import Plan
from memplan.profiler import Comparison, Estimate, Profile, compare, estimate, profile
from memplan.profiler.monitor import log_memory
from memplan.runtime.module import PlannedModule
from memplan.transforms.passes import Effect, Pass
from memplan.units import format_bytes, parse_bytes
from memplan.with_loss import WithLoss

__all__ = [
    "CaptureError",
    "Comparison",
    "Costs",
    "Effect",
    "Estimate",
    "InfeasibleBudget",
    "MemplanError",
    "NotPlannedYet",
    "Options",
    "Pass",
    "Plan",
    "PlanMismatch",
    "PlannedModule",
    "Profile",
    "Sample",
    "UnfaithfulCapture",
    "UnitsError",
    "WithLoss",
    "compare",
    "estimate",
    "format_bytes",
    "frontier",
    "log_memory",
    "optimize",
    "parse_bytes",
    "passes",
    "plan",
    "profile",
]

try:
    __version__ = _version("memplan")
except _PackageNotFoundError:  # imported from a checkout that is not installed
    __version__ = "0+unknown"

_folder = _Path(__file__).parent
if not (_folder / "passes").is_dir():
    # Imported from a checkout, where the package `memplan.passes` lies beside this one.
    __path__.append(str(_folder.parent))

# Last: passes import the kernel.
from memplan import passes  # noqa: E402
