"""The grouped product against one matrix product a segment in fp64: any counts, empty experts, rows of nobody."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minids_kernels import _launch, grouped_gemm, grouped_gemm_reference
from minids_kernels._ops import ops
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from benchmarks.aot import record
from tests.kernels.gluon_interpreter import interpreted
from tests.kernels.numerics import LAYOUTS, MODES, assert_near, check, error_bound, poisoned_memory, run

room = importlib.import_module("minids_kernels.grouped_gemm")

# rows of each expert, rows of no expert, N, K; at most 32 rows take the kernel for decoding
SIZES = [
    ([5, 0, 17, 1], 0, 24, 40), ([0, 0, 19, 0], 5, 80, 48), ([3, 4], 0, 1, 1), ([0, 0], 0, 8, 8), ([0, 0], 3, 8, 8),
    ([40, 0, 0, 31, 0, 65], 0, 33, 17), ([0, 33], 70, 16, 64), ([130], 0, 144, 80),
    ([64, 64], 0, 32, 0), ([40, 0, 33, 0], 6, 72, 136), ([0, 0], 35, 8, 8),
]  # fmt: skip

# launches that use descriptors, by table
TILE = dict(TMA=True, BLOCK_M=64, BLOCK_N=64, GROUP=2, num_warps=4, num_stages=2)
TMA = {"many": dict(TILE, BLOCK_K=32), "outer": dict(TILE, BLOCK_T=32)}


@pytest.fixture(params=["torch", "triton", "descriptors"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The PyTorch path, then the launch tables' kernels, which take fp32 by pointers, then descriptors for all that can
    have them. On a GPU, those of its own chip."""
    monkeypatch.setattr(_launch, "BACKEND", "torch" if request.param == "torch" else "triton")
    if request.param == "descriptors":
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("the machine's GPU knows no descriptors")
        real = _launch.config

        def config(room: str, kernel: str, arch: str, **shape: int) -> dict[str, int]:
            return TMA.get(kernel.split("_")[0]) or real(room, kernel, arch, **shape)

        monkeypatch.setattr(_launch, "config", config)
    return str(request.param)


@pytest.fixture
def device(backend: str) -> torch.device:
    return torch.device("cuda" if backend != "torch" and torch.cuda.is_available() else "cpu")


def offsets_of(counts: Sequence[int], device: str | torch.device = "cpu") -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)


def inputs(counts: Sequence[int], spare: int, width: int, depth: int) -> list[Tensor]:
    return [torch.randn(sum(counts) + spare, depth), torch.randn(len(counts), width, depth) / math.sqrt(max(1, depth))]


def exact(x: Tensor, w: Tensor, counts: Sequence[int]) -> Tensor:
    """One product a segment; what lies behind the last is zero and depends on nothing."""
    total = sum(counts)
    pieces = [piece @ matrix.T for piece, matrix in zip(x[:total].split(list(counts)), w, strict=True)]
    return torch.cat([*pieces, 0 * x[total:].sum(1, keepdim=True).expand(-1, w.shape[1])])


def check_counts(counts: Sequence[int], spare: int, width: int, depth: int, mode: str, device: torch.device) -> None:
    """3 roundings: autocast's of the operands, and the result's. Sums over K, N, or a segment's rows."""
    check(
        lambda x, w: grouped_gemm(x, w, offsets_of(counts, x.device)), lambda x, w: exact(x, w, counts),
        inputs(counts, spare, width, depth), mode, roundings=4, length=max(width, depth, *counts), device=device,
    )  # fmt: skip


def skip_bf16(mode: str, backend: str, device: torch.device) -> None:
    if backend != "torch" and device.type == "cpu" and mode in ("bf16", "autocast"):
        pytest.skip("Triton's interpreter takes bf16 operands of tl.dot for integers")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agrees_with_a_product_for_each_segment(
    size: tuple[list[int], int, int, int], mode: str, backend: str, device: torch.device
) -> None:
    skip_bf16(mode, backend, device)
    check_counts(*size, mode, device)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_agrees(size: tuple[list[int], int, int, int]) -> None:
    counts, _, width, depth = size
    x, w = inputs(*size)
    bound = error_bound(torch.float32, 2, max(width, depth))
    assert_near(grouped_gemm_reference(x, w, offsets_of(counts)), exact(x.double(), w.double(), counts), bound)


