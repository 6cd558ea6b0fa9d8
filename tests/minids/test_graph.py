"""A recorded step does what the step itself does, bit for bit; documents added at the end change nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minids.graph import Recorded, pad_cu_seqlens
from minids.model import DeepseekV3
from minids.train.pretrain import pretrain
from tests.minids import tiny


@given(st.lists(st.integers(0, 50), min_size=1, max_size=70))
def test_padding_adds_empty_documents_up_to_a_power_of_two(lengths: list[int]) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    padded = pad_cu_seqlens(cu_seqlens)
    added = padded.diff()[len(lengths) :]
    assert padded.dtype == torch.int32 and torch.equal(padded[: len(cu_seqlens)], cu_seqlens)
    assert (added == 0).all() and len(added) < max(2, len(lengths))
    assert (len(padded) - 1).bit_count() == 1


def test_padding_changes_no_loss() -> None:
    model = DeepseekV3(tiny.model_config(50))
    ids = torch.randint(0, 50, (2, 30))
    cu_seqlens = torch.tensor([0, 7, 30, 33, 34, 60], dtype=torch.int32)
    losses, padded = (model.losses(ids, ids, cu) for cu in (cu_seqlens, pad_cu_seqlens(cu_seqlens)))
    assert torch.equal(losses.nll_sum, padded.nll_sum) and torch.equal(losses.tokens, padded.tokens)
    assert torch.equal(losses.mtp_nll_sum[0], padded.mtp_nll_sum[0]) and torch.equal(losses.balance, padded.balance)


@pytest.mark.gpu
@pytest.mark.parametrize(("parts", "dtype"), [(1, "fp32"), (3, "fp32"), (1, "fp8")])
def test_a_recorded_run_is_the_run(tmp_path: Path, parts: int, dtype: str) -> None:
    """Also with batches that are accumulated, and where the number of documents changes; in fp8 weights are quantised
    anew in each replay."""
    tiny.write_shards(tmp_path)
    for graph in (False, True):
        config = tiny.pretrain_config(tmp_path, f"graph-{graph}", steps=8, every=0)
        settings = dict(device="cuda", cuda_graph=graph, grad_accumulation_steps=parts, eval_every=3, dtype=dtype)
        pretrain(tiny.with_steps(config, **settings))
    tiny.assert_same_run(tmp_path / "graph-False", tmp_path / "graph-True")


@pytest.mark.gpu
def test_each_shape_and_kind_has_its_own_graph() -> None:
    weight = torch.nn.Parameter(torch.randn(4, device="cuda"))

    def work(inputs: list[torch.Tensor], kind: float) -> torch.Tensor:
        loss = (inputs[0].float() @ inputs[0].float().new_ones(inputs[0].shape[1], 4) * weight * kind).sum()
        loss.backward()
        return loss.detach()

    recorded = Recorded(work, weight.device, [weight])
    for turn in range(4):
        for columns in (3, 5):
            for kind in (1.0, -2.0):
                x = torch.full((2, columns), turn)
                weight.grad = None
                loss = recorded([x], kind)
                assert torch.equal(loss, (2 * columns * turn * kind * weight.detach()).sum())
                assert torch.equal(weight.grad, torch.full_like(weight, 2 * columns * turn * kind))


WAITS = """
import torch
from minids.graph import CannotRecord, Recorded

weight = torch.nn.Parameter(torch.ones(1, device="cuda"))
recorded = Recorded(lambda inputs, kind: weight.item(), weight.device)
recorded([torch.zeros(1)], None)
try:
    recorded([torch.zeros(1)], None)
except CannotRecord as error:
    print("refused:", error)
"""


@pytest.mark.gpu
def test_work_that_waits_is_refused() -> None:
    """In a process of its own: a recording that breaks off leaves PyTorch's random numbers unusable."""
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("refused: "), done.stderr
