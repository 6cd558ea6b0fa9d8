"""A recorded step does what the step itself does, bit for bit; documents added at the end change nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minids.data.loader import Batch
from minids.graph import Recorded, pad_cu_seqlens
from minids.model import DeepseekV3
from minids.train.loop import Gradients, Trainer, Window
from minids.train.pretrain import pretrain
from tests.minids import tiny


@given(st.lists(st.integers(0, 50), min_size=1, max_size=70), st.integers(0, 70))
def test_padding_adds_empty_documents(lengths: list[int], more: int) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    padded = pad_cu_seqlens(cu_seqlens, len(lengths) + more)
    assert padded.dtype == torch.int32 and torch.equal(padded[: len(cu_seqlens)], cu_seqlens)
    assert padded.diff()[len(lengths) :].tolist() == [0] * more


def test_padding_changes_no_loss() -> None:
    model = DeepseekV3(tiny.model_config(50))
    ids = torch.randint(0, 50, (2, 30))
    cu_seqlens = torch.tensor([0, 7, 30, 33, 34, 60], dtype=torch.int32)
    losses, padded = (model.losses(ids, ids, cu) for cu in (cu_seqlens, pad_cu_seqlens(cu_seqlens, 8)))
    assert torch.equal(losses.nll_sum, padded.nll_sum) and torch.equal(losses.tokens, padded.tokens)
    assert torch.equal(losses.mtp_nll_sum[0], padded.mtp_nll_sum[0]) and torch.equal(losses.balance, padded.balance)


class Played:
    """In a graph's place: runs the work, and counts which graphs there would be at a time."""

    def __init__(self, work: Callable[[list[torch.Tensor], bool], Gradients]) -> None:
        self.work, self.graphs, self.most = work, set[Any](), 0

    def __call__(self, inputs: list[torch.Tensor], kind: bool) -> Gradients:
        self.graphs.add((kind, *(x.shape for x in inputs)))
        self.most = max(self.most, len(self.graphs))
        return self.work(inputs, kind)

    def forget(self) -> None:
        self.graphs.clear()


def test_accumulated_batches_are_one_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their numbers of documents, in which batches and steps differ; and the run is the same."""
    tiny.write_shards(tmp_path)
    documents: list[int] = []
    played: list[Played] = []
    init, inputs = Trainer.__init__, Trainer._inputs

    def plays(trainer: Trainer, *arguments: Any) -> None:
        init(trainer, *arguments)
        trainer.recorded = Played(trainer._work)  # type: ignore[assignment]
        played.append(trainer.recorded)  # type: ignore[arg-type]

    def counts(trainer: Trainer, batches: list[Batch], window: Window) -> list[torch.Tensor]:
        documents.extend(len(b.cu_seqlens) - 1 for b in batches)
        return inputs(trainer, batches, window)

    for graph in (False, True):
        if graph:
            monkeypatch.setattr(Trainer, "__init__", plays)
            monkeypatch.setattr(Trainer, "_inputs", counts)
        config = tiny.pretrain_config(tmp_path, f"graph-{graph}", steps=8, every=0)
        pretrain(tiny.with_steps(config, grad_accumulation_steps=3))
    tiny.assert_same_run(tmp_path / "graph-False", tmp_path / "graph-True")
    assert len({(n - 1).bit_length() for n in documents}) > 1  # or this shows nothing
    assert [p.most for p in played] == [1]


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


@pytest.mark.gpu
def test_a_result_outlives_its_graph() -> None:
    recorded = Recorded(lambda inputs, kind: inputs[0] * kind, torch.device("cuda"))
    kept = []
    for start in (1.0, 10.0):
        for turn in range(3):
            kept.append(recorded([torch.tensor(start + turn)], 2))
        recorded.forget()
    assert [x.item() for x in kept] == [2.0, 6.0, 6.0, 20.0, 24.0, 24.0]


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
