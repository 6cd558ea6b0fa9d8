"""Cross-entropy of a linear head without the [T, V] logits (arXiv 2410.10989, 2411.09009), per token:

    loss[t] = (1 - s) * nll + s * mean over v of -log p[v] + z * lse^2,    nll = lse - logits[target[t]]

with logits = x[t] @ weight.T, lse = logsumexp(logits), label smoothing s and z-loss z (arXiv 2204.02311); 0 where
target[t] == ignore_index. x [T, D] and weight [V, D] in fp32, bf16 or fp16 (fp64 on the PyTorch path). Logits are
rounded to the compute dtype as a linear layer's output is; sums and exponentials are fp32.

Triton path, losses of each token: logits come in chunks of about D columns, as large as x itself, by cuBLAS. The
forward reads each chunk once, keeping a running maximum and sum, and saves lse [T]. The backward makes each chunk
again, turns it in place into the loss's gradient by logits in one pass, and multiplies it twice: a chunk's rows of
dweight are then complete, and what is summed over chunks in fp32 is dx, smaller than dweight by V / T. Besides its
results the forward holds one x, the backward one x and dx in fp32.

Triton path, their sum or mean: no logits are made twice. Chunks of rows become losses and gradients in one kernel and
are multiplied at once; dx and, summed in fp32, dweight wait for the backward, which scales them. A chunk has SUM_ROWS
or more, so that adding to dweight takes less time than the product that is spared, and up to SUM_ELEMENTS logits.

Both: no atomics, no host syncs; ignored tokens are masked. Run on every GPU Triton knows.

PyTorch path: ignored tokens are left out altogether; chunks of rows become losses and gradients. A sum's dx and dweight
are made in the forward, while a chunk is warm; without a sum small problems keep gradients by logits for the backward.
Test: tests/kernels/test_cross_entropy.py. Benchmark: benchmarks/ops/cross_entropy.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _launch
from ._checks import check_float, check_shape, compute_dtype
from ._launch import tl, triton
from ._operator import operator

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]

MIN_COLUMNS = 1024  # of a chunk of logits, however narrow x is
SUM_ROWS, SUM_ELEMENTS = 2048, 1 << 27  # of a chunk of logits whose losses are summed: 256 MiB in half precision
PIECE_ELEMENTS = 1 << 20  # logits whose softmax or gradient the PyTorch path makes at once: what CPU caches hold
CHUNK_ELEMENTS = 1 << 22  # logits that the PyTorch path's forward makes at once
KEPT_ELEMENTS = 1 << 24  # gradients by logits that the PyTorch path keeps for the backward
SUMS = {"sum": (True, True), "sum, dx": (True, False), "sum, dweight": (False, True)}  # kept: dx, dweight
LOWEST, REDUCTIONS = torch.finfo(torch.float32).min, ("none", "mean", "sum")


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """fp32 logits in full; x [T, D], weight [V, D], targets [T] -> loss [T]."""
    logits = x.float() @ weight.float().T
    loss = F.cross_entropy(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    return loss + z_loss * logits.logsumexp(-1).square() * (targets != ignore_index)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _sum_up(logits, columns, pitch, largest, exps, total, SMOOTHED: tl.constexpr, BLOCK_V: tl.constexpr):
    """Maximum, sum of exponentials less it, and with SMOOTHED sum, of a row's logits and of what came before. A row is
    `pitch` numbers long, of which `columns` are logits: an even pitch lets a thread load several at a time."""
    for first in tl.range(0, columns, BLOCK_V):
        cols = first + tl.arange(0, BLOCK_V)
        logit = tl.load(logits + cols, mask=cols < pitch, other=0.0).to(tl.float32)
        logit = tl.where(cols < columns, logit, float("-inf"))
        if SMOOTHED:
            total += tl.sum(tl.where(cols < columns, logit, 0.0), axis=0)
        former = largest
        largest = tl.maximum(former, tl.max(logit, axis=0))
        exps = exps * tl.exp(former - largest) + tl.sum(tl.exp(logit - largest), axis=0)
    return largest, exps, total


@triton.jit
def _loss(target, largest, exps, at_target, total, vocab, label_smoothing, z_loss, SMOOTHED: tl.constexpr):
    """A token's loss and lse; NaN for a target outside the vocabulary."""
    log_exps = tl.log(exps)
    lse = tl.where((target >= 0) & (target < vocab), largest + log_exps, float("nan"))
    loss = (1.0 - label_smoothing) * ((largest - at_target) + log_exps) + z_loss * lse * lse
    if SMOOTHED:
        loss += label_smoothing * ((largest - total / vocab) + log_exps)
    return tl.where(lse == lse, loss, lse), lse


