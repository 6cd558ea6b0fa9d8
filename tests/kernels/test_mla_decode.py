"""Absorbed paged attention against plain attention over keys and values that are spelled out, in fp64; conventions,
sizes and tolerances are those of FlashMLA's tests (github.com/deepseek-ai/FlashMLA, tests/)."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from minids_kernels import mla_decode, mla_decode_reference, quantize_latent_cache
from minids_kernels._ops import ops
from torch import Tensor
from torch.library import opcheck

from tests.kernels.gluon_interpreter import interpreted
from tests.kernels.numerics import poisoned_memory

room = importlib.import_module("minids_kernels.mla_decode")
LATENT, WIDTH = 16, 24
SCALE = 0.3
NO_PAGE = 2147480000  # what FlashMLA's tests put behind a sequence's last page

Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def flash_mla_numbers(*shape: int) -> Tensor:
    return (torch.randn(*shape) / 10).clamp(-1, 1)


def problem(
    lengths: Sequence[int], new: int, heads: int, v_dim: int, rest: int, page: int, dtype: torch.dtype,
    device: torch.device,
) -> tuple[Problem, list[Tensor]]:  # fmt: skip
    """q, cache, table and lengths, and each sequence's rows spelled out. All that is no row is NaN."""
    width, most = v_dim + rest, max((-(-length // page) for length in lengths), default=0) + 1
    used = [-(-length // page) for length in lengths]
    order = iter(torch.randperm(sum(used) + 2).tolist())
    cache = torch.full((sum(used) + 2, page, width), torch.nan, dtype=dtype)
    table = torch.full((len(lengths), most), NO_PAGE, dtype=torch.int32)
    rows = [flash_mla_numbers(length, width).to(dtype) for length in lengths]
    for b, length in enumerate(lengths):
        for i in range(used[b]):
            table[b, i] = next(order)
            piece = rows[b][i * page : min(length, (i + 1) * page)]
            cache[table[b, i], : len(piece)] = piece
    q = flash_mla_numbers(len(lengths), new, heads, width).to(dtype)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    return tuple(x.to(device) for x in (q, cache, table, seq_lens)), rows  # type: ignore[return-value]


def exact(q: Tensor, rows: list[Tensor], v_dim: int, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """fp64: torch's attention of what each query sees; nothing seen: 0 and +inf."""
    batch, new, heads, _ = q.shape
    out = torch.zeros(batch, new, heads, v_dim, dtype=torch.float64)
    lse = torch.full((batch, new, heads), torch.inf, dtype=torch.float64)
    for b, i in itertools.product(range(batch), range(new)):
        seen = max(0, len(rows[b]) - new + 1 + i) if causal else len(rows[b])
        keys = rows[b].double()[:seen]
        if seen:
            query = q[b, i].cpu().double()
            out[b, i] = F.scaled_dot_product_attention(query[None], keys[None], keys[None, :, :v_dim], scale=scale)[0]
            lse[b, i] = (scale * query @ keys.T).logsumexp(-1)
    return out, lse


def assert_as_flash_mla(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Within either of two tolerances, and the whole within one of direction."""
    for x, y, absolute, relative, direction in (
        (got[0], want[0], 8e-4, 2.01 / 128, 5e-6),
        (got[1], want[1], 1e-6, 8.01 / 65536, 5e-6),
    ):
        x = x.cpu().double()
        assert x.shape == y.shape and torch.equal(x.isinf(), y.isinf()) and not x.isnan().any()
        x, y = x[y.isfinite()], y[y.isfinite()]
        error = (x - y).abs()
        assert ((error < absolute) | (error < relative * y.abs())).all(), f"largest error {error.max():.2e}"
        if y.any():
            assert 1 - 2 * (x * y).sum() / (x.square() + y.square()).sum() < direction


MINI, SMALL, V3 = (64, 16), (128, 16), (512, 64)
CASES = {
    "1 head": (1, 1, [0, 20, 140], 64, *MINI),
    "3 heads": (3, 2, [1, 0, 77], 16, *MINI),
    "9 heads": (9, 4, [3, 130, 4], 32, *SMALL),
    "63 heads": (63, 1, [140, 20], 64, *MINI),
    "126 heads": (126, 1, [33], 16, *MINI),
    "128 heads": (128, 1, [65], 128, *MINI),
    "8 tokens, fewer rows": (5, 8, [5, 8, 0, 100], 64, *MINI),
    "long": (1, 1, [4096], 64, *MINI),
    "nothing at all": (4, 2, [0, 0], 64, *MINI),
    "no sequences": (4, 2, [], 64, *MINI),
    "pages of 1": (2, 1, [37, 5], 1, *MINI),
    "pages of 7": (2, 3, [37, 70], 7, *MINI),
    "long pages": (2, 1, [300, 700], 512, *MINI),
    "no rest": (2, 2, [90], 64, 64, 0),
    "odd widths": (3, 2, [90, 2], 64, 17, 5),
    "one number": (3, 1, [90], 64, 1, 1),
    "V3": (16, 1, [70], 64, *V3),
    "V3, 2 tokens": (16, 2, [70], 64, *V3),
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_flash_mla(
    case: tuple[int, int, list[int], int, int, int], causal: bool, backend: str, device: torch.device
) -> None:
    """In the interpreter in fp16, because it multiplies no bf16; on a GPU in bf16, and in fp32 where kernels take it.
    The PyTorch path in fp32: in half precision it rounds scores, for which FlashMLA's tolerance of lse has no room."""
    heads, new, lengths, page, v_dim, rest = case
    dtypes = {"torch": [torch.float32], "triton": [torch.float16]}[backend]
    if device.type == "cuda":
        dtypes = [torch.bfloat16, torch.float32] if v_dim <= 128 else [torch.bfloat16]
    for dtype in dtypes:
        (q, *cache), rows = problem(lengths, new, heads, v_dim, rest, page, dtype, device)
        got = mla_decode(q, *cache, v_dim, 0.5, causal)
        assert got[0].dtype == dtype and got[1].dtype == torch.float32
        assert_as_flash_mla(got, exact(q, rows, v_dim, 0.5, causal))


def test_fp32_is_exact_but_for_fp32_roundings(device: torch.device) -> None:
    (q, *cache), rows = problem([0, 20, 140], 2, 3, *MINI, 16, torch.float32, device)
    out, lse = mla_decode(10 * q, *cache, MINI[0], 0.5)
    want, want_lse = exact(10 * q, rows, MINI[0], 0.5, True)
    torch.testing.assert_close(out.cpu().double(), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.cpu().double(), want_lse, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sign", [-1, 1])
def test_large_scores_do_not_overflow(sign: int, device: torch.device) -> None:
    """Scores beyond exp's range, on the side of either sign."""
    (q, *cache), rows = problem([0, 40, 300], 2, 3, *MINI, 16, torch.float32, device)
    out, lse = mla_decode(q, *cache, MINI[0], sign * 2e4)
    want, want_lse = exact(q, rows, MINI[0], sign * 2e4, True)
    torch.testing.assert_close(out.cpu().double(), want, atol=5e-4, rtol=0)  # scores of 1e4: rounded by 1e-3
    torch.testing.assert_close(lse.cpu().double(), want_lse, atol=0, rtol=1e-6)


def force_shares(monkeypatch: pytest.MonkeyPatch, processors: int, keys_first: bool) -> None:
    """Blocks of 16 rows, shared out over so many parts."""
    config = dict(BLOCK_M=16, BLOCK_N=16, LEAST=1, PROGRAMS_PER_SM=1, KEYS_FIRST=keys_first, num_warps=4, num_stages=1)
    combine = dict(SLOTS=2, NUMBERS=64, num_warps=4)
    monkeypatch.setattr(
        room._launch, "config", lambda room, kernel, arch, **shape: combine if "combine" in kernel else config
    )
    monkeypatch.setattr(room._launch, "multiprocessors", lambda x: processors)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("keys_first", [False, True], ids=["", "keys first"])
@pytest.mark.parametrize("processors", [1, 5, 12])
def test_any_share_of_the_work(
    processors: int, keys_first: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few parts of many sequences, many parts of one; borders inside sequences, between them, in what beginning one
    is taken to cost; idle parts."""
    force_shares(monkeypatch, processors, keys_first)
    lengths = [0, 83, 16, 0, 1, 0]
    (q, *cache), rows = problem(lengths, 2, 9, 24, 8, 32, torch.float32, device)
    with poisoned_memory():
        got = mla_decode(q, *cache, 24, 0.5)
        again = mla_decode(q, *cache, 24, 0.5)
    assert_as_flash_mla(got, exact(q, rows, 24, 0.5, True))
    assert torch.equal(got[0], again[0]) and torch.equal(got[1], again[1])


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_lengths_that_are_none(device: torch.device) -> None:
    """Kernels do not wait to judge lengths: -1 is an idle place of a CUDA graph, and none leads beyond the table."""
    (q, cache, table, lengths), rows = problem([5, 64, 64], 1, 2, *MINI, 64, torch.float32, device)
    table = table[:, :1].contiguous()
    lengths = torch.tensor([-1, 64, 1000], dtype=torch.int64, device=device)
    got = mla_decode(q, cache, table, lengths, MINI[0], 0.5)
    assert_as_flash_mla(got, exact(q, [rows[0][:0], *rows[1:]], MINI[0], 0.5, True))


def fp8_problem(
    lengths: Sequence[int], new: int, heads: int, v_dim: int, rest: int, page: int, dtype: torch.dtype,
    device: torch.device,
) -> tuple[Problem, list[Tensor]]:  # fmt: skip
    """`problem` with a cache of fp8 rows, and what they stand for: bytes cut by hand, as FlashMLA describes them. In
    pages, all that is no row is NaN in codes (0x7F), scales and rotated values (0xFFFF) alike."""
    (q, cache, table, seq_lens), rows = problem(lengths, new, heads, v_dim, rest, page, torch.float32, device)
    seen = cache.isfinite().all(-1, keepdim=True)
    packed = quantize_latent_cache(*cache.nan_to_num().split([v_dim, rest], -1))
    packed = packed.where(seen, torch.tensor(255, dtype=torch.uint8, device=device))
    packed[..., :v_dim].masked_fill_(~seen, 0x7F)
    meant = []
    for x in rows:
        raw = quantize_latent_cache(*x.to(device).split([v_dim, rest], -1)).cpu()
        codes = raw[:, :v_dim].view(torch.float8_e4m3fn).double().unflatten(-1, (-1, 128))
        scales = raw[:, v_dim : v_dim + v_dim // 32].clone().view(torch.float32).double()
        rotary = raw[:, v_dim + v_dim // 32 :].clone().view(torch.bfloat16).double()
        meant.append(torch.cat(((codes * scales[..., None]).flatten(1), rotary), dim=-1))
    return (q.to(dtype), packed, table, seq_lens), meant


FP8_CASES = {
    "V3": (1, 2, [33, 0], 64, *V3),
    "8 tokens": (1, 8, [5, 36], 16, 128, 16),
    "middle, pages of 7": (2, 3, [37], 7, 256, 64),
    "no rest": (2, 1, [33, 33], 16, 128, 0),
    "64 rows": (16, 4, [70], 64, 128, 16),
    "32 rows of V3": (16, 2, [70, 5], 64, *V3),
    "wider than kernels serve": (2, 1, [20], 16, 640, 64),
}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("case", FP8_CASES.values(), ids=FP8_CASES)
def test_fp8_cache(
    case: tuple[int, int, list[int], int, int, int], causal: bool, backend: str, device: torch.device
) -> None:
    """As FlashMLA, of what the bytes stand for: code times a power of two is exact in fp16 and bf16 alike."""
    heads, new, lengths, page, v_dim, rest = case
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16 if backend == "triton" else torch.float32
    (q, cache, *more), rows = fp8_problem(lengths, new, heads, v_dim, rest, page, dtype, device)
    assert cache.shape[-1] == v_dim + v_dim // 32 + 2 * rest
    got = mla_decode(q, cache, *more, v_dim, 0.5, causal)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    assert_as_flash_mla(got, exact(q, rows, v_dim, 0.5, causal))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("page", [8, 32])
@pytest.mark.parametrize("keys_first", [False, True], ids=["", "keys first"])
def test_any_share_of_fp8_rows(
    keys_first: bool, page: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are widened one ahead: not beyond a part's end, a sequence's, or the table's."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    (q, cache, table, lengths), rows = fp8_problem([0, 96, 16, 0, 1], 2, 9, 128, 16, page, dtype, device)
    force_shares(monkeypatch, 5, keys_first)
    got = mla_decode(q, cache, table[:, : 96 // page].contiguous(), lengths, 128, 0.5)
    assert_as_flash_mla(got, exact(q, rows, 128, 0.5, True))


def test_fp8_strides_do_not_matter(device: torch.device) -> None:
    """Nor whether bytes are called e4m3; the second cache has its rows at odd addresses."""
    (q, cache, *more), _ = fp8_problem([5, 3], 1, 2, 128, 16, 4, torch.float16, device)
    want = mla_decode(q, cache, *more, 128, 0.5)
    for same in (cache.view(torch.float8_e4m3fn), F.pad(cache, (1, 2, 1, 2))[:, 1:-2, 1:-2]):
        got = mla_decode(q, same, *more, 128, 0.5)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_fp8_agrees_with_the_reference_and_fp64() -> None:
    for dtype in (torch.float32, torch.float64):
        (q, *cache), rows = fp8_problem([20, 5], 2, 3, 128, 16, 4, dtype, torch.device("cpu"))
        assert_as_flash_mla(mla_decode(q, *cache, 128, 0.5), exact(q, rows, 128, 0.5, True))
    got, want = mla_decode(q.float(), *cache, 128, 0.5), mla_decode_reference(q.float(), *cache, 128, 0.5)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_fp8_registration(device: torch.device) -> None:
    (q, *cache), _ = fp8_problem([0, 20], 2, 3, 128, 16, 16, torch.float16, device)
    opcheck(ops.mla_decode.default, (q, *cache, 128, 0.5, True))


@pytest.mark.parametrize(
    ("v_dim", "rest", "row", "message"),
    [
        (64, 16, 98, "an fp8 row: got 64 latent and 16 rotated values, allowed are multiples of 128 and of 2"),
        (128, 15, 162, "an fp8 row: got 128 latent and 15"),
        (512, 64, 576, r"kv_cache: got shape \(2, 4, 576\), allowed is \(any, any, 656\)"),
    ],
)
def test_bad_fp8_rows(v_dim: int, rest: int, row: int, message: str) -> None:
    cache = torch.zeros(2, 4, row, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        mla_decode(torch.zeros(1, 1, 2, v_dim + rest), cache, torch.zeros(1, 1).int(), torch.tensor([1]), v_dim, 0.5)
    with pytest.raises(ValueError, match="rotary: got shape"):
        quantize_latent_cache(torch.zeros(3, 128), torch.zeros(2, 16))


def test_strides_do_not_matter(device: torch.device) -> None:
    (q, cache, table, lengths), _ = problem([70, 20], 2, 3, *MINI, 16, torch.float32, device)
    want = mla_decode(q, cache, table, lengths, MINI[0], 0.5)
    strided = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        F.pad(cache, (3, 5, 1, 2))[:, 1:-2, 3:-5],
        table.T.contiguous().T,
        lengths.repeat_interleave(2)[::2],
    )
    got = mla_decode(*strided, MINI[0], 0.5)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    columns = cache.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(mla_decode(q, columns, table, lengths, MINI[0], 0.5), want, atol=1e-6, rtol=1e-6)


def test_pages_beyond_two_to_the_31(device: torch.device) -> None:
    """Numbers into the cache, of which only the first and the last page are ever touched."""
    far, (v_dim, rest) = 2**31 + 64, MINI
    memory = torch.empty(far + 64 * (v_dim + rest), dtype=torch.float16, device=device)
    cache = memory.as_strided((2, 64, v_dim + rest), (far, v_dim + rest, 1))
    cache.copy_(flash_mla_numbers(*cache.shape))
    q = flash_mla_numbers(1, 1, 2, v_dim + rest).half().to(device)
    table, lengths = torch.tensor([[1, 0]], device=device), torch.tensor([100], device=device)
    rows = cache.cpu()[[1, 0]].flatten(0, 1)[:100]
    assert_as_flash_mla(mla_decode(q, cache, table, lengths, v_dim, 0.5), exact(q, [rows], v_dim, 0.5, True))


def test_registration(device: torch.device) -> None:
    (q, *cache), _ = problem([0, 20], 2, 3, *MINI, 16, torch.float32, device)
    opcheck(ops.mla_decode.default, (q, *cache, MINI[0], 0.5, True))


def test_one_graph_under_compile(device: torch.device) -> None:
    compiled = torch.compile(mla_decode, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([0, 20], [33, 5, 2]):
        (q, *cache), _ = problem(lengths, 2, 3, *MINI, 16, torch.float32, device)
        for got, want in zip(compiled(q, *cache, MINI[0], 0.5), mla_decode(q, *cache, MINI[0], 0.5), strict=True):
            assert torch.equal(got, want)


BY_HAND = {
    "rows of one tile": (16, 1, [64, 128, 320, 100, 0, 1, 63, 65, 4096]),
    "several tiles": (128, 1, [64, 129, 0, 1000]),
    "several tokens": (16, 4, [64, 3, 0, 5, 200, 640]),
    "tokens over tiles": (64, 2, [1, 0, 64, 777]),
    "a tile that is not full": (20, 3, [500, 2, 64]),
    "more sequences than programs": (8, 1, [*range(0, 400, 2)]),
    "one long sequence": (128, 1, [30000]),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU orders its warps itself")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("made", [problem, fp8_problem])
@pytest.mark.parametrize("case", list(BY_HAND)[:5])
def test_by_hand_in_any_order(
    case: str, made: Callable[..., tuple[Problem, list[Tensor]]], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever warps go ahead, however late a copy or product is. Partial results are combined by few programs, which
    take less time to interpret."""
    real, combine = room._launch.config, dict(SLOTS=2, NUMBERS=8192, num_warps=4)
    monkeypatch.setattr(room._launch, "BACKEND", "triton")
    monkeypatch.setattr(
        room._launch, "config", lambda *at, **shape: combine if "mla_decode_combine" in at else real(*at, **shape)
    )
    heads, new, lengths = BY_HAND[case]
    dtype, causal = torch.float16 if seed % 2 and made is problem else torch.bfloat16, seed == 0
    lengths = [min(length, 400) for length in lengths]
    (q, *cache), rows = made(lengths, new, heads, *V3, 64, dtype, torch.device("cpu"))
    assert importlib.import_module("minids_kernels._mla_decode_hopper").fits(q, cache[0], V3[0], 0.5)
    with interpreted(seed), poisoned_memory():
        got = mla_decode(q, *cache, V3[0], 0.5, causal)
    assert_as_flash_mla(got, exact(q, rows, V3[0], 0.5, causal))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize(
    ("made", "dtype"), [(problem, torch.bfloat16), (problem, torch.float16), (fp8_problem, torch.bfloat16)]
)
@pytest.mark.parametrize("case", BY_HAND.values(), ids=BY_HAND)
def test_by_hand_as_flash_mla(
    case: tuple[int, int, list[int]],
    made: Callable[..., tuple[Problem, list[Tensor]]],
    dtype: torch.dtype,
    causal: bool,
) -> None:
    """What fails to be written is NaN, as is all that is no row."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("for Hopper alone")
    heads, new, lengths = case
    (q, *cache), rows = made(lengths, new, heads, *V3, 64, dtype, torch.device("cuda"))
    assert importlib.import_module("minids_kernels._mla_decode_hopper").fits(q, cache[0], V3[0], 0.5)
    with poisoned_memory():
        results = [mla_decode(q, *cache, V3[0], 0.5, causal) for _ in range(3)]
    assert_as_flash_mla(results[0], exact(q, rows, V3[0], 0.5, causal))
    assert all(torch.equal(x, y) for again in results[1:] for x, y in zip(again, results[0], strict=True))


@pytest.mark.gpu
def test_a_cuda_graph_follows_the_lengths() -> None:
    device = torch.device("cuda")
    (q, cache, table, lengths), rows = problem([900, 140, 300], 1, 16, *V3, 64, torch.bfloat16, device)
    mla_decode(q, cache, table, lengths, V3[0], 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mla_decode(q, cache, table, lengths, V3[0], 0.1)
    for now in ([900, 140, 300], [0, 20, 299], [-1, 1, 64]):
        lengths.copy_(torch.tensor(now))
        graph.replay()
        want = exact(q, [x[: max(length, 0)] for x, length in zip(rows, now, strict=True)], V3[0], 0.1, True)
        assert_as_flash_mla(got, want)


def test_rows_that_kernels_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64, and rows wider than a kernel's tile, take the PyTorch path wherever they lie."""
    monkeypatch.setattr(room._launch, "BACKEND", "triton")
    monkeypatch.setattr(room._launch, "launch", lambda *args, **kwargs: pytest.fail("a kernel was launched"))
    rows_of = [(513, 64, torch.float32), (64, 65, torch.float32), (129, 8, torch.float32), (8, 8, torch.float64)]
    for v_dim, rest, dtype in rows_of:
        (q, *cache), rows = problem([3, 0], 1, 2, v_dim, rest, 4, dtype, torch.device("cpu"))
        assert_as_flash_mla(mla_decode(q, *cache, v_dim, 0.5), exact(q, rows, v_dim, 0.5, True))


def paged(batch: int, table_pages: int, page: int, scattered: bool) -> tuple[Tensor, Tensor]:
    """A cache with spare pages, full of numbers, and a table whose pages follow each other or lie about."""
    spare = 3
    cache = torch.randn(batch * table_pages + spare, page, WIDTH)
    order = torch.randperm(len(cache))[: batch * table_pages] if scattered else 1 + torch.arange(batch * table_pages)
    return cache, order.view(batch, table_pages).int()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3), new=st.integers(1, 4), heads=st.integers(1, 3), page=st.sampled_from([1, 4, 7]),
    scattered=st.booleans(), ragged=st.booleans(), causal=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_agrees_with_the_reference(
    batch: int, new: int, heads: int, page: int, scattered: bool, ragged: bool, causal: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    cache, table = paged(batch, 13 // page + 2, page, scattered)
    lengths = torch.randint(0, 14, (batch,)) if ragged else torch.full((batch,), 13)
    q = torch.randn(batch, new, heads, WIDTH)
    out, lse = mla_decode(q, cache, table, lengths.int(), LATENT, SCALE, causal)
    want, want_lse = mla_decode_reference(q, cache, table, lengths, LATENT, SCALE, causal)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_agrees_with_torch_attention(dtype: torch.dtype, tolerance: float) -> None:
    """A whole causal sequence as new tokens is ordinary attention with one key and value head."""
    cache, table = paged(2, 5, 4, scattered=True)
    q = torch.randn(2, 18, 3, WIDTH).to(dtype)
    rows = cache[table.flatten().long()].view(2, 20, WIDTH)[:, :18].to(dtype)
    keys = rows.unsqueeze(1).expand(-1, 3, -1, -1).float()
    want = F.scaled_dot_product_attention(
        q.transpose(1, 2).float(), keys, keys[..., :LATENT], is_causal=True, scale=SCALE
    )
    out, _ = mla_decode(q, cache.to(dtype), table, torch.tensor([18, 18]), LATENT, SCALE)
    assert out.dtype == dtype
    torch.testing.assert_close(out.transpose(1, 2).float(), want, atol=tolerance, rtol=tolerance)


def test_rows_behind_the_length_are_never_read() -> None:
    cache, table = paged(2, 2, 8, scattered=False)
    cache[:] = torch.nan
    cache[1:3, :5] = torch.randn(2, 5, WIDTH)  # the first 5 rows of sequence 0 ...
    cache[3] = torch.randn(8, WIDTH)  # ... and 8 of sequence 1
    cache[1] = torch.randn(8, WIDTH)
    out, lse = mla_decode(torch.randn(2, 1, 2, WIDTH), cache, table, torch.tensor([8 + 5, 8]), LATENT, SCALE)
    assert out.isfinite().all() and lse.isfinite().all()


def test_pages_in_order_are_not_copied() -> None:
    cache, table = paged(3, 2, 8, scattered=False)
    rows = room._rows(cache, table, 11)
    assert rows.shape == (3, 11, WIDTH)
    assert rows.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()


def test_autocast_changes_nothing() -> None:
    cache, table = torch.randn(4, 4, WIDTH), torch.tensor([[0, 2], [3, 1]])
    for lengths in ([7, 7], [3, 8]):
        args = torch.randn(2, 1, 2, WIDTH), cache, table, torch.tensor(lengths), LATENT, SCALE
        want = mla_decode(*args)
        with torch.autocast("cpu", torch.bfloat16):
            got = mla_decode(*args)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and got[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(1, 1, 2, WIDTH, dtype=torch.int64)}, TypeError, "q: got torch.int64"),
        ({"kv_cache": torch.zeros(2, 4, WIDTH - 1)}, ValueError, "kv_cache: got shape"),
        ({"kv_cache": torch.zeros(2, 4, WIDTH).half()}, TypeError, "kv_cache: got torch.float16, allowed is q's"),
        ({"block_table": torch.zeros(2, 2).int()}, ValueError, "block_table: got shape"),
        ({"seq_lens": torch.tensor([9])}, ValueError, r"seq_lens: got \[9\], allowed is 0 to 8"),
        ({"seq_lens": torch.tensor([-1])}, ValueError, r"seq_lens: got \[-1\]"),
        ({"seq_lens": torch.tensor([5.0])}, TypeError, "seq_lens: got torch.float32, allowed are torch.int32"),
        ({"block_table": torch.zeros(1, 2)}, TypeError, "block_table: got torch.float32, allowed are torch.int32"),
        ({"block_table": torch.tensor([[1, 2]])}, ValueError, "block_table: got page 2, allowed is 0 to 1"),
        ({"block_table": torch.tensor([[-1, 0]])}, ValueError, "block_table: got page -1, allowed is 0 to 1"),
        ({"q": torch.zeros(1, 2, WIDTH)}, ValueError, "q: got shape"),
        ({"v_dim": WIDTH + 1}, ValueError, "v_dim: got 25, allowed is 1 to the row's 24"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = dict(
        q=torch.zeros(1, 1, 2, WIDTH), kv_cache=torch.zeros(2, 4, WIDTH), block_table=torch.tensor([[0, 1]]),
        seq_lens=torch.tensor([5]), v_dim=LATENT, scale=SCALE,
    )  # fmt: skip
    with pytest.raises(error, match=message):
        mla_decode(**{**good, **change})  # type: ignore[arg-type]
