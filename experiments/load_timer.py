"""An alarm for event loops that keeps to microseconds.

Event loops round their timers to milliseconds, which a latency of milliseconds does not bear.
"""

import asyncio
import ctypes
import os
import time
from collections.abc import Callable

_NANOSECONDS = 1_000_000_000
_ABSOLUTE = 1  # TFD_TIMER_ABSTIME


class _Moment(ctypes.Structure):
    """C's ``struct timespec``."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Setting(ctypes.Structure):
    """C's ``struct itimerspec``: never again, and once at ``moment``."""

    _fields_ = (("interval", _Moment), ("moment", _Moment))


class Alarm:
    """Calls ``action`` in the running loop once the moment that was set has come (Linux).

    Moments are those of ``time.perf_counter``, in seconds.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "no timer of the system")
        self._action = action
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._ring)

    def set(self, moment: float) -> None:
        """Ring at ``moment``; at once where it has passed. What was set before is forgotten."""
        at = max(1, int(moment * _NANOSECONDS))  # zero would switch it off
        setting = _Setting(_Moment(0, 0), _Moment(*divmod(at, _NANOSECONDS)))
        done = self._libc.timerfd_settime(self._descriptor, _ABSOLUTE, ctypes.byref(setting), None)
        assert done == 0, os.strerror(ctypes.get_errno())

    def close(self) -> None:
        """Never ring again."""
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _ring(self) -> None:
        try:
            os.read(self._descriptor, 8)
        except BlockingIOError:  # set anew in the meantime
            return
        self._action()
