"""What the tests of kernels share: precisions, errors that rounding explains, awkward strides, poisoned memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from minids_kernels import _launch
from minids_kernels.fp8_quant import native_e4m3
from torch import Tensor

Op = Callable[..., Tensor]

# dtype of the tensors, and whether autocast to bf16 is on
MODES = {
    "fp64": (torch.float64, False),
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "autocast": (torch.float32, True),
}

# same values, other strides
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "a slice of columns": lambda x: F.pad(x, (1, 2))[..., 1:-2],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
}


def error_bound(dtype: torch.dtype, roundings: int, length: int) -> float:
    """Relative error to be expected of a result that passed `roundings` roundings to `dtype` and sums of `length` terms
    in fp32 (in fp64 for fp64). One rounding is at most eps / 2; a sum's are independent and grow with its root."""
    wide = torch.promote_types(dtype, torch.float32)
    return roundings * torch.finfo(dtype).eps / 2 + math.sqrt(length) * torch.finfo(wide).eps


def serves(arch: str, alone: bool) -> bool:
    """Whether the machine's GPU runs what is meant for `arch` and, unless for it `alone`, newer chips."""
    wanted, found = divmod(int(arch.removeprefix("sm_")), 10), torch.cuda.get_device_capability()
    return found == wanted if alone else found >= wanted


def tensor_core_error(device: torch.device, length: int) -> float:
    """Relative error that e4m3 instructions add to an fp8 product's sums of `length` terms, where `device` has them.

    Hopper's align 32 products and the sum so far to the largest of them and cut off what lies below its 14 bits
    (DeepSeek-V3 report, arXiv 2412.19437, section 3.5.2), 2^-13 of it. The terms' signs differ, so that an instruction
    errs by about that, and the 4 that a group of 128 takes by at most 4 times that; groups are summed in fp32. Done so
    in fp64, the products of test_fp8_gemm.py err by half of this. Older chips' kernels widen codes to fp16, exactly.
    """
    if device.type != "cuda" or not native_e4m3(torch.empty(0, device=device)):
        return 0.0
    return -(-min(length, 128) // 32) * 2.0**-13


def assert_near(got: Tensor, want: Tensor, bound: float, what: str = "", floor: float = 0.0) -> None:
    """Error against exact `want`: its root mean square within `bound` of want's, its maximum within 6 times that of
    want's maximum (a Gaussian tail reaches 5 deviations in a million). A want below `floor` counts as it."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} for {tuple(want.shape)}"
    if want.numel() == 0:
        return
    error = got.double() - want
    assert error.isfinite().all(), f"{what}: {int((~error.isfinite()).sum())} of {error.numel()} are not finite"
    rms, scale = error.square().mean().sqrt(), want.square().mean().sqrt().clamp(min=floor)
    assert rms <= bound * scale, f"{what}: error {rms / scale:.2e}, bound {bound:.2e}"
    worst, largest = error.abs().max(), want.abs().max().clamp(min=floor)
    assert worst <= 6 * bound * largest, f"{what}: largest error {worst / largest:.2e}, bound {6 * bound:.2e}"


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same memory, as leaves that want gradients where they can."""
    return [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]


def run(op: Op, tensors: Sequence[Tensor], dout: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Output and the floating-point inputs' gradients; upstream gradient `dout`, or that of `.sum()`."""
    inputs = leaves(tensors)
    out = op(*inputs)
    (out.sum() if dout is None else out).backward(dout)
    grads = [x.grad for x in inputs if x.requires_grad]
    assert all(g is not None for g in grads)
    return out.detach(), [g for g in grads if g is not None]


def check(
    op: Op,
    exact: Op,
    tensors: Sequence[Tensor],
    mode: str,
    roundings: int,
    length: int,
    device: str | torch.device = "cpu",
) -> None:
    """`op` in `mode` on `device` against `exact` in fp64 on the same numbers: output and every gradient, values and
    dtypes.

    Inputs are of size 1. A handful of results may all happen to be small differences of such numbers, whose error stays
    that of the numbers.
    """
    device = torch.device(device)
    dtype, autocast = MODES[mode]
    inputs = [t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in tensors]
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        shape = op(*inputs)
        dout = torch.randn(shape.shape).to(device, shape.dtype)
        out, grads = run(op, inputs, dout)
    want, wanted = run(exact, [t.double() if t.is_floating_point() else t for t in inputs], dout.double())
    if device.type == "cpu" and _launch.BACKEND == "triton":
        roundings *= 2  # the interpreter cuts bf16 off where hardware rounds it: twice the error
    bound = error_bound(torch.bfloat16 if autocast else dtype, roundings, length)
    assert_near(out, want, bound, "output", floor=float(want.numel() < 50))
    floats = [x for x in inputs if x.is_floating_point()]
    for index, (x, grad, expected) in enumerate(zip(floats, grads, wanted, strict=True)):
        assert grad.dtype == x.dtype
        assert_near(grad, expected, bound, f"gradient {index}", floor=float(grad.numel() < 50))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin give NaN: what an op forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
