"""Matrix products of fp8 (e4m3) codes with blockwise scales, value = code * scale (DeepSeek-V3 report, arXiv
2412.19437, section 3.3): forward and data gradient multiply activations with 1x128 scales and weights with 128x128
scales, the weight gradient two operands with 1x128 scales.

    out[m, n] = sum over groups g of 128 k: a_scale[m, g] * b_scale[n / 128, g] * sum over k in g of a[m, k] * b[n, k]

Tensor cores sum a group (on Hopper with some 14 bits of mantissa), fp32 registers sum the groups. Any M, N, K from 1 (M
and N from 0), a K tail under 128, any strides. out in bf16, fp16 or fp32.

One program computes one tile of x @ y.T. Few rows of a are made the y side (SWAP in the launch table), so that the
weights fill the 64 rows of a Hopper instruction. Tiles are fetched by tensor descriptors where the table says TMA, else
by pointers; codes whose rows do not lie at multiples of 16 bytes are copied first. On Hopper a tile's products and its
fp32 sums take turns, so several programs must share a multiprocessor for one's products to run beside another's sums;
where the table says GROUPS, groups of warps within a program do (`_fp8_gemm_hopper`), which takes half as much from L2.
Chips without e4m3 instructions (sm_80, sm_86) widen codes to fp16 in registers, exactly.
Test: tests/kernels/test_fp8_gemm.py. Benchmark: benchmarks/ops/fp8_gemm.py.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from . import _launch
from ._checks import check_dtype, check_shape
from ._launch import tl, triton
from ._operator import operator

if _launch.HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["fp8_gemm", "fp8_gemm_reference", "fp8_gemm_wgrad", "fp8_gemm_wgrad_reference"]

E4M3 = torch.float8_e4m3fn
GROUP = 128  # numbers along K, and rows of a block, that share a scale
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _dequantize(codes: Tensor, scale: Tensor, rows: int) -> Tensor:
    """codes [R, K] and scale [ceil(R / rows), ceil(K / 128)] -> values [R, K] fp32."""
    scale = scale.repeat_interleave(rows, 0)[: codes.shape[0]].repeat_interleave(GROUP, 1)[:, : codes.shape[1]]
    return codes.float() * scale


def fp8_gemm_reference(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Values in fp32, one product: what `fp8_gemm` computes."""
    return (_dequantize(a, a_scale, 1) @ _dequantize(b, b_scale, GROUP).T).to(out_dtype)


def fp8_gemm_wgrad_reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """Values in fp32, one product: what `fp8_gemm_wgrad` computes without `out`."""
    return _dequantize(a, a_scale, 1) @ _dequantize(b, b_scale, 1).T


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _widen(codes):
    """uint8 bits of e4m3 -> fp16, 2^-8 of the value, NaN to NaN: exact, since the exponent's bias is 15 for 7."""
    bits = codes.to(tl.uint16)
    size = bits & 0x7F
    nan = ((size + 1) & 0x80) << 7  # the code 0x7F alone carries
    return ((bits & 0x80) << 8 | size << 7 | nan).to(tl.float16, bitcast=True)


