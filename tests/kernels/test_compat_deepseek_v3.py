"""DeepSeek-V3's kernel names: values against their formulae, written again here in plain PyTorch, and a model whose
linear layers call them as the official `inference/model.py` does."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from minids_kernels.compat import deepseek_v3
from torch import Tensor, nn

from tests.kernels.numerics import assert_near, error_bound, tensor_core_error
from tests.kernels.test_fp8_quant import E4M3, assert_same_bits

BLOCK = 128


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def default_dtype(request: pytest.FixtureRequest, backend: str, device: torch.device) -> Iterator[torch.dtype]:
    """fp16 in place of bf16 in the interpreter, which cuts bf16 off instead of rounding it."""
    dtype = request.param
    if dtype == torch.bfloat16 and backend == "triton" and device.type == "cpu":
        dtype = torch.float16
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield dtype
    torch.set_default_dtype(former)


def formula_act_quant(x: Tensor, block_size: int = BLOCK, scale_fmt: str | None = None) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(-1, (-1, block_size))
    s = groups.abs().amax(-1).clamp(min=1e-4) / 448
    if scale_fmt == "ue8m0":
        s = torch.exp2(torch.ceil(torch.log2(s)))
    return (groups / s.unsqueeze(-1)).flatten(-2).to(E4M3), s


def formula_weight_dequant(x: Tensor, s: Tensor, block_size: int = BLOCK) -> Tensor:
    wide = s.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    return (x.float() * wide[: x.shape[0], : x.shape[1]]).to(torch.get_default_dtype())


def formula_fp8_gemm(a: Tensor, a_s: Tensor, b: Tensor, b_s: Tensor) -> Tensor:
    out = torch.zeros(*a.shape[:-1], b.shape[0], dtype=torch.float32, device=a.device)
    for group, start in enumerate(range(0, a.shape[-1], BLOCK)):
        product = a[..., start : start + BLOCK].float() @ b[:, start : start + BLOCK].float().T
        b_scale = b_s[:, group].repeat_interleave(BLOCK)[: b.shape[0]]
        out += product * a_s[..., group, None] * b_scale
    return out.to(torch.get_default_dtype())


formulae = SimpleNamespace(
    act_quant=formula_act_quant, weight_dequant=formula_weight_dequant, fp8_gemm=formula_fp8_gemm
)


def activations(*shape: int, device: torch.device) -> Tensor:
    """With a row of zeros and groups below and about the least amax, as padding and dead units have them."""
    x = torch.randn(shape, dtype=torch.bfloat16)
    rows = x.view(-1, shape[-1])
    rows[0] = 0
    rows[1, :BLOCK] *= 1e-6
    rows[2, -BLOCK:] *= 3e-5
    return x.to(device)


def weight(n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes with the scales that make them weights of about 1 / sqrt(k)."""
    codes = torch.randn(n, k, dtype=torch.float32).mul(100).clamp(-448, 448).to(E4M3)
    scales = torch.rand(-(-n // BLOCK), -(-k // BLOCK), dtype=torch.float32).add(0.5).div(100 * k**0.5)
    return codes.to(device), scales.to(device)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("block_size", [16, 128, 256])
def test_act_quant(block_size: int, scale_fmt: str | None, device: torch.device) -> None:
    """Bit for bit: x / s is rounded once, then to e4m3. On a GPU theirs and ours divide by the same instruction, which
    may differ from the CPU's in the last bit; few numbers lie that close to the middle of two codes."""
    x = activations(2, 3, 512, device=device)
    codes, scales = deepseek_v3.act_quant(x, block_size, scale_fmt)
    want_codes, want_scales = formula_act_quant(x.cpu(), block_size, scale_fmt)
    assert codes.dtype == E4M3 and codes.shape == x.shape and scales.shape == (2, 3, 512 // block_size)
    if device.type == "cpu":
        assert_same_bits((codes, scales), (want_codes, want_scales))
    else:
        torch.testing.assert_close(scales.cpu(), want_scales, rtol=3e-7, atol=0)
        assert (codes.cpu().view(torch.uint8) != want_codes.view(torch.uint8)).float().mean() < 0.002


def test_defaults_and_empty_input(device: torch.device) -> None:
    x = activations(4, 256, device=device)
    assert_same_bits(deepseek_v3.act_quant(x), deepseek_v3.act_quant(x, 128, None))
    codes, scales = deepseek_v3.act_quant(x[:0])
    assert codes.shape == (0, 256) and scales.shape == (0, 2)


@pytest.mark.parametrize("block_size", [32, 128])
def test_weight_dequant(block_size: int, default_dtype: torch.dtype, device: torch.device) -> None:
    codes, _ = weight(200, 300, device)
    scales = torch.rand(-(-200 // block_size), -(-300 // block_size), dtype=torch.float32, device=device)
    got = deepseek_v3.weight_dequant(codes, scales, block_size)
    want = formula_weight_dequant(codes, scales, block_size)
    assert got.dtype == default_dtype
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_fp8_gemm(shape: tuple[int, ...], default_dtype: torch.dtype, device: torch.device) -> None:
    codes, scales = formula_act_quant(activations(*shape, 256, device=device))
    codes_w, scales_w = weight(140, 256, device)
    got = deepseek_v3.fp8_gemm(codes, scales, codes_w, scales_w)
    want = formula_fp8_gemm(codes.double().to(E4M3), scales, codes_w, scales_w)
    assert got.dtype == default_dtype and got.shape == (*shape, 140)
    bound = error_bound(default_dtype, 2, 256) + tensor_core_error(device, 256)
    assert_near(got, want.double(), bound)


class Linear(nn.Module):
    """A linear layer as the official model has it: fp8 weight with its scale hung on, or an ordinary weight."""

    def __init__(self, k: int, n: int, bias: bool, device: torch.device) -> None:
        super().__init__()
        codes, scales = weight(n, k, device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight.scale = nn.Parameter(scales, requires_grad=False)  # type: ignore[assignment]
        self.bias = nn.Parameter(torch.randn(n, device=device), requires_grad=False) if bias else None

    def forward(self, x: Tensor, kernel: SimpleNamespace, gemm_impl: str, scale_fmt: str | None) -> Tensor:
        scale = self.weight.scale
        if gemm_impl == "bf16":
            return F.linear(x, kernel.weight_dequant(self.weight, scale), self.bias)
        codes, scales = kernel.act_quant(x, BLOCK, scale_fmt)
        y = kernel.fp8_gemm(codes, scales, self.weight, scale)
        return y if self.bias is None else y + self.bias


class Model(nn.Module):
    """Embedding, a SwiGLU layer with a residual, a norm and a head."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(30, 256, device=device), requires_grad=False)
        self.gate, self.up = (Linear(256, 384, bias, device) for bias in (False, True))
        self.down = Linear(384, 256, False, device)
        self.head = Linear(256, 30, False, device)

    def forward(self, ids: Tensor, kernel: object, gemm_impl: str, scale_fmt: str | None) -> Tensor:
        how = kernel, gemm_impl, scale_fmt
        x = F.embedding(ids, self.embedding)
        x = x + self.down(F.silu(self.gate(x, *how)) * self.up(x, *how), *how)
        return self.head(F.rms_norm(x, (256,)), *how)


@pytest.mark.parametrize(("gemm_impl", "scale_fmt"), [("bf16", None), ("fp8", None), ("fp8", "ue8m0")])
def test_logits_of_a_model(
    gemm_impl: str, scale_fmt: str | None, default_dtype: torch.dtype, device: torch.device
) -> None:
    """Sums in another order differ in fp32's last bits, which now and then turn a layer's output, or a code of the next
    layer's input, to its neighbour: rarely, so the root mean square of what comes out is a fraction of two roundings
    to bf16 or fp16, and of one step of a code (1/16) in fp32. A scale off by one part in 16 misses both."""
    model, ids = Model(device), torch.randint(30, (2, 5), device=device)
    got = model(ids, deepseek_v3, gemm_impl, scale_fmt)
    want = model(ids, formulae, gemm_impl, scale_fmt)
    assert got.dtype == want.dtype == default_dtype
    bound = 2**-10 if default_dtype == torch.float32 else error_bound(torch.bfloat16, 2, 384)
    assert_near(got, want.double(), bound)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, w, s: deepseek_v3.act_quant(x[:, :100]), ValueError, r"x: got strides \(256, 1\) .* contiguous"),
        (
            lambda x, w, s: deepseek_v3.act_quant(x[:, :100].contiguous()),
            ValueError,
            "x: got shape .* divisible by 128",
        ),
        (lambda x, w, s: deepseek_v3.act_quant(x, 96), ValueError, "block_size: got 96, allowed are powers of two"),
        (lambda x, w, s: deepseek_v3.act_quant(x, scale_fmt="e4m3"), ValueError, "scale_fmt: got 'e4m3', allowed are"),
        (lambda x, w, s: deepseek_v3.act_quant(x.int()), TypeError, r"x: got torch.int32, allowed is torch.float32 or"),
        (lambda x, w, s: deepseek_v3.weight_dequant(w.t(), s), ValueError, "x: got strides .* allowed is contiguous"),
        (
            lambda x, w, s: deepseek_v3.weight_dequant(w[0], s),
            ValueError,
            r"x: got shape \(256,\), allowed is \(any, a",
        ),
        (lambda x, w, s: deepseek_v3.weight_dequant(w, s, 64), ValueError, r"s: got shape .*, allowed is \(3, 4\)"),
        (lambda x, w, s: deepseek_v3.weight_dequant(x, s), TypeError, "x: got torch.float32, allowed is .*e4m3fn"),
        (lambda x, w, s: deepseek_v3.weight_dequant(w, s.half()), TypeError, "s: got torch.float16, allowed is"),
        (lambda x, w, s: deepseek_v3.fp8_gemm(w.t(), s, w, s), ValueError, "a: got strides .* allowed is contiguous"),
        (lambda x, w, s: deepseek_v3.fp8_gemm(w, s, w, s), ValueError, r"a_s: got shape \(2, 2\), allowed is \(140, 2"),
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    codes, scales = weight(140, 256, torch.device("cpu"))
    with pytest.raises(error, match=message):
        call(torch.zeros(3, 256), codes, scales)
