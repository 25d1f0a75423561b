"""The command line, one module per command."""

from __future__ import annotations

import os
import sys
import traceback

import click

from memplan.cli.compare import compare
from memplan.cli.diff import diff
from memplan.cli.doctor import doctor
from memplan.cli.estimate import estimate
from memplan.cli.failures import described
from memplan.cli.freeze import freeze
from memplan.cli.frontier import frontier
from memplan.cli.plan import plan
from memplan.cli.profile import profile
from memplan.cli.report import report
from memplan.cli.solve import solve
from memplan.cli.verify import verify


class _Main(click.Group):
    """Report an error inside as one line, or as the whole traceback with ``--debug``."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except click.ClickException:
            if ctx.params["debug"]:
                traceback.print_exc()
            raise
        except (click.Abort, click.exceptions.Exit):
            raise
        except BrokenPipeError:
            # The reader has seen enough; the rest of the buffer goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except Exception as error:
            if ctx.params["debug"]:
                raise
            raise click.ClickException(
                f"internal error: {described(error)} (please report it, with what "
                "'memplan --debug ...' prints)"
            ) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="memplan")
@click.option("--debug", is_flag=True, help="Show the traceback of what goes wrong.")
def main(debug: bool) -> None:
    """Train within the memory that you have."""
    del debug


for command in (
    profile,
    estimate,
    plan,
    solve,
    frontier,
    freeze,
    compare,
    verify,
    diff,
    report,
    doctor,
):
    main.add_command(command)

__all__ = ["main"]
