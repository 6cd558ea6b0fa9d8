"""Where a step's inputs lie, and what becomes of memory on the CPU."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor


def queue_copy(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`. From the CPU to a GPU the copy takes its turn behind what the GPU has to do, and nobody waits for
    it: `to` alone would wait for everything queued before."""
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def keep_freed_memory() -> None:
    """From here on glibc keeps what is freed, up to 1 GiB a piece, instead of handing it back to Linux page by page,
    only to get it again, zeroed, at the next step: thousands of page faults a step. Elsewhere this does nothing."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, (1 << 31) - 1)
