"""New tokens over a paged latent cache: against all rows expanded at once, and against the absorbed form."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from minids_kernels import _launch, mla_decode, mla_prefill, mla_prefill_reference, quantize_latent_cache
from minids_kernels.mla_prefill import _passes
from torch import Tensor

from tests.kernels.numerics import assert_near, error_bound

HEADS, NOPE, ROPE, VALUE = 3, 8, 4, 6
SCALE = 0.3

# rows of each sequence, and new tokens among them
SEQUENCES = {
    "whole prompts": [(5, 5), (19, 19)],
    "long contexts": [(70, 9), (33, 1)],
    "mixed": [(0, 0), (40, 40), (17, 0), (64, 3)],
    "nothing": [],
}


def problem(
    sequences: list[tuple[int, int]], latent: int, page: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Pages in any order; unused pages and rows hold NaN, unused entries of the table are no pages."""
    lengths, new = [length for length, _ in sequences], [n for _, n in sequences]
    used = [-(-length // page) for length in lengths]
    pages = torch.randperm(sum(used) + 2)
    cache = torch.full((len(pages), page, latent + ROPE), torch.nan)
    table = torch.full((len(sequences), max(used, default=0) + 1), 2147480000, dtype=torch.int32)
    for b, (length, first) in enumerate(zip(lengths, [0, *itertools.accumulate(used)], strict=False)):
        table[b, : used[b]] = pages[first : first + used[b]]
        for i in range(length):
            cache[table[b, i // page], i % page] = torch.randn(latent + ROPE)
    arguments = dict(
        q=tuple(torch.randn(sum(new), HEADS, width).to(device, dtype) for width in (NOPE, ROPE)),
        kv_cache=cache.to(dtype), block_table=table, seq_lens=torch.tensor(lengths, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32),
        w_kv=(torch.randn(HEADS * (NOPE + VALUE), latent) / latent**0.5).to(dtype), scale=SCALE,
    )  # fmt: skip
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("workspace", [20, 1000])
@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
def test_agrees_with_all_rows_expanded(
    sequences: list[tuple[int, int]], workspace: int, dtype: torch.dtype, device: torch.device
) -> None:
    if _launch.BACKEND == "triton" and dtype == torch.float64:
        pytest.skip("fp64 is always PyTorch's")
    given = problem(sequences, 10, 16, dtype, device)
    out, lse = mla_prefill(**given, return_lse=True, workspace=workspace)
    assert torch.equal(mla_prefill(**given, workspace=workspace), out)
    want = mla_prefill_reference(**given)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32) and lse.isfinite().all()
    # roundings of keys, values, probabilities and products in the dtype, as in attention's own test
    assert_near(out, want.double(), error_bound(torch.float32 if dtype == torch.float64 else dtype, 24, 128))


@pytest.mark.parametrize("workspace", [20, 1000])
def test_agrees_with_the_absorbed_form(workspace: int, device: torch.device) -> None:
    """`mla_decode` of the same tokens, W_UK in its query and W_UV behind it: output and log-sum-exp."""
    given = problem([(70, 4), (31, 4)], 16, 8, torch.float32, device)
    nope, rotary = given["q"]
    w_uk, w_uv = given["w_kv"].unflatten(0, (HEADS, -1)).split([NOPE, VALUE], 1)
    absorbed = torch.cat((torch.einsum("thn,hnc->thc", nope, w_uk), rotary), -1).unflatten(0, (2, 4))
    latent, want_lse = mla_decode(absorbed, given["kv_cache"], given["block_table"], given["seq_lens"], 16, SCALE)
    want = torch.einsum("thc,hvc->thv", latent.flatten(0, 1), w_uv)
    out, lse = mla_prefill(**given, return_lse=True, workspace=workspace)
    bound = error_bound(torch.float32, 24, 128)
    assert_near(out, want.double(), bound)
    assert_near(lse, want_lse.flatten(0, 1).double(), bound, floor=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_rows(dtype: torch.dtype, device: torch.device) -> None:
    if _launch.BACKEND == "triton" and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter does not multiply bf16")
    given = problem([(70, 9), (33, 33)], 128, 16, dtype, device)
    wide = torch.randn(given["kv_cache"].shape, device=device)
    given["kv_cache"] = quantize_latent_cache(wide[..., :128], wide[..., 128:])
    want = mla_prefill_reference(**given)
    for rows in (given["kv_cache"], given["kv_cache"].view(torch.float8_e4m3fn)):
        out = mla_prefill(**{**given, "kv_cache": rows}, workspace=30)
        assert_near(out, want.double(), error_bound(dtype, 24, 128))


@settings(max_examples=200, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda x: (max(x), min(x))), max_size=5),
    workspace=st.integers(1, 80),
)  # fmt: skip
def test_passes_expand_each_row_once(sequences: list[tuple[int, int]], workspace: int) -> None:
    lengths, new = [length for length, _ in sequences], [n for _, n in sequences]
    passes = _passes(lengths, new, workspace)
    for b, length in enumerate(lengths):
        ranges = [ranges[b] for ranges in passes]
        assert [i for begin, end in ranges for i in range(begin, end)] == [*range(length)]
        assert ranges[-1][1] == length and ranges[-1][0] <= length - new[b]
    for ranges in passes[:-1]:
        assert sum(end - begin for begin, end in ranges) <= max(workspace, len(sequences))
    assert sum(end - begin for begin, end in passes[-1]) <= max(workspace, sum(new))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"w_kv": torch.zeros(25, 10)},
            ValueError,
            r"w_kv: got 25 rows, allowed is a multiple of 3 heads above 3",
        ),
        ({"w_kv": torch.zeros(24, 10)}, ValueError, "w_kv: got 24 rows"),
        ({"w_kv": torch.zeros(42, 9)}, ValueError, r"kv_cache: got shape \(\d+, 16, 14\), allowed is .*13"),
        ({"w_kv": torch.zeros(42, 10).half()}, TypeError, "w_kv: got torch.float16, allowed is .*torch.float32"),
        ({"workspace": 0}, ValueError, "workspace: got 0, allowed is 1 or more"),
        ({"seq_lens": torch.tensor([8, 33])}, ValueError, r"seq_lens: got \[8, 33\] with \[9, 33\] new tokens"),
        ({"seq_lens": torch.tensor([70, 97])}, ValueError, r"seq_lens: got \[70, 97\] .* allowed is those to 96"),
        ({"cu_seqlens": torch.tensor([0, 9, 41])}, ValueError, r"cu_seqlens: got \[0, 9, 41\], allowed is 0, rising"),
        ({"cu_seqlens": torch.tensor([0, 9, 4e1])}, TypeError, "cu_seqlens: got torch.float32, allowed are"),
        ({"block_table": torch.zeros(2, 6)}, TypeError, "block_table: got torch.float32, allowed are torch.int32"),
        ({"cu_seqlens": torch.tensor([0, 42])}, ValueError, r"cu_seqlens: got shape \(2,\), allowed is \(3\)"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = problem([(70, 9), (33, 33)], 10, 16, torch.float32, torch.device("cpu"))
    with pytest.raises(error, match=message):
        mla_prefill(**{**good, **change})


@pytest.mark.gpu
def test_waits_for_no_gpu() -> None:
    """With lengths on the CPU, in one pass and in several."""
    given = problem([(70, 9), (33, 33)], 10, 16, torch.bfloat16, torch.device("cuda"))
    given |= {name: given[name].cpu() for name in ("seq_lens", "cu_seqlens")}
    for workspace in (1000, 20):
        mla_prefill(**given, workspace=workspace)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            mla_prefill(**given, workspace=workspace)
        finally:
            torch.cuda.set_sync_debug_mode("default")