@triton.jit
def _load(x, start, k, rows, width, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """Codes [BLOCK, BLOCK_K] from row `start` and column `k` on, zeros outside of [rows, width]. x: a pointer to rows
    `stride` apart, for TMA a descriptor, whose own bounds count instead, and its row and column to count from."""
    if TMA:
        return x[0].load([x[1] + start, x[2] + k])
    else:
        row = start + tl.arange(0, BLOCK)[:, None]
        col = k + tl.arange(0, BLOCK_K)[None, :]
        return tl.load(x + row.to(tl.int64) * stride + col, mask=(row < rows) & (col < width), other=0.0)


@triton.jit
def _scale(scale, start, k, rows, stride, k_stride, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Scales of the group of column `k` for BLOCK rows from `start`: one number of 128x128 BLOCKS, else [BLOCK]."""
    scale += k // 128 * k_stride
    if BLOCKS:
        return tl.load(scale + start // 128 * stride)
    else:
        row = start + tl.arange(0, BLOCK)
        return tl.load(scale + row.to(tl.int64) * stride, mask=row < rows, other=0.0)


@triton.jit
def _factors(x_scale, y_scale, X_BLOCKS: tl.constexpr, Y_BLOCKS: tl.constexpr):
    """What to multiply a product by, first [1, BLOCK_Q] (1 where nothing is left to do), then [BLOCK_P, 1]: blocks have
    one scale for the whole tile, which is folded into the other operand's."""
    if X_BLOCKS:
        return 1.0, (x_scale * y_scale)[None, :]
    elif Y_BLOCKS:
        return 1.0, (x_scale * y_scale)[:, None]
    else:
        return y_scale[None, :], x_scale[:, None]


@triton.jit
def _origin(tile, P, Q, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, STRIPE: tl.constexpr):
    """First row and column of a tile. Neighbours in time share rows and columns, so that L2 serves them: STRIPE tiles
    down, then one to the right."""
    down, right = tl.cdiv(P, BLOCK_P), tl.cdiv(Q, BLOCK_Q)
    first = tile // (STRIPE * right) * STRIPE
    height = tl.minimum(down - first, STRIPE)
    inside = tile % (STRIPE * right)
    return (first + inside % height) * BLOCK_P, inside // height * BLOCK_Q


@triton.jit
def _store(out, acc, p, q, P, Q, p_stride, q_stride, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, ADD: tl.constexpr):
    row = p + tl.arange(0, BLOCK_P)[:, None]
    col = q + tl.arange(0, BLOCK_Q)[None, :]
    mask = (row < P) & (col < Q)
    out += row.to(tl.int64) * p_stride + col.to(tl.int64) * q_stride
    if ADD:
        acc += tl.load(out, mask=mask)
    tl.store(out, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _tile(
    x, xs, y, ys, out, p, q, P, Q, K, x_stride, xs_stride, xs_k_stride, y_stride, ys_stride, ys_k_stride,
    p_stride, q_stride,
    X_BLOCKS: tl.constexpr, Y_BLOCKS: tl.constexpr, WIDE: tl.constexpr, ADD: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of out [P, Q] = x [P, K] @ y [Q, K].T. STAGES: how many steps of codes and scales are under way."""
    acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        x_scale = _scale(xs, p, k, P, xs_stride, xs_k_stride, BLOCK_P, X_BLOCKS)
        y_scale = _scale(ys, q, k, Q, ys_stride, ys_k_stride, BLOCK_Q, Y_BLOCKS)
        left = _load(x, p, k, P, K, x_stride, BLOCK_P, BLOCK_K, TMA)
        right = _load(y, q, k, Q, K, y_stride, BLOCK_Q, BLOCK_K, TMA)
        first, then = _factors(x_scale, y_scale, X_BLOCKS, Y_BLOCKS)
        if WIDE:
            product = tl.dot(_widen(left), _widen(right).T)
            then *= 65536.0  # 2^8 of either side
        else:
            product = tl.dot(left, right.T)
        if not (X_BLOCKS or Y_BLOCKS):
            product *= first
        acc = tl.fma(product, then, acc)  # the promotion to fp32
    _store(out, acc, p, q, P, Q, p_stride, q_stride, BLOCK_P, BLOCK_Q, ADD)


@triton.jit
def _fp8_gemm_kernel(
    x, xs, y, ys, out, P, Q, K, x_stride, xs_stride, xs_k_stride, y_stride, ys_stride, ys_k_stride, p_stride, q_stride,
    X_BLOCKS: tl.constexpr, Y_BLOCKS: tl.constexpr, WIDE: tl.constexpr, ADD: tl.constexpr,
    STRIPE: tl.constexpr, STAGES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program a tile, codes by pointers. WIDE: they come as uint8, on chips without e4m3."""
    p, q = _origin(tl.program_id(0), P, Q, BLOCK_P, BLOCK_Q, STRIPE)
    _tile(
        x, xs, y, ys, out, p, q, P, Q, K, x_stride, xs_stride, xs_k_stride, y_stride, ys_stride, ys_k_stride,
        p_stride, q_stride, X_BLOCKS, Y_BLOCKS, WIDE, ADD, False, STAGES, BLOCK_P, BLOCK_Q, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _fp8_gemm_tma_kernel(
    x, xs, y, ys, out, P, Q, K, xs_stride, xs_k_stride, ys_stride, ys_k_stride, p_stride, q_stride,
    X_BLOCKS: tl.constexpr, Y_BLOCKS: tl.constexpr, ADD: tl.constexpr,
    STRIPE: tl.constexpr, STAGES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program a tile and part of K, x and y descriptors of [BLOCK_P, BLOCK_K] and [BLOCK_Q, BLOCK_K] codes; out
    [parts, P, Q], a part's numbers P * Q after the one before."""
    p, q = _origin(tl.program_id(0), P, Q, BLOCK_P, BLOCK_Q, STRIPE)
    groups = tl.cdiv(tl.cdiv(K, 128), tl.num_programs(1))
    first = tl.program_id(1) * groups
    depth = tl.minimum(K - first * 128, groups * 128)
    _tile(
        (x, 0, first * 128), xs + first * xs_k_stride, (y, 0, first * 128), ys + first * ys_k_stride,
        out + tl.program_id(1).to(tl.int64) * P * Q, p, q, P, Q, depth, 0, xs_stride, xs_k_stride, 0, ys_stride,
        ys_k_stride, p_stride, q_stride, X_BLOCKS, Y_BLOCKS, False, ADD, True, STAGES, BLOCK_P, BLOCK_Q, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _sum_parts_kernel(parts, out, numbers, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out [numbers] = the sum of parts [PARTS, numbers], in this order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        acc += tl.load(parts + part * numbers + place, mask=place < numbers, other=0.0)
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=place < numbers)


# --- launchers --------------------------------------------------------------------------------------------------------

SUM_BLOCK = 1024  # numbers of a program that sums parts
# in place of a launch by hand: for Triton's interpreter, which cannot run it, and rows that descriptors cannot store
PLAIN = dict(TMA=True, BLOCK_P=64, BLOCK_Q=128, BLOCK_K=128, STRIPE=8, STAGES=4, num_warps=4)


def _generation(x: Tensor) -> int:
    """90 for Hopper, 80 for Ampere; 0 where the chip is not NVIDIA's."""
    found = re.fullmatch(r"sm_(\d+)", _launch.arch(x))
    return int(found.group(1)) if found else 0


def _aligned(codes: Tensor) -> Tensor:
    """codes [R, K], or a copy of them with zeros behind each row, so that rows start at multiples of 16 bytes and are
    multiples of 16 long: what descriptors ask for, and what lets pointers fetch 16 bytes at a time."""
    rows, width = codes.shape
    if width % 16 == 0 and codes.data_ptr() % 16 == 0 and codes.stride(0) % 16 == 0 and codes.stride(1) == 1:
        return codes
    padded = torch.zeros(rows, triton.cdiv(width, 16) * 16, dtype=torch.uint8, device=codes.device)
    padded[:, :width] = codes.view(torch.uint8)
    return padded.view(E4M3)


def _triton_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, blocks: bool, add: bool = False
) -> None:
    """Writes a @ b.T into `out` [M, N], or adds it. blocks: b's scales are those of 128x128 blocks, else of tiles, and
    `out` is contiguous. PARTS of K are summed by programs of their own where few tiles would leave the chip idle."""
    if out.numel() == 0:
        return
    a, b = _aligned(a), _aligned(b)
    table = "fp8_gemm" if blocks else "fp8_gemm_wgrad"
    config = dict(_launch.config("fp8_gemm", table, _launch.arch(a), M=a.shape[0], N=b.shape[0], K=a.shape[1]))
    if "GROUPS" in config:
        if _launch.runs_gluon(a) and (not blocks or out.shape[1] * out.element_size() % 16 == 0):
            from ._fp8_gemm_hopper import gemm, gemm_wgrad  # Gluon, which is experimental: imported where it serves

            if blocks:
                gemm(a, a_scale, b, b_scale, out, **config)
            else:
                gemm_wgrad(a, a_scale, b, b_scale, out, add, **config)
            return
        config = dict(PLAIN)
    swap, tma, parts = (config.pop(name, 0) for name in ("SWAP", "TMA", "PARTS"))
    parts = min(max(1, parts), a_scale.shape[1]) if blocks and tma else 1
    result = out if parts == 1 else out.new_empty(parts, *out.shape, dtype=torch.float32)
    target = result if parts == 1 else result[0]
    x, xs, y, ys, target = (b, b_scale, a, a_scale, target.T) if swap else (a, a_scale, b, b_scale, target)
    (rows, width), cols = x.shape, y.shape[0]
    tiles = triton.cdiv(rows, config["BLOCK_P"]) * triton.cdiv(cols, config["BLOCK_Q"])
    meta = {**config, "X_BLOCKS": blocks and swap, "Y_BLOCKS": blocks and not swap, "ADD": add}
    if tma:
        x, y = (
            TensorDescriptor(t, list(t.shape), list(t.stride()), [config[block], config["BLOCK_K"]])
            for t, block in ((x, "BLOCK_P"), (y, "BLOCK_Q"))
        )
        _launch.launch(
            _fp8_gemm_tma_kernel, (tiles, parts),
            x, xs, y, ys, target, rows, cols, width, *xs.stride(), *ys.stride(), *target.stride(), **meta,
        )  # fmt: skip
        if parts > 1:
            grid = (triton.cdiv(out.numel(), SUM_BLOCK),)
            _launch.launch(_sum_parts_kernel, grid, result, out, out.numel(), PARTS=parts, BLOCK=SUM_BLOCK)
    else:
        wide = _generation(a) < 89
        if wide:
            x, y = x.view(torch.uint8), y.view(torch.uint8)
        _launch.launch(
            _fp8_gemm_kernel, (tiles,),
            x, xs, y, ys, target, rows, cols, width, x.stride(0), *xs.stride(), y.stride(0), *ys.stride(),
            *target.stride(), WIDE=wide, **meta,
        )  # fmt: skip


# --- PyTorch path -----------------------------------------------------------------------------------------------------


def _values(codes: Tensor, scale: Tensor, rows: int) -> Tensor:
    """As `_dequantize`, in one pass to convert and one to multiply."""
    groups = scale.shape[1]
    values = codes.new_empty(codes.shape[0], groups * GROUP, dtype=torch.float32)
    values[:, : codes.shape[1]] = codes
    values.view(-1, groups, GROUP).mul_(scale.repeat_interleave(rows, 0)[: codes.shape[0], :, None])
    return values[:, : codes.shape[1]]


def _torch_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype, rows: int) -> Tensor:
    """One product of values in fp32, under autocast too: rounded to bf16 they would turn codes of the next product's
    input."""
    with torch.autocast(a.device.type, enabled=False):
        return (_values(a, a_scale, 1) @ _values(b, b_scale, rows).T).to(out_dtype)


# --- registration -----------------------------------------------------------------------------------------------------


@operator("fp8_gemm")
def _fp8_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """a [M, K] with tiles' scales, b [N, K] with blocks' -> [M, N] in out_dtype."""
    if not _launch.use_triton(a):
        return _torch_gemm(a, a_scale, b, b_scale, out_dtype, GROUP)
    out = a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)
    _triton_gemm(a, a_scale, b, b_scale, out, blocks=True)
    return out


@operator("fp8_gemm_into", mutates_args=("out",))
def _fp8_gemm_into(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> None:
    """`_fp8_gemm` written to `out` [M, N], contiguous."""
    if _launch.use_triton(a):
        _triton_gemm(a, a_scale, b, b_scale, out, blocks=True)
    else:
        out.copy_(_torch_gemm(a, a_scale, b, b_scale, out.dtype, GROUP))


@operator("fp8_gemm_wgrad")
def _fp8_gemm_wgrad(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """a [M, K], b [N, K], both with tiles' scales -> [M, N] fp32."""
    if not _launch.use_triton(a):
        return _torch_gemm(a, a_scale, b, b_scale, torch.float32, 1)
    out = a.new_empty(a.shape[0], b.shape[0], dtype=torch.float32)
    _triton_gemm(a, a_scale, b, b_scale, out, blocks=False)
    return out


@operator("fp8_gemm_wgrad_add", mutates_args=("out",))
def _fp8_gemm_wgrad_add(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> None:
    """`_fp8_gemm_wgrad` added to `out` [M, N] fp32."""
    if _launch.use_triton(a):
        _triton_gemm(a, a_scale, b, b_scale, out, blocks=False, add=True)
    else:
        out.addmm_(_values(a, a_scale, 1), _values(b, b_scale, 1).T)


@_fp8_gemm.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


@_fp8_gemm_into.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> None:
    return None


@_fp8_gemm_wgrad.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=torch.float32)


@_fp8_gemm_wgrad_add.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> None:
    return None


# --- public ops -------------------------------------------------------------------------------------------------------


def _check_operand(name: str, codes: Tensor, scale: Tensor, width: int | None, rows: int) -> None:
    if codes.dtype != E4M3:
        raise TypeError(f"{name}: got {codes.dtype}, allowed is {E4M3}")
    check_shape(name, codes, (None, width))
    if codes.shape[1] == 0:
        raise ValueError(f"{name}: got shape {tuple(codes.shape)}, allowed is a last dimension of 1 or more")
    if scale.dtype != torch.float32:
        raise TypeError(f"{name}_scale: got {scale.dtype}, allowed is {torch.float32}")
    check_shape(f"{name}_scale", scale, (-(-codes.shape[0] // rows), -(-codes.shape[1] // GROUP)))


def fp8_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """a [M, K] @ b [N, K].T -> [M, N] in out_dtype (bf16, fp16 or fp32). a, b: e4m3 codes; a_scale [M, ceil(K / 128)]
    and b_scale [ceil(N / 128), ceil(K / 128)] fp32. Any strides. Not differentiable: `fp8_linear` is.

    Raises TypeError for codes that are not torch.float8_e4m3fn, scales that are not fp32 or another out_dtype,
    ValueError for shapes that do not fit.
    """
    _check_operand("a", a, a_scale, None, 1)
    _check_operand("b", b, b_scale, a.shape[1], GROUP)
    if out_dtype not in OUT_DTYPES:
        raise TypeError(f"out_dtype: got {out_dtype}, allowed are {', '.join(map(str, OUT_DTYPES))}")
    return _fp8_gemm(a, a_scale, b, b_scale, out_dtype)


def fp8_gemm_into(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor) -> None:
    """`fp8_gemm` written to out [M, N] (bf16, fp16 or fp32, contiguous). Raises as it does, and for such an `out`."""
    _check_operand("a", a, a_scale, None, 1)
    _check_operand("b", b, b_scale, a.shape[1], GROUP)
    check_out(out, (a.shape[0], b.shape[0]))
    _fp8_gemm_into(a, a_scale, b, b_scale, out)


def check_out(out: Tensor, shape: tuple[int, ...]) -> None:
    check_shape("out", out, shape)
    check_dtype("out", out, *OUT_DTYPES)
    if not out.is_contiguous():
        raise ValueError(f"out: got strides {out.stride()}, allowed is a contiguous tensor")


def fp8_gemm_wgrad(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor | None = None) -> Tensor:
    """a [M, K] @ b [N, K].T -> [M, N] fp32, both operands with scales along K: a_scale [M, ceil(K / 128)], b_scale
    [N, ceil(K / 128)] fp32. With `out` [M, N] fp32 it is added to it in place, and `out` returned.

    Raises TypeError for codes that are not torch.float8_e4m3fn and scales or `out` that are not fp32, ValueError for
    shapes that do not fit.
    """
    _check_operand("a", a, a_scale, None, 1)
    _check_operand("b", b, b_scale, a.shape[1], 1)
    if out is None:
        return _fp8_gemm_wgrad(a, a_scale, b, b_scale)
    if out.dtype != torch.float32:
        raise TypeError(f"out: got {out.dtype}, allowed is {torch.float32}")
    check_shape("out", out, (a.shape[0], b.shape[0]))
    _fp8_gemm_wgrad_add(a, a_scale, b, b_scale, out)
    return out
