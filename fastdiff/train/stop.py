"""An orderly end where the system asks for one: SIGTERM, which schedulers send some time before they kill."""

from __future__ import annotations

import signal
import threading
from typing import Any

STATUS = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


class Stopped(SystemExit):
    """The process was asked to end, and its run has a checkpoint of the last step it did."""


class Stop:
    """While it is entered, SIGTERM is noted instead of ending the process; a second one ends it.

    Where the process has a handler of its own, or this is not its main thread, it does nothing.

    Attributes:
        asked: whether SIGTERM came.
    """

    def __init__(self) -> None:
        self.asked = False
        self._is_set = False

    def __enter__(self) -> Stop:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._note)
            self._is_set = True
        return self

    def __exit__(self, *_: Any) -> None:
        if self._is_set:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._is_set = False

    def _note(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
