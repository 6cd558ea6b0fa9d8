"""Cross-entropy of a linear head against torch's on logits in fp64; every number of chunks and pieces."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from minids_kernels import linear_cross_entropy, linear_cross_entropy_reference
from torch import Tensor

from tests.kernels.numerics import MODES, assert_near, check, error_bound, run

room = importlib.import_module("minids_kernels.cross_entropy")
SHAPES = [(0, 5, 7), (1, 1, 2), (3, 8, 1), (13, 17, 31), (64, 33, 257)]  # T, D, V


def inputs(tokens: int, width: int, vocab: int, ignored: float = 0.0) -> tuple[list[Tensor], Tensor]:
    """x and weight whose logits are standard normal; targets of which a share is ignored."""
    targets = torch.randint(vocab, (tokens,))
    targets[torch.rand(tokens) < ignored] = -100
    return [torch.randn(tokens, width), torch.randn(vocab, width) / math.sqrt(width)], targets


def exact(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(x @ weight.T, targets, reduction="none")


@pytest.fixture(params=["kept", "computed again"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of the backward."""
    if request.param == "computed again":
        monkeypatch.setattr(room, "KEPT_ELEMENTS", 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_agrees_with_torch(shape: tuple[int, int, int], ignored: float, mode: str) -> None:
    tokens, width, vocab = shape
    tensors, targets = inputs(*shape, ignored)
    # a logit's rounding moves a loss by itself, however small the loss: more roundings than operations
    check(
        lambda x, w: linear_cross_entropy(x, w, targets), lambda x, w: exact(x, w, targets), tensors, mode,
        roundings=8, length=width + vocab + tokens,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_agrees_with_torch(shape: tuple[int, int, int]) -> None:
    (x, weight), targets = inputs(*shape, 0.4)
    got = linear_cross_entropy_reference(x, weight, targets)
    assert_near(got, exact(x.double(), weight.double(), targets), error_bound(torch.float32, 8, sum(shape)))


def test_everything_ignored_is_exactly_nothing() -> None:
    (x, weight), _ = inputs(9, 5, 11)
    x[4] = torch.nan  # what is ignored is not looked at either
    out, (dx, dweight) = run(lambda x, w: linear_cross_entropy(x, w, torch.full((9,), -100)), [x, weight])
    assert out.count_nonzero() == dx.count_nonzero() == dweight.count_nonzero() == 0


def test_another_ignore_index() -> None:
    (x, weight), targets = inputs(20, 5, 4)
    ignore = 2
    got = linear_cross_entropy(x, weight, targets, ignore_index=ignore)
    assert got[targets == ignore].count_nonzero() == 0
    torch.testing.assert_close(got[targets != ignore], exact(x, weight, targets)[targets != ignore])


@pytest.mark.usefixtures("way")
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 12), vocab=st.integers(2, 9), piece=st.integers(1, 40), chunk=st.integers(1, 80),
    ignored=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_where_chunks_end_does_not_matter(
    tokens: int, vocab: int, piece: int, chunk: int, ignored: float, seed: int
) -> None:
    """Chunks and pieces of fewer elements than one row, exactly as many, one more."""
    torch.manual_seed(seed)
    tensors, targets = inputs(tokens, 6, vocab, ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "PIECE_ELEMENTS", piece)
        patch.setattr(room, "CHUNK_ELEMENTS", chunk)
        check(
            lambda x, w: linear_cross_entropy(x, w, targets), lambda x, w: exact(x, w, targets), tensors, "fp32",
            roundings=16, length=40,
        )  # fmt: skip


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_large_vocabulary(mode: str) -> None:
    """Several real pieces; V3's own vocabulary."""
    tensors, targets = inputs(9, 16, 129280)
    check(
        lambda x, w: linear_cross_entropy(x, w, targets), lambda x, w: exact(x, w, targets), tensors, mode,
        roundings=8, length=129280,
    )  # fmt: skip


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits_do_not_overflow(dtype: torch.dtype) -> None:
    """Logits of +-30000: the right target costs nothing, a wrong one the difference; gradients are one-hot."""
    weight = torch.tensor([[1.0], [-1.0], [0.5]], dtype=dtype)
    x = torch.full((2, 1), 30000.0, dtype=dtype)
    out, (dx, dweight) = run(lambda x, w: linear_cross_entropy(x, w, torch.tensor([0, 1])), [x, weight])
    height = x[0, 0].item()
    assert out.tolist() == [0.0, 2 * height]
    assert dx.flatten().tolist() == [0.0, 2.0]  # (p - one-hot) @ weight = 1 * 1 - 1 * -1
    assert dweight.flatten().tolist() == [height, -height, 0.0]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_confident_targets_keep_their_gradient(dtype: torch.dtype) -> None:
    """At p = 0.999 the gradient p - 1 is smaller than p's rounding to bf16, but must not be lost.

    What remains is fp32's rounding of a logit of 10 against 1 - p = 7e-4: 10 * eps / 7e-4 = 2e-3.
    """
    weight = torch.eye(16, dtype=dtype)
    x = torch.zeros(4, 16, dtype=dtype)
    x[torch.arange(4), torch.arange(4)] = torch.tensor([2.0, 6.0, 8.0, 10.0], dtype=dtype)  # logits are exact
    targets = torch.arange(4)
    _, (dx, _) = run(lambda x, w: linear_cross_entropy(x, w, targets), [x, weight])
    _, (want, _) = run(lambda x, w: exact(x, w, targets), [x.double(), weight.double()])
    for got, expected in zip(dx, want, strict=True):
        assert_near(got, expected, error_bound(dtype, 3, 16) + 2e-3)


@pytest.mark.parametrize("target", [5, -1, 10**6])
def test_target_outside_the_vocabulary(target: int) -> None:
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|out of range"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, target]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3).long()}, TypeError, "x: got torch.int64"),
        ({"x": torch.zeros(2, 4)}, ValueError, r"x: got shape \(2, 4\), allowed is \(any, 3\)"),
        ({"x": torch.zeros(1, 2, 3)}, ValueError, r"x: got shape \(1, 2, 3\)"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight: got shape \(3,\), allowed is \(any, any\)"),
        ({"targets": torch.zeros(3).long()}, ValueError, r"targets: got shape \(3,\), allowed is \(2\)"),
        ({"targets": torch.zeros(2).int()}, TypeError, "targets: got torch.int32, allowed is torch.int64"),
    ],
)
def test_bad_input(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    good = dict(x=torch.zeros(2, 3), weight=torch.zeros(5, 3), targets=torch.zeros(2).long())
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**good, **change})
