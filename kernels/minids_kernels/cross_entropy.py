"""Cross-entropy of a linear head without the [T, V] logits: loss and gradients are made chunk by chunk.

nll[t] = logsumexp(x[t] @ weight.T) - (x[t] . weight[target[t]]), 0 where target[t] == ignore_index. Logits are rounded
to the compute dtype as a linear layer's output is; sums and exponentials are fp32. The chunking idea is Liger's and
Cut Cross-Entropy's (arXiv 2410.10989, 2411.09009). Test: tests/kernels/test_cross_entropy.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import check_float, check_shape, compute_dtype

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]

PIECE_ELEMENTS = 1 << 19  # logits in fp32 at once: what stays in a CPU's caches
CHUNK_ELEMENTS = 1 << 23  # logits in the compute dtype at once
KEPT_ELEMENTS = 1 << 24  # logits kept for the backward instead of computed again


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """fp32 logits in full; x [T, D], weight [V, D], targets [T] -> nll [T]."""
    return F.cross_entropy(x.float() @ weight.float().T, targets, ignore_index=ignore_index, reduction="none")


def _pieces(rows: int, vocab: int, elements: int) -> list[slice]:
    step = max(1, elements // vocab)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class _LinearCrossEntropy(torch.autograd.Function):
    """Per-token losses. Small problems keep the gradient by logits in the compute dtype, large ones make it again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        rows, vocab = x.shape[0], weight.shape[0]
        xc, wc = x.to(dtype), weight.to(dtype)
        nll = torch.empty(rows, dtype=torch.promote_types(dtype, torch.float32), device=x.device)
        keep = rows * vocab <= KEPT_ELEMENTS and any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        for chunk in _pieces(rows, vocab, CHUNK_ELEMENTS):
            logits = xc[chunk] @ wc.T
            _to_gradient(logits, targets[chunk], nll[chunk], keep)
            if keep:
                kept.append(logits)
        ctx.save_for_backward(x, weight, targets, xc, wc, *kept)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, dnll: Tensor):
        x, weight, targets, xc, wc, *kept = ctx.saved_tensors
        rows, vocab = x.shape[0], weight.shape[0]
        scale = dnll.to(xc.dtype).unsqueeze(1)
        dx = torch.empty_like(xc)
        dweight = torch.zeros_like(weight)
        for index, chunk in enumerate(_pieces(rows, vocab, CHUNK_ELEMENTS)):
            if kept:
                grad = kept[index] * scale[chunk]
            else:
                grad = xc[chunk] @ wc.T
                _to_gradient(grad, targets[chunk], torch.empty_like(dnll[chunk]), keep=True)
                grad *= scale[chunk]
            torch.mm(grad, wc, out=dx[chunk])
            dweight += grad.T @ xc[chunk]
        return dx.to(x.dtype), dweight, None, None


def _to_gradient(logits: Tensor, targets: Tensor, nll: Tensor, keep: bool) -> None:
    """Writes nll [rows] fp32; turns logits [rows, V] in place into nll's gradient by them if `keep`, else leaves them.

    That is the probabilities, less 1 at the target: subtracted before rounding, since a confident target's p - 1 is far
    smaller than p's rounding.
    """
    pieces = _pieces(logits.shape[0], logits.shape[1], PIECE_ELEMENTS)
    wide, log_p = logits.new_empty(2, pieces[0].stop, logits.shape[1], dtype=nll.dtype)
    for piece in pieces:
        rows = piece.stop - piece.start
        torch.log_softmax(wide[:rows].copy_(logits[piece]), -1, out=log_p[:rows])
        target = targets[piece].unsqueeze(1)
        at_target = log_p[:rows].gather(1, target)
        nll[piece] = -at_target.squeeze(1)
        if keep:
            logits[piece] = log_p[:rows].exp_().scatter_(1, target, at_target.expm1_())


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Per-token negative log-likelihood in nats of a linear head, without materialising its logits.

    x [T, D] and weight [V, D] float, targets [T] int64 in [0, V) or `ignore_index` -> [T] fp32, 0 where ignored.
    Differentiable in x and weight. Ignored tokens cost nothing. Raises TypeError, ValueError on other shapes or dtypes.
    """
    check_float("x", x)
    check_shape("weight", weight, (None, None))
    check_shape("x", x, (None, weight.shape[1]))
    check_shape("targets", targets, (x.shape[0],))
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: got {targets.dtype}, allowed is torch.int64")
    kept = (targets != ignore_index).nonzero().squeeze(1)
    if kept.numel() == targets.numel():
        return _LinearCrossEntropy.apply(x, weight, targets, compute_dtype(x))
    nll = _LinearCrossEntropy.apply(x.index_select(0, kept), weight, targets[kept], compute_dtype(x))
    return nll.new_zeros(targets.shape).index_copy(0, kept, nll)
