"""Where a step's inputs lie, and in what precision they are multiplied."""

from __future__ import annotations

import torch
from torch import Tensor


def queue_copy(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`. From the CPU to a GPU the copy takes its turn behind what the GPU has to do, and nobody waits for
    it: `to` alone would wait for everything queued before."""
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def product_dtype(x: Tensor) -> torch.dtype:
    """Of matrix products with x: autocast's under autocast, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
