"""Mixture of experts, after the gate (DeepSeek-V3 report, section 2.1.2).

    y[t] = sum_j topk_weight[t, j] * down_e(swiglu(gate_up_e(x[t]))) with e = topk_ids[t, j]

Tokens are sorted by expert (moe_plan), so that each expert is one matrix product. Kernels apply the weight with SwiGLU,
in the first product's epilogue (`down` is linear), the PyTorch path in the sum over experts. The backward keeps x, the
gate_up products and the plan, and computes everything else again. On a GPU nothing waits for a count: segments lie end
to end, grids depend on shapes alone.
Test: tests/kernels/test_moe.py. Benchmark: benchmarks/ops/moe.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _launch
from ._checks import check_devices, check_float, check_shape, compute_dtype
from ._launch import tl, triton
from ._operator import operator
from .fp8_quant import ScaleFormat, quantize_tiles
from .grouped_fp8_gemm import grouped_fp8_gemm, grouped_fp8_gemm_wgrad, quantize_segments_transposed
from .grouped_fp8_linear import empty_experts, quantize_experts
from .grouped_gemm import grouped_mm, grouped_outer, grouped_swiglu
from .moe_plan import MoePlan, check_experts, check_ids, plan_pairs
from .swiglu import swiglu_gradients, swiglu_values
from .swiglu_quant import swiglu_quant

__all__ = ["moe_experts", "moe_experts_reference", "moe_permute", "moe_unpermute"]

ALIGN = 64  # rows of an expert's products on the PyTorch path in half precision


def moe_experts_reference(
    x: Tensor, topk_ids: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> Tensor:
    """fp32, one expert after the other; shapes as `moe_experts`."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in range(w_gate_up.shape[0]):
        token, slot = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token].float() @ w_gate_up[expert].float().T).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ w_down[expert].float().T
        out.index_add_(0, token, y * topk_weight[token, slot, None].float())
    return out.to(x.dtype)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _activate_backward_kernel(
    dout_ptr, gate_up_ptr, weight_ptr, pair_ptr, out_ptr, dgate_up_ptr, dweight_ptr, M, N,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From dout [M, N]: out again, dgate_up [M, 2N] and in dweight[pair [M]] fp32 each row's products summed in one
    order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows = row[:, None]
    pair = tl.load(pair_ptr + row, mask=row < M, other=0)
    weight = tl.load(weight_ptr + pair, mask=row < M, other=0.0).to(tl.float32)[:, None]
    products = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        mask = (rows < M) & (cols < N)
        gate = tl.load(gate_up_ptr + rows * (2 * N) + cols, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + rows * (2 * N) + N + cols, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + rows * N + cols, mask=mask, other=0.0).to(tl.float32)
        y = swiglu_values(gate, up)
        products += dout * y
        dgate, dup = swiglu_gradients(dout * weight, gate, up)
        tl.store(out_ptr + rows * N + cols, (y * weight).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(dgate_up_ptr + rows * (2 * N) + cols, dgate.to(dgate_up_ptr.dtype.element_ty), mask=mask)
        tl.store(dgate_up_ptr + rows * (2 * N) + N + cols, dup.to(dgate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + pair, tl.sum(products, axis=1), mask=row < M)


@triton.jit
def _combine_kernel(
    y_ptr, place_ptr, weight_ptr, base_ptr, out_ptr, T, N, top_k,
    HAS_WEIGHT: tl.constexpr, HAS_BASE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [T, N]: base [T, N], and each token's top_k rows of y, times weight [T, top_k], in fp32 and one order."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(N, BLOCK_N)
    rows = (program // across) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (program % across) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < T) & (cols < N)
    if HAS_BASE:
        total = tl.load(base_ptr + rows * N + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for slot in tl.range(top_k):
        place = tl.load(place_ptr + rows * top_k + slot, mask=rows < T, other=0)
        y = tl.load(y_ptr + place * N + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + rows * top_k + slot, mask=rows < T, other=0.0).to(tl.float32)
        total += y
    tl.store(out_ptr + rows * N + cols, total.to(out_ptr.dtype.element_ty), mask=mask)


# --- launchers --------------------------------------------------------------------------------------------------------


def _triton_activate_backward(
    dout: Tensor, gate_up: Tensor, weight: Tensor, pair: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, width = dout.shape
    out, dgate_up = torch.empty_like(dout), torch.empty_like(gate_up)
    dweight = dout.new_empty(rows, dtype=torch.float32)
    config = _launch.config("moe", "activate_backward", _launch.arch(dout), N=width)
    _launch.launch(
        _activate_backward_kernel, (triton.cdiv(rows, config["ROWS"]),),
        dout, gate_up, weight.contiguous(), pair, out, dgate_up, dweight, rows, width, **config,
    )  # fmt: skip
    return out, dgate_up, dweight


def _triton_combine(y: Tensor, place: Tensor, top_k: int, weight: Tensor | None, base: Tensor | None = None) -> Tensor:
    tokens, width = place.shape[0] // top_k, y.shape[1]
    out = y.new_empty(tokens, width)
    config = _launch.config("moe", "combine", _launch.arch(y), N=width)
    _launch.launch(
        _combine_kernel, (triton.cdiv(tokens, config["ROWS"]) * triton.cdiv(width, config["BLOCK_N"]),),
        y.contiguous(), place, place if weight is None else weight.contiguous(),
        y if base is None else base.contiguous(), out, tokens, width, top_k,
        HAS_WEIGHT=weight is not None, HAS_BASE=base is not None, **config,
    )  # fmt: skip
    return out


# --- PyTorch path -----------------------------------------------------------------------------------------------------


def _torch_activate_backward(
    dout: Tensor, gate: Tensor, up: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    silu = F.silu(gate)
    out = silu * up
    dweight = torch.linalg.vecdot(dout, out)
    dout.mul_(weight)
    dgate_up = dout.new_empty(dout.shape[0], 2 * dout.shape[1])
    dgate, dup = dgate_up.chunk(2, dim=-1)
    torch.mul(silu, dout, out=dup)
    torch.ops.aten.silu_backward.grad_input(dout.mul_(up), gate, grad_input=dgate)
    return out.mul_(weight), dgate_up, dweight


def _torch_combine(y: Tensor, place: Tensor, top_k: int, weight: Tensor | None, base: Tensor | None = None) -> Tensor:
    weight = None if weight is None else weight.to(y.dtype)
    out = F.embedding_bag(place.view(-1, top_k), y, mode="sum", per_sample_weights=weight)
    return out if base is None else out.add_(base)


def _spare(x: Tensor) -> int:
    """Rows that an expert's products may have beyond its own. For half precision CPU libraries prepare code for each
    shape of product they meet, which takes longer than the product itself: whole ALIGN rows bound the shapes."""
    return ALIGN - 1 if x.element_size() == 2 and not _launch.use_triton(x) else 0


def _segments(offsets: Tensor, spare: int) -> list[tuple[int, int, int, int]]:
    """(expert, first row, end, end of the products' rows) of experts that have rows."""
    align = spare + 1
    return [
        (expert, start, end, start + -(-(end - start) // align) * align)
        for expert, (start, end) in enumerate(itertools.pairwise(offsets.tolist()))
        if start < end
    ]


def _gather(x: Tensor, token: Tensor, out: Tensor) -> Tensor:
    """Tokens' rows of x, and zeros behind them."""
    if out.shape[0] == token.shape[0]:
        return torch.index_select(x, 0, token, out=out)
    torch.index_select(x, 0, token, out=out[: token.shape[0]])
    out[token.shape[0] :].zero_()
    return out


def _torch_fwd(
    x: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor, base: Tensor | None, plan: MoePlan, keep: bool
) -> tuple[Tensor, Tensor]:
    """One expert after the other, whose rows stay in the caches. What its products write behind its segment is the next
    expert's to overwrite."""
    spare, pairs = _spare(x), topk_weight.numel()
    segments = _segments(plan.offsets, spare)
    longest = max((stop - start for _, start, _, stop in segments), default=0)
    rows, y = (x.new_empty(length, x.shape[1]) for length in (longest, pairs + spare))
    gate_up = x.new_empty(pairs + spare if keep else longest, w_gate_up.shape[1])
    if keep:
        gate_up[pairs:].zero_()
    gate, up = gate_up.chunk(2, dim=-1)
    for expert, start, end, stop in segments:
        mine = _gather(x, plan.token[start:end], rows[: stop - start])
        at = slice(start, stop) if keep else slice(stop - start)
        torch.mm(mine, w_gate_up[expert].T, out=gate_up[at])
        torch.mm(F.silu(gate[at]).mul_(up[at]), w_down[expert].T, out=y[start:stop])
    return _torch_combine(y, plan.place, topk_weight.shape[1], topk_weight, base), gate_up


def _torch_bwd(
    dout: Tensor, x: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor, gate_up: Tensor, plan: MoePlan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spare, pairs = _spare(x), topk_weight.numel()
    dx, dweight = x.new_empty(pairs + spare, x.shape[1]), x.new_empty(pairs)
    dw_gate_up, dw_down = torch.empty_like(w_gate_up), torch.empty_like(w_down)
    gate, up = gate_up.chunk(2, dim=-1)
    weight = F.pad(_spread(topk_weight, plan.pair, x.dtype), (0, 0, 0, spare))
    segments = _segments(plan.offsets, spare)
    rows, drows = x.new_empty(2, max((stop - start for _, start, _, stop in segments), default=0), x.shape[1])
    for expert, start, end, stop in segments:
        mine, dmine = (_gather(t, plan.token[start:end], to[: stop - start]) for t, to in ((x, rows), (dout, drows)))
        scaled, dgate_up, products = _torch_activate_backward(
            torch.mm(dmine, w_down[expert]), gate[start:stop], up[start:stop], weight[start:stop]
        )
        dweight[start:end] = products[: end - start]
        if stop > end:  # what the next expert's gate_up gave
            scaled[end - start :].zero_()
            dgate_up[end - start :].zero_()
        torch.mm(dmine.T, scaled, out=dw_down[expert])
        torch.mm(dgate_up.T, mine, out=dw_gate_up[expert])
        torch.mm(dgate_up, w_gate_up[expert], out=dx[start:stop])
    for idle in set(range(w_down.shape[0])).difference(expert for expert, *_ in segments):
        dw_gate_up[idle].zero_()
        dw_down[idle].zero_()
    return _torch_combine(dx, plan.place, topk_weight.shape[1], None), dweight[plan.place], dw_gate_up, dw_down


# --- forward and backward ---------------------------------------------------------------------------------------------


def _spread(weight: Tensor, pair: Tensor, dtype: torch.dtype) -> Tensor:
    """Router weights [T, k] -> [T * k, 1] in the rows' order."""
    return weight.flatten().index_select(0, pair).to(dtype).unsqueeze(1)


def _activate_backward(
    dout: Tensor, gate_up: Tensor, topk_weight: Tensor, plan: MoePlan
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> scaled activations again, dgate_up, dweight [T * k] in the order of pairs."""
    if _launch.use_triton(gate_up):
        return _triton_activate_backward(dout, gate_up, topk_weight, plan.pair)
    gate, up = gate_up.chunk(2, dim=-1)
    weight = _spread(topk_weight, plan.pair, dout.dtype)
    scaled, dgate_up, dweight = _torch_activate_backward(dout, gate, up, weight)
    return scaled, dgate_up, dweight[plan.place]


def _combine(y: Tensor, place: Tensor, top_k: int, weight: Tensor | None = None, base: Tensor | None = None) -> Tensor:
    return (_triton_combine if _launch.use_triton(y) else _torch_combine)(y, place, top_k, weight, base)


def _triton_fwd(
    x: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor, base: Tensor | None, plan: MoePlan, keep: bool
) -> tuple[Tensor, Tensor]:
    """-> out [T, D], gate_up [T * k, 2F], or no rows of it unless `keep`."""
    scaled, gate_up = grouped_swiglu(x, w_gate_up, plan.offsets, plan.token, topk_weight, plan.pair, keep)
    y = grouped_mm(scaled, w_down, plan.offsets)
    return _triton_combine(y, plan.place, topk_weight.shape[1], None, base), gate_up


def _triton_bwd(
    dout: Tensor, x: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor, gate_up: Tensor, plan: MoePlan,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx [T, D], dweight [T * k] in the order of pairs, dw_gate_up and dw_down in `dtype`."""
    dscaled = grouped_mm(dout, w_down.transpose(1, 2), plan.offsets, plan.token)
    scaled, dgate_up, dweight = _triton_activate_backward(dscaled, gate_up, topk_weight, plan.pair)
    dw_down = grouped_outer(dout, scaled, plan.offsets, a_token=plan.token, dtype=dtype)
    dw_gate_up = grouped_outer(dgate_up, x, plan.offsets, b_token=plan.token, dtype=dtype)
    drows = grouped_mm(dgate_up, w_gate_up.transpose(1, 2), plan.offsets)
    return _triton_combine(drows, plan.place, topk_weight.shape[1], None), dweight, dw_gate_up, dw_down


def _permuted_codes(x: Tensor, token: Tensor, scale_format: ScaleFormat) -> tuple[Tensor, Tensor]:
    """Codes and scales of the tokens' rows: a token is quantised once, whatever the number of its experts."""
    codes, scales = quantize_tiles(x, scale_format)
    return codes.view(torch.uint8).index_select(0, token).view(codes.dtype), scales.t().index_select(1, token).t()


def _fp8_fwd(
    x: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor, base: Tensor | None, plan: MoePlan
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """-> out, gate_up, both weights' codes and scales."""
    gate_up_codes, down_codes = quantize_experts(w_gate_up), quantize_experts(w_down)
    gate_up = _fp8_mm(_permuted_codes(x, plan.token, "fp32"), gate_up_codes, plan.offsets, x.dtype)
    scaled = swiglu_quant(gate_up, weight=_spread(topk_weight, plan.pair, x.dtype).squeeze(1))
    y = _fp8_mm(scaled, down_codes, plan.offsets, x.dtype)
    out = _combine(y, plan.place, topk_weight.shape[1], base=base)
    return out, gate_up, [*gate_up_codes, *down_codes]


def _fp8_bwd(
    dout: Tensor, x: Tensor, topk_weight: Tensor, kept: list[Tensor], gate_up: Tensor, plan: MoePlan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx [T, D], dweight [T * k], dw_gate_up and dw_down in fp32."""
    gate_up_turned, down_turned = (
        (codes.transpose(1, 2).contiguous(), scales.transpose(1, 2)) for codes, scales in (kept[:2], kept[2:])
    )
    dscaled = _fp8_mm(_permuted_codes(dout, plan.token, "fp32"), down_turned, plan.offsets, x.dtype)
    scaled, dgate_up, dweight = _activate_backward(dscaled, gate_up, topk_weight, plan)
    dw_down, dw_gate_up = (
        grouped_fp8_gemm_wgrad(
            *quantize_segments_transposed(left, plan.offsets, left_token),
            *quantize_segments_transposed(right, plan.offsets, right_token),
            plan.offsets,
        )
        for left, left_token, right, right_token in (
            (dout, plan.token, scaled, None), (dgate_up, None, x, plan.token),
        )
    )  # fmt: skip
    drows = _fp8_mm(quantize_tiles(dgate_up), gate_up_turned, plan.offsets, x.dtype)
    return _combine(drows, plan.place, topk_weight.shape[1]), dweight, dw_gate_up, dw_down


def _fp8_mm(rows: tuple[Tensor, Tensor], w: Sequence[Tensor], offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Each operand: codes and scales; w's codes as uint8."""
    return grouped_fp8_gemm(*rows, w[0].view(torch.float8_e4m3fn), w[1], offsets, dtype)


@operator("moe_experts")
def _moe_experts(
    x: Tensor, topk_ids: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor, base: Tensor | None, fp8: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """-> out [T, D]; for the backward: gate_up [T * k and _spare, 2F], no rows of it unless `keep`, the plan, and what
    products take of the weights where that is not they themselves: what `_fp8_fwd` keeps, or they in x's dtype."""
    plan = plan_pairs(topk_ids, w_gate_up.shape[0])
    kept: list[Tensor] = []
    if fp8:
        out, gate_up, kept = _fp8_fwd(x, topk_weight, w_gate_up, w_down, base, plan)
    else:
        if w_gate_up.dtype != x.dtype:
            w_gate_up, w_down = kept = [w_gate_up.to(x.dtype), w_down.to(x.dtype)]
        forward = _triton_fwd if _launch.use_triton(x) else _torch_fwd
        out, gate_up = forward(x, topk_weight, w_gate_up, w_down, base, plan, keep)
    return out, gate_up if keep else gate_up.new_empty(0, gate_up.shape[1]), *plan, kept


@operator("moe_experts_backward")
def _moe_experts_backward(
    dout: Tensor, x: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor, gate_up: Tensor, offsets: Tensor,
    place: Tensor, pair: Tensor, token: Tensor, kept: list[Tensor], fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dtopk_weight, dw_gate_up, dw_down."""
    plan, factors = MoePlan(offsets, place, pair, token), (kept[0], kept[1]) if kept else (w_gate_up, w_down)
    if fp8:
        dx, dweight, *dw = _fp8_bwd(dout, x, topk_weight, kept, gate_up, plan)
    elif _launch.use_triton(x):
        dx, dweight, *dw = _triton_bwd(dout, x, topk_weight, *factors, gate_up, plan, w_gate_up.dtype)
    else:
        dx, dweight, *dw = _torch_bwd(dout, x, topk_weight, *factors, gate_up, plan)
    dw_gate_up, dw_down = (d.to(w.dtype) for d, w in zip(dw, (w_gate_up, w_down), strict=True))
    return dx, dweight.to(topk_weight.dtype).view_as(topk_weight), dw_gate_up, dw_down


@_moe_experts.register_fake
def _(
    x: Tensor, topk_ids: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor, base: Tensor | None, fp8: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    experts, width, _ = w_gate_up.shape
    pairs = topk_ids.shape[0] * topk_ids.shape[1]
    place, pair, token = (topk_ids.new_empty(pairs) for _ in range(3))
    if fp8:
        kept = [t for w in (w_gate_up, w_down) for t in empty_experts(w)]
    else:
        kept = [w.new_empty(w.shape, dtype=x.dtype) for w in (w_gate_up, w_down) if w.dtype != x.dtype]
    return (
        x.new_empty(x.shape), x.new_empty(pairs + (0 if fp8 else _spare(x)) if keep else 0, width),
        x.new_empty(experts + 1, dtype=torch.int32), place, pair, token, kept,
    )  # fmt: skip


@_moe_experts_backward.register_fake
def _(
    dout: Tensor, x: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor, gate_up: Tensor, offsets: Tensor,
    place: Tensor, pair: Tensor, token: Tensor, kept: list[Tensor], fp8: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return tuple(t.new_empty(t.shape) for t in (x, topk_weight, w_gate_up, w_down))  # type: ignore[return-value]


def _setup(ctx, inputs, output) -> None:
    x, _, topk_weight, w_gate_up, w_down, base, ctx.fp8, ctx.keep = inputs
    ctx.has_base = base is not None
    _, *others, kept = output
    ctx.mark_non_differentiable(*others, *kept)
    ctx.set_materialize_grads(False)  # else zeros of gate_up's size would come back for it
    ctx.save_for_backward(x, topk_weight, w_gate_up, w_down, *others, *kept)


def _backward(ctx, dout, *_):
    if dout is None:  # nothing came back
        return (None,) * 8
    saved, dbase = ctx.saved_tensors, dout if ctx.has_base else None
    if not ctx.keep:  # base alone wants a gradient
        return None, None, None, None, None, dbase, None, None
    dx, dweight, dw_gate_up, dw_down = _moe_experts_backward(dout, *saved[:9], list(saved[9:]), ctx.fp8)
    return dx, None, dweight, dw_gate_up, dw_down, dbase, None, None


_moe_experts.register_autograd(_backward, setup_context=_setup)


@operator("moe_permute")
def _moe_permute(x: Tensor, topk_ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> rows [T * k, D], and the plan."""
    plan = plan_pairs(topk_ids, n_experts)
    return x.index_select(0, plan.token), *plan


@operator("moe_unpermute")
def _moe_unpermute(y: Tensor, place: Tensor, pair: Tensor, top_k: int, weight: Tensor | None) -> Tensor:
    return _combine(y, place, top_k, weight)


@_moe_permute.register_fake
def _(x: Tensor, topk_ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    pairs = topk_ids.shape[0] * topk_ids.shape[1]
    place, pair, token = (topk_ids.new_empty(pairs) for _ in range(3))
    return x.new_empty(pairs, x.shape[1]), x.new_empty(n_experts + 1, dtype=torch.int32), place, pair, token


@_moe_unpermute.register_fake
def _(y: Tensor, place: Tensor, pair: Tensor, top_k: int, weight: Tensor | None) -> Tensor:
    return y.new_empty(place.shape[0] // top_k, y.shape[1])


def _permute_setup(ctx, inputs, output) -> None:
    _, offsets, place, pair, token = output
    ctx.top_k = inputs[1].shape[1]
    ctx.mark_non_differentiable(offsets, place, pair, token)
    ctx.save_for_backward(place, pair)


def _permute_backward(ctx, drows, *_):
    return _moe_unpermute(drows, *ctx.saved_tensors, ctx.top_k, None), None, None


def _unpermute_setup(ctx, inputs, output) -> None:
    y, place, pair, ctx.top_k, weight = inputs
    ctx.save_for_backward(y, place, pair, weight)


def _unpermute_backward(ctx, dout):
    """A token's gradient goes to all its rows; a weight's is the product of its row with it."""
    y, place, pair, weight = ctx.saved_tensors
    dy = dout.index_select(0, pair // ctx.top_k)
    if weight is None:
        return dy, None, None, None, None
    wide = torch.promote_types(y.dtype, torch.float32)
    dweight = (dy.to(wide) * y.to(wide)).sum(-1).to(weight.dtype)[place].view_as(weight)
    return (dy * weight.flatten()[pair].unsqueeze(1)).to(y.dtype), None, None, None, dweight


_moe_permute.register_autograd(_permute_backward, setup_context=_permute_setup)
_moe_unpermute.register_autograd(_unpermute_backward, setup_context=_unpermute_setup)


# --- public ops -------------------------------------------------------------------------------------------------------


@overload
def moe_permute(x: Tensor, topk_ids: Tensor, n_experts: int, scale_format: None = None) -> tuple[Tensor, MoePlan]: ...
@overload
def moe_permute(
    x: Tensor, topk_ids: Tensor, n_experts: int, scale_format: ScaleFormat
) -> tuple[tuple[Tensor, Tensor], MoePlan]: ...
def moe_permute(
    x: Tensor, topk_ids: Tensor, n_experts: int, scale_format: ScaleFormat | None = None
) -> tuple[Tensor | tuple[Tensor, Tensor], MoePlan]:
    """x [T, D], topk_ids [T, k] int64 below n_experts -> rows [T * k, D] sorted by expert, without padding, and the
    plan, whose offsets are what `grouped_gemm` takes. Differentiable in x.

    With `scale_format` as `quantize_tiles` has it the rows are e4m3 codes [T * k, D] and scales [T * k, ceil(D / 128)],
    what `grouped_fp8_gemm` takes, of tokens quantised before they are copied; then not differentiable.

    Raises TypeError for a dtype that is no float or ids that are not int64, ValueError when shapes or devices disagree,
    and for ids as `moe_plan`; with `scale_format` also what `quantize_tiles` raises.
    """
    check_float("x", x)
    check_shape("x", x, (None, None))
    check_ids(topk_ids, x.shape[0])
    check_experts(n_experts)
    check_devices(x, topk_ids=topk_ids)
    if scale_format is not None:
        plan = plan_pairs(topk_ids, n_experts)
        return _permuted_codes(x.detach(), plan.token, scale_format), plan
    rows, *parts = _moe_permute(x, topk_ids, n_experts)
    return rows, MoePlan(*parts)


def moe_unpermute(y: Tensor, plan: MoePlan, topk_weight: Tensor) -> Tensor:
    """y [T * k, D] in the plan's order, topk_weight [T, k] -> [T, D]: each token's rows times their weights, summed, in
    y's dtype. Differentiable in y and topk_weight.

    Raises TypeError for a dtype that is no float, ValueError when shapes or devices disagree.
    """
    check_float("y", y)
    check_float("topk_weight", topk_weight)
    check_shape("topk_weight", topk_weight, (None, None))
    check_shape("plan.place", plan.place, (topk_weight.numel(),))
    check_shape("y", y, (topk_weight.numel(), None))
    check_devices(y, topk_weight=topk_weight)
    return _moe_unpermute(y, plan.place, plan.pair, topk_weight.shape[1], topk_weight)


def moe_experts(
    x: Tensor, topk_ids: Tensor, topk_weight: Tensor, w_gate_up: Tensor, w_down: Tensor, fp8: bool = False,
    base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [T, D], topk_ids [T, k] int64, topk_weight [T, k], w_gate_up [E, 2F, D], w_down [E, D, F] -> [T, D], x's dtype.
    With `base` [T, D], such as shared experts' output, it is added, in the pass that sums a token's experts.

    Differentiable in x, topk_weight, both weights and base, once. Products run in x's dtype, under autocast in its own;
    weights of another are rounded to it, and their gradients come in the one they have; kernels do not round them to
    the products' on the way. With `fp8` all products, forward and backward, are of e4m3 codes: tokens and their
    gradients in tiles of 1x128, weights in blocks of 128x128, quantised once a call from the dtype they have
    (DeepSeek-V3 report, section 3.3). Raises TypeError for a dtype that is no float (with `fp8` for fp64 too) and for
    two weights of different dtypes, ValueError when shapes or devices disagree and for ids as `moe_plan`.
    """
    for name, tensor in (("x", x), ("topk_weight", topk_weight), ("w_gate_up", w_gate_up), ("w_down", w_down)):
        check_float(name, tensor)
    check_shape("x", x, (None, None))
    tokens, width = x.shape
    check_shape("w_down", w_down, (None, width, None))
    experts, _, inner = w_down.shape
    check_shape("w_gate_up", w_gate_up, (experts, 2 * inner, width))
    check_ids(topk_ids, tokens)
    check_shape("topk_weight", topk_weight, tuple(topk_ids.shape))
    check_devices(x, topk_ids=topk_ids, topk_weight=topk_weight, w_gate_up=w_gate_up, w_down=w_down)
    if w_down.dtype != w_gate_up.dtype:
        raise TypeError(f"w_down: got {w_down.dtype}, allowed is w_gate_up's {w_gate_up.dtype}")
    dtype = compute_dtype(x)
    if fp8 and dtype == torch.float64:
        raise TypeError("x: got torch.float64, allowed with fp8 are torch.float32, torch.bfloat16, torch.float16")
    if base is not None:
        check_float("base", base)
        check_shape("base", base, tuple(x.shape))
        check_devices(x, base=base)
        base = base.to(dtype)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, topk_weight, w_gate_up, w_down))
    out, *_ = _moe_experts(x.to(dtype), topk_ids, topk_weight, w_gate_up, w_down, base, fp8, keep)
    return out.to(x.dtype)
