"""DeepGEMM's fp8 products (github.com/deepseek-ai/DeepGEMM, csrc/apis/gemm.hpp) on `fp8_gemm` and `grouped_fp8_gemm`.

    from minids_kernels.compat.deep_gemm import fp8_gemm_nt, m_grouped_fp8_gemm_nt_contiguous

An operand is a pair of e4m3 codes and fp32 scales, as DeepGEMM wants them on Hopper; scales may lie in memory as they
will, with or without its alignment for tensor copies. Runs on every GPU that Triton serves, any sizes, without a
compiler at run time. Nothing waits for the device. Recipes other than 1x128 by 128x128 (1x128 by 1x128 for the
k-grouped products, both for `fp8_gemm_nt`), packed power-of-two scales and the layout of prefix sums are refused;
`compiled_dims` is ignored.
Test: tests/kernels/test_compat_deep_gemm.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_shape
from ..fp8_gemm import GROUP, fp8_gemm, fp8_gemm_wgrad
from ..grouped_fp8_gemm import grouped_fp8_gemm, grouped_fp8_gemm_masked, grouped_fp8_gemm_wgrad

__all__ = [
    "fp8_gemm_nt",
    "get_m_alignment_for_contiguous_layout",
    "get_mk_alignment_for_contiguous_layout",
    "k_grouped_fp8_gemm_nt_contiguous",
    "k_grouped_fp8_gemm_tn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
]

Operand = tuple[Tensor, Tensor]
Recipe = tuple[int, int, int]

BLOCKS: Recipe = (1, 128, 128)  # rows of a, rows of b, columns that share a scale
TILES: Recipe = (1, 1, 128)


def get_mk_alignment_for_contiguous_layout() -> int:
    """Rows that DeepGEMM's callers pad each group to: its own 128. The products here need no padding at all."""
    return 128


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout  # its name in older versions


def _check_recipe(recipe: Recipe | None, *allowed: Recipe) -> Recipe:
    if recipe is None:
        return BLOCKS
    if tuple(recipe) not in allowed:
        raise ValueError(f"recipe: got {tuple(recipe)}, allowed are {', '.join(map(str, allowed))} and None")
    return recipe


def _check_sum(c: Tensor | None, d: Tensor) -> None:
    if c is not None:
        check_shape("c", c, tuple(d.shape))
        if c.dtype != d.dtype:
            raise TypeError(f"c: got {c.dtype}, allowed is d's {d.dtype}")


def _check_ks(ks: Sequence[int], ks_tensor: Tensor) -> None:
    if any(k < 0 or k % GROUP for k in ks):
        raise ValueError(f"ks: got {list(ks)}, allowed are multiples of {GROUP}")
    check_shape("ks_tensor", ks_tensor, (len(ks),))
    if ks_tensor.dtype != torch.int32:
        raise TypeError(f"ks_tensor: got {ks_tensor.dtype}, allowed is torch.int32")


