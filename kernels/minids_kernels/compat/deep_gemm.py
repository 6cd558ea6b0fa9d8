"""DeepGEMM's fp8 products (github.com/deepseek-ai/DeepGEMM 2.6, csrc/apis/gemm.hpp) on `fp8_gemm` and
`grouped_fp8_gemm`.

    from minids_kernels.compat.deep_gemm import fp8_gemm_nt, m_grouped_fp8_gemm_nt_contiguous

Arguments go by the names and in the order of 2.6. An operand is a pair of e4m3 codes and fp32 scales, as DeepGEMM wants
them on Hopper; both may lie in memory as they will, with or without its alignment for tensor copies. Runs on every GPU
that Triton serves, any sizes, without a compiler at run time. Nothing waits for the device. Recipes other than 1x128 by
128x128 (1x128 by 1x128 for the k-grouped products, both for the dense ones), packed power-of-two scales and prefix sums
of K are refused. Of no effect are `compiled_dims`, `disable_ue8m0_cast` (no scale is ever cast) and
`expected_m_for_psum_layout`.
Test: tests/kernels/test_compat_deep_gemm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_dtype, check_shape
from ..fp8_gemm import GROUP, fp8_gemm, fp8_gemm_into, fp8_gemm_wgrad
from ..grouped_fp8_gemm import (
    grouped_fp8_gemm,
    grouped_fp8_gemm_into,
    grouped_fp8_gemm_masked,
    grouped_fp8_gemm_wgrad,
)

__all__ = [
    "fp8_gemm_nn",
    "fp8_gemm_nt",
    "fp8_gemm_tn",
    "fp8_gemm_tt",
    "fp8_m_grouped_gemm_nt_masked",
    "get_m_alignment_for_contiguous_layout",
    "get_mk_alignment_for_contiguous_layout",
    "get_mn_major_tma_aligned_tensor",
    "get_tma_aligned_size",
    "k_grouped_fp8_gemm_nt_contiguous",
    "k_grouped_fp8_gemm_tn_contiguous",
    "m_grouped_fp8_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
]

Operand = tuple[Tensor, Tensor]
Recipe = tuple[int, int, int]
OfOne = tuple[int, int] | None  # one operand's part of a recipe: rows and columns that share a scale

BLOCKS: Recipe = (1, 128, 128)  # rows of a, rows of b, columns that share a scale
TILES: Recipe = (1, 1, 128)


def get_mk_alignment_for_contiguous_layout() -> int:
    """Rows that DeepGEMM's callers pad each group to: its own 128. Only the layout of prefix sums needs it here."""
    return 128


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout  # its name in older versions


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """x numbers of element_size bytes, and as many more as make it a multiple of 16 bytes."""
    unit = 16 // element_size
    return -(-x // unit) * unit


def get_mn_major_tma_aligned_tensor(sf: Tensor) -> Tensor:
    """Scales [MN, G] or [B, MN, G] with neighbours along MN side by side in memory and groups at multiples of 16 bytes:
    sf itself if it lies so, else a copy. The products here take either."""
    rows, groups = sf.shape[-2:]
    pitch = get_tma_aligned_size(rows, sf.element_size())
    lies_so = sf.stride() == (groups * pitch, 1, pitch)[-sf.dim() :]
    return sf if lies_so else sf.new_empty(*sf.shape[:-2], groups, pitch)[..., :rows].mT.copy_(sf)


def _check_recipe(recipe: Recipe | None, recipe_a: OfOne, recipe_b: OfOne, *allowed: Recipe) -> Recipe:
    if recipe_a is not None or recipe_b is not None:
        if recipe is not None or recipe_a is None or recipe_b is None or recipe_a[1] != recipe_b[1]:
            raise ValueError(
                f"recipe, recipe_a, recipe_b: got {recipe}, {recipe_a}, {recipe_b}, allowed is the first alone, or the "
                "others together, with as many columns a scale"
            )
        recipe = recipe_a[0], recipe_b[0], recipe_a[1]
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


def _check_ks(ks_cpu: Sequence[int], grouped_layout: Tensor, use_psum_layout: bool) -> None:
    if use_psum_layout:
        raise ValueError("use_psum_layout: got True, allowed is False for k-grouped products")
    if any(k < 0 or k % GROUP for k in ks_cpu):
        raise ValueError(f"ks_cpu: got {list(ks_cpu)}, allowed are multiples of {GROUP}")
    check_shape("grouped_layout", grouped_layout, (len(ks_cpu),))
    check_dtype("grouped_layout", grouped_layout, torch.int32)


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
    ks: Tensor,
    c: Tensor | None,
    recipe: Recipe,
) -> None:
    """Each operand: groups' codes [M, k], and all scales [M, K / 128]."""
    _check_recipe(recipe, None, None, TILES)
    check_shape("d", d, (len(ks), a[1].shape[0], b[1].shape[0]))
    _check_sum(c, d)
    offsets = F.pad(ks.cumsum(0, dtype=torch.int32), (1, 0))
    product = grouped_fp8_gemm_wgrad(*_spaced(*a), *_spaced(*b), offsets)
    d.copy_(product if c is None else product + c)


