"""Who is at work and for how long, on stderr while it lasts; and an end to what lasts too long."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch


def say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


@contextlib.contextmanager
def shown(name: str) -> Iterator[None]:
    """Adds the name to the line at once, so that one sees who hangs, and the seconds behind the block."""
    say(f" | {name}", end="")
    start = time.perf_counter()
    try:
        yield
    finally:
        say(f" {time.perf_counter() - start:.1f} s", end="")


class TookTooLong(BaseException):
    """No Exception, since tuners go on with their defaults after any of those."""


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raises TookTooLong in the block after `seconds`, and every second from there on if the block catches it. For the
    main thread. Python code is cut off at its next line, waiting at once; a call of compiled code is when it returns.
    Backwards run in this thread meanwhile: in those of a GPU's own thread no signal is seen."""

    def cut_off(*_: Any) -> NoReturn:
        raise TookTooLong(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, cut_off)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
