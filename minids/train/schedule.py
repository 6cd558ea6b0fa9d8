"""Learning rate, MTP weight and balancing speed over a run, in the proportions of DeepSeek-V3 (arXiv 2412.19437, 4.2).

The report trains on 14.8T tokens: the learning rate warms up linearly over 2000 steps, stays constant until 10T (67.6 %
of the run), falls as a cosine over 4.3T (29.1 %) to a tenth, stays there for 333B (2.25 %) and runs the last 167B
(1.13 %) at 7.3e-6 of 2.2e-4 (3.3 %). The MTP weight lambda falls from 0.3 to 0.1 at 10T, gamma to 0 for the last 500B
(3.4 %).
Steps are counted from 0: step `s` of `n` has seen the share s / n of the run.
"""

from __future__ import annotations

import math

from minids.config import TrainConfig

CONSTANT_UNTIL = 10 / 14.8
COSINE_UNTIL = 14.3 / 14.8
LOW_UNTIL = 14.633 / 14.8
LOW = 2.2e-5 / 2.2e-4
LAST = 7.3e-6 / 2.2e-4


def warmup_steps(train: TrainConfig) -> int:
    """Steps of linear warm-up: as given, else 2000 as in the report but at most 5 % of the run."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return min(2000, train.steps // 20)


def _cosine(share: float, low: float) -> float:
    """1 at share 0, `low` at share 1."""
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share))


def learning_rate(step: int, train: TrainConfig) -> float:
    """Learning rate of step `step` (0-based). "v3": the shape above; "cosine": warm-up, then a cosine to a tenth."""
    warmup = warmup_steps(train)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.schedule == "cosine":
        return train.lr * _cosine((step - warmup) / max(1, train.steps - warmup), LOW)
    share = step / train.steps
    if share < CONSTANT_UNTIL:
        return train.lr
    if share < COSINE_UNTIL:
        return train.lr * _cosine((share - CONSTANT_UNTIL) / (COSINE_UNTIL - CONSTANT_UNTIL), LOW)
    return train.lr * (LOW if share < LOW_UNTIL else LAST)


def mtp_weight(step: int, train: TrainConfig) -> float:
    """lambda of the multi-token-prediction loss: a third of `train.mtp_loss_weight` after 67.6 % of the run."""
    return train.mtp_loss_weight if step / train.steps < CONSTANT_UNTIL else train.mtp_loss_weight / 3


def bias_speed(step: int, train: TrainConfig) -> float:
    """gamma of the auxiliary-loss-free balancing: 0 for the last 3.4 % of the run."""
    return train.bias_update_speed if step / train.steps < COSINE_UNTIL else 0.0
