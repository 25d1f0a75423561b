"""Progress of a long command, on stderr and only on a terminal."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

from rich.console import Console
from rich.status import Status


class _ToStatus(logging.Handler):
    def __init__(self, status: Status) -> None:
        super().__init__(logging.DEBUG)
        self.status = status

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.INFO:
            self.status.update(record.getMessage())


def aside() -> AbstractContextManager[object]:
    """Send the output of the user's code to stderr: stdout is for the result only."""
    return contextlib.redirect_stdout(sys.stderr)


@contextlib.contextmanager
def progress() -> Iterator[None]:
    """Show memplan's log as it works, in one transient line; the rest is as in ``aside``."""
    console = Console(stderr=True)
    if not console.is_terminal:
        with aside():
            yield
        return
    logger = logging.getLogger("memplan")
    level = logger.level
    with aside(), console.status("starting") as status:
        handler = _ToStatus(status)
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
