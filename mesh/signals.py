"""What a node does about the signals that end it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Final

from mesh.logs import Log

_log = Log(__name__)

EXIT_KILLED: Final = 130


class Signals:
    """First SIGTERM, SIGINT or SIGHUP: ``first`` is set. Second: *kill*, and the process ends right there.

    A hang-up is never the second, for a terminal that closes may send several; under nohup it is not even the first.
    """

    def __init__(self, kill: Callable[[], None]) -> None:
        self.first = asyncio.Event()
        self._kill = kill
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._received, number)

    def _received(self, number: signal.Signals) -> None:
        if not self.first.is_set():
            _log.info("draining; a second signal stops at once", signal=number.name)
            self.first.set()
            return
        if number is signal.SIGHUP:
            return
        _log.warning("second signal: killing the children, stopping at once", signal=number.name)
        self._kill()
        os._exit(EXIT_KILLED)
