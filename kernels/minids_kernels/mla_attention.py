"""Attention over packed documents: softmax(q k^T * scale) v within each document, causal or not.

q [T, H, Dqk], k [T, Hk, Dqk], v [T, Hk, Dv] with Hk = H or 1 (shared by all heads, as MLA's rope key is), documents end
to end, document i at tokens cu_seqlens[i]:cu_seqlens[i+1] (FlashAttention's convention). Its keys and values may be
others than its queries' tokens, and more or fewer: then they lie at cu_seqlens_k[i]:cu_seqlens_k[i+1]. Widths of q/k
and v may differ, as they do in multi-head latent attention (DeepSeek-V3 report, section 2.1.1). fp32, bf16 or fp16
(fp64 on the PyTorch path).

The kernels are in _mla_attention_triton.py (every GPU Triton knows; Dqk up to 192 and Dv up to 128 there), the PyTorch
path in _mla_attention_torch.py.
Test: tests/kernels/test_mla_attention.py. Benchmark: benchmarks/ops/mla_attention.py.
"""

from __future__ import annotations

import itertools
from typing import Literal, overload

import torch
from torch import Tensor

from . import _launch, _mla_attention_torch, _mla_attention_triton
from ._checks import check_float, check_shape, compute_dtype
from ._mla_attention_triton import MAX_V_WIDTH, MAX_WIDTH, padded
from ._operator import operator
from .rope import rope, rotate, rotate_back_

__all__ = ["mla_attention", "mla_attention_reference"]


def mla_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool = True, scale: float | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """fp32, one document after the other; shapes as `mla_attention`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = q.shape[1]
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=torch.float32, device=q.device)
    bounds = cu_seqlens.tolist()
    key_bounds = bounds if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for (start, end), keys in zip(itertools.pairwise(bounds), itertools.pairwise(key_bounds), strict=True):
        places = (slice(start, end), slice(*keys), slice(*keys))
        qd, kd, vd = (
            x[place].float().expand(-1, heads, -1).transpose(0, 1) for x, place in zip((q, k, v), places, strict=True)
        )
        scores = qd @ kd.transpose(1, 2) * scale
        if causal:
            scores += torch.full_like(scores[0], -torch.inf).triu(1 + scores.shape[2] - scores.shape[1])
        p = scores.softmax(-1).nan_to_num() if scores.shape[2] < scores.shape[1] else scores.softmax(-1)
        out[start:end] = (p @ vd).transpose(0, 1)
    return out.to(q.dtype)


# --- registration -----------------------------------------------------------------------------------------------------
# q, k: whole rows, or with q_pe, k_pe their nope columns. (Lists of tensors would cost 60 us a call.) With cos and sin
# the rows' last columns are not rotated yet, and gradients are those of what was given.


@operator("mla_attention")
def _mla_attention(
    q: Tensor, q_pe: Tensor | None, k: Tensor, k_pe: Tensor | None, v: Tensor, cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None, cos: Tensor | None, sin: Tensor | None, causal: bool, scale: float, with_lse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> out [T, H, Dv], lse [H, T] ([H, 0] on the PyTorch path unless `with_lse`), and if `keep` what the PyTorch
    path's backward uses again."""
    path = _mla_attention_triton if _launch.use_triton(v) else _mla_attention_torch
    bounds = cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    queries, keys = (_rotated(_parts(rows, cos), cos, sin) for rows in (_given(q, q_pe), _given(k, k_pe)))
    return path.forward(queries, keys, v, *bounds, causal, scale, with_lse, keep)


@operator("mla_attention_backward")
def _mla_attention_backward(
    dout: Tensor, q: Tensor, q_pe: Tensor | None, k: Tensor, k_pe: Tensor | None, v: Tensor, out: Tensor, lse: Tensor,
    kept: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    causal: bool, scale: float,
) -> list[Tensor]:  # fmt: skip
    """dout [T, H, Dv] and what the forward took and gave -> the gradients of those of q, q_pe, k, k_pe, v there are."""
    path = _mla_attention_triton if _launch.use_triton(v) else _mla_attention_torch
    bounds = cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    queries, keys = _parts(_given(q, q_pe), cos), _parts(_given(k, k_pe), cos)
    if not kept.numel():
        queries, keys = _rotated(queries, cos, sin), _rotated(keys, cos, sin)
    dq = [x.new_empty(x.shape) for x in _given(q, q_pe)]
    *dk, dv = path.backward(dout, queries, keys, v, out, lse, kept, *bounds, causal, scale, dq)
    if cos is not None and sin is not None:
        rotate_back_(dq[-1][..., -2 * cos.shape[1] :], cos, sin)
        rotate_back_(dk[-1], cos, sin)
    return [*dq, *(dk if k_pe is not None or len(dk) == 1 else [torch.cat(dk, -1)]), dv]


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _parts(rows: list[Tensor], cos: Tensor | None) -> list[Tensor]:
    """Whole rows as views of the columns that pass and of those to be rotated, where both exist."""
    rotated = 0 if cos is None else 2 * cos.shape[1]
    if len(rows) == 2 or not 0 < rotated < rows[0].shape[2]:
        return rows
    return [rows[0][..., :-rotated], rows[0][..., -rotated:]]


