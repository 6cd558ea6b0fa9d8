"""unsloth's grouped products are handed the case's own problem: stand-ins in a package of the same layout, which import
what the real files import and read the arguments where these do, must agree with the case's reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import unsloth_moe
from benchmarks.ops import grouped_gemm as cases
from benchmarks.protocol import judge

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
    def forward(ctx, X, W, m_sizes, tiles):
        ctx.save_for_backward(X, W, m_sizes)
        ctx.tiles = tiles
        with torch_gpu_device(X.device):
            return product(X, W, m_sizes.tolist())

    @staticmethod
    def backward(ctx, dY):
        from ..autotune_cache import fits

        X, W, m_sizes = ctx.saved_tensors
        assert all(fits(tiles) for tiles in ctx.tiles)
        return *gradients(X, W, m_sizes.tolist(), dY), None, None


def grouped_gemm(
    X, W, m_sizes, topk, kernel_config_fwd=None, kernel_config_bwd_dX=None, kernel_config_bwd_dW=None, autotune=False
):
    assert topk == 1 and not autotune and int(m_sizes.sum()) == len(X)
    tiles = kernel_config_fwd, kernel_config_bwd_dX, kernel_config_bwd_dW
    assert [t.what for t in tiles] == ["fwd", "dX", "dW"] and all(isinstance(t, Tiles) for t in tiles)
    assert {t.problem for t in tiles} == {(len(W), W.shape[2], W.shape[1] // 2, topk, W.dtype)}
    return GroupedGemm.apply(X, W, m_sizes.view(-1), tiles)
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


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for path, text in FILES.items():
        file = tmp_path / "unsloth" / unsloth_moe.FOLDER / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "unsloth/__init__.py").write_text("raise AssertionError('the package itself was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    unsloth_moe.unsloth.cache_clear()
    unsloth_moe.tiles.cache_clear()
    yield
    unsloth_moe.unsloth.cache_clear()
    unsloth_moe.tiles.cache_clear()


@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_grouped_gemm(package: None, mode: str) -> None:
    torch.manual_seed(0)
    case = cases._case(40, 16, 12, 4, torch.float32, mode, torch.device("cpu"))
    inputs, contestant = case.make(), case.contestants["unsloth"]
    run = contestant.bind(inputs)
    for _ in range(2):
        assert not judge(contestant.read(run()), case.reference(inputs), case.tolerance).reason
    assert unsloth_moe.unsloth()[1].asked == [(4, 12, 8, 1, torch.float32)]  # once for a shape
    assert not any(module.split(".")[0] == "unsloth" for module in sys.modules)


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    unsloth_moe.unsloth.cache_clear()
    with pytest.raises(ImportError, match=r"autotuning\.py: no such file in unsloth's folders"):
        unsloth_moe.unsloth()