def _spaced(pieces: Sequence[Tensor], scales: Tensor) -> Operand:
    """Groups' codes [M, k] and all scales [M, K / 128] as `grouped_fp8_gemm_wgrad` takes them: with a tile of zeros
    behind each group."""
    codes = torch.cat([F.pad(piece, (0, GROUP)) for piece in pieces], dim=1)
    counts = [piece.shape[1] // GROUP for piece in pieces]
    spread = torch.cat([F.pad(part, (0, 1), value=1.0) for part in scales.split(counts, dim=1)], dim=1)
    return codes.view(torch.float8_e4m3fn), spread


def _k_grouped(
    a: tuple[Sequence[Tensor], Tensor],
    b: tuple[Sequence[Tensor], Tensor],
    d: Tensor,
    ks_tensor: Tensor,
    c: Tensor | None,
    recipe: Recipe,
) -> None:
    """Each operand: groups' codes [M, k], and all scales [M, K / 128]."""
    _check_recipe(recipe, TILES)
    check_shape("d", d, (len(ks_tensor), a[1].shape[0], b[1].shape[0]))
    _check_sum(c, d)
    offsets = F.pad(ks_tensor.cumsum(0, dtype=torch.int32), (1, 0))
    product = grouped_fp8_gemm_wgrad(*_spaced(*a), *_spaced(*b), offsets)
    d.copy_(product if c is None else product + c)


def fp8_gemm_nt(
    a: Operand,
    b: Operand,
    d: Tensor,
    c: Tensor | None = None,
    recipe: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """Writes a @ b.T, plus c if given, into d [M, N] (bf16, fp16 or fp32). a: codes [M, K], scales [M, ceil(K / 128)];
    b: codes [N, K], scales [ceil(N / 128), ceil(K / 128)], with the recipe (1, 1, 128) [N, ceil(K / 128)]. c has d's
    shape and dtype and may be d itself.

    Raises ValueError for another recipe and shapes that do not fit, TypeError for other dtypes.
    """
    check_shape("d", d, (a[0].shape[0], b[0].shape[0]))
    _check_sum(c, d)
    if tuple(_check_recipe(recipe, BLOCKS, TILES)) == TILES:
        product = fp8_gemm_wgrad(*a, *b)
    else:
        product = fp8_gemm(*a, *b, d.dtype if c is None else torch.float32)
    d.copy_(product if c is None else product + c)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Operand,
    b: Operand,
    d: Tensor,
    m_indices: Tensor,
    recipe: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
) -> None:
    """Writes each row of a times its group's b, transposed, into d [M, N] (bf16, fp16 or fp32). a: codes [M, K], scales
    [M, ceil(K / 128)]; b: codes [G, N, K], scales [G, ceil(N / 128), ceil(K / 128)]. m_indices int32 [M]: the group of
    each row, groups in ascending order, -1 in the padding behind a group, whose rows of d are unspecified. Groups may
    be empty and of any length.

    Raises ValueError for another recipe, use_psum_layout and shapes that do not fit, TypeError for other dtypes.
    """
    _check_recipe(recipe, BLOCKS)
    if use_psum_layout:
        raise ValueError("use_psum_layout: got True, allowed is False")
    check_shape("m_indices", m_indices, (a[0].shape[0],))
    if m_indices.dtype != torch.int32:
        raise TypeError(f"m_indices: got {m_indices.dtype}, allowed is torch.int32")
    check_shape("b", b[0], (None, None, None))
    groups, columns = b[0].shape[:2]
    check_shape("d", d, (a[0].shape[0], columns))
    rows = m_indices.clamp(min=0).cummax(0).values  # padding goes with the group before it
    edges = torch.arange(groups + 1, dtype=torch.int32, device=rows.device)
    d.copy_(grouped_fp8_gemm(*a, *b, torch.searchsorted(rows, edges, out_int32=True), d.dtype))


def m_grouped_fp8_gemm_nt_masked(
    a: Operand,
    b: Operand,
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    recipe: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """Writes the first masked_m[g] rows (int32 [G]) of a[g] @ b[g].T into d [G, M, N] (bf16, fp16 or fp32, contiguous),
    and leaves its other rows alone. a: codes [G, M, K], scales [G, M, ceil(K / 128)]; b as for the contiguous layout.
    expected_m: rows a group has on average.

    Raises ValueError for another recipe and shapes that do not fit, TypeError for other dtypes.
    """
    _check_recipe(recipe, BLOCKS)
    grouped_fp8_gemm_masked(*a, *b, masked_m, d, expected_m)


def k_grouped_fp8_gemm_tn_contiguous(
    a: Operand,
    b: Operand,
    d: Tensor,
    ks: Sequence[int],
    ks_tensor: Tensor,
    c: Tensor | None = None,
    recipe: Recipe = TILES,
    compiled_dims: str = "mn",
) -> None:
    """Writes a_g.T @ b_g, plus c if given, into d [G, M, N] (bf16, fp16 or fp32) for the g-th ks[g] rows of a and b:
    the weights' gradients of experts. a: codes [K, M], scales [K / 128, M], b: codes [K, N], scales [K / 128, N], with
    K the sum of ks, multiples of 128 or 0; ks_tensor int32 [G] has the same on the device. c has d's shape and dtype
    and may be d itself. Operands are transposed first, which costs a pass over them; tensor cores want them so.

    Raises ValueError for another recipe, ks that do not fit and shapes that do not fit, TypeError for other dtypes.
    """
    for name, (codes, scales) in (("a", a), ("b", b)):
        check_shape(name, codes, (sum(ks), None))
        check_shape(f"{name}'s scales", scales, (sum(ks) // GROUP, codes.shape[1]))
    _check_ks(ks, ks_tensor)
    left, right = ([piece.T for piece in codes.view(torch.uint8).split(list(ks))] for codes, _ in (a, b))
    _k_grouped((left, a[1].T), (right, b[1].T), d, ks_tensor, c, recipe)


def k_grouped_fp8_gemm_nt_contiguous(
    a: Operand,
    b: Operand,
    d: Tensor,
    ks: Sequence[int],
    ks_tensor: Tensor,
    c: Tensor | None = None,
    recipe: Recipe = TILES,
    compiled_dims: str = "mn",
) -> None:
    """`k_grouped_fp8_gemm_tn_contiguous` for operands that lie transposed, as DeepGEMM has them on Hopper: codes of a
    are [M, ks[g]] one after the other in one dimension, of b [N, ks[g]]; scales [M, K / 128] and [N, K / 128]."""
    pieces = []
    for name, (codes, scales) in (("a", a), ("b", b)):
        check_shape(f"{name}'s scales", scales, (None, sum(ks) // GROUP))
        rows = scales.shape[0]
        check_shape(name, codes, (rows * sum(ks),))
        split = codes.view(torch.uint8).split([rows * k for k in ks])
        pieces.append([piece.view(rows, k) for piece, k in zip(split, ks, strict=True)])
    _check_ks(ks, ks_tensor)
    _k_grouped((pieces[0], a[1]), (pieces[1], b[1]), d, ks_tensor, c, recipe)
