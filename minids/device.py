"""Where a step's inputs lie."""

from __future__ import annotations

import torch
from torch import Tensor


def queue_copy(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`. From the CPU to a GPU the copy takes its turn behind what the GPU has to do, and nobody waits for
    it: `to` alone would wait for everything queued before."""
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
