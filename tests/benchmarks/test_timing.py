"""A captured call's replays give what the call gives, also when nobody else holds what it reads; rounds have an end."""

from __future__ import annotations

import pytest
import torch

from benchmarks import timing


def prepared(device: torch.device) -> timing.Prepared:
    x = torch.arange(4096.0, device=device)
    return timing.prepare(lambda: x + 1, device)


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_keeps_what_the_call_reads(name: str) -> None:
    device = torch.device(name)
    with timing.side_stream(device):
        call = prepared(device)
        others = [torch.full((4096,), -1.0, device=device) for _ in range(64)]  # lie where memory was let go
        call.replay()
        assert torch.equal(call.output(), torch.arange(4096.0, device=device) + 1)
    assert all(other.eq(-1).all() for other in others)


@pytest.mark.gpu
def test_who_comes_first_is_timed_as_the_others() -> None:
    """Behind each round the GPU has nothing to do; what it waits for the host then is nobody's time."""
    device = torch.device("cuda")
    with timing.side_stream(device):
        calls = {name: prepared(device) for name in ("first", "second", "third")}
        found = timing.measure(calls, 50, device)
    assert found["first"].median < 1.2 * found["third"].median
    assert found["first"].p80 < 1.5 * found["third"].p80


def test_no_round_begins_after_the_limit() -> None:
    calls: list[int] = []
    call = timing.prepare(lambda: calls.append(1), torch.device("cpu"))
    assert timing.measure({"it": call}, 5, torch.device("cpu"))["it"].repeats == 5
    assert timing.measure({"it": call}, 5, torch.device("cpu"), limit=0)["it"].repeats == 1
    assert len(calls) == timing.WARMUP + 6
