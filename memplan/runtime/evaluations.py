"""A lock between threads that run a module and one that swaps its tensors for a while."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator


class Evaluations:
    """Any number of threads run a module at a time, or one alone captures it."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._running: Counter[int] = Counter()
        self._alone: list[int] = []

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Context of a run of the module; waits while another thread captures it."""
        me = threading.get_ident()
        with self._free:
            self._free.wait_for(lambda: {*self._alone} <= {me})
            self._running[me] += 1
        try:
            yield
        finally:
            with self._free:
                self._running[me] -= 1
                self._running += Counter()  # forget idle threads
                self._free.notify_all()

    @contextlib.contextmanager
    def none(self) -> Iterator[None]:
        """Context of a capture; waits until no other thread runs or captures the module."""
        me = threading.get_ident()
        with self._free:
            self._free.wait_for(lambda: {*self._alone, *self._running} <= {me})
            self._alone.append(me)
        try:
            yield
        finally:
            with self._free:
                self._alone.pop()
                self._free.notify_all()
