"""Rotary position embedding on interleaved pairs (x0, x1), (x2, x3), ... as DeepSeek lays them out (arXiv 2104.09864).

x [T, H, D] with angles cos, sin [T, R/2], R <= D: of each head the last R entries are rotated, out[2i] = x[2i] cos_i -
x[2i+1] sin_i and out[2i+1] = x[2i] sin_i + x[2i+1] cos_i; the first D - R pass through (the "nope" part). One kernel on
a GPU; elsewhere, and under torch.compile, which fuses them, PyTorch's products of complex numbers.
Test: tests/kernels/test_rope.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _launch
from ._checks import check_float, check_shape
from ._launch import tl, triton

__all__ = ["rope", "rope_reference"]


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation as a complex product in fp32; shapes as `rope`."""
    passed, rotated = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
    pairs = torch.view_as_complex(rotated.float().unflatten(-1, (-1, 2)).clone(memory_format=torch.contiguous_format))
    angles = torch.complex(cos.float(), sin.float()).unsqueeze(1)
    return torch.cat((passed, torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)), dim=-1)


@triton.jit
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, rows, heads, x_token, x_head, cos_token, sin_token, out_token, out_head,
    PAIRS: tl.constexpr, BACK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS of the T * H rows a program; a row's PAIRS numbers two by two times e^(i angle), BACK: e^(-i angle). COLS:
    a power of two, at least PAIRS. out may be x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = row // heads, row % heads
    pair, col = tl.arange(0, COLS)[None, :], tl.arange(0, 2 * COLS)[None, :]
    angle, number = (row < rows) & (pair < PAIRS), (row < rows) & (col < 2 * PAIRS)
    cos = tl.load(cos_ptr + token * cos_token + pair, mask=angle, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_token + pair, mask=angle, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    x = tl.load(x_ptr + token * x_token + head * x_head + col, mask=number, other=0.0).to(tl.float32)
    real, imaginary = tl.split(tl.reshape(x, (ROWS, COLS, 2)))
    out = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
    out = tl.reshape(out, (ROWS, 2 * COLS)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * out_token + head * out_head + col, out, mask=number)


NUMBERS = 4096  # of a program


def _launch_rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool) -> None:
    """Columns of x and out lie side by side."""
    (tokens, heads, width), cols = x.shape, triton.next_power_of_2(max(1, x.shape[2] // 2))
    cos, sin = (angle if angle.stride(1) == 1 else angle.contiguous() for angle in (cos, sin))
    rows = max(1, NUMBERS // (2 * cols))
    _launch.launch(
        _rotate_kernel, (triton.cdiv(tokens * heads, rows) if width else 0,),
        x, cos, sin, out, tokens * heads, heads, *x.stride()[:2], cos.stride(0), sin.stride(0), *out.stride()[:2],
        PAIRS=width // 2, BACK=back, ROWS=rows, COLS=cols,
    )  # fmt: skip


def _by_kernel(x: Tensor) -> bool:
    return _launch.use_triton(x) and not torch.compiler.is_compiling()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A copy of x with its tail rotated: pairs are complex numbers, times e^(i angle), in fp32 or wider."""
    if _by_kernel(x):
        x, whole = x if x.stride(-1) == 1 else x.contiguous(), x.new_empty(x.shape)
        width = x.shape[-1] - 2 * cos.shape[-1]
        whole[..., :width] = x[..., :width]
        _launch_rotate(x[..., width:], cos, sin, whole[..., width:], back=False)
        return whole
    wide = torch.promote_types(x.dtype, torch.float32)
    passed, tail = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
    angles = torch.complex(cos.to(wide), sin.to(wide)).unsqueeze(1)
    rotated = torch.view_as_real(_pairs(tail.to(wide)) * angles).flatten(-2).to(x.dtype)
    return torch.cat((passed, rotated), dim=-1) if passed.shape[-1] else rotated


def _pairs(x: Tensor) -> Tensor:
    """Neighbouring columns as complex numbers [T, H, R/2], which have to begin at even places of memory."""
    if (
        torch.compiler.is_compiling()
        or x.stride(-1) != 1
        or x.storage_offset() % 2
        or any(stride % 2 for stride in x.stride()[:-1])
    ):
        x = x.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def rotate_back_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """A gradient's way back through `rotate`, where x [T, H, R] lies, all of whose columns were rotated."""
    if _by_kernel(x) and x.stride(-1) == 1:
        _launch_rotate(x, cos, sin, x, back=True)
        return
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = _pairs(x.to(wide))
    pairs.mul_(torch.complex(cos.to(wide), -sin.to(wide)).unsqueeze(1))
    if pairs.data_ptr() != x.data_ptr():
        x.copy_(torch.view_as_real(pairs).flatten(-2))


class _Rope(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dout: Tensor):
        cos, sin = ctx.saved_tensors
        return rotate(dout, cos, -sin), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D], cos and sin [T, R/2] -> x with the last R entries of each head rotated. Differentiable in x.

    Raises TypeError for a dtype that is no float, ValueError when cos or sin is not [T, at most D/2].
    """
    check_float("x", x)
    check_shape("x", x, (None, None, None))
    check_shape("cos", cos, (x.shape[0], None))
    check_shape("sin", sin, tuple(cos.shape))
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos: got {cos.shape[1]} angles, allowed are at most {x.shape[-1] // 2} for heads of {x.shape[-1]}"
        )
    if torch.compiler.is_compiling():  # which has its own way back; through _Rope's torch 2.11 gives gradients of 0
        return rotate(x, cos.detach(), sin.detach())
    return _Rope.apply(x, cos, sin)