def test_512_experts(device: torch.device) -> None:
    """Hardly any of which have rows, as in decoding, but too many for the kernel of few rows."""
    counts = torch.bincount(torch.randint(0, 512, (40,)), minlength=512).tolist()
    x, w = inputs(counts, 1, 16, 16)
    out = grouped_gemm(x.to(device), w.to(device), offsets_of(counts, device))
    assert_near(out.cpu(), exact(x.double(), w.double(), counts), error_bound(torch.float32, 2, 16))


@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(0, 70)), min_size=1, max_size=5),
    spare=st.sampled_from([0, 0, 9]), width=st.integers(1, 40), depth=st.integers(1, 40), triton=st.booleans(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_counts(counts: list[int], spare: int, width: int, depth: int, triton: bool, seed: int) -> None:
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_launch, "BACKEND", "triton" if triton else "torch")
        device = torch.device("cuda" if triton and torch.cuda.is_available() else "cpu")
        check_counts(counts, spare, width, depth, "fp32", device)


@pytest.mark.parametrize("counts", [[3, 9, 2], [20, 45, 6]], ids=["few rows", "many rows"])
def test_segments_do_not_meet(counts: list[int], device: torch.device) -> None:
    """What one expert is fed, not even NaN, reaches another's rows, weights' gradient or the rows of nobody."""
    tensors = [t.to(device) for t in inputs(counts, 4, 24, 40)]
    offsets = offsets_of(counts, device)
    mine = torch.ones(sum(counts) + 4, dtype=torch.bool, device=device)
    mine[counts[0] : counts[0] + counts[1]] = False
    poisoned, dout = tensors[0].clone(), torch.randn(len(mine), 24, device=device)
    poisoned[~mine] = torch.nan
    bad_dout = dout.clone()
    bad_dout[~mine] = torch.nan
    out, (dx, dw) = run(lambda x, w: grouped_gemm(x, w, offsets), tensors, dout)
    out2, (dx2, dw2) = run(lambda x, w: grouped_gemm(x, w, offsets), [poisoned, tensors[1]], bad_dout)
    assert torch.equal(out[mine], out2[mine]) and torch.equal(dx[mine], dx2[mine])
    assert torch.equal(dw[[0, 2]], dw2[[0, 2]])
    assert all(t.isnan().all() for t in (out2[~mine], dx2[~mine], dw2[1]))


