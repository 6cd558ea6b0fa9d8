"""unsloth's grouped products and layer are handed the cases' own problems: stand-ins in packages of the same layout,
which import what the real files import and read the arguments where these do, must agree with the cases' references."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import unsloth_moe
from benchmarks.ops import grouped_gemm, moe
from benchmarks.protocol import Case, judge

TUNING = """
from dataclasses import dataclass

import pandas as pd

from .autotuning import BLOCKS


@dataclass
class Tiles:
    what: str
    problem: tuple
    block: int = BLOCKS[0]

    def frame(self):
        return pd.DataFrame([])
"""
INTERFACE = """
import torch
from unsloth import DEVICE_TYPE
from unsloth.device_type import cuda_visible_capabilities
from unsloth.kernels.utils import torch_gpu_device

from .kernels.backward import gradients
from .kernels.forward import product
from .kernels.tuning import Tiles

assert DEVICE_TYPE == "cuda" and callable(cuda_visible_capabilities)


class GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, W, m_sizes, topk, gather_indices, permute_x, permute_y, tiles):
        ctx.save_for_backward(X, W, m_sizes, gather_indices)
        ctx.rest = topk, permute_x, permute_y, tiles
        with torch_gpu_device(X.device):
            y = product(X[gather_indices // topk] if permute_x else X, W, m_sizes.tolist())
        return torch.empty_like(y).index_copy_(0, gather_indices, y) if permute_y else y

    @staticmethod
    def backward(ctx, dY):
        from ..autotune_cache import fits

        X, W, m_sizes, gather_indices = ctx.saved_tensors
        topk, permute_x, permute_y, tiles = ctx.rest
        assert all(fits(config) for config in tiles)
        rows = X[gather_indices // topk] if permute_x else X
        dX, dW = gradients(rows, W, m_sizes.tolist(), dY[gather_indices] if permute_y else dY)
        if permute_x:
            dX = torch.zeros_like(X).index_add_(0, gather_indices // topk, dX)
        return dX, dW, *(None,) * 6


def grouped_gemm(
    X, W, m_sizes, topk, gather_indices=None, permute_x=False, permute_y=False, kernel_config_fwd=None,
    kernel_config_bwd_dX=None, kernel_config_bwd_dW=None, autotune=False, is_first_gemm=True,
):
    assert not autotune and not (permute_x if not is_first_gemm else permute_y)
    assert int(m_sizes.sum()) == len(X) * (topk if permute_x else 1)
    tiles = kernel_config_fwd, kernel_config_bwd_dX, kernel_config_bwd_dW
    assert [t.what for t in tiles] == ["fwd", "dX", "dW"] and all(isinstance(t, Tiles) for t in tiles)
    assert {t.problem for t in tiles} == {(len(W), W.shape[2], W.shape[1] // 2, topk, W.dtype)}
    return GroupedGemm.apply(X, W, m_sizes.view(-1), topk, gather_indices, permute_x, permute_y, tiles)
"""
ROUTING = """
import torch


def moe_routing_sort(top_k_index, num_experts):
    flat = top_k_index.flatten()
    counts = torch.bincount(flat, minlength=num_experts).int()
    return counts, flat.argsort(stable=True), counts.cumsum(0)
"""
ACTIVATION = """
import torch.nn.functional as F


def moe_fused_swiglu(gate_up, act=0, interleaved=False):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
"""
FILES = {
    "grouped_gemm/kernels/autotuning.py": "BLOCKS = [64, 128]",
    "grouped_gemm/kernels/tuning.py": TUNING,
    "grouped_gemm/kernels/forward.py": """
import torch

from .autotuning import BLOCKS


def product(X, W, sizes):
    return torch.cat([x @ w.T for x, w in zip(X.split(sizes), W)])
""",
    "grouped_gemm/kernels/backward.py": """
import torch

from .autotuning import BLOCKS


def gradients(X, W, sizes, dY):
    parts = list(zip(X.split(sizes), W, dY.split(sizes)))
    return torch.cat([dy @ w for _, w, dy in parts]), torch.stack([dy.T @ x for x, _, dy in parts])
""",
    "grouped_gemm/interface.py": INTERFACE,
    "autotune_cache.py": """
asked = []


def fits(tiles):
    return tiles.block == 64


def get_or_autotune_moe_kernels(num_experts, hidden_dim, intermediate_dim, top_k, dtype):
    from .grouped_gemm.kernels.tuning import Tiles

    problem = num_experts, hidden_dim, intermediate_dim, top_k, dtype
    asked.append(problem)
    return tuple(Tiles(what, problem) for what in ("fwd", "dX", "dW"))
""",
}


FILES = {f"unsloth/{unsloth_moe.FOLDER}/{path}": text for path, text in FILES.items()} | {
    f"unsloth_zoo/{unsloth_moe.PATCHES}/moe_routing_triton.py": ROUTING,
    f"unsloth_zoo/{unsloth_moe.PATCHES}/moe_fused_swiglu.py": ACTIVATION,
}
CACHES = unsloth_moe.unsloth, unsloth_moe.zoo, unsloth_moe.tiles


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for path, text in FILES.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for package in ("unsloth", "unsloth_zoo"):
        (tmp_path / package / "__init__.py").write_text("raise AssertionError('the package itself was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


def agrees(case: Case) -> None:
    inputs, contestant = case.make(), case.contestants["unsloth"]
    run = contestant.bind(inputs)
    for _ in range(2):
        assert not judge(contestant.read(run()), case.reference(inputs), case.tolerance).reason
    assert not any(module.split(".")[0] in ("unsloth", "unsloth_zoo") for module in sys.modules)


@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_grouped_gemm(packages: None, mode: str) -> None:
    torch.manual_seed(0)
    agrees(grouped_gemm._case(40, 16, 12, 4, torch.float32, mode, torch.device("cpu")))
    assert unsloth_moe.unsloth()[1].asked == [(4, 12, 8, 1, torch.float32)]  # once for a shape


@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_experts(packages: None, mode: str) -> None:
    torch.manual_seed(0)
    agrees(moe._case(20, 16, 12, 4, 2, torch.float32, mode, torch.device("cpu")))
    assert unsloth_moe.unsloth()[1].asked == [(4, 16, 12, 2, torch.float32), (4, 12, 8, 2, torch.float32)]


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    unsloth_moe.unsloth.cache_clear()
    with pytest.raises(ImportError, match=r"autotuning\.py: no such file in unsloth's folders"):
        unsloth_moe.unsloth()
