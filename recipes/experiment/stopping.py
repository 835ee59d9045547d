"""How a run is asked to end, and what its exit code says of it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["EXIT_CODES", "Stop", "Stopped", "exit_code", "stoppable"]

EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 75}
"""Of a run that a signal has ended. 75, EX_TEMPFAIL, is for a cluster that is to start it again."""


class Stopped(KeyboardInterrupt):
    """Raised where a signal may end at once what goes on.

    Args:
        signal: its name.
    """

    def __init__(self, signal: str) -> None:
        super().__init__(signal)
        self.signal = signal


class Stop:
    """Whether a run is asked to end.

    The first signal is a request where the run is :meth:`patient`, and else raises :class:`Stopped`. A
    second Ctrl-C always does; other signals come again, as from a cluster, without being meant so.

    Attributes:
        requested: the name of the first signal, None before.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._patient = False

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Inside, the run looks at :attr:`requested` itself, so that no gradient step is left half done."""
        before, self._patient = self._patient, True
        try:
            yield
        finally:
            self._patient = before

    def at_once(self, wait: Callable[[], None]) -> None:
        """Do what the run would wait for; on request it is left where it is, or not even begun.

        Args:
            wait: what may take long, or never end.
        """
        if self.requested is not None:
            return
        before, self._patient = self._patient, False
        try:
            wait()
        except Stopped:
            if not before:
                raise
        finally:
            self._patient = before

    def _request(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        again, self.requested = self.requested is not None, self.requested or name
        if not self._patient if not again else name == "SIGINT":
            raise Stopped(name)
        if not again:  # print may be in the middle of another line
            os.write(2, b"\nEnds after the present step, and saves; Ctrl-C now ends at once\n")


_active: Stop | None = None


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Take Ctrl-C, SIGTERM and SIGUSR1 as requests to end; inside of another such block, as that one does."""
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield _active or Stop()
        return
    _active = Stop()
    numbers = [getattr(signal, name) for name in EXIT_CODES if hasattr(signal, name)]
    previous = {number: signal.signal(number, _active._request) for number in numbers}
    try:
        yield _active
    finally:
        _active = None
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def exit_code() -> Iterator[None]:
    """End the process with the exit code of the signal that has ended what is inside, if one has."""
    with stoppable() as stop:
        try:
            yield
        except Stopped:
            if stop.requested is None:
                raise
    if stop.requested is not None:
        sys.exit(EXIT_CODES[stop.requested])
