"""Cross-entropy of a linear head against torch's on logits in fp64; every number of chunks and pieces."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from minids_kernels import _launch, linear_cross_entropy, linear_cross_entropy_reference
from minids_kernels._ops import ops
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ops.cross_entropy import eager, peak_bytes
from benchmarks.ops.cross_entropy import inputs as mean_inputs
from benchmarks.ops.cross_entropy import ours as mean_loss
from benchmarks.protocol import calls
from tests.kernels.numerics import MODES, assert_near, check, error_bound, run

room = importlib.import_module("minids_kernels.cross_entropy")
SHAPES = [(0, 5, 7), (1, 1, 2), (3, 8, 1), (13, 17, 31), (64, 33, 257)]  # T, D, V
ODD_VOCABULARIES = [7, 129, 6400]


def inputs(tokens: int, width: int, vocab: int, ignored: float = 0.0) -> tuple[list[Tensor], Tensor]:
    """x and weight whose logits are standard normal; targets of which a share is ignored."""
    targets = torch.randint(vocab, (tokens,))
    targets[torch.rand(tokens) < ignored] = -100
    return [torch.randn(tokens, width), torch.randn(vocab, width) / math.sqrt(width)], targets


def exact(x: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    logits = x @ weight.T
    loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return loss + z_loss * torch.where(targets == -100, 0.0, logits.logsumexp(-1).square())


def compare(
    tensors: list[Tensor], targets: Tensor, mode: str, device: torch.device, roundings: int = 8, **options: Any
) -> None:
    """A logit's rounding moves a loss by itself, however small the loss: more roundings than operations. Sums run over
    the width, the vocabulary and the tokens."""
    (tokens, width), vocab = tensors[0].shape, tensors[1].shape[0]
    check(
        lambda x, w: linear_cross_entropy(x, w, targets.to(x.device), **options),
        lambda x, w: exact(x, w, targets.to(x.device), **options),
        tensors, mode, roundings, length=width + vocab + tokens, device=device,
    )  # fmt: skip


@pytest.fixture(params=["kept", "computed again", "triton"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Both ways of the PyTorch path's backward, and Triton's: the device that their tensors lie on."""
    monkeypatch.setattr(_launch, "BACKEND", "triton" if request.param == "triton" else "torch")
    if request.param == "computed again":
        monkeypatch.setattr(room, "KEPT_ELEMENTS", 0)
    return torch.device("cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_agrees_with_torch(shape: tuple[int, int, int], ignored: float, mode: str, way: torch.device) -> None:
    tensors, targets = inputs(*shape, ignored)
    compare(tensors, targets, mode, way)


@pytest.mark.parametrize("mode", ["fp32", "fp16"])
@pytest.mark.parametrize("vocab", ODD_VOCABULARIES)
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.1, 0.0), (0.0, 0.01), (0.3, 0.001), (1.0, 0.0)])
def test_label_smoothing_and_z_loss(
    label_smoothing: float, z_loss: float, vocab: int, mode: str, way: torch.device
) -> None:
    tensors, targets = inputs(9, 24, vocab, 0.3)
    compare(tensors, targets, mode, way, label_smoothing=label_smoothing, z_loss=z_loss)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "z_loss": 0.01}], ids=["plain", "both"])