@triton.jit
def _into_gradient(
    logits, columns, pitch, col, lse, counts, scale, label_smoothing, uniform, z_loss, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A row's logits become their gradient in place, times `scale`; the target's is the one at `col`. What lies behind
    them becomes anything."""
    for first in tl.range(0, columns, BLOCK_V):
        cols = first + tl.arange(0, BLOCK_V)
        mask = cols < pitch
        logit = tl.load(logits + cols, mask=mask & counts, other=0.0).to(tl.float32)
        grad = tl.exp(logit - lse) * (1.0 + 2.0 * z_loss * lse) - uniform
        grad = tl.where(cols == col, grad - (1.0 - label_smoothing), grad) * scale
        tl.store(logits + cols, tl.where(counts, grad, 0.0).to(logits.dtype.element_ty), mask=mask)


@triton.jit
def _cross_entropy_statistics_kernel(
    logits_ptr, targets_ptr, state_ptr, loss_ptr, lse_ptr, columns, start, vocab, ignore_index, label_smoothing, z_loss,
    SMOOTHED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A row a program; logits [T, columns] of the vocabulary from `start` on. state [T, 4] holds maximum, sum of
    exponentials less it, logit at the target and sum of logits so far; the last chunk writes loss and lse [T]."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target != ignore_index:
        logits = logits_ptr + row * columns
        state = state_ptr + row * 4
        at_target = tl.load(state + 2)
        largest, exps, total = _sum_up(
            logits, columns, columns, tl.load(state), tl.load(state + 1), tl.load(state + 3), SMOOTHED, BLOCK_V
        )
        col = target - start
        at_target += tl.load(logits + col, mask=(col >= 0) & (col < columns), other=0.0).to(tl.float32)
        if start + columns == vocab:
            loss, lse = _loss(target, largest, exps, at_target, total, vocab, label_smoothing, z_loss, SMOOTHED)
            tl.store(lse_ptr + row, lse)
            tl.store(loss_ptr + row, loss)
        else:
            tl.store(state, largest)
            tl.store(state + 1, exps)
            tl.store(state + 2, at_target)
            tl.store(state + 3, total)


@triton.jit
def _cross_entropy_gradient_kernel(
    logits_ptr, targets_ptr, lse_ptr, dloss_ptr, columns, start, dloss_stride, ignore_index, label_smoothing, uniform,
    z_loss, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A row a program: logits [T, columns] become their gradient in place. uniform: label_smoothing / vocab."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    lse = tl.load(lse_ptr + row)
    counts = target != ignore_index
    dloss = tl.load(dloss_ptr + row * dloss_stride)
    _into_gradient(
        logits_ptr + row * columns, columns, columns, target - start, lse, counts, dloss, label_smoothing, uniform,
        z_loss, BLOCK_V,
    )  # fmt: skip


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, loss_ptr, lse_ptr, vocab, pitch, ignore_index, label_smoothing, uniform, z_loss,
    LOWEST: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A row a program: logits [T, vocab], rows `pitch` apart, become the gradient of their loss in place; writes loss
    and lse [T]."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    counts = target != ignore_index
    logits = logits_ptr + row * pitch
    # before sums over the row, whose barriers keep other warps from overwriting it
    at_target = tl.load(logits + target, mask=(target >= 0) & (target < vocab), other=0.0).to(tl.float32)
    lowest, zero = tl.full((), LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    largest, exps, total = _sum_up(logits, vocab, pitch, lowest, zero, zero, SMOOTHED, BLOCK_V)
    loss, lse = _loss(target, largest, exps, at_target, total, vocab, label_smoothing, z_loss, SMOOTHED)
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))
    tl.store(lse_ptr + row, tl.where(counts, lse, 0.0))
    _into_gradient(logits, vocab, pitch, target, lse, counts, 1.0, label_smoothing, uniform, z_loss, BLOCK_V)


# --- launchers --------------------------------------------------------------------------------------------------------


def _chunks(x: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(start, weight[start : start + C] in x's dtype, x @ its transpose [T, C]) over all of the vocabulary, with even
    C; each overwrites the one before."""
    (rows, width), vocab = x.shape, weight.shape[0]
    chunks = triton.cdiv(vocab, max(width, MIN_COLUMNS))
    step = min(vocab, 128 * triton.cdiv(triton.cdiv(vocab, chunks), 128))
    buffer = x.new_empty(rows * step)
    for start in range(0, vocab, step):
        part = weight[start : start + step].to(x.dtype)
        logits = buffer[: rows * part.shape[0]].view(rows, part.shape[0])
        yield start, part, torch.mm(x, part.T, out=logits)


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out = a @ b, or with `add` out += a @ b; halves give fp32 without a rounding where the matrix library can."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif out.dtype == torch.float32 and a.dtype.itemsize == 2 and a.is_cuda and not torch.version.hip:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), out=out)
    elif a.dtype == torch.float16:  # whose range the product may leave
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=int(add), out=out)
    elif add:
        out += torch.mm(a, b)
    else:
        out.copy_(torch.mm(a, b))


