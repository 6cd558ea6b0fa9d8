"""Attention over packed documents: softmax(q k^T * scale) v within each document, causal or not.

q [T, H, Dqk], k [T, Hk, Dqk], v [T, Hk, Dv] with Hk = H or 1 (shared by all heads, as MLA's rope key is), documents end
to end, document i at tokens cu_seqlens[i]:cu_seqlens[i+1] (FlashAttention's convention). Widths of q/k and v may
differ, as they do in multi-head latent attention (DeepSeek-V3 report, section 2.1.1).

On the PyTorch path documents are laid side by side in rectangles of similar length: a causal row never sees the padding
behind it, so no mask over documents is needed. Within a rectangle, blocks of query rows meet all their keys in batched
matrix products. Scores are rounded to the compute dtype before an fp32 softmax, as in any unfused attention.
Test: tests/kernels/test_mla_attention.py.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._checks import check_float, check_shape, compute_dtype

__all__ = ["mla_attention", "mla_attention_reference"]

QUERY_BLOCK = 128  # rows of scores in memory at once, a document
KEPT_ELEMENTS = 1 << 23  # probabilities kept for the backward instead of computed again, a rectangle


def mla_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool = True, scale: float | None = None
) -> Tensor:
    """fp32, one document after the other; shapes as `mla_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = q.shape[1]
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=torch.float32, device=q.device)
    bounds = cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        qd, kd, vd = (x[start:end].float().expand(-1, heads, -1).transpose(0, 1) for x in (q, k, v))
        scores = qd @ kd.transpose(1, 2) * scale
        if causal:
            scores += torch.full_like(scores[0], -torch.inf).triu(1)
        out[start:end] = (scores.softmax(-1) @ vd).transpose(0, 1)
    return out.to(q.dtype)


class _Rectangle:
    """`rows` documents of at most `length` tokens side by side. `gather` [rows, length] holds token numbers (a
    document's last token repeated behind its end), `tokens` and `places` say which token each real place is; all are
    None when the rectangle is simply the whole input."""

    def __init__(self, documents: list[tuple[int, int]], length: int, total: int) -> None:
        self.rows, self.length = len(documents), length
        self.gather = self.tokens = self.places = None
        if all(end - start == length for start, end in documents) and self.rows * length == total:
            return
        start = torch.tensor([d[0] for d in documents]).unsqueeze(1)
        end = torch.tensor([d[1] for d in documents]).unsqueeze(1)
        self.gather = torch.minimum(start + torch.arange(length), end - 1)
        real = start + torch.arange(length) < end
        self.tokens, self.places = self.gather[real], real.flatten().nonzero().squeeze(1)

    def take(self, x: Tensor) -> Tensor:
        """[T, H, D] -> [rows * H, length, D]."""
        if self.gather is not None:
            x = x[self.gather.to(x.device)]
        return x.reshape(self.rows, self.length, *x.shape[-2:]).transpose(1, 2).flatten(0, 1)

    def put(self, out: Tensor, x: Tensor) -> None:
        """Writes x [rows * H, length, D] to its tokens in out [T, H, D]."""
        x = x.unflatten(0, (self.rows, -1)).transpose(1, 2)
        if self.tokens is None or self.places is None:
            out.view(self.rows, self.length, *out.shape[1:]).copy_(x)
        else:
            out[self.tokens.to(out.device)] = x.reshape(-1, *out.shape[1:])[self.places.to(out.device)]

    def take_gradient(self, x: Tensor) -> Tensor:
        """As `take`, with zeros behind the documents' ends."""
        if self.tokens is None or self.places is None:
            return self.take(x)
        padded = x.new_zeros(self.rows * self.length, *x.shape[1:])
        padded[self.places.to(x.device)] = x[self.tokens.to(x.device)]
        return padded.view(self.rows, self.length, *x.shape[1:]).transpose(1, 2).flatten(0, 1)


@functools.lru_cache(maxsize=16)
def _rectangles(bounds: tuple[int, ...], causal: bool) -> list[_Rectangle]:
    """Documents grouped so that padding adds at most a quarter to a causal document's length (none otherwise)."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, end in itertools.pairwise(bounds):
        length = end - start
        if length == 0:
            continue
        step = max(8, 1 << max(0, length.bit_length() - 3)) if causal else 1
        groups.setdefault(-(-length // step) * step, []).append((start, end))
    return [
        _Rectangle(group, max(end - start for start, end in group), bounds[-1]) for _, group in sorted(groups.items())
    ]


def _probabilities(q: Tensor, k: Tensor, first: int, causal: bool, scale: float) -> Tensor:
    """Softmax rows of query block q [B, M, D] (rows first.. of the document) over keys k [B, N, D] -> [B, M, N]."""
    mask = q.new_zeros(q.shape[1], k.shape[1])
    if causal:
        mask[:, first:] = q.new_full((q.shape[1], k.shape[1] - first), -math.inf).triu_(1)
    return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale).softmax(-1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...], causal: bool, scale: float) -> Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        heads = q.shape[1]
        kept: list[Tensor] = []
        for rectangle in _rectangles(bounds, causal):
            qr, kr, vr = (rectangle.take(x.expand(-1, heads, -1)) for x in (q, k, v))
            result = torch.empty_like(vr)
            keep = qr.shape[0] * rectangle.length**2 <= KEPT_ELEMENTS
            for first in range(0, rectangle.length, QUERY_BLOCK):
                rows = slice(first, first + QUERY_BLOCK)
                seen = slice(0, first + QUERY_BLOCK if causal else None)
                p = _probabilities(qr[:, rows], kr[:, seen], first, causal, scale)
                result[:, rows] = torch.bmm(p, vr[:, seen])
                if keep:
                    kept.append(p)
            rectangle.put(out, result)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.bounds, ctx.causal, ctx.scale = bounds, causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        heads, causal = q.shape[1], ctx.causal
        dq = torch.empty_like(q)
        dk, dv = (x.new_empty(x.shape[0], heads, x.shape[-1]) for x in (k, v))
        for rectangle in _rectangles(ctx.bounds, causal):
            qr, kr, vr = (rectangle.take(x.expand(-1, heads, -1)) for x in (q, k, v))
            dor = rectangle.take_gradient(dout)
            dqr, dkr, dvr = torch.empty_like(qr), torch.zeros_like(kr), torch.zeros_like(vr)
            keep = qr.shape[0] * rectangle.length**2 <= KEPT_ELEMENTS
            for first in range(0, rectangle.length, QUERY_BLOCK):
                rows = slice(first, first + QUERY_BLOCK)
                seen = slice(0, first + QUERY_BLOCK if causal else None)
                p = kept.pop(0) if keep else _probabilities(qr[:, rows], kr[:, seen], first, causal, ctx.scale)
                dp = torch.bmm(dor[:, rows], vr[:, seen].transpose(1, 2))
                ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
                dqr[:, rows] = torch.bmm(ds, kr[:, seen])
                dkr[:, seen] += torch.bmm(ds.transpose(1, 2), qr[:, rows])
                dvr[:, seen] += torch.bmm(p.transpose(1, 2), dor[:, rows])
            rectangle.put(dq, dqr.mul_(ctx.scale))
            rectangle.put(dk, dkr.mul_(ctx.scale))
            rectangle.put(dv, dvr)
        dk, dv = (d.sum(1, keepdim=True) if x.shape[1] < heads else d for d, x in ((dk, k), (dv, v)))
        return dq, dk, dv, None, None, None


def mla_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool = True, scale: float | None = None
) -> Tensor:
    """q [T, H, Dqk], k [T, Hk, Dqk], v [T, Hk, Dv] (Hk = H or 1), cu_seqlens int32 [documents + 1] -> [T, H, Dv].

    Row t attends to the rows of its own document, up to itself when `causal`. `scale` defaults to 1 / sqrt(Dqk).
    Differentiable in q, k and v. Under autocast the products run in autocast's dtype. Raises TypeError for dtypes that
    are no floats, ValueError when shapes disagree or cu_seqlens does not run from 0 to T in rising order.
    """
    check_float("q", q)
    check_shape("q", q, (None, None, None))
    check_shape("cu_seqlens", cu_seqlens, (None,))
    tokens, heads, width = q.shape
    for name, x, last in (("k", k, width), ("v", v, None)):
        check_float(name, x)
        check_shape(name, x, (tokens, None, last))
        if x.shape[1] not in (1, heads):
            raise ValueError(f"{name}: got {x.shape[1]} heads, allowed is 1 or q's {heads}")
    bounds = tuple(cu_seqlens.tolist())
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens: got {list(bounds[:4])}...{list(bounds[-2:])}, allowed is 0, rising, to {tokens}")
    dtype = compute_dtype(q)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    scale = width**-0.5 if scale is None else scale
    return _Attention.apply(q, k, v, bounds, causal, scale)
