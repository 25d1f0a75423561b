"""Run a page's first Python snippet with its plan and without, and compare every bit.

python examples/benchmarks/snippet.py README.md

Without: the line that calls ``memplan.optimize``, and those that need a plan, are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch


def ran(lines: list[str]) -> dict[str, Any]:
    """The names that the lines define, run from a fixed random state."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    return names


def main() -> None:
    """Print the differences; exit with 1 if there are any."""
    page = Path(sys.argv[1]).read_text()
    lines = page.partition("```python\n")[2].partition("```")[0].splitlines()
    plain = [line for line in lines if "memplan.optimize" not in line and ".plan" not in line]
    if len(lines) - len(plain) != 2:
        sys.exit(f"{sys.argv[1]}: the first snippet neither plans nor shows its plan")
    planned, eager = ran(lines), ran(plain)
    differing = [
        name
        for name, value in eager["model"].state_dict().items()
        if not torch.equal(value, planned["model"].state_dict()[name])
    ]
    if not torch.equal(planned["loss"], eager["loss"]):
        differing.append("loss")
    print(f"torch {torch.__version__}: {', '.join(differing) or 'nothing'} differs")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
