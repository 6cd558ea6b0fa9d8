"""RMSNorm as modules; the arithmetic is minids_kernels.rms_norm."""

from __future__ import annotations

import torch
from minids_kernels import rms_norm
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x [..., N] -> [..., N]; `weight` [N] starts at one."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class AddRMSNorm(RMSNorm):
    """x, residual [..., N] -> the norm of their sum, and the sum; without a residual the norm of x, and x."""

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if residual is None:
            return super().forward(x), x
        return rms_norm(x, self.weight, self.eps, residual=residual)
