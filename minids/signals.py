"""Who answers SIGINT and SIGTERM for a while."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def answered_by(handler: Callable[[int, FrameType | None], Any], *numbers: signal.Signals) -> Iterator[None]:
    """`handler` answers the signals `numbers`, afterwards whoever did before. Python lets the main thread alone set
    handlers: in others nothing changes."""
    former: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        former = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before or signal.SIG_DFL)  # None: set outside of Python