@pytest.mark.parametrize("copied", [1, room.COPIED])
@pytest.mark.parametrize("size", [*SIZES, ([9, 0, 8, 3], 2, 24, 40)], ids=str)
def test_rows_of_tokens(
    size: tuple[list[int], int, int, int], copied: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of rows gathered before, some of them several times; rows that no one asks for hold NaN. By kernels that
    copy them for the weight gradient and by those that do not."""
    monkeypatch.setattr(room, "COPIED", copied)
    rows, w = (t.to(device) for t in inputs(*size))
    offsets, token = offsets_of(size[0], device), 2 * torch.randint(50, (len(rows),), device=device)
    x = torch.full((100, rows.shape[1]), torch.nan, device=device)
    x[::2] = torch.randn(50, rows.shape[1], device=device)
    with poisoned_memory():
        got = room.grouped_mm(x.T.contiguous().T, w, offsets, token)
    assert torch.equal(got, room.grouped_mm(x[token], w, offsets))

    dy, other = torch.randn(len(rows), w.shape[1], device=device), torch.randint(50, (len(rows),), device=device)
    of_tokens = torch.full((100, w.shape[1]), torch.nan, device=device)
    of_tokens[:50] = torch.randn(50, w.shape[1], device=device)
    for a, a_token, b, b_token in ((dy, None, x, token), (of_tokens, other, rows, None), (of_tokens, other, x, token)):
        with poisoned_memory():
            got = room.grouped_outer(a, b, offsets, a_token, b_token)
        gathered = (t if index is None else t[index] for t, index in ((a, a_token), (b, b_token)))
        assert torch.equal(got, room.grouped_outer(*gathered, offsets))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_same_bits_twice_and_all_written(size: tuple[list[int], int, int, int], device: torch.device) -> None:
    counts = size[0]
    tensors = [t.to(device) for t in inputs(*size)]
    dout = torch.randn(tensors[0].shape[0], size[2], device=device)

    def both() -> list[Tensor]:
        out, grads = run(lambda x, w: grouped_gemm(x, w, offsets_of(counts, device)), tensors, dout)
        return [out, *grads]

    first, second = both(), both()
    with poisoned_memory():
        third = both()
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


LONG = [[5, 200, 0, 64, 65, 130], [0, 300], [64, 64, 0], [129], [0, 1, 63, 65, 1, 127, 129, 2]]


@pytest.mark.parametrize("mode", ["fp32", "fp16"])
@pytest.mark.parametrize("counts", LONG, ids=str)
def test_long_segments_are_summed_in_parts(
    counts: list[int], mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 rows, by rows as they lie and by tokens'; behind the last segment are rows of nobody."""
    monkeypatch.setattr(room, "LEAST_PART", 64)
    monkeypatch.setattr(room, "PARTS", 64)
    dtype, rows, offsets = MODES[mode][0], sum(counts) + 7, offsets_of(counts, device)
    assert room._most_rows(rows, 1, 4) == 64
    a, x = (torch.randn(rows, width, device=device).to(dtype) for width in (24, 40))
    token = torch.randint(50, (rows,), device=device)
    of_tokens = torch.randn(50, 40, device=device).to(dtype)
    bound = error_bound(dtype, 1, 1) + error_bound(torch.float32, 2, max(counts))
    for b, b_token in ((x, None), (of_tokens, token)):
        with poisoned_memory():
            got, again = (room.grouped_outer(a, b, offsets, b_token=b_token) for _ in range(2))
        lines = (b if b_token is None else b[b_token]).double()
        pieces = zip(a.double()[: sum(counts)].split(counts), lines[: sum(counts)].split(counts), strict=True)
        assert torch.equal(got, again)
        assert_near(got, torch.stack([left.T @ right for left, right in pieces]), bound)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12), spare=st.integers(0, 9),
    most=st.sampled_from([1, 2, 4, 8, 16]),
)  # fmt: skip
def test_parts_have_places_of_their_own(counts: list[int], spare: int, most: int) -> None:
    """The formula of `_part` in Python: segments longer than `most` begin a part every `most` rows."""
    ends = list(itertools.accumulate(counts))
    parts = [
        row // most * 2 + (row == end - count)
        for count, end in zip(counts, ends, strict=True)
        if count > most
        for row in range(end - count, end, most)
    ]
    assert len(set(parts)) == len(parts)
    assert all(part < 2 * ((ends[-1] + spare) // most + 1) for part in parts)


def test_how_many_rows_a_part_has() -> None:
    assert room._most_rows(65_536, 36, 132) == 8192
    assert room._most_rows(65_536, 132, 132) == 0  # tiles enough for the chip
    assert room._most_rows(1024, 36, 132) == 0  # too few to divide
    assert room._most_rows(1025, 36, 132) == 1024


@pytest.mark.parametrize("tokens", [17, 200])
def test_no_count_leaves_the_device(tokens: int) -> None:
    """Tensors without values: whatever asked for one would raise. The grids that come out serve any counts."""
    with FakeTensorMode():
        x, w, offsets = torch.empty(tokens, 32), torch.empty(6, 48, 32), torch.empty(7, dtype=torch.int32)
        calls = [
            ("", lambda: room.grouped_mm(x, w, offsets)),
            ("", lambda: room.grouped_outer(torch.empty(tokens, 48), x, offsets)),
        ]
        names = [launch.kernel.__name__ for launch in record(calls, "sm_90")]
    assert names == [f"_grouped_gemm_{'small_' * (tokens <= 32)}kernel", "_grouped_outer_kernel"]


# --- by hand ----------------------------------------------------------------------------------------------------------

HALVES = [torch.float16, torch.bfloat16]
BY_HAND = {
    "whole results": dict(BLOCK_N=128, DEPTH=64, PIECES=1, STAGES=8, STRIPE=2),
    "pieces": dict(BLOCK_N=256, DEPTH=64, PIECES=2, STAGES=8, STRIPE=8),
    "short steps, small pieces": dict(BLOCK_N=256, DEPTH=32, PIECES=4, STAGES=4, STRIPE=2),
    "few buffers": dict(BLOCK_N=128, DEPTH=32, PIECES=2, STAGES=3, STRIPE=1),
}


def use(config: Mapping[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "BACKEND", "triton")
    monkeypatch.setattr(_launch, "config", lambda *_, **__: config)


def products(
    counts: Sequence[int], spare: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, what a kernel gives, the same in fp64) of every way that experts' products are taken: rows in order and of
    tokens, weights as stored and turned, with SwiGLU and without; weights' gradients. What must not be read, rows of
    nobody and of other tokens, is NaN, and so are weights of experts without rows."""
    experts, rows, width, inner, depth = len(counts), sum(counts) + spare, 272, 512, 144
    offsets, live = offsets_of(counts, device), sum(counts)
    bounds = list(itertools.pairwise(offsets.tolist()))
    idle = torch.tensor(counts, device=device) == 0

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def weights(n: int, k: int) -> Tensor:
        return (normal(experts, n, k) / math.sqrt(k)).masked_fill(idle[:, None, None], torch.nan)

    def product(x: Tensor, w: Tensor) -> Tensor:
        """In fp64; zero for rows of nobody."""
        pieces = [x[start:end].double() @ w[e].double().T for e, (start, end) in enumerate(bounds)]
        return torch.cat([*pieces, torch.zeros(spare, w.shape[1], dtype=torch.float64, device=device)])

    x, dy, of_tokens = normal(rows, depth), normal(rows, width), torch.full((100, depth), torch.nan, device=device)
    x[live:], dy[live:], of_tokens = torch.nan, torch.nan, of_tokens.to(dtype)
    of_tokens[::2] = normal(50, depth)
    token = 2 * torch.randint(50, (rows,), device=device)
    for name, w in (("as stored", weights(width, depth)), ("turned", weights(depth, width).transpose(1, 2))):
        yield name, room.grouped_mm(x, w, offsets), product(x, w)
        yield f"tokens' rows, {name}", room.grouped_mm(of_tokens, w, offsets, token), product(of_tokens[token], w)
    w, weight, pair = weights(inner, depth), torch.rand(rows, device=device), torch.randperm(rows, device=device)
    gate_up = product(of_tokens[token], w)
    gate, up = gate_up.chunk(2, 1)
    activated = torch.nn.functional.silu(gate) * up * weight[pair, None]
    for keep in (True, False):
        out, kept = room.grouped_swiglu(of_tokens, w, offsets, token, weight, pair, keep)
        yield f"SwiGLU, {keep}", out, activated
        if keep:
            yield "gate and up", kept, gate_up
    outer = torch.stack([dy[start:end].double().T @ x[start:end].double() for start, end in bounds])
    for kind in (dtype, torch.float32):
        yield f"weights' gradient in {kind}", room.grouped_outer(dy, x, offsets, dtype=kind), outer


def check_by_hand(
    counts: Sequence[int], spare: int, dtype: torch.dtype, device: torch.device, seeds: Sequence[int]
) -> None:
    """The same bits each time, near the exact ones. 3 roundings: gate's or up's, the weight's product, the result's."""
    bound = error_bound(dtype, 3, 1) + error_bound(torch.float32, 2, max(144, *counts))
    first: dict[str, Tensor] = {}
    for seed in seeds:
        torch.manual_seed(1)
        emulated = interpreted(seed) if device.type == "cpu" else contextlib.nullcontext()
        with emulated, poisoned_memory():
            for name, got, want in products(counts, spare, dtype, device):
                assert_near(got, want, bound, name, floor=float(got.numel() < 50))
                assert torch.equal(first.setdefault(name, got), got), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU orders its warps itself")
@pytest.mark.parametrize(("config", "dtype"), [*zip(BY_HAND.values(), 2 * HALVES, strict=True)], ids=BY_HAND)
@pytest.mark.parametrize(
    ("counts", "spare"), [([70, 0, 1, 200, 0, 64], 70), ([0, 129, 0], 9), ([40], 0), ([0, 0], 35)], ids=str
)
def test_by_hand_in_any_order(
    counts: list[int], spare: int, config: Mapping[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever warps go ahead, however late a copy or product is."""
    use(config, monkeypatch)
    monkeypatch.setattr(_launch, "multiprocessors", lambda x: 2)
    check_by_hand(counts, spare, dtype, torch.device("cpu"), range(2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU orders its warps itself")
@settings(max_examples=6, deadline=None)
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(1, 150)), min_size=1, max_size=5).filter(any),
    spare=st.integers(0, 70), programs=st.integers(1, 3), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_by_hand_any_counts(counts: list[int], spare: int, programs: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        use(BY_HAND["few buffers"], patch)
        patch.setattr(_launch, "multiprocessors", lambda x: programs)
        check_by_hand(counts, max(spare, 33 - sum(counts)), torch.float16, torch.device("cpu"), [seed])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("config", BY_HAND.values(), ids=BY_HAND)
@pytest.mark.parametrize(
    "counts", [[512] * 8, [3000, 0, 1, 500, 64, 0, 131, 1000], [0, 4096, 0], [192, 128, 64, 65, 63]], ids=str
)
def test_by_hand_on_a_gpu(
    counts: list[int], config: Mapping[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper alone")
    use(config, monkeypatch)
    monkeypatch.setattr(room, "_most_rows", lambda *_: 0)
    check_by_hand(counts, 70, dtype, torch.device("cuda"), range(3))


def test_what_goes_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the table says so, what descriptors can stand for; else the kernel of any chip."""
    use(BY_HAND["pieces"], monkeypatch)
    monkeypatch.setattr(_launch, "RUNS_GLUON", True)
    wide, narrow, w = (torch.empty(4096, n, dtype=torch.float16) for n in (4096, 512, 512))
    odd, offsets, token = torch.empty(4096, 516, dtype=torch.float16)[:, :512], torch.empty(9).int(), torch.zeros(4096)
    pair, token = token.long(), token.long()
    stored, turned = w.view(8, 512, 512), w.view(8, 512, 512).transpose(1, 2)
    part, part_stored = narrow[:, :488], stored[..., :488]  # every row at 16 bytes, but 488 is no multiple of 16
    calls: dict[str, Callable[[], Any]] = {
        "rows": lambda: room.grouped_mm(narrow, stored, offsets),
        "turned": lambda: room.grouped_mm(narrow, turned, offsets),
        "tokens": lambda: room.grouped_mm(narrow, stored, offsets, token),
        "SwiGLU": lambda: room.grouped_swiglu(narrow, stored, offsets, token, pair, pair, False),
        "outer": lambda: room.grouped_outer(wide, wide, offsets),
        "outer of copied rows": lambda: room.grouped_outer(wide, wide, offsets, b_token=token),
        "K off 16": lambda: room.grouped_mm(part, part_stored, offsets),
        "tokens, K off 16": lambda: room.grouped_mm(part, part_stored, offsets, token),
        "SwiGLU of turned weights": lambda: room.grouped_swiglu(narrow, turned, offsets, token, pair, pair, False),
        "outer in fp64": lambda: room.grouped_outer(wide, wide, offsets, dtype=torch.float64),
        "rows off 16 bytes": lambda: room.grouped_mm(odd, stored, offsets),
        "result off 16 bytes": lambda: room.grouped_mm(narrow, stored[:, :500], offsets),
        "SwiGLU, half a block": lambda: room.grouped_swiglu(narrow, stored[:, :384], offsets, token, pair, pair, False),
        "outer of tokens' rows": lambda: room.grouped_outer(narrow, wide, offsets, b_token=token),
        "outer of few tiles": lambda: room.grouped_outer(narrow, narrow, offsets),
    }
    names = {name: record([(name, call)], "sm_90")[0].kernel.__name__ for name, call in calls.items()}
    by_hand = {name for name, kernel in names.items() if kernel.endswith("_hopper_kernel")}
    assert by_hand == set(list(calls)[:7]), names


def test_no_later_chip_takes_what_is_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables without entries of a chip's own give it those of the one before."""
    use(BY_HAND["pieces"], monkeypatch)
    monkeypatch.setattr(_launch, "RUNS_GLUON", True)
    x, w, offsets = torch.empty(4096, 512, dtype=torch.float16), torch.empty(8, 512, 512).half(), torch.empty(9).int()
    for chip, hopper in (("sm_89", False), ("sm_90", True), ("sm_100", False), ("sm_120", False)):
        [launched] = record([("", lambda: room.grouped_mm(x, w, offsets))], chip)
        assert launched.kernel.__name__.endswith("_hopper_kernel") == hopper, chip


# --- descriptors ------------------------------------------------------------------------------------------------------

HALF = torch.empty(64, 64, dtype=torch.float16)


@pytest.mark.parametrize(
    ("x", "as_rows", "as_weights"),
    [
        (HALF, True, True), (HALF[:, 8:56], True, True), (HALF[:, 1:49], False, False), (HALF.T, False, True),
        (HALF[:1].expand(64, 64), False, False), (HALF[:, ::2], False, False),
        (HALF[:, :1].contiguous(), False, False), (HALF[:, :0], False, False),
    ],
    ids=["whole", "columns", "base off 16 bytes", "transposed", "one row", "steps", "pitch off 16 bytes", "empty"],
)  # fmt: skip
def test_descriptors_stand_for_what_they_can(
    x: Tensor, as_rows: bool, as_weights: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By sm_90's shipped table: rows, but tokens' only once they are copied, and weights as they are stored or their
    transpose; gradients."""
    token, offsets = torch.zeros(64, dtype=torch.int64), torch.empty(4, dtype=torch.int32)
    weights = x.new_empty(3, 64, x.shape[1])
    calls: list[Callable[[], Tensor]] = [
        lambda: room.grouped_mm(x, weights, offsets), lambda: room.grouped_mm(x, weights, offsets, token),
        lambda: room.grouped_mm(HALF[:, : x.shape[1]], x[None], offsets[:2]),
        lambda: room.grouped_mm(HALF, x.T[None], offsets[:2]), lambda: room.grouped_outer(x, HALF, offsets),
        lambda: room.grouped_outer(HALF, x, offsets, token), lambda: room.grouped_outer(HALF, x, offsets, None, token),
    ]  # fmt: skip
    found = (launch.kwargs for launch in record([("", call) for call in calls], "sm_90"))
    rows, tokens, stored, turned, outer, outer_of_tokens, outer_with_tokens = found
    assert rows["X_TMA"] == as_rows and not tokens["X_TMA"]
    assert stored["W_TMA"] == turned["W_TMA"] == as_weights
    assert not as_weights or stored["TURNED"] != turned["TURNED"]
    assert outer["A_TMA"] == outer_of_tokens["B_TMA"] == as_rows
    assert not outer_of_tokens["A_TMA"] and not outer_with_tokens["B_TMA"]
    assert not as_rows or (outer["B_TMA"] and outer_with_tokens["A_TMA"])
    monkeypatch.setattr(room, "COPIED", 1)
    copied, other = (launch.kwargs for launch in record([("", call) for call in calls[-2:]], "sm_90"))
    assert not as_rows or (copied["A_TMA"] and other["B_TMA"])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_operators_are_registered_well(layout: Callable[[Tensor], Tensor], device: torch.device) -> None:
    counts = [20, 0, 13]
    x, w = (layout(t).to(device) for t in inputs(counts, 2, 24, 40))
    dy = layout(torch.randn(35, 24)).to(device)
    offsets = offsets_of(counts, device)
    opcheck(ops.grouped_gemm.default, (x.detach().requires_grad_(), w.detach().requires_grad_(), offsets))
    opcheck(ops.grouped_outer.default, (dy.detach().requires_grad_(), x.detach().requires_grad_(), offsets))


def test_gradients_of_gradients() -> None:
    counts = [3, 0, 2]
    x, w = (t.double().requires_grad_() for t in inputs(counts, 1, 4, 3))
    assert torch.autograd.gradgradcheck(lambda x, w: grouped_gemm(x, w, offsets_of(counts)), (x, w))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 4).int()}, TypeError, "x: got torch.int32"),
        ({"x": torch.zeros(12)}, ValueError, r"x: got shape \(12,\), allowed is \(any, any\)"),
        ({"w": torch.zeros(2, 5, 3)}, ValueError, r"w: got shape \(2, 5, 3\), allowed is \(any, any, 4\)"),
        ({"w": torch.zeros(2, 5, 4).half()}, TypeError, "w: got torch.float16, allowed is x's torch.float32"),
        ({"w": torch.zeros(2, 5, 4, device="meta")}, ValueError, "w: got device meta, allowed is cpu"),
        ({"offsets": torch.zeros(2).int()}, ValueError, r"offsets: got shape \(2,\), allowed is \(3\)"),
        ({"offsets": torch.zeros(3).long()}, TypeError, "offsets: got torch.int64, allowed is torch.int32"),
        *(
            (
                {"offsets": torch.tensor(bounds).int()},
                ValueError,
                r"offsets: got \[.*\], allowed are numbers that rise from 0",
            )
            for bounds in ([0, 2, 4], [1, 2, 3], [0, 3, 2])
        ),
    ],
)
def test_bad_input(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    good = dict(x=torch.zeros(3, 4), w=torch.zeros(2, 5, 4), offsets=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(error, match=message):
        grouped_gemm(**{**good, **change})
