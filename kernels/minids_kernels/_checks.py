"""What rooms do with arguments: checks, each of which raises naming the argument, what came, and what is allowed; and
their rows."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dtype(name: str, x: Tensor, *allowed: torch.dtype) -> None:
    if x.dtype not in allowed:
        verb = "is" if len(allowed) == 1 else "are"
        raise TypeError(f"{name}: got {x.dtype}, allowed {verb} {', '.join(map(str, allowed))}")


def check_float(name: str, x: Tensor) -> None:
    check_dtype(name, x, *FLOATS)


def check_shape(name: str, x: Tensor, expected: tuple[int | None, ...]) -> None:
    """`expected`: one entry a dimension, None for any size."""
    if x.dim() != len(expected) or any(e is not None and e != s for s, e in zip(x.shape, expected, strict=True)):
        want = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, allowed is ({want})")


def check_devices(x: Tensor, **others: Tensor) -> None:
    """The others lie where x lies."""
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(f"{name}: got device {other.device}, allowed is {x.device}")


def as_rows(x: Tensor) -> Tensor:
    """x [..., N] as [M, N]: x itself if it is that, since a view is one more node of autograd's graph."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def as_shape(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The way back."""
    return y if y.shape == shape else y.view(shape)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products on `x` run in: autocast's where it is on, else x's own."""
    device = x.device.type  # autocast knows no "meta"
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else x.dtype