def fp8_gemm_nt(
    a: Operand,
    b: Operand,
    d: Tensor,
    c: Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: OfOne = None,
    recipe_b: OfOne = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """Writes a @ b.T, plus c if given, into d [M, N] (bf16, fp16 or fp32). a: codes [M, K], scales [M, ceil(K / 128)];
    b: codes [N, K], scales [ceil(N / 128), ceil(K / 128)], with the recipe (1, 1, 128) [N, ceil(K / 128)]. c has d's
    shape and dtype and may be d itself. recipe_a and recipe_b together are another way to name a recipe: (1, 128) and
    (128, 128), or (1, 128) twice.

    Raises ValueError for another recipe and shapes that do not fit, TypeError for other dtypes.
    """
    check_shape("d", d, (a[0].shape[0], b[0].shape[0]))
    _check_sum(c, d)
    if tuple(_check_recipe(recipe, recipe_a, recipe_b, BLOCKS, TILES)) == TILES:
        if c is None or d.dtype != torch.float32:
            product = fp8_gemm_wgrad(*a, *b)
            d.copy_(product if c is None else product + c)
        else:
            fp8_gemm_wgrad(*a, *b, out=d if c is d else d.copy_(c))
    elif c is None and d.is_contiguous():
        fp8_gemm_into(*a, *b, d)
    else:
        product = fp8_gemm(*a, *b, d.dtype if c is None else torch.float32)
        d.copy_(product if c is None else product + c)


def _turned(x: Operand) -> Operand:
    return x[0].mT, x[1].mT


def fp8_gemm_nn(a: Operand, b: Operand, d: Tensor, *args: Any, **kwargs: Any) -> None:
    """`fp8_gemm_nt` with b's codes [K, N], and its scales transposed too. Codes are copied to where kernels want
    them."""
    fp8_gemm_nt(a, _turned(b), d, *args, **kwargs)


def fp8_gemm_tn(a: Operand, b: Operand, d: Tensor, *args: Any, **kwargs: Any) -> None:
    """`fp8_gemm_nn` with a's codes [K, M], and its scales transposed too."""
    fp8_gemm_nt(_turned(a), _turned(b), d, *args, **kwargs)


def fp8_gemm_tt(a: Operand, b: Operand, d: Tensor, *args: Any, **kwargs: Any) -> None:
    """`fp8_gemm_nt` with a's codes [K, M], and its scales transposed too."""
    fp8_gemm_nt(_turned(a), b, d, *args, **kwargs)


def m_grouped_fp8_gemm_nt_contiguous(
    a: Operand,
    b: Operand,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: Recipe | None = None,
    recipe_a: OfOne = None,
    recipe_b: OfOne = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    """Writes each row of a times its group's b, transposed, into d [M, N] (bf16, fp16 or fp32). a: codes [M, K], scales
    [M, ceil(K / 128)]; b: codes [G, N, K], scales [G, ceil(N / 128), ceil(K / 128)]. grouped_layout (m_indices in older
    versions) int32 [M]: the group of each row, groups in ascending order, -1 in the padding behind a group, whose rows
    of d are unspecified. Groups may be empty and of any length. With use_psum_layout it is int32 [G], where each
    group's rows end: they begin at the first multiple of 128 behind the group before; rows between are zero in d with
    ensure_zero_padding, else unspecified, and so are those behind the last.

    Raises ValueError for another recipe and shapes that do not fit, TypeError for other dtypes, RuntimeError for groups
    out of order or beyond the last: on a GPU the device does, when it comes to it, as for any index out of bounds.
    """
    _check_recipe(recipe, recipe_a, recipe_b, BLOCKS)
    check_shape("b", b[0], (None, None, None))
    (rows, _), (groups, columns, _) = a[0].shape, b[0].shape
    check_shape("grouped_layout", grouped_layout, (groups if use_psum_layout else rows,))
    check_dtype("grouped_layout", grouped_layout, torch.int32)
    check_shape("d", d, (rows, columns))
    if use_psum_layout:
        alignment = get_mk_alignment_for_contiguous_layout()
        ends = ((grouped_layout + alignment - 1) // alignment * alignment).clamp(max=rows)
        offsets = F.pad(ends, (1, 0))
    else:
        group = grouped_layout.clamp(min=0).cummax(0).values  # padding goes with the group before it
        known = (grouped_layout < 0) | ((grouped_layout == group) & (group < groups))
        torch._assert_async(
            known.all(), f"grouped_layout: got groups out of order, allowed is 0 to {groups - 1}, or -1"
        )
        edges = torch.arange(groups + 1, dtype=torch.int32, device=group.device)
        offsets = torch.searchsorted(group, edges, out_int32=True)
    if d.is_contiguous():
        grouped_fp8_gemm_into(*a, *b, offsets, d)
    else:
        d.copy_(grouped_fp8_gemm(*a, *b, offsets, d.dtype))
    if use_psum_layout and ensure_zero_padding:
        row = torch.arange(rows, dtype=torch.int32, device=d.device)
        group = torch.searchsorted(ends, row, right=True).clamp(max=groups - 1)
        d.masked_fill_((row >= grouped_layout[group])[:, None], 0)


def m_grouped_fp8_gemm_nn_contiguous(
    a: Operand, b: Operand, d: Tensor, grouped_layout: Tensor, *args: Any, **kwargs: Any
) -> None:
    """`m_grouped_fp8_gemm_nt_contiguous` with b's codes [G, K, N], and its scales transposed too. Codes are copied to
    where kernels want them."""
    m_grouped_fp8_gemm_nt_contiguous(a, _turned(b), d, grouped_layout, *args, **kwargs)


def m_grouped_fp8_gemm_nt_masked(
    a: Operand,
    b: Operand,
    d: Tensor,
    masked_m: Tensor,
    expected_m: int,
    recipe: Recipe | None = None,
    recipe_a: OfOne = None,
    recipe_b: OfOne = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """Writes the first masked_m[g] rows (int32 [G]) of a[g] @ b[g].T into d [G, M, N] (bf16, fp16 or fp32, contiguous),
    and leaves its other rows alone. a: codes [G, M, K], scales [G, M, ceil(K / 128)]; b as for the contiguous layout.
    expected_m: rows a group has on average.

    Raises ValueError for another recipe and shapes that do not fit, TypeError for other dtypes.
    """
    _check_recipe(recipe, recipe_a, recipe_b, BLOCKS)
    grouped_fp8_gemm_masked(*a, *b, masked_m, d, expected_m)


fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked  # its name in older versions


def k_grouped_fp8_gemm_tn_contiguous(
    a: Operand,
    b: Operand,
    d: Tensor,
    ks_cpu: Sequence[int],
    grouped_layout: Tensor,
    c: Tensor | None = None,
    recipe: Recipe = TILES,
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """Writes a_g.T @ b_g, plus c if given, into d [G, M, N] (bf16, fp16 or fp32) for the g-th ks_cpu[g] rows of a and
    b: the weights' gradients of experts. a: codes [K, M], scales [K / 128, M], b: codes [K, N], scales [K / 128, N],
    with K the sum of ks_cpu, multiples of 128 or 0; grouped_layout int32 [G] (ks and ks_tensor in older versions) has
    the same on the device. c has d's shape and dtype and may be d itself. Operands are transposed first, which costs a
    pass over them; tensor cores want them so.

    Raises ValueError for another recipe, use_psum_layout, ks_cpu and shapes that do not fit, TypeError for other
    dtypes.
    """
    for name, (codes, scales) in (("a", a), ("b", b)):
        check_shape(name, codes, (sum(ks_cpu), None))
        check_shape(f"{name}'s scales", scales, (sum(ks_cpu) // GROUP, codes.shape[1]))
    _check_ks(ks_cpu, grouped_layout, use_psum_layout)
    left, right = ([piece.T for piece in codes.view(torch.uint8).split(list(ks_cpu))] for codes, _ in (a, b))
    _k_grouped((left, a[1].T), (right, b[1].T), d, grouped_layout, c, recipe)


def k_grouped_fp8_gemm_nt_contiguous(
    a: Operand,
    b: Operand,
    d: Tensor,
    ks_cpu: Sequence[int],
    grouped_layout: Tensor,
    c: Tensor | None = None,
    recipe: Recipe = TILES,
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    """`k_grouped_fp8_gemm_tn_contiguous` for operands that lie transposed, as DeepGEMM has them on Hopper: codes of a
    are [M, ks_cpu[g]] one after the other in one dimension, of b [N, ks_cpu[g]]; scales [M, K / 128], [N, K / 128]."""
    pieces = []
    for name, (codes, scales) in (("a", a), ("b", b)):
        check_shape(f"{name}'s scales", scales, (None, sum(ks_cpu) // GROUP))
        rows = scales.shape[0]
        check_shape(name, codes, (rows * sum(ks_cpu),))
        split = codes.view(torch.uint8).split([rows * k for k in ks_cpu])
        pieces.append([piece.view(rows, k) for piece, k in zip(split, ks_cpu, strict=True)])
    _check_ks(ks_cpu, grouped_layout, use_psum_layout)
    _k_grouped((pieces[0], a[1]), (pieces[1], b[1]), d, grouped_layout, c, recipe)
