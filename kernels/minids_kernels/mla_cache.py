"""What a decoder does with a token's latent before it attends: RMSNorm of the latent, rotation of its key and of the
queries, and the row written into the paged cache that `mla_decode` reads, in one launch (DeepSeek-V3 report, 2.1.1).

A cache row is [latent Dc | rotated key Dr] in the model's dtype, or an fp8 row of FlashMLA's
(flash_mla/flash_mla_interface.py there; 656 bytes in DeepSeek-V3): Dc codes (e4m3), Dc / 128 fp32 scales, one for each
128 codes, Dr rotated values in bf16. The latent is rounded to its dtype before it is quantised, as if each step were an
op of its own.

Kernel: a program normalises and writes one token's latent and key; further ones rotate HEADS heads of its queries. Runs
on every GPU Triton knows. Test: tests/kernels/test_mla_cache.py. Benchmark: benchmarks/ops/mla_cache.py.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from . import _launch
from ._checks import check_float, check_shape
from ._launch import tl, triton
from ._operator import operator
from .fp8_quant import E4M3, TILE, ScaleFormat, dequantize_tiles, native_e4m3, quantize_groups, quantize_tiles
from .rms_norm import rms_norm_reference, torch_fwd
from .rope import rope, rope_reference

__all__ = ["quantize_latent_cache", "write_latent_cache", "write_latent_cache_reference"]


def write_latent_cache_reference(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor, eps: float = 1e-6,
    q_pe: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """One token after the other; arguments as `write_latent_cache` -> the written copy of kv_cache, q_pe rotated."""
    width, cache = weight.shape[0], kv_cache.clone()
    latent = rms_norm_reference(kv[:, :width], weight, eps)
    key = rope_reference(kv[:, None, width:], cos, sin).squeeze(1)
    fp8 = kv_cache.dtype in (torch.uint8, E4M3)
    rows = quantize_latent_cache(latent, key).view(kv_cache.dtype) if fp8 else torch.cat((latent, key), -1)
    for row, slot in zip(rows, slots.tolist(), strict=True):
        if slot >= 0:
            cache[slot // kv_cache.shape[1], slot % kv_cache.shape[1]] = row
    return cache, None if q_pe is None else rope_reference(q_pe, cos, sin)


def row_bytes(latent: int, rotary: int) -> int:
    """Bytes of an fp8 row; raises ValueError for widths that none has."""
    if latent % TILE or rotary % 2:
        allowed = f"multiples of {TILE} and of 2"
        raise ValueError(f"an fp8 row: got {latent} latent and {rotary} rotated values, allowed are {allowed}")
    return latent + latent // TILE * 4 + rotary * 2


def row_fields(rows: Tensor, latent: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp8 rows [..., bytes], each at a multiple of 4 bytes -> views: uint8 codes, fp32 scales, bf16 rotated values."""
    rows = rows.view(torch.uint8)
    end = latent + latent // TILE * 4
    return rows[..., :latent], rows[..., latent:end].view(torch.float32), rows[..., end:].view(torch.bfloat16)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _turn(x, cos, sin, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """x [ROWS, 2 * PAIRS] with its pairs of columns rotated by the angles of cos and sin [PAIRS], fp32."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (ROWS, PAIRS, 2)))
    cos, sin = cos[None, :], sin[None, :]
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, 2 * PAIRS))


@triton.jit
def _write_latent_cache_kernel(
    kv_ptr, weight_ptr, cos_ptr, sin_ptr, slots_ptr, latent_ptr, scales_ptr, key_ptr, q_ptr, q_out_ptr, heads, page,
    eps, kv_stride, angle_stride, latent_page, latent_row, scales_page, scales_row, key_page, key_row, q_stride, q_head,
    LATENT: tl.constexpr, HALF: tl.constexpr, FP8: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr,
    PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (token, 0): its latent and key; (token, i): queries of HEADS heads from (i - 1) * HEADS on, to q_out
    [T, heads, 2 * HALF] contiguous. BLOCK, PAIRS: LATENT and HALF, padded."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    cos = tl.load(cos_ptr + token * angle_stride + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * angle_stride + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    turned = tl.arange(0, 2 * PAIRS)[None, :]
    if tl.program_id(1) > 0:
        head = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)[:, None]
        mask = (head < heads) & (turned < 2 * HALF)
        q = tl.load(q_ptr + token * q_stride + head * q_head + turned, mask=mask, other=0.0)
        out = q_out_ptr + (token * heads + head) * (2 * HALF) + turned
        tl.store(out, _turn(q, cos, sin, HEADS, PAIRS).to(q_out_ptr.dtype.element_ty), mask=mask)
        return
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    at_page, at_row = slot // page, slot % page
    cols = tl.arange(0, BLOCK)
    kv_ptr += token * kv_stride
    x = tl.load(kv_ptr + cols, mask=cols < LATENT, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=0) / LATENT + eps)
    weight = tl.load(weight_ptr + cols, mask=cols < LATENT, other=0.0).to(tl.float32)
    latent = (x * rstd * weight).to(kv_ptr.dtype.element_ty)
    latent_ptr += at_page * latent_page + at_row * latent_row
    if FP8:
        GROUPS: tl.constexpr = BLOCK // 128
        codes, scale = quantize_groups(tl.reshape(latent.to(tl.float32), (1, GROUPS, 128)), True, NATIVE)
        tl.store(latent_ptr + cols, tl.reshape(codes, (BLOCK,)), mask=cols < LATENT)
        group = tl.arange(0, GROUPS)
        scales_ptr += at_page * scales_page + at_row * scales_row
        tl.store(scales_ptr + group, tl.reshape(scale, (GROUPS,)), mask=group < LATENT // 128)
    else:
        tl.store(latent_ptr + cols, latent, mask=cols < LATENT)
    key = tl.load(kv_ptr + LATENT + turned, mask=turned < 2 * HALF, other=0.0)
    key = _turn(key, cos, sin, 1, PAIRS).to(kv_ptr.dtype.element_ty)
    key_ptr += at_page * key_page + at_row * key_row
    tl.store(key_ptr + turned, key.to(key_ptr.dtype.element_ty), mask=turned < 2 * HALF)


# --- launcher ---------------------------------------------------------------------------------------------------------


def _columns(x: Tensor) -> Tensor:
    """x with neighbouring columns side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _triton(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor, eps: float,
    q_pe: Tensor | None,
) -> Tensor:  # fmt: skip
    (tokens, width), latent = kv.shape, weight.shape[0]
    fp8 = kv_cache.dtype == torch.uint8
    fields = row_fields(kv_cache, latent) if fp8 else (kv_cache[..., :latent], kv_cache, kv_cache[..., latent:])
    kv, angles = _columns(kv), torch.stack((cos, sin))
    q = kv.new_empty(tokens, 0, width - latent) if q_pe is None else _columns(q_pe)
    out = kv.new_empty(q.shape, dtype=q.dtype)
    config = _launch.config("mla_cache", "write_latent_cache", _launch.arch(kv), C=latent)
    _launch.launch(
        _write_latent_cache_kernel, (tokens, 1 + triton.cdiv(q.shape[1], config["HEADS"])),
        kv, weight.contiguous(), angles[0], angles[1], slots, *fields, q, out, q.shape[1], kv_cache.shape[1], eps,
        kv.stride(0), angles.stride(1), *(s for field in fields for s in field.stride()[:2]), q.stride(0), q.stride(1),
        LATENT=latent, HALF=(width - latent) // 2, FP8=fp8, NATIVE=native_e4m3(kv),
        BLOCK=max(TILE if fp8 else 1, triton.next_power_of_2(latent)),
        PAIRS=triton.next_power_of_2(max(1, (width - latent) // 2)), **config,
    )  # fmt: skip
    return out


# --- PyTorch path -----------------------------------------------------------------------------------------------------


def _torch(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor, eps: float,
    q_pe: Tensor | None,
) -> Tensor:  # fmt: skip
    width, (pages, page, _) = weight.shape[0], kv_cache.shape
    if slots.numel() and int(slots.max()) >= pages * page:
        raise ValueError(f"slots: got {int(slots.max())}, allowed are those below {pages} * {page}, or below 0")
    written = (slots >= 0).nonzero().squeeze(1)
    slots, kv, key_angles = slots[written], kv[written], (cos[written], sin[written])
    latent, _, _ = torch_fwd(kv[:, :width], weight, None, eps, kv.dtype)
    key = rope(kv[:, None, width:], *key_angles).squeeze(1)
    rows = quantize_latent_cache(latent, key) if kv_cache.dtype == torch.uint8 else torch.cat((latent, key), -1)
    kv_cache[slots // page, slots % page] = rows
    return kv.new_empty(0) if q_pe is None else rope(q_pe, cos, sin)


# --- registration -----------------------------------------------------------------------------------------------------


@operator("write_latent_cache", mutates_args=("kv_cache",))
def _write_latent_cache(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor, eps: float,
    q_pe: Tensor | None,
) -> Tensor:  # fmt: skip
    """kv_cache in kv's dtype or uint8 -> q_pe rotated, or nothing of use."""
    write = _triton if _launch.use_triton(kv) else _torch
    return write(kv, weight, cos, sin, kv_cache, slots, eps, q_pe)


@_write_latent_cache.register_fake
def _(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor, eps: float,
    q_pe: Tensor | None,
) -> Tensor:  # fmt: skip
    if q_pe is not None:
        return q_pe.new_empty(q_pe.shape)
    return kv.new_empty((kv.shape[0], 0, kv.shape[1] - weight.shape[0]) if _launch.use_triton(kv) else 0)


# --- public ops -------------------------------------------------------------------------------------------------------


def quantize_latent_cache(latent: Tensor, rotary: Tensor, scale_format: ScaleFormat = "ue8m0") -> Tensor:
    """latent [..., Dc] and rotated keys [..., Dr], fp32, bf16 or fp16 -> fp8 rows [..., Dc + Dc / 32 + 2 Dr] uint8, to
    be written into the cache of `mla_decode`. Scales are powers of two, so that code * scale is a bf16 number, or with
    `scale_format` "fp32" amax / 448. Dc is a multiple of 128, Dr of 2, else ValueError; further errors are those of
    `quantize_tiles`."""
    check_shape("rotary", rotary, (*latent.shape[:-1], None))
    width = row_bytes(latent.shape[-1], rotary.shape[-1])
    rows = latent.new_empty(*latent.shape[:-1], width, dtype=torch.uint8)
    codes, scales = quantize_tiles(latent, scale_format)
    values = codes.view(torch.uint8), scales, rotary
    for field, value in zip(row_fields(rows, latent.shape[-1]), values, strict=True):
        field.copy_(value)
    return rows


def aligned_rows(rows: Tensor) -> Tensor:
    """fp8 rows, copied unless each is in one piece at a multiple of 4 bytes."""
    if rows.stride(-1) == 1 and all(n % 4 == 0 for n in (*rows.stride()[:-1], rows.storage_offset())):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def widened_rows(rows: Tensor, latent: int, dtype: torch.dtype) -> Tensor:
    """Cache rows [..., bytes or Dc + Dr] -> [..., Dc + Dr]: those of fp8 (uint8) as numbers of `dtype`."""
    if rows.dtype != torch.uint8:
        return rows
    codes, scales, rotary = row_fields(aligned_rows(rows), latent)
    wide = torch.float32 if dtype == torch.float64 else dtype
    return torch.cat((dequantize_tiles(codes.view(E4M3), scales, wide), rotary.to(wide)), dim=-1).to(dtype)


@overload
def write_latent_cache(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor, eps: float = 1e-6,
    q_pe: None = None,
) -> None: ...  # fmt: skip
@overload
def write_latent_cache(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor, eps: float, q_pe: Tensor
) -> Tensor: ...  # fmt: skip
def write_latent_cache(
    kv: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, kv_cache: Tensor, slots: Tensor, eps: float = 1e-6,
    q_pe: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """kv [T, Dc + Dr] as kv_a_proj_with_mqa gives it, weight [Dc] of the latent's norm, cos and sin [T, Dr/2] of the
    tokens' positions, kv_cache [pages, page, Dc + Dr] in kv's dtype or of fp8 rows (uint8 or e4m3, see
    `quantize_latent_cache`), slots [T] int32 or int64: token t's row is page * page_size + place, below 0 it is not
    written. Writes kv_cache in place. -> q_pe [T, H, Dr] rotated, a copy in its dtype; None without q_pe.

    For inference: has no gradient. Raises TypeError for dtypes that are not those above, ValueError when shapes
    disagree, for an odd Dr or an fp8 row that is none, and on the PyTorch path for a slot beyond the cache (kernels
    trust slots). Two tokens must not have one slot.
    """
    check_float("kv", kv)
    check_float("weight", weight)
    check_shape("weight", weight, (None,))
    check_shape("kv", kv, (None, None))
    (tokens, width), latent = kv.shape, weight.shape[0]
    if not 0 < latent <= width or (width - latent) % 2:
        raise ValueError(f"kv: got {width} columns for {latent} weights, allowed is an even number above those")
    check_shape("cos", cos, (tokens, (width - latent) // 2))
    check_shape("sin", sin, tuple(cos.shape))
    check_shape("slots", slots, (tokens,))
    if slots.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"slots: got {slots.dtype}, allowed are torch.int32, torch.int64")
    fp8 = kv_cache.dtype in (torch.uint8, E4M3)
    if not fp8 and kv_cache.dtype != kv.dtype:
        raise TypeError(f"kv_cache: got {kv_cache.dtype}, allowed is kv's {kv.dtype}, torch.uint8 or {E4M3}")
    check_shape("kv_cache", kv_cache, (None, None, row_bytes(latent, width - latent) if fp8 else width))
    if kv_cache.stride(-1) != 1:
        raise ValueError(f"kv_cache: got strides {kv_cache.stride()}, allowed are rows without gaps")
    if q_pe is not None:
        check_float("q_pe", q_pe)
        check_shape("q_pe", q_pe, (tokens, None, width - latent))
    cache = kv_cache.view(torch.uint8) if fp8 else kv_cache
    rotated = _write_latent_cache(kv, weight, cos, sin, cache, slots, eps, q_pe)
    return None if q_pe is None else rotated
