"""precompile against Triton's own count of what is compiled. Without a GPU a stand-in for the driver is of sm_90, in a
process of its own, where kernels are not interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from minids_kernels import moe_experts, moe_gate, precompile, rms_norm
from torch import Tensor

from tests.kernels.numerics import leaves

ROOT = Path(__file__).parents[2]
TOKENS, WIDTH, INNER, EXPERTS = 300, 64, 32, 4


def inputs(device: torch.device | str = "cpu") -> list[Tensor]:
    sizes = (TOKENS, WIDTH), (WIDTH,), (EXPERTS, WIDTH), (EXPERTS, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER)
    return leaves([torch.randn(size).to(device, torch.bfloat16) for size in sizes])


def layer(x: Tensor, norm: Tensor, gate: Tensor, w_gate_up: Tensor, w_down: Tensor) -> Tensor:
    """Kernels whose outputs are indices to others, and to PyTorch's scatter."""
    x = rms_norm(x, norm)
    ids, weight, _ = moe_gate(x @ gate.T, gate.new_zeros(EXPERTS).float(), 2)
    load = torch.zeros(EXPERTS, device=x.device).scatter_add_(0, ids.flatten(), weight.flatten())
    return moe_experts(x, ids, weight, w_gate_up, w_down) * load.sum().to(x.dtype)


def step(tensors: list[Tensor]) -> list[Tensor]:
    out = layer(*tensors)
    return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]


def without_a_gpu() -> None:
    """In a process of its own."""
    import triton
    from minids_kernels import _launch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    driver.set_active(Driver())
    compiled: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name)
    launched: list[tuple] = []
    tensors = inputs()
    found = precompile(lambda: step(tensors))
    assert found == len(compiled) > 10, (found, compiled)
    assert all(x.grad is None for x in tensors)
    with _launch.launched_by(lambda kernel, grid, *args, **kwargs: launched.append((kernel, grid, args, kwargs))):
        norm = rms_norm(*tensors[:2])
        norm.backward(torch.ones_like(norm))
    for kernel, grid, args, kwargs in launched:
        kernel.warmup(*args, grid=grid, **kwargs)
    assert len(launched) > 1 and len(compiled) == found, compiled[found:]
    rms_norm_fwd, _, args, kwargs = launched[0]
    rms_norm_fwd.warmup(*args, grid=(1,), **{**kwargs, "num_warps": 2 * kwargs["num_warps"]})
    assert len(compiled) == found + 1  # the count does rise


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux alone")
def test_compiles_all_that_would_be_launched(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "MINIDS_KERNELS": "triton", "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = "from tests.kernels.test_precompile import without_a_gpu; without_a_gpu()"
    run = subprocess.run([sys.executable, "-c", command], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
def test_interpreted_kernels_are_left_alone(backend: str) -> None:
    assert precompile(lambda: pytest.fail("called")) == 0


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_left_to_compile() -> None:
    import triton

    tensors = inputs("cuda")
    compiled: list[str] = []
    former = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name)
    try:
        precompile(lambda: step(tensors))
        count = len(compiled)
        got = step(tensors)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = former
    assert len(compiled) == count
    for x, want in zip(got, step(tensors), strict=True):
        assert torch.equal(x, want)
