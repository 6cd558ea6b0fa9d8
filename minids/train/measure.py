"""Held-out likelihood of a language model: nats per token and bits per byte.

Bits per byte = nats / ln 2 / UTF-8 bytes, both over the tokens that are predicted; it compares models with different
tokenizers. Special tokens count with 0 bytes: predicting the end of a document is part of the price.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from minids.data.loader import IGNORED, Batch
from minids.data.pack import Sample
from minids.model.model import DeepseekV3
from minids.tokenizer import Tokenizer


def token_bytes(tokenizer: Tokenizer) -> torch.Tensor:
    """int64 [vocab]: bytes of text in each token, 0 for special tokens."""
    return torch.tensor([len(tokenizer.decode_bytes([token])) for token in range(tokenizer.vocab_size)])


def join(documents: Sequence[Sample], seq_len: int, pad_id: int) -> Batch:
    """Whole documents end to end as one batch; the mask (None: everything) says what counts, first tokens never do.

    Rows are as few as `seq_len` allows and documents may run over their ends: only cu_seqlens tells them apart.
    """
    lengths = [len(document.tokens) for document in documents]
    rows = -(-sum(lengths) // seq_len)
    width = -(-sum(lengths) // rows)
    padding = rows * width - sum(lengths)
    tokens = np.concatenate([*(d.tokens for d in documents), np.full(padding, pad_id)]).astype(np.int64)
    counts = [np.ones(n, bool) if d.mask is None else d.mask for d, n in zip(documents, lengths, strict=True)]
    counted = np.concatenate([*counts, np.zeros(padding, bool)])
    starts = np.cumsum([0, *lengths])
    counted[starts[:-1]] = False
    ends = [*starts, tokens.size] if padding else starts
    return Batch(
        torch.from_numpy(tokens).view(rows, width),
        torch.from_numpy(np.where(counted, tokens, IGNORED)).view(rows, width),
        torch.tensor(ends, dtype=torch.int32),
    )


@torch.no_grad()
def likelihood(model: DeepseekV3, batches: Iterable[Batch], token_bytes: torch.Tensor) -> dict[str, float]:
    """{"nll": nats per token, "bits_per_byte", "tokens", "bytes"} over the batches' labels.

    token_bytes: as above, on the CPU like the batches. Without counted tokens only the counts, without text no bits.
    """
    device = next(model.parameters()).device
    nats, tokens, size = 0.0, 0, 0
    for batch in batches:
        losses = model.losses(batch.input_ids.to(device), batch.labels.to(device), batch.cu_seqlens, mtp=False)
        nats += losses.nll_sum.item()
        tokens += int(losses.tokens)
        size += int(token_bytes[batch.labels[batch.labels >= 0]].sum())
    values: dict[str, float] = {"nll": nats / tokens} if tokens else {}
    if size:
        values["bits_per_byte"] = nats / math.log(2) / size
    return {**values, "tokens": tokens, "bytes": size}
