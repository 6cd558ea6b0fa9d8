"""The PyTorch path of mla_attention: packed documents on the CPU, without a mask over documents.

Documents are laid side by side in rectangles of similar length: a causal row never sees the padding behind it. Within a
rectangle, blocks of query rows meet all their keys in batched matrix products, small enough for their scores to stay in
the caches. Scores are rounded to the compute dtype before an fp32 softmax, as in any unfused attention.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

QUERY_BLOCK = 64  # rows of scores in memory at once, a document and head
SCORES = 1 << 20  # scores worked on at once where documents are short: what stays in a CPU's caches
KEPT_ELEMENTS = 1 << 23  # of laid out rows and probabilities for the backward at most; made again where there are more


def statistic(x: Tensor) -> torch.dtype:
    """The dtype of sums over x."""
    return torch.promote_types(x.dtype, torch.float32)


class _Side:
    """Where the tokens of `documents` (their bounds) lie, as rectangles see them: `rows` documents of at most `length`
    tokens side by side. Equally long neighbours are tokens `first`.. of the input. Otherwise `gather` [rows * length]
    holds token numbers (a document's last token repeated behind its end), and `tokens` and `places` say which token
    each real place is."""

    def __init__(self, documents: list[tuple[int, int]]) -> None:
        self.rows, self.length, self.first = len(documents), max(e - s for s, e in documents), documents[0][0]
        self.gather = self.tokens = self.places = None
        starts = range(self.first, self.first + self.rows * self.length, self.length)
        if documents == [(start, start + self.length) for start in starts]:
            return
        start = torch.tensor([d[0] for d in documents]).unsqueeze(1)
        end = torch.tensor([d[1] for d in documents]).unsqueeze(1)
        self.gather = torch.minimum(start + torch.arange(self.length), end - 1).flatten()
        self.places = (start + torch.arange(self.length) < end).flatten().nonzero().squeeze(1)
        self.tokens = self.gather[self.places]

    def _laid_out(self, x: Tensor) -> Tensor:
        """[T, H, D] -> [rows, H, length, D], a view if it can be."""
        if self.gather is None:
            x = x[self.first : self.first + self.rows * self.length]
        else:
            x = x.index_select(0, self.gather.to(x.device))
        return x.unflatten(0, (self.rows, self.length)).transpose(1, 2)

    def take(self, parts: list[Tensor], heads: int, out: Tensor | None = None) -> Tensor:
        """[T, H or 1, D], or two parts of its columns -> [rows * H, length, D], in `out` if given, else a view if it
        can be."""
        laid_out = [self._laid_out(part.expand(-1, heads, -1)) for part in parts]
        if out is not None:
            torch.cat(laid_out, -1, out=out.unflatten(0, (self.rows, heads)))
            return out
        return (laid_out[0] if len(parts) == 1 else torch.cat(laid_out, -1)).flatten(0, 1)

    def open(self, parts: list[Tensor], fill: float = 0.0) -> list[Tensor]:
        """What blocks of rows of `parts` [T, H, D] are written to: [rows, H, length, D] for each part, the part's own
        memory if it can be. `close` follows."""
        if self.gather is None:
            return [self._laid_out(part) for part in parts]
        return [part.new_full((self.rows, part.shape[1], self.length, part.shape[2]), fill) for part in parts]

    def write(self, opened: list[Tensor], rows: slice, x: Tensor) -> None:
        """x [rows * H, M, D], columns of all parts side by side."""
        first = 0
        for part in opened:
            width = part.shape[-1]
            values = x if width == x.shape[-1] else x[..., first : first + width]
            part[:, :, rows] = values.unflatten(0, (self.rows, -1))
            first += width

    def close(self, parts: list[Tensor], opened: list[Tensor]) -> None:
        if self.tokens is None or self.places is None:
            return
        for part, values in zip(parts, opened, strict=True):
            real = values.transpose(1, 2).flatten(0, 1).index_select(0, self.places.to(part.device))
            part.index_copy_(0, self.tokens.to(part.device), real)

    def put(self, parts: list[Tensor], x: Tensor) -> None:
        """Writes x [rows * H, length, D] to its tokens in what `take` had: a part of one head is the heads' sum."""
        x = x.unflatten(0, (self.rows, -1))
        widths = [part.shape[-1] for part in parts]
        for part, values in zip(parts, x.split(widths, -1), strict=True):
            if part.shape[1] < values.shape[1]:
                values = values.sum(1, keepdim=True)
            opened = self.open([part])
            opened[0].copy_(values)
            self.close([part], opened)

    def take_gradient(self, x: Tensor) -> Tensor:
        """As `take`, with zeros behind the documents' ends."""
        if self.tokens is None or self.places is None:
            return self.take([x], x.shape[1])
        padded = x.new_zeros(self.rows * self.length, *x.shape[1:])
        padded.index_copy_(0, self.places.to(x.device), x.index_select(0, self.tokens.to(x.device)))
        return padded.view(self.rows, self.length, *x.shape[1:]).transpose(1, 2).flatten(0, 1)


class _Rectangle:
    """Documents worked on at once, whose queries and keys lie at `queries` and `keys`. `blocks`: query rows taken at
    once, and how many keys they may see; rows before the first see none."""

    def __init__(self, queries: list[tuple[int, int]], keys: list[tuple[int, int]], causal: bool) -> None:
        self.q = _Side(queries)
        self.k = self.q if keys == queries else _Side(keys)
        length, ahead = self.q.length, self.k.length - self.q.length  # the last row sees the last key
        rows = [
            slice(start, min(start + QUERY_BLOCK, length))
            for start in range(max(0, -ahead) if causal else 0, length, QUERY_BLOCK)
        ]
        self.blocks = [(block, slice(0, block.stop + ahead if causal else self.k.length)) for block in rows]


@functools.lru_cache(maxsize=16)
def _rectangles(
    bounds: tuple[int, ...], key_bounds: tuple[int, ...], heads: int, causal: bool
) -> list[_Rectangle]:  # fmt: skip
    """Documents that have queries and keys, grouped so that a block of query rows has at most SCORES scores. Where
    queries are their own keys, padding adds at most a quarter to a causal document's length, else there is none."""
    groups: dict[tuple[int, int], list[tuple[tuple[int, int], tuple[int, int]]]] = {}
    for queries, keys in zip(itertools.pairwise(bounds), itertools.pairwise(key_bounds), strict=True):
        lengths = queries[1] - queries[0], keys[1] - keys[0]
        if 0 in lengths:
            continue
        step = max(8, 1 << max(0, lengths[0].bit_length() - 3)) if causal and key_bounds == bounds else 1
        group = -(-lengths[0] // step) * step, -(-lengths[1] // step) * step
        groups.setdefault(group, []).append((queries, keys))
    rectangles = []
    for (length, seen), documents in sorted(groups.items()):
        size = max(1, SCORES // (max(1, heads) * min(length, QUERY_BLOCK) * seen))
        for i in range(0, len(documents), size):
            some = documents[i : i + size]
            rectangles.append(_Rectangle([q for q, _ in some], [k for _, k in some], causal))
    return rectangles


def _bounds(name: str, cu_seqlens: Tensor, tokens: int) -> tuple[int, ...]:
    bounds = tuple(cu_seqlens.tolist())
    if bounds[0] != 0 or bounds[-1] != tokens or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"{name}: got {list(bounds[:4])}...{list(bounds[-2:])}, allowed is 0, rising, to {tokens}")
    return bounds


def _work(
    q: list[Tensor], v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool
) -> tuple[list[_Rectangle], bool]:  # fmt: skip
    """-> rectangles, and whether they leave no row of q and no key out."""
    bounds = _bounds("cu_seqlens", cu_seqlens, q[0].shape[0])
    key_bounds = _bounds("cu_seqlens_k", cu_seqlens_k, v.shape[0]) if cu_seqlens_k is not cu_seqlens else bounds
    return _rectangles(bounds, key_bounds, q[0].shape[1], causal), key_bounds == bounds


def _shapes(rectangle: _Rectangle, heads: int, widths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Of what the forward keeps of a rectangle: q, k, v as laid out, rows of `widths`, and each block's probabilities
    [B, M, N]."""
    batch = rectangle.q.rows * heads
    lengths = (rectangle.q.length, rectangle.k.length, rectangle.k.length)
    laid_out = [(batch, length, width) for length, width in zip(lengths, widths, strict=True)]
    return laid_out + [(batch, rows.stop - rows.start, seen.stop) for rows, seen in rectangle.blocks]


def _kept_size(rectangles: list[_Rectangle], heads: int, widths: Sequence[int]) -> int:
    """Number of elements that are kept: all or none."""
    size = sum(math.prod(shape) for rectangle in rectangles for shape in _shapes(rectangle, heads, widths))
    return size if size <= KEPT_ELEMENTS else 0


def _places(
    kept: Tensor, rectangles: list[_Rectangle], heads: int, widths: Sequence[int]
) -> Iterator[list[Tensor | None]]:  # fmt: skip
    """For each rectangle the places of `_shapes` in `kept`, None where nothing is kept."""
    first = 0
    for rectangle in rectangles:
        places: list[Tensor | None] = []
        for shape in _shapes(rectangle, heads, widths):
            places.append(kept[first : first + math.prod(shape)].view(shape) if kept.numel() else None)
            first += math.prod(shape)
        yield places


def _widths(*rows: list[Tensor]) -> list[int]:
    return [sum(part.shape[-1] for part in x) for x in rows]


def _product(nothing: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha a b of batches. `nothing`: a scalar that is not looked at."""
    return torch.baddbmm(nothing, a, b, beta=0, alpha=alpha)


def _scores(nothing: Tensor, q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Query block q [B, M, D] against the keys k [B, N, D] that it may see -> [B, M, N]; `hidden` [M, M] is added for
    the last ones, and is [0, 0] where nothing is causal."""
    scores = _product(nothing, q, k.mT, scale)
    if hidden.numel():
        rows = scores.shape[1]
        scores[:, :, -rows:].add_(hidden if rows == QUERY_BLOCK else hidden[:rows, :rows])
    return scores


def _hidden(x: Tensor, causal: bool) -> Tensor:
    """What is added to the scores of a block's rows and its own keys: -inf for those that follow."""
    return x.new_full((QUERY_BLOCK, QUERY_BLOCK) if causal else (0, 0), -math.inf).triu_(1)


def forward(
    q: list[Tensor], k: list[Tensor], v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool, scale: float,
    with_lse: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, heads, _ = q[0].shape
    rectangles, whole = _work(q, v, cu_seqlens, cu_seqlens_k, causal)
    make = torch.empty if whole else torch.zeros
    out = make(tokens, heads, v.shape[-1], dtype=v.dtype, device=v.device)
    hidden, nothing = _hidden(v, causal), v.new_empty(())
    lse = v.new_full((tokens if with_lse else 0, heads, 1), math.inf, dtype=statistic(v))
    widths = _widths(q, k, [v])
    kept = v.new_empty(_kept_size(rectangles, heads, widths) if keep else 0)
    for rectangle, places in zip(rectangles, _places(kept, rectangles, heads, widths), strict=True):
        qr, kr, vr = _laid_out(rectangle, places, q, k, v)
        result = rectangle.q.open([out])
        sums = rectangle.q.open([lse], math.inf) if with_lse else []
        for (rows, seen), place in zip(rectangle.blocks, places[3:], strict=True):
            scores = _scores(nothing, qr[:, rows], kr[:, seen], hidden, scale)
            if sums:
                rectangle.q.write(sums, rows, scores.to(lse.dtype).logsumexp(-1, keepdim=True))
            p = torch.softmax(scores, -1, out=scores if place is None else place)
            rectangle.q.write(result, rows, torch.bmm(p, vr[:, seen]))
        rectangle.q.close([out], result)
        if sums:
            rectangle.q.close([lse], sums)
    return out, lse.squeeze(2).t().contiguous(), kept


def _laid_out(
    rectangle: _Rectangle, places: Sequence[Tensor | None], q: list[Tensor], k: list[Tensor], v: Tensor,
    made: bool = False,
) -> list[Tensor]:  # fmt: skip
    """q, k, v of a rectangle, in the first of `places` if there are any: where they are already, if `made`."""
    sides = (rectangle.q, q), (rectangle.k, k), (rectangle.k, [v])
    return [
        place if made and place is not None else side.take(x, q[0].shape[1], place)
        for (side, x), place in zip(sides, places[:3], strict=True)
    ]


def backward(
    dout: Tensor, q: list[Tensor], k: list[Tensor], v: Tensor, out: Tensor, lse: Tensor, kept: Tensor,
    cu_seqlens: Tensor, cu_seqlens_k: Tensor, causal: bool, scale: float, dq: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """dq [T, H, D], whole or in two parts, is written to; -> dk, dv. With something kept q and k only have shapes."""
    heads, hidden, nothing = q[0].shape[1], _hidden(v, causal), v.new_empty(())
    rectangles, whole = _work(q, v, cu_seqlens, cu_seqlens_k, causal)
    make = torch.empty if whole else torch.zeros
    dk, dv = ([make(part.shape, dtype=part.dtype, device=part.device) for part in x] for x in (k, [v]))
    if not whole:
        for part in dq:
            part.zero_()
    for rectangle, places in zip(rectangles, _places(kept, rectangles, heads, _widths(q, k, [v])), strict=True):
        qr, kr, vr = _laid_out(rectangle, places, q, k, v, made=True)
        dor = rectangle.q.take_gradient(dout)
        dqr, dkr, dvr = rectangle.q.open(dq), None, None
        for (rows, seen), p in zip(reversed(rectangle.blocks), reversed(places[3:]), strict=True):
            if p is None:
                p = _scores(nothing, qr[:, rows], kr[:, seen], hidden, scale)
                torch.softmax(p, -1, out=p)
            dob = dor[:, rows]
            dp = torch.bmm(dob, vr[:, seen].mT)
            ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
            rectangle.q.write(dqr, rows, _product(nothing, ds, kr[:, seen], scale))
            # not baddbmm_: into some of the keys it multiplies one batch entry after the other
            of_k, of_v = _product(nothing, ds.mT, qr[:, rows], scale), torch.bmm(p.mT, dob)
            if dkr is None or dvr is None:  # the last block, which sees all keys
                dkr, dvr = of_k, of_v
            else:
                dkr[:, seen].add_(of_k)
                dvr[:, seen].add_(of_v)
        rectangle.q.close(dq, dqr)
        for parts, gradient in ((dk, dkr), (dv, dvr)):
            if gradient is not None:
                rectangle.k.put(parts, gradient)
    return [*dk, *dv]
