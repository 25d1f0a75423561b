"""The command line. One module a command."""

from __future__ import annotations

import click

from memplan.cli.compare import compare


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="memplan")
def main() -> None:
    """Train within the memory that you have."""


main.add_command(compare)

__all__ = ["main"]
