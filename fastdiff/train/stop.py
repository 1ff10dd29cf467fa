"""An orderly end where the system asks for one: SIGTERM, which schedulers send some time before they kill."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any

STATUS = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended
_REPEATS = 5.0  # seconds: systemd, Slurm and torchrun may each send the same request to the whole group


class Stopped(SystemExit):
    """The process was asked to end, and its run has a checkpoint of the last step it did."""


class Stop:
    """While it is entered, SIGTERM is noted instead of ending the process.

    Another one ends it, if it comes more than 5 s after the first; and so does, on leaving, one that was
    noted and not answered by `Stopped`. Where the process has a handler of its own, or this is not its main
    thread, it does nothing.

    Attributes:
        asked: whether SIGTERM came.
    """

    def __init__(self) -> None:
        self.asked = False
        self._first = 0.0
        self._is_set = False

    def __enter__(self) -> Stop:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._note)
            self._is_set = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_set:
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._is_set = False
        if self.asked and not isinstance(error, Stopped):
            if kind is not None and error is not None:
                sys.excepthook(kind, error, trace)  # nobody will be there to say it
            _end()

    def _note(self, *_: Any) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._first = True, now
        elif now - self._first > _REPEATS:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _end()


def _end() -> None:
    sys.stderr.flush()
    signal.raise_signal(signal.SIGTERM)
