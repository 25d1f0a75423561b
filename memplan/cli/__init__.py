"""The command line. One module a command."""

from __future__ import annotations

import click

from memplan.cli.compare import compare
from memplan.cli.estimate import estimate
from memplan.cli.frontier import frontier
from memplan.cli.plan import plan
from memplan.cli.profile import profile
from memplan.cli.report import report
from memplan.cli.verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="memplan")
def main() -> None:
    """Train within the memory that you have."""


for command in (profile, estimate, plan, frontier, compare, verify, report):
    main.add_command(command)

__all__ = ["main"]
