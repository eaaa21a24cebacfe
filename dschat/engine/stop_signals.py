"""SIGTERM and SIGINT as requests: the run ends where it can be continued."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from dschat.engine.distributed import Runtime, all_reduce_max

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST = 2.0  # seconds: a launcher passes on a Ctrl-C that the terminal has already sent to every rank


class StopSignals:
    """Inside ``with``, the first signal is noted and the second one, `ONE_REQUEST` later or more, ends the process."""

    def __init__(self) -> None:
        self.number = 0
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, runtime: Runtime) -> int:
        """The signal that any rank has received, 0 for none; the same on every rank. A collective."""
        return int(all_reduce_max(float(self.number), runtime)) if runtime.world_size > 1 else self.number

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._first = number, time.monotonic()
            name = signal.Signals(number).name
            os.write(2, f"{name}: the run is saved after the present step; a second one ends it at once\n".encode())
        elif time.monotonic() - self._first > ONE_REQUEST:
            sys.stderr.flush()
            os._exit(128 + number)