def test_reference_agrees_with_torch(shape: tuple[int, int, int], options: dict[str, Any]) -> None:
    (x, weight), targets = inputs(*shape, 0.4)
    got = linear_cross_entropy_reference(x, weight, targets, **options)
    want = exact(x.double(), weight.double(), targets, **options)
    assert_near(got, want, error_bound(torch.float32, 8, sum(shape)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_sum_and_mean(
    chunk: int, ignored: float, reduction: str, mode: str, backend: str, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As F.cross_entropy's, in chunks of one row, of several, and in one."""
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(room, "SUM_ELEMENTS", chunk)
    monkeypatch.setattr(room, "SUM_ROWS", 1)
    (x, weight), targets = inputs(40, 12, 30, ignored)
    scale = 0.125 if reduction == "sum" else 0.125 / int((targets != -100).sum())
    check(
        lambda x, w: linear_cross_entropy(x, w, targets.to(x.device), -100, 0.1, 0.1, reduction).expand(1) / 8,
        lambda x, w: exact(x, w, targets.to(x.device), label_smoothing=0.1, z_loss=0.1).sum(0, keepdim=True) * scale,
        [x, weight], mode, 8, length=40 + 12 + 30, device=device,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sum_and_mean_of_nothing(reduction: str, backend: str, device: torch.device) -> None:
    """As torch's: 0 and NaN, and gradients of zeros."""
    for targets in (torch.full((5,), -100), torch.zeros(0, dtype=torch.long)):
        x, weight = (torch.randn(n, 4, device=device, requires_grad=True) for n in (len(targets), 7))
        loss = linear_cross_entropy(x, weight, targets.to(device), reduction=reduction)
        loss.backward()
        assert loss.item() == 0 if reduction == "sum" else loss.isnan()
        assert x.grad is not None and weight.grad is not None
        assert x.grad.count_nonzero() == weight.grad.count_nonzero() == 0


def test_a_mean_in_fp16_overflows_nowhere(backend: str, device: torch.device) -> None:
    """The gradient's sum over tokens, 400 times 175, is out of fp16's range; their mean is not."""
    x = torch.full((400, 4), 200.0, dtype=torch.float16, device=device)
    weight = torch.zeros(8, 4, dtype=torch.float16, device=device, requires_grad=True)
    linear_cross_entropy(x, weight, x.new_zeros(400).long(), reduction="mean").backward()
    assert weight.grad is not None
    expected = torch.full((8, 4), 200 / 8, device=device)
    expected[0] -= 200
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2**-10, atol=0)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_nothing_is_made_for_what_is_frozen(
    frozen: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others' gradients are the same, and the frozen one's is neither made nor kept."""
    (x, weight), targets = inputs(40, 12, 30, 0.3)
    pair = {"x": x.to(device), "weight": weight.to(device)}
    grads, kept = [], []

    def keeping(*inputs: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        out = forward(*inputs)
        kept.append(sum(t.numel() for t in out[2]))
        return out

    name = "_triton_fwd" if backend == "triton" else "_torch_fwd"
    forward = getattr(room, name)
    monkeypatch.setattr(room, name, keeping)
    for alone in (False, True):
        leaves = {k: t.clone().requires_grad_(not (alone and k == frozen)) for k, t in pair.items()}
        linear_cross_entropy(leaves["x"], leaves["weight"], targets.to(device), reduction="sum").backward()
        assert (leaves[frozen].grad is None) == alone
        grads.append(leaves["weight" if frozen == "x" else "x"].grad)
    assert torch.equal(*grads)
    assert kept[0] - kept[1] == pair[frozen].numel()


def test_gradients_of_a_sum_survive_a_second_pass(device: torch.device) -> None:
    """retain_graph: what was kept is not used up."""
    (x, weight), targets = inputs(9, 5, 30, 0.3)
    x, weight = (t.to(device).requires_grad_() for t in (x, weight))
    loss = linear_cross_entropy(x, weight, targets.to(device), reduction="sum")
    first, second = (torch.autograd.grad(loss, (x, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_everything_ignored_is_exactly_nothing(way: torch.device) -> None:
    x, weight = (t.to(way) for t in inputs(9, 5, 11)[0])
    targets = torch.full((9,), -100, device=way)
    out, (dx, dweight) = run(lambda x, w: linear_cross_entropy(x, w, targets, -100, 0.1, 0.1), [x, weight])
    assert out.count_nonzero() == dx.count_nonzero() == dweight.count_nonzero() == 0


def test_ignored_tokens_are_not_looked_at(backend: str, device: torch.device) -> None:
    """Not even a NaN in them is; Triton, which multiplies them by 0 rather than leave them out, passes it on to the
    weight's gradient, as torch does."""
    (x, weight), targets = inputs(9, 5, 11)
    x[4] = torch.nan
    targets[4] = -100
    x, weight, targets = x.to(device), weight.to(device), targets.to(device)
    out, (dx, dweight) = run(lambda x, w: linear_cross_entropy(x, w, targets), [x, weight])
    assert out.isfinite().all() and dx.isfinite().all()
    assert backend == "triton" or dweight.isfinite().all()


def test_another_ignore_index(way: torch.device) -> None:
    (x, weight), targets = inputs(20, 5, 4)
    ignore = 2
    got = linear_cross_entropy(x.to(way), weight.to(way), targets.to(way), ignore_index=ignore).cpu()
    assert got[targets == ignore].count_nonzero() == 0
    torch.testing.assert_close(got[targets != ignore], exact(x, weight, targets)[targets != ignore])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 8), vocab=st.sampled_from([2, 9, 127, 128, 129, 256, 300]), piece=st.integers(1, 400),
    chunk=st.integers(1, 800), columns=st.sampled_from([1, 130, 300]), ignored=st.sampled_from([0.0, 0.5]),
    label_smoothing=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_where_chunks_end_does_not_matter(
    way: torch.device, tokens: int, vocab: int, piece: int, chunk: int, columns: int, ignored: float,
    label_smoothing: float, seed: int,
) -> None:  # fmt: skip
    """Chunks and pieces of fewer elements than one row, exactly as many, one more; one chunk of the vocabulary, exactly
    two, and a last one of one column."""
    torch.manual_seed(seed)
    tensors, targets = inputs(tokens, 6, vocab, ignored)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "PIECE_ELEMENTS", piece)
        patch.setattr(room, "CHUNK_ELEMENTS", chunk)
        patch.setattr(room, "MIN_COLUMNS", columns)
        compare(tensors, targets, "fp32", way, roundings=16, label_smoothing=label_smoothing)


def test_many_chunks_do_not_add_up_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight's gradient in bf16 is rounded a few times, whatever the number of chunks that it is summed over."""
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", 8 * 300)
    x, weight = torch.randn(2048, 16).bfloat16(), torch.randn(300, 16).bfloat16().requires_grad_()
    targets = torch.randint(300, (2048,))
    linear_cross_entropy(x, weight, targets, reduction="sum").backward()
    wide = weight.detach().double().requires_grad_()
    F.cross_entropy(x.double() @ wide.T, targets, reduction="sum").backward()
    assert weight.grad is not None and wide.grad is not None
    assert_near(weight.grad, wide.grad, error_bound(torch.bfloat16, 3, 2048))


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_large_vocabulary(mode: str) -> None:
    """Several real pieces; V3's own vocabulary."""
    tensors, targets = inputs(9, 16, 129280)
    compare(tensors, targets, mode, torch.device("cpu"))


def test_large_vocabulary_in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen chunks, over which each token's statistics and dx are summed up."""
    monkeypatch.setattr(_launch, "BACKEND", "triton")
    monkeypatch.setattr(room, "MIN_COLUMNS", 8192)
    tensors, targets = inputs(2, 16, 129280)
    compare(tensors, targets, "fp32", torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.parametrize(("x", "weight"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_weight_of_another_dtype(x: torch.dtype, weight: torch.dtype, way: torch.device) -> None:
    """Products are in x's dtype; gradients come in each tensor's own."""
    (a, w), targets = inputs(17, 40, 33)
    a, w, targets = a.to(way, x), w.to(way, weight), targets.to(way)
    dout = torch.randn(17, device=way)
    out, (da, dw) = run(lambda a, w: linear_cross_entropy(a, w, targets), [a, w], dout)
    want, (da64, dw64) = run(lambda a, w: exact(a, w, targets), [a.double(), w.double()], dout.double())
    assert out.dtype == torch.float32 and da.dtype == x and dw.dtype == weight
    for got, expected in ((out, want), (da, da64), (dw, dw64)):
        assert_near(got, expected, error_bound(torch.bfloat16, 8, 40 + 33 + 17))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits_do_not_overflow(dtype: torch.dtype, way: torch.device) -> None:
    """Logits of +-30000: the right target costs nothing, a wrong one the difference; gradients are one-hot."""
    weight = torch.tensor([[1.0], [-1.0], [0.5]], dtype=dtype, device=way)
    x = torch.full((2, 1), 30000.0, dtype=dtype, device=way)
    targets = torch.tensor([0, 1], device=way)
    out, (dx, dweight) = run(lambda x, w: linear_cross_entropy(x, w, targets), [x, weight])
    height = x[0, 0].item()
    assert out.tolist() == [0.0, 2 * height]
    assert dx.flatten().tolist() == [0.0, 2.0]  # (p - one-hot) @ weight = 1 * 1 - 1 * -1
    assert dweight.flatten().tolist() == [height, -height, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_confident_targets_keep_their_gradient(dtype: torch.dtype, way: torch.device) -> None:
    """At p = 0.999 the gradient p - 1 is smaller than p's rounding to bf16, but must not be lost.

    What remains is fp32's rounding of a logit of 10 against 1 - p = 7e-4: 10 * eps / 7e-4 = 2e-3.
    """
    weight = torch.eye(16, dtype=dtype, device=way)
    x = torch.zeros(4, 16, dtype=dtype, device=way)
    targets = torch.arange(4, device=way)
    x[targets, targets] = torch.tensor([2.0, 6.0, 8.0, 10.0], dtype=dtype, device=way)  # logits are exact
    _, (dx, _) = run(lambda x, w: linear_cross_entropy(x, w, targets), [x, weight])
    _, (want, _) = run(lambda x, w: exact(x, w, targets), [x.double(), weight.double()])
    for got, expected in zip(dx, want, strict=True):
        assert_near(got, expected, error_bound(dtype, 3, 16) + 2e-3)


def test_nan_stays_visible(way: torch.device) -> None:
    (x, weight), targets = inputs(4, 5, 300)
    x[1] = torch.nan
    out = linear_cross_entropy(x.to(way), weight.to(way), targets.to(way))
    assert out.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("target", [5, -1, 10**6])
def test_target_outside_the_vocabulary(target: int, backend: str, device: torch.device) -> None:
    """PyTorch refuses it; Triton, which must not wait to look, gives NaN for this token and no other."""
    x, weight = torch.zeros(2, 3, device=device), torch.zeros(5, 3, device=device)
    targets = torch.tensor([0, target], device=device)
    if backend == "triton":
        assert linear_cross_entropy(x, weight, targets).isnan().tolist() == [False, True]
        return
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|out of range"):
        linear_cross_entropy(x, weight, targets)


# --- memory, waiting, registration ------------------------------------------------------------------------------------


def test_peak_memory_beside_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the size of a small model's step: at most 60 % of what F.cross_entropy of the logits takes."""
    monkeypatch.setattr(_launch, "BACKEND", "torch")
    given_inputs = mean_inputs(2048, 6400, 64, torch.float32, torch.device("cpu"), "fwd+bwd")
    mine, theirs = (peak_bytes(calls(fn, "fwd+bwd")(given_inputs)) for fn in (mean_loss, eager))
    assert theirs > 2 * 2048 * 6400 * 4, "the measurement sees logits and their gradient"
    assert mine <= 0.6 * theirs


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
def test_large_problems_never_hold_the_logits(grad: bool, way: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the weight's gradient, which Triton's is scaled to: a chunk of logits, and x's gradient, once as a sum and
    once as it is returned."""
    if way.type == "cuda":
        pytest.skip("the profiler's record is of the CPU's memory")
    tokens, vocab, width = 8, 16_384, 32
    monkeypatch.setattr(room, "KEPT_ELEMENTS", 0)
    monkeypatch.setattr(room, "CHUNK_ELEMENTS", tokens * room.MIN_COLUMNS)
    monkeypatch.setattr(room, "SUM_ELEMENTS", tokens * room.MIN_COLUMNS)
    monkeypatch.setattr(room, "SUM_ROWS", 1)
    given_inputs = mean_inputs(tokens, vocab, width, torch.float32, way, "fwd+bwd")
    peak = peak_bytes(calls(mean_loss, "fwd+bwd" if grad else "fwd")(given_inputs))
    chunk = max(tokens * room.MIN_COLUMNS, vocab) * 4
    weights = grad * vocab * width * 4 * (2 if _launch.BACKEND == "triton" else 1)
    assert peak <= weights + 2 * chunk + 4 * tokens * width * 4
    assert peak - weights < tokens * vocab * 4 / 3, "logits"


class Recorder(TorchDispatchMode):
    """Names of all operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_triton_path_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator whose result's size or value the host must know, with ignored tokens or without."""
    monkeypatch.setattr(_launch, "BACKEND", "triton")
    monkeypatch.setattr(_launch, "launch", lambda *args, **kwargs: None)
    (x, weight), targets = inputs(9, 5, 3000, 0.5)
    with Recorder() as seen:
        loss, lse, _ = room._triton_fwd(x, weight, targets, -100, 0.1, 0.1, x.dtype, "")
        room._triton_fwd(x, weight, targets, -100, 0.1, 0.1, x.dtype, "sum")
        room._chunked_bwd(torch.ones_like(loss), x, weight, targets, lse, -100, 0.1, 0.1, x.dtype)
    assert "mm" in seen.names
    assert not seen.names & {"_local_scalar_dense", "nonzero", "index", "masked_select", "_to_copy", "item", "equal"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", ["", "logits", *room.SUMS])
def test_registration(dtype: torch.dtype, keep: str, backend: str, device: torch.device) -> None:
    if backend == "triton" and keep == "logits":
        pytest.skip("the PyTorch path's alone")
    (x, weight), targets = inputs(6, 5, 9, 0.4)
    wanted = room.SUMS.get(keep, (True, True))
    x, weight = (t.to(device, dtype).requires_grad_(wants) for t, wants in zip((x, weight), wanted, strict=True))
    arguments = (x, weight, targets.to(device))
    options = (-100, 0.1, 0.01)
    opcheck(ops.linear_cross_entropy.default, (*arguments, *options, dtype, keep))
    with torch.no_grad():
        loss, lse, kept = ops.linear_cross_entropy(*arguments, *options, dtype, keep)
    assert loss.dtype == lse.dtype == torch.float32
    none, dx, dweight = (0, 0), (6, 5), (9, 5)
    shapes = {"": [], "logits": [(6, 9)], "sum": [dx, dweight], "sum, dx": [dx, none], "sum, dweight": [none, dweight]}
    assert [(t.shape, t.dtype) for t in kept] == [(shape, dtype) for shape in shapes[keep]]
    detached = [t.detach() for t in arguments]
    opcheck(
        ops.linear_cross_entropy_backward.default,
        (torch.ones_like(loss), *detached, lse, kept, *options, dtype, keep),
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3).long()}, TypeError, "x: got torch.int64"),
        ({"weight": torch.zeros(5, 3).long()}, TypeError, "weight: got torch.int64"),
        ({"x": torch.zeros(2, 4)}, ValueError, r"x: got shape \(2, 4\), allowed is \(any, 3\)"),
        ({"x": torch.zeros(1, 2, 3)}, ValueError, r"x: got shape \(1, 2, 3\)"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight: got shape \(3,\), allowed is \(any, any\)"),
        ({"weight": torch.zeros(0, 3)}, ValueError, r"weight: got shape \(0, 3\), allowed is a first dimension of 1"),
        ({"targets": torch.zeros(3).long()}, ValueError, r"targets: got shape \(3,\), allowed is \(2\)"),
        ({"targets": torch.zeros(2).int()}, TypeError, "targets: got torch.int32, allowed is torch.int64"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: got 1.5, allowed is 0 to 1"),
        ({"label_smoothing": math.nan}, ValueError, "label_smoothing: got nan, allowed is 0 to 1"),
        ({"z_loss": -1.0}, ValueError, "z_loss: got -1.0, allowed is 0 or more"),
        ({"reduction": "max"}, ValueError, r"reduction: got 'max', allowed are \('none', 'mean', 'sum'\)"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = dict(x=torch.zeros(2, 3), weight=torch.zeros(5, 3), targets=torch.zeros(2).long())
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**good, **change})
