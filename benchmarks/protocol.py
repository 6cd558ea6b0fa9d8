"""What benchmarks/ops/<room>.py hands to benchmarks.run and benchmarks.tune.

A room's module has

    launches(arch, every) -> [(label, call), ...]       for benchmarks.aot
    cases(device, quick) -> [Case, ...]                 for benchmarks.run
    tuning(device) -> {kernel in configs/<room>.json: Tuning} for benchmarks.tune

Names that benchmarks.goals and the tables rely on. Contestants: "minids" is ours, always there; "eager" is the plain
formula in PyTorch, "compile" the same under torch.compile, "cublas" F.scaled_mm with block scales, "bf16" PyTorch's
bf16 product, then "torchao", "deepgemm", "liger", "fla", "unsloth", "vllm triton", "sglang triton", "deepseek"
(DeepSeek's own kernels' formulae) and "dense" (for experts, a feed-forward layer of as many active FLOPs); a PyTorch
function goes by its own name, "F.rms_norm". Cases: "fwd", "bwd", "fwd+bwd", with a word before it where one room has
several ops: "linear fwd+bwd", "residual fwd", "quant fwd". Sizes are letters: M rows or tokens, N output columns (a
norm's columns), K what is summed over, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

OURS = "minids"
MODES = ("fwd", "bwd", "fwd+bwd")

S = TypeVar("S")
Run = Callable[[], Any]  # what is timed; returns a tensor or a tuple of tensors


class Absent(Exception):
    """A contestant's `bind` raises it, with the reason, where it cannot take part."""


@dataclass(frozen=True)
class Inputs:
    """The tensors an op is called with, and its outputs' upstream gradients (none for forward alone)."""

    args: tuple[Tensor, ...]
    douts: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Contestant:
    """One implementation. `bind(inputs)` prepares what is not timed (layouts, operands quantised beforehand,
    compilation) and returns the timed call, which must not change the inputs; `read` turns the call's output into what
    the reference returns (dequantises, transposes back). Imports of other projects belong inside both. `limit`: it does
    other work, than which ours can hardly be faster, and is not compared with the reference.
    """

    bind: Callable[[Inputs], Run]
    package: str = (
        "torch"  # the distribution it comes from: left out where it is not installed, else named with version
    )
    on: tuple[str, ...] = ()  # architectures it runs on, "sm_90"; "cuda" is any GPU; none named: everywhere
    read: Callable[[Any], Any] = lambda output: output
    limit: bool = False


@dataclass(frozen=True)
class Case:
    """One op at one shape. `make()` draws N(0, 1) inputs on the device (the harness seeds), `reference(inputs)` gives
    the fp32 result (tensor or tuple) that every contestant's output must match: for each tensor the root mean square of
    the difference at most `tolerance` of the reference's.

    `bytes`: what must cross memory at least once; `flops`: arithmetic that counts, 0 for what memory alone limits, and
    `math` the precision whose matmul ceiling it is held against.
    """

    name: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    make: Callable[[], Inputs]
    reference: Callable[[Inputs], Any]
    contestants: Mapping[str, Contestant]
    tolerance: float
    bytes: int
    flops: int = 0
    math: str = "bf16"  # or "fp8"

    @property
    def label(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.name} {sizes} {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class Tuning:
    """How benchmarks.tune tries one kernel: `bind(shape)` makes inputs of a table entry's shape on the device (the GPU,
    or "meta" where launches are recorded only, so nothing may wait for numbers) and returns a call that launches the
    kernel; `candidates(shape)` are the configs to try."""

    bind: Callable[[Mapping[str, int]], Run]
    candidates: Callable[[Mapping[str, int]], Iterable[dict[str, Any]]]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sizes(device: torch.device, quick: bool, gpu: Sequence[S], cpu: Sequence[S], small: S) -> Sequence[S]:
    """The shapes to time: on a GPU its own, the first alone if `quick`; on a CPU its own, `small` alone if `quick`."""
    if device.type == "cuda":
        return gpu[:1] if quick else gpu
    return [small] if quick else cpu


def precision(device: torch.device) -> torch.dtype:
    """What cases are timed in: bf16, on a CPU fp32, since few of them multiply bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def combinations(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of the choices, as configs to try."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a call's output; None among them (no such gradient) is left out."""
    return [output] if isinstance(output, Tensor) else [t for t in output if t is not None]


def _trains(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype.itemsize > 1


def calls(fn: Callable[..., Any], mode: str = "fwd") -> Callable[[Inputs], Run]:
    """A `bind` for `fn(*args)`, which returns one or several tensors. "fwd" times it without gradients; "fwd+bwd" with
    the gradients of all floating-point arguments wider than fp8, and returns (outputs..., gradients...); "bwd" times
    the gradients alone, the forward being done once beforehand, and returns them."""
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, allowed are {MODES}")

    def bind(inputs: Inputs) -> Run:
        if mode == "fwd":
            return lambda: _without_gradients(fn, inputs.args)
        args = [x.detach().requires_grad_(_trains(x)) for x in inputs.args]
        wanted = [x for x in args if x.requires_grad]

        def backward(outputs: Sequence[Tensor], keep: bool) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, wanted, inputs.douts, retain_graph=keep)

        if mode == "bwd":
            outputs = tensors(fn(*args))
            return lambda: backward(outputs, keep=True)

        def both() -> tuple[Tensor, ...]:
            outputs = tensors(fn(*args))
            return *outputs, *backward(outputs, keep=False)

        return both

    return bind


def _without_gradients(fn: Callable[..., Any], args: Sequence[Tensor]) -> Any:
    with torch.no_grad():
        return fn(*args)


def compiled(fn: Callable[..., Any], mode: str = "fwd") -> Callable[[Inputs], Run]:
    """As `calls`, with `fn` under torch.compile for these very shapes."""
    return lambda inputs: calls(torch.compile(fn, dynamic=False, fullgraph=True), mode)(inputs)


def exact(fn: Callable[..., Any], mode: str = "fwd") -> Callable[[Inputs], Any]:
    """A `reference`: `fn` on the inputs in fp32, in the same mode."""

    def reference(inputs: Inputs) -> Any:
        args = tuple(x.float() if _trains(x) else x for x in inputs.args)
        return calls(fn, mode)(Inputs(args, tuple(x.float() for x in inputs.douts)))()

    return reference


def normal(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """N(0, 1), drawn in fp32."""
    return torch.randn(*shape, device=device).to(dtype)


@dataclass(frozen=True)
class Verdict:
    """`error` is the largest relative root mean square over the outputs; `reason` says what is wrong, "" if nothing."""

    error: float
    reason: str = field(default="")


def judge(output: Any, reference: Any, tolerance: float) -> Verdict:
    """Compares a contestant's (read) output with the reference's."""
    got, want = tensors(output), tensors(reference)
    if [tuple(x.shape) for x in got] != [tuple(x.shape) for x in want]:
        return Verdict(float("inf"), f"shapes {[tuple(x.shape) for x in got]} for {[tuple(x.shape) for x in want]}")
    error = 0.0
    for x, y in zip(got, want, strict=True):
        if y.numel() == 0:
            continue
        norm = torch.linalg.vector_norm(y.float()).clamp_min_(torch.finfo(torch.float32).tiny)
        relative = (torch.linalg.vector_norm(x.float() - y.float()) / norm).item()
        error = max(error, relative if relative == relative else float("inf"))  # NaN compares as nothing
    return Verdict(error, "" if error <= tolerance else f"relative error {error:.3g}, allowed is {tolerance:.3g}")
