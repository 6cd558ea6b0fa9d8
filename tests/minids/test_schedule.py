"""The schedule's values, worked out by hand from the report's token counts."""

from __future__ import annotations

import itertools

import pytest

from minids.config import TrainConfig
from minids.train.schedule import bias_speed, learning_rate, mtp_weight, warmup_steps


def v3(**changes) -> TrainConfig:
    """One step per 10^9 of the report's 14.8e12 tokens, with its learning rate."""
    return TrainConfig(**{"steps": 14800, "lr": 2.2e-4, "warmup_steps": 2, **changes})


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 1.1e-4),  # warm-up
        (1, 2.2e-4),
        (2, 2.2e-4),
        (9999, 2.2e-4),  # constant to 10T
        (12150, (2.2e-4 + 2.2e-5) / 2),  # half of the cosine
        (14300, 2.2e-5),  # 333B at a tenth
        (14632, 2.2e-5),
        (14633, 7.3e-6),  # 167B at the end
        (14799, 7.3e-6),
    ],
)
def test_learning_rate_is_that_of_the_report(step, lr):
    assert learning_rate(step, v3()) == pytest.approx(lr, rel=1e-12)


def test_the_cosine_part_only_falls():
    rates = [learning_rate(step, v3()) for step in range(10000, 14301)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))


def test_mtp_weight_falls_to_a_third_at_10t():
    train = v3(mtp_loss_weight=0.3)
    assert mtp_weight(9999, train) == 0.3
    assert mtp_weight(10000, train) == pytest.approx(0.1)


def test_balancing_stops_for_the_last_500b():
    assert bias_speed(14299, v3()) == 1e-3
    assert bias_speed(14300, v3()) == 0.0


@pytest.mark.parametrize(
    ("steps", "given", "expected"), [(100, None, 5), (10, None, 0), (10**6, None, 2000), (100, 30, 30), (100, 0, 0)]
)
def test_warmup_length(steps, given, expected):
    assert warmup_steps(TrainConfig(steps=steps, warmup_steps=given)) == expected


def test_cosine_schedule_goes_from_the_peak_to_a_tenth():
    train = TrainConfig(steps=110, warmup_steps=10, lr=1.0, schedule="cosine")
    assert learning_rate(4, train) == 0.5
    assert learning_rate(10, train) == 1.0
    assert learning_rate(60, train) == pytest.approx(0.55)
    assert learning_rate(110, train) == pytest.approx(0.1)


def test_shortest_runs_have_a_rate_at_every_step():
    for steps in (1, 2, 3):
        train = TrainConfig(steps=steps, lr=1.0)
        assert all(0 < learning_rate(step, train) <= 1 for step in range(steps))