def _rotated(parts: list[Tensor], cos: Tensor | None, sin: Tensor | None) -> list[Tensor]:
    return parts if cos is None or sin is None else [*parts[:-1], rotate(parts[-1], cos, sin)]


@_mla_attention.register_fake
def _(
    q: Tensor, q_pe: Tensor | None, k: Tensor, k_pe: Tensor | None, v: Tensor, cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None, cos: Tensor | None, sin: Tensor | None, causal: bool, scale: float, with_lse: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (tokens, heads, _), on_gpu = q.shape, _launch.use_triton(v)
    lse = v.new_empty(heads, tokens if with_lse or on_gpu else 0, dtype=_mla_attention_torch.statistic(v))
    kept = torch.library.get_ctx().new_dynamic_size() if keep and not on_gpu else 0
    return v.new_empty(tokens, heads, v.shape[2]), lse, v.new_empty(kept)


@_mla_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, q_pe: Tensor | None, k: Tensor, k_pe: Tensor | None, v: Tensor, out: Tensor, lse: Tensor,
    kept: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    causal: bool, scale: float,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(x.shape) for x in _given(q, q_pe, k, k_pe, v)]


def _setup(ctx, inputs, output) -> None:
    *rows, cu_seqlens, cu_seqlens_k, cos, sin, ctx.causal, ctx.scale, _, _ = inputs
    out, lse, kept = output
    ctx.mark_non_differentiable(lse, kept)
    ctx.set_materialize_grads(False)  # else zeros of kept's size would come back for it
    size = kept.numel()
    if isinstance(size, int) and size:  # holds the rows as well: only the given ones' shapes are still asked for
        rows = [None if x is None else x.new_empty(()).expand(x.shape) for x in rows]
    ctx.save_for_backward(*rows, out, lse, kept, cu_seqlens, cu_seqlens_k, cos, sin)


def _backward(ctx, dout, dlse, dkept):
    if dout is None:  # nothing came back
        return (None,) * 13
    saved = ctx.saved_tensors  # once: activation checkpointing hands each out one time
    rows, rest = saved[:5], saved[5:]
    grads = iter(_mla_attention_backward(dout, *rows, *rest, ctx.causal, ctx.scale))
    return *(None if x is None else next(grads) for x in rows), *[None] * 8


_mla_attention.register_autograd(_backward, setup_context=_setup)


# --- public op --------------------------------------------------------------------------------------------------------


Rows = Tensor | tuple[Tensor, Tensor]  # whole, or their nope and rope columns apart