def _triton_statistics(
    logits: Tensor, targets: Tensor, state: Tensor, loss: Tensor, lse: Tensor, start: int, vocab: int,
    ignore_index: int, label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    """Takes logits [T, C], columns of the vocabulary from `start` on, into `state` or, being the last, into loss and
    lse."""
    rows, columns = logits.shape
    config = _launch.config("cross_entropy", "cross_entropy_statistics", _launch.arch(logits), C=columns)
    _launch.launch(
        _cross_entropy_statistics_kernel, (rows,),
        logits, targets, state, loss, lse, columns, start, vocab, ignore_index, label_smoothing, z_loss,
        SMOOTHED=label_smoothing > 0, **config,
    )  # fmt: skip


def _triton_fwd(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    dtype: torch.dtype, keep: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    rows, vocab = x.shape[0], weight.shape[0]
    targets = targets.contiguous()
    if keep in SUMS:
        return _triton_sums(x.to(dtype), weight, targets, ignore_index, label_smoothing, z_loss, *SUMS[keep])
    loss, lse = (x.new_zeros(rows, dtype=torch.float32) for _ in range(2))
    state = x.new_zeros(rows, 4, dtype=torch.float32)
    state[:, 0] = LOWEST
    for start, _, logits in _chunks(x.to(dtype), weight):
        _triton_statistics(logits, targets, state, loss, lse, start, vocab, ignore_index, label_smoothing, z_loss)
    return loss, lse, []


def _triton_losses(
    logits: Tensor, targets: Tensor, loss: Tensor, lse: Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float,
) -> None:  # fmt: skip
    """logits [T, V], of any pitch, become the gradient of their losses; writes loss and lse."""
    rows, vocab = logits.shape
    config = _launch.config("cross_entropy", "cross_entropy", _launch.arch(logits), C=vocab)
    _launch.launch(
        _cross_entropy_kernel, (rows,),
        logits, targets, loss, lse, vocab, logits.stride(0), ignore_index, label_smoothing, label_smoothing / vocab,
        z_loss, LOWEST=LOWEST, SMOOTHED=label_smoothing > 0, **config,
    )  # fmt: skip


def _sum_chunks(tokens: int, vocab: int) -> list[slice]:
    """Rows of each chunk whose losses are summed."""
    return _pieces(tokens, vocab, max(SUM_ELEMENTS, SUM_ROWS * vocab))


def _sum_dtype(dtype: torch.dtype, chunks: Sequence[slice]) -> torch.dtype:
    """Of dweight on its way, `dtype` in the end: fp32 or wider where it is summed over chunks, and for fp16, whose
    range a sum over tokens that is scaled to a mean afterwards may leave."""
    return torch.promote_types(dtype, torch.float32) if len(chunks) > 1 or dtype == torch.float16 else dtype


def _empty_sums(
    x: Tensor, weight: Tensor, dx_dtype: torch.dtype, dweight_dtype: torch.dtype, for_x: bool, for_weight: bool
) -> list[Tensor]:
    """dx and dweight, unwritten; [0, 0] where nobody wants them."""
    wanted = ((x, dx_dtype, for_x), (weight, dweight_dtype, for_weight))
    return [t.new_empty(t.shape if wants else (0, 0), dtype=dtype) for t, dtype, wants in wanted]


def _triton_sums(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, for_x: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Products in x's dtype -> loss, lse, and the gradients of the losses' sum: dx in x's dtype, dweight."""
    (tokens, _), vocab = x.shape, weight.shape[0]
    chunks, factor = _sum_chunks(tokens, vocab), weight.to(x.dtype)
    loss, lse = (x.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    dx, dweight = _empty_sums(x, weight, x.dtype, _sum_dtype(weight.dtype, chunks), for_x, for_weight)
    if not chunks:
        dweight.zero_()
    # rows at multiples of 16 numbers, for the kernel and for the matrix library
    buffer = x.new_empty(chunks[0].stop if chunks else 0, 16 * triton.cdiv(vocab, 16))[:, :vocab]
    for i, chunk in enumerate(chunks):
        logits = buffer[: chunk.stop - chunk.start]
        torch.mm(x[chunk], factor.T, out=logits)
        _triton_losses(logits, targets[chunk], loss[chunk], lse[chunk], ignore_index, label_smoothing, z_loss)
        if for_x:
            torch.mm(logits, factor, out=dx[chunk])
        if for_weight:
            _multiply(dweight, logits.T, x[chunk], add=i > 0)
    return loss, lse, [dx, dweight]


def _triton_gradient(
    logits: Tensor, targets: Tensor, lse: Tensor, dloss: Tensor, start: int, vocab: int, ignore_index: int,
    label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    """logits [T, C], columns of the vocabulary from `start` on, become the loss's gradient by them."""
    rows, columns = logits.shape
    config = _launch.config("cross_entropy", "cross_entropy_gradient", _launch.arch(logits), C=columns)
    _launch.launch(
        _cross_entropy_gradient_kernel, (rows,),
        logits, targets, lse, dloss, columns, start, dloss.stride(0), ignore_index, label_smoothing,
        label_smoothing / vocab, z_loss, **config,
    )  # fmt: skip


def _chunked_bwd(
    dloss: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both paths' backward from lse alone: dx in lse's dtype, dweight in weight's."""
    gradient = _triton_gradient if _launch.use_triton(x) else _torch_gradient
    x, targets = x.to(dtype), targets.contiguous()
    dx = x.new_zeros(x.shape, dtype=lse.dtype)
    dweight = weight.new_empty(weight.shape)
    for start, part, logits in _chunks(x, weight):
        gradient(logits, targets, lse, dloss, start, weight.shape[0], ignore_index, label_smoothing, z_loss)
        _multiply(dweight[start : start + part.shape[0]], logits.T, x, add=False)
        _multiply(dx, logits, part, add=True)
    return dx, dweight


# --- PyTorch path -----------------------------------------------------------------------------------------------------


def _pieces(rows: int, columns: int, elements: int) -> list[slice]:
    """As few as have at most `elements` each (a row at least), about equally long."""
    step = -(-rows // max(1, -(-rows // max(1, elements // columns))))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step or 1)]


def _chunks_that_count(rows: int, tokens: int, vocab: int) -> list[slice]:
    """The first `rows` of what `tokens` rows are divided into."""
    chunks = _pieces(tokens, vocab, CHUNK_ELEMENTS)
    return [slice(chunk.start, min(chunk.stop, rows)) for chunk in chunks if chunk.start < rows]


def _kept_tokens(targets: Tensor, ignore_index: int, *tensors: Tensor) -> list[Tensor]:
    """Positions of the tokens that count; targets and `tensors` at them, which are themselves if all count."""
    index = (targets != ignore_index).nonzero().squeeze(1)
    if index.numel() == targets.numel():
        return [index, targets, *tensors]
    return [index, *(t.index_select(0, index) for t in (targets, *tensors))]


def _at_target(log_p: Tensor, lse: Tensor, vocab: int, label_smoothing: float, z_loss: float) -> Tensor:
    """The gradient by the target's logit. Where the target is likely, p - 1 is far smaller than p's rounding: it is
    not made from p."""
    gradient = log_p.exp() - (1 - label_smoothing + label_smoothing / vocab) if label_smoothing else log_p.expm1()
    return gradient + 2 * z_loss * lse * log_p.exp() if z_loss else gradient


def _torch_fwd(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    dtype: torch.dtype, keep: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    tokens, vocab = x.shape[0], weight.shape[0]
    index, targets, x = _kept_tokens(targets, ignore_index, x)
    x, weight = x.to(dtype), weight.to(dtype)
    rows = x.shape[0]
    loss, lse = (x.new_empty(rows, 1, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    chunks, kept = _chunks_that_count(rows, tokens, vocab), []
    if keep == "logits":
        kept = [x.new_empty(p.stop - p.start, vocab) for p in _pieces(tokens, vocab, CHUNK_ELEMENTS)]
    for_x, for_weight = SUMS.get(keep, (False, False))
    if keep in SUMS:
        summed = _sum_dtype(dtype, _pieces(tokens, vocab, CHUNK_ELEMENTS))
        kept = _empty_sums(x, weight, dtype, summed, for_x, for_weight)
        if not chunks:
            kept[1].zero_()
    warm = x.new_empty(0 if keep == "logits" or not chunks else chunks[0].stop, vocab)
    for i, chunk in enumerate(chunks):
        logits = (kept[i] if keep == "logits" else warm)[: chunk.stop - chunk.start]
        torch.mm(x[chunk], weight.T, out=logits)
        for piece in _pieces(logits.shape[0], vocab, PIECE_ELEMENTS):
            target, losses, lses, rows_of_x = (t[chunk][piece] for t in (targets.unsqueeze(1), loss, lse, x))
            _torch_softmax(
                logits[piece], target, losses, lses, label_smoothing, z_loss, bool(keep), rows_of_x, weight
            )  # fmt: skip
        if for_x:
            torch.mm(logits, weight, out=kept[0][chunk])
        if for_weight:
            _multiply(kept[1], logits.T, x[chunk], add=i > 0)
    if keep == "logits":
        for chunk, logits in zip(_pieces(tokens, vocab, CHUNK_ELEMENTS), kept, strict=True):
            logits[max(0, rows - chunk.start) :] = 0
    if rows == tokens:
        return loss.view(rows), lse.view(rows), kept
    if for_x:
        kept[0] = x.new_zeros(tokens, x.shape[1]).index_copy_(0, index, kept[0])
    zeros = loss.new_zeros(tokens)
    return zeros.index_copy(0, index, loss.view(rows)), zeros.index_copy(0, index, lse.view(rows)), kept


def _torch_softmax(
    logits: Tensor, targets: Tensor, loss: Tensor, lse: Tensor, label_smoothing: float, z_loss: float, keep: bool,
    x: Tensor, weight: Tensor,
) -> None:  # fmt: skip
    """logits [rows, V] = x @ weight.T, targets [rows, 1]: writes loss and lse [rows, 1], and over the logits their
    gradient if `keep`, nothing of use otherwise.

    A target's probability says how far its logit lies below lse: no pass looks for the largest logit. Where it has
    underflowed, those rows' logits are made again."""
    vocab = logits.shape[1]
    p = logits.to(lse.dtype)
    at_target = p.gather(1, targets)
    mean = p.mean(1, keepdim=True) if label_smoothing else None
    torch.softmax(p, 1, out=p)
    log_p = p.gather(1, targets).log_()
    far = (log_p.squeeze(1) < math.log(torch.finfo(p.dtype).tiny)).nonzero().squeeze(1)
    if far.numel():
        log_p[far] = at_target[far] - (x[far] @ weight.T).to(p.dtype).logsumexp(1, keepdim=True)
    torch.sub(at_target, log_p, out=lse)
    torch.mul(log_p, label_smoothing - 1, out=loss)
    if mean is not None:
        loss.add_(lse - mean, alpha=label_smoothing)
    if z_loss:
        loss.add_(lse.square(), alpha=z_loss)
    if keep:
        if z_loss:
            p.mul_(1 + 2 * z_loss * lse)
        if label_smoothing:
            p.sub_(label_smoothing / vocab)
        p.scatter_(1, targets, _at_target(log_p, lse, vocab, label_smoothing, z_loss))
        if p.dtype != logits.dtype:
            logits.copy_(p)


def _torch_gradient(
    logits: Tensor, targets: Tensor, lse: Tensor, dloss: Tensor, start: int, vocab: int, ignore_index: int,
    label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    """`_triton_gradient` without ignored tokens."""
    for piece in _pieces(logits.shape[0], logits.shape[1], PIECE_ELEMENTS):
        grad = logits[piece].to(lse.dtype)
        lses, scale = lse[piece].unsqueeze(1), dloss[piece].unsqueeze(1)
        columns = targets[piece] - start
        inside = ((columns >= 0) & (columns < logits.shape[1])).nonzero().squeeze(1)
        columns = columns[inside]
        grad.sub_(lses)
        at_target = _at_target(grad[inside, columns], lses[inside, 0], vocab, label_smoothing, z_loss)
        grad.exp_().mul_((1 + 2 * z_loss * lses) * scale)
        if label_smoothing:
            grad.sub_(scale * (label_smoothing / vocab))
        grad[inside, columns] = at_target * scale[inside, 0]
        if grad.dtype != logits.dtype:
            logits[piece] = grad


def _torch_bwd(
    dloss: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, kept: list[Tensor], ignore_index: int,
    label_smoothing: float, z_loss: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens = x.shape[0]
    index, targets, x, lse, dloss = _kept_tokens(targets, ignore_index, x, lse, dloss)
    if kept:
        scale = dloss.to(dtype).unsqueeze(1)
        scaled, w = x.to(dtype) * scale, weight.to(dtype)
        dx, dweight = x.new_empty(x.shape, dtype=dtype), torch.empty_like(w)
        chunks = _chunks_that_count(x.shape[0], tokens, weight.shape[0]) or [slice(0, 0)]
        for i, (chunk, grad) in enumerate(zip(chunks, kept, strict=False)):
            grad = grad[: chunk.stop - chunk.start]
            torch.mm(grad, w, out=dx[chunk])
            _multiply(dweight, grad.T, scaled[chunk], add=i > 0)
        dx.mul_(scale)
    else:
        dx, dweight = _chunked_bwd(dloss, x, weight, targets, lse, ignore_index, label_smoothing, z_loss, dtype)
    dx = dx.to(x.dtype)
    if x.shape[0] != tokens:
        dx = dx.new_zeros(tokens, x.shape[1]).index_copy_(0, index, dx)
    return dx, dweight.to(weight.dtype)


# --- registration -----------------------------------------------------------------------------------------------------


@operator("linear_cross_entropy")
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    dtype: torch.dtype, keep: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """x [T, D], weight [V, D], targets [T] -> loss, lse [T], and what is kept for the backward, in the compute dtype
    `dtype`: nothing with `keep` ""; with one of SUMS dx and dweight of the losses' sum, or one of them and [0, 0]
    (dweight in `_sum_dtype`'s), then the backward's dloss must be one number for all tokens; with "logits", which is
    the PyTorch path's, the gradients by the logits of tokens that count, in chunks of rows that allocators can use
    again, rows past those tokens zero."""
    forward = _triton_fwd if _launch.use_triton(x) else _torch_fwd
    return forward(x, weight, targets, ignore_index, label_smoothing, z_loss, dtype, keep)


@operator("linear_cross_entropy_backward")
def _linear_cross_entropy_backward(
    dloss: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, kept: list[Tensor], ignore_index: int,
    label_smoothing: float, z_loss: float, dtype: torch.dtype, keep: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dloss [T] and the forward's inputs and outputs -> dx [T, D], dweight [V, D]; of a sum those that it kept."""
    if keep in SUMS:
        factor = dloss[:1].sum()  # all the same, or there are none
        return (kept[0] * factor).to(x.dtype), (kept[1] * factor).to(weight.dtype)
    if not _launch.use_triton(x):
        return _torch_bwd(dloss, x, weight, targets, lse, kept, ignore_index, label_smoothing, z_loss, dtype)
    dx, dweight = _chunked_bwd(dloss, x, weight, targets, lse, ignore_index, label_smoothing, z_loss, dtype)
    return dx.to(x.dtype), dweight


@_linear_cross_entropy.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float,
    dtype: torch.dtype, keep: str,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    tokens, vocab = x.shape[0], weight.shape[0]
    loss, lse = (x.new_empty(tokens, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    if keep in SUMS:
        if _launch.use_triton(x):
            summed = _sum_dtype(weight.dtype, _sum_chunks(tokens, vocab))
        else:
            summed = _sum_dtype(dtype, _pieces(tokens, vocab, CHUNK_ELEMENTS))
        return loss, lse, _empty_sums(x, weight, dtype, summed, *SUMS[keep])
    chunks = _pieces(tokens, vocab, CHUNK_ELEMENTS) if keep else []
    return loss, lse, [x.new_empty(chunk.stop - chunk.start, vocab, dtype=dtype) for chunk in chunks]


@_linear_cross_entropy_backward.register_fake
def _(
    dloss: Tensor, x: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, kept: list[Tensor], ignore_index: int,
    label_smoothing: float, z_loss: float, dtype: torch.dtype, keep: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if keep in SUMS:
        return kept[0].new_empty(kept[0].shape, dtype=x.dtype), kept[1].new_empty(kept[1].shape, dtype=weight.dtype)
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup(ctx, inputs, output) -> None:
    x, weight, targets, *settings = inputs
    _, lse, kept = output
    ctx.mark_non_differentiable(lse, *kept)
    ctx.set_materialize_grads(False)  # else zeros of kept's size would come back for it
    ctx.save_for_backward(x, weight, targets, lse, *kept)
    ctx.settings = settings


def _backward(ctx, dloss, dlse, dkept):
    if dloss is None:  # nothing came back
        return (None,) * 8
    x, weight, targets, lse, *kept = ctx.saved_tensors
    both = _linear_cross_entropy_backward(dloss, x, weight, targets, lse, kept, *ctx.settings)
    wanted = (d if wants else None for d, wants in zip(both, ctx.needs_input_grad, strict=False))
    return *wanted, *[None] * 6


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup)


# --- public op --------------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0,
    z_loss: float = 0.0, reduction: Literal["none", "mean", "sum"] = "none",
) -> Tensor:  # fmt: skip
    """Per-token loss in nats of a linear head, without materialising its logits.

    x [T, D] and weight [V, D] float, targets [T] int64 in [0, V) or `ignore_index` -> [T] fp32, 0 where ignored; with
    `reduction` "sum" their sum, with "mean" that over the number of tokens that are not ignored. A sum or mean is
    faster than one made of the losses afterwards: gradients are made in the forward, and kept. A mean of none is NaN,
    with gradients of zeros. Label smoothing is torch.nn.functional.cross_entropy's; `z_loss` weighs the square of the
    logits' logsumexp.
    Differentiable in x and weight. Raises TypeError, ValueError on other shapes, dtypes or settings; a target outside
    the vocabulary raises RuntimeError on the PyTorch path and gives NaN on the Triton path.
    """
    check_float("x", x)
    check_float("weight", weight)
    check_shape("weight", weight, (None, None))
    check_shape("x", x, (None, weight.shape[1]))
    check_shape("targets", targets, (x.shape[0],))
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: got {targets.dtype}, allowed is torch.int64")
    if weight.shape[0] == 0:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, allowed is a first dimension of 1 or more")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: got {label_smoothing}, allowed is 0 to 1")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss: got {z_loss}, allowed is 0 or more")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, allowed are {REDUCTIONS}")
    dtype, keep, by_triton = compute_dtype(x), "", _launch.use_triton(x)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        # by PyTorch where weights are no more than logits; its fp16 sums over tokens might overflow unscaled
        if reduction != "none" and (by_triton or (x.shape[0] >= x.shape[1] and dtype != torch.float16)):
            keep = next(name for name, wanted in SUMS.items() if wanted == (x.requires_grad, weight.requires_grad))
        elif not by_triton and x.shape[0] * weight.shape[0] <= KEPT_ELEMENTS:
            keep = "logits"
    loss, _, _ = _linear_cross_entropy(x, weight, targets, ignore_index, label_smoothing, z_loss, dtype, keep)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    count = (targets != ignore_index).sum()
    return torch.where(count > 0, loss.sum() / count.clamp(min=1), torch.nan)
