"""Limits end what lasts too long and leave nothing behind; who is at work is shown while it lasts."""

from __future__ import annotations

import re
import signal
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.watch import TookTooLong, limit, shown


def busy(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_what_takes_too_long_is_cut_off_and_nothing_stays_behind() -> None:
    def theirs(*_: Any) -> None:
        pass

    before = signal.signal(signal.SIGALRM, theirs)
    try:
        start = time.monotonic()
        with pytest.raises(TookTooLong, match=r"took longer than 0\.05 s"), limit(0.05):
            busy(5)
        assert time.monotonic() - start < 4
        assert signal.getsignal(signal.SIGALRM) is theirs and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
        with limit(60):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        with pytest.raises(ValueError, match="own"), limit(60):
            raise ValueError("own")
        assert signal.getsignal(signal.SIGALRM) is theirs and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_who_catches_it_is_cut_off_again() -> None:
    caught = []
    with pytest.raises(TookTooLong), limit(0.05):
        try:
            busy(5)
        except BaseException as error:
            caught.append(error)
        busy(5)
    assert len(caught) == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_backward_is_cut_off(device: str) -> None:
    threads = []

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            threads.append(threading.get_ident())
            busy(5)
            return dy

    y: Tensor = Slow.apply(torch.ones(2, device=device, requires_grad=True))
    with pytest.raises(TookTooLong), limit(0.1):
        y.sum().backward()
    assert threads == [threading.get_ident()]


def test_who_is_at_work_is_shown_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with shown("peer"):
        assert capfd.readouterr().err == " | peer"
    assert re.fullmatch(r" 0\.\d s", capfd.readouterr().err)