@overload
def mla_attention(
    q: Rows, k: Rows, v: Tensor, cu_seqlens: Tensor, causal: bool = True, scale: float | None = None,
    return_lse: Literal[False] = False, cu_seqlens_k: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def mla_attention(
    q: Rows, k: Rows, v: Tensor, cu_seqlens: Tensor, causal: bool = True, scale: float | None = None, *,
    return_lse: Literal[True], cu_seqlens_k: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def mla_attention(
    q: Rows, k: Rows, v: Tensor, cu_seqlens: Tensor, causal: bool = True, scale: float | None = None,
    return_lse: bool = False, cu_seqlens_k: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """q [T, H, Dqk], k [T, Hk, Dqk], v [T, Hk, Dv] (Hk = H or 1, k's and v's alike or not), cu_seqlens int32
    [documents + 1] from 0 in rising order to T -> [T, H, Dv] in v's dtype (autocast's under autocast); with
    `return_lse` also the scores' log-sum-exp [T, H] in fp32 (fp64 for fp64).

    q, k or both may come apart as (nope [T, H, Dn], rope [T, H, Dr]), Dn + Dr = Dqk, each part of k with H heads or 1:
    MLA's rope key is never copied to the heads.

    With `rotary_cos` and `rotary_sin` [T, Dr/2] the last Dr columns of q's and k's rows (the rope parts where these
    come apart) are rotated first, as `rope` does; q can then be a linear layer's output as it is, and its gradient one
    tensor.

    Row t attends to the rows of its own document, up to itself when `causal`. With `cu_seqlens_k`, int32
    [documents + 1] from 0 in rising order to Tk, k and v have Tk rows instead, and document i's queries meet keys
    cu_seqlens_k[i]:cu_seqlens_k[i+1]; when `causal` the last query sees all of them and each one before it one key less
    (FlashAttention's alignment). A query that sees no key gives out 0 and lse +inf. `scale` defaults to 1 / sqrt(Dqk).
    Differentiable in q, k and v; nothing flows back through the log-sum-exp. Raises TypeError for dtypes that are no
    floats, ValueError when shapes disagree, for a scale that is not above 0, and for widths the kernels do not serve.
    Values in cu_seqlens(_k) that do not run from 0 to T(k) raise ValueError on the PyTorch path; kernels trust them,
    since looking would wait for the GPU.
    """
    queries, keys = ([x] if isinstance(x, Tensor) else list(x) for x in (q, k))
    tokens, heads, width = _check_rows(queries, keys, v, own_keys=cu_seqlens_k is not None)
    check_shape("cu_seqlens", cu_seqlens, (None,))
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: got nothing, allowed is 0, rising, to {tokens}")
    if cu_seqlens_k is not None:
        check_shape("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens.shape))
    _check_rotation(queries, keys, rotary_cos, rotary_sin, own_keys=cu_seqlens_k is not None)
    scale = width**-0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale: got {scale}, allowed is above 0")
    dtype = compute_dtype(v)
    queries, keys, v = [x.to(dtype) for x in queries], [x.to(dtype) for x in keys], v.to(dtype)
    if _launch.use_triton(v):
        if width > MAX_WIDTH:
            raise ValueError(f"q: got {width} columns, allowed are up to {MAX_WIDTH}")
        if v.shape[2] > MAX_V_WIDTH:
            raise ValueError(f"v: got {v.shape[2]} columns, allowed are up to {MAX_V_WIDTH}")
        apart = max((_parts(x, rotary_cos) for x in (queries, keys)), key=len)
        if len(apart) == 2 and sum(padded(x.shape[2]) for x in apart) > MAX_WIDTH:  # wider than kernels hold
            queries, keys = ([torch.cat([x.expand(-1, heads, -1) for x in parts], -1)] for parts in (queries, keys))
            if rotary_cos is not None and rotary_sin is not None:
                queries, keys = ([rope(x[0], rotary_cos, rotary_sin)] for x in (queries, keys))
                rotary_cos = rotary_sin = None
        cu_seqlens = _launch.queued(cu_seqlens, v.device, torch.int32)
        cu_seqlens_k = None if cu_seqlens_k is None else _launch.queued(cu_seqlens_k, v.device, torch.int32)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*queries, *keys, v))
    rows = (x for parts in (queries, keys) for x in (*parts, None)[:2])
    out, lse, _ = _mla_attention(
        *rows, v, cu_seqlens, cu_seqlens_k, rotary_cos, rotary_sin, causal, scale, return_lse, keep
    )
    return (out, lse.t()) if return_lse else out


def _check_rows(q: list[Tensor], k: list[Tensor], v: Tensor, own_keys: bool) -> tuple[int, int, int]:
    """-> tokens, heads, columns of a row. `own_keys`: k and v need not have q's tokens."""
    expected: list[int | None] = [None, None]
    for name, part in _named("q", q):
        check_float(name, part)
        check_shape(name, part, (*expected, None))
        expected = [*part.shape[:2]]
    (tokens, heads), widths = q[0].shape[:2], [part.shape[2] for part in q]
    columns: list[int | None] = [None, None]
    if len(k) == 1:
        columns = [sum(widths)]
    elif len(q) == 2:
        columns = [*widths]
    rows = None if own_keys else tokens
    for (name, part), width in zip([*_named("k", k), ("v", v)], [*columns, None], strict=True):
        check_float(name, part)
        check_shape(name, part, (rows, None, width))
        rows = part.shape[0]
        if part.shape[1] not in (1, heads):
            raise ValueError(f"{name}: got {part.shape[1]} heads, allowed is 1 or q's {heads}")
    if sum(part.shape[2] for part in k) != sum(widths):
        raise ValueError(f"k: got {' + '.join(str(part.shape[2]) for part in k)} columns, allowed are q's {widths[0]}")
    return tokens, heads, sum(widths)


def _check_rotation(
    q: list[Tensor], k: list[Tensor], cos: Tensor | None, sin: Tensor | None, own_keys: bool
) -> None:  # fmt: skip
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError("rotary_cos, rotary_sin: got one of them, allowed are both or neither")
    if own_keys:
        raise ValueError("rotary_cos: got angles and cu_seqlens_k, allowed are angles where q's tokens are k's")
    check_shape("rotary_cos", cos, (q[0].shape[0], None))
    check_shape("rotary_sin", sin, tuple(cos.shape))
    angles = 2 * cos.shape[1]
    for name, x in (("q", q), ("k", k)):
        if not (x[1].shape[2] == angles if len(x) == 2 else 0 < angles <= x[0].shape[2]):
            raise ValueError(
                f"rotary_cos: got {cos.shape[1]} angles, allowed are half as many as {name} has columns to rotate, of "
                f"{' + '.join(str(part.shape[2]) for part in x)}"
            )


def _named(name: str, x: list[Tensor]) -> list[tuple[str, Tensor]]:
    if len(x) not in (1, 2):
        raise ValueError(f"{name}: got {len(x)} tensors, allowed are one or two")
    return [(name, x[0])] if len(x) == 1 else [(f"{name}[{i}]", part) for i, part in enumerate(x)]
