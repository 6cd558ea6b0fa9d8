"""Batches from token shards: shuffled, weighted by source, and resumable at an exact position.

An epoch draws as many rows as the split holds, from each source its share. A row is found from (seed, epoch, position)
alone, by a keyed permutation, so shuffling takes no memory, and the position is two numbers.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minids.data.store import TokenShards, is_padding
from minids.errors import InputError

IGNORED = -100  # label the loss skips, as in torch.nn.functional.cross_entropy
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Batch:
    """input_ids, labels: int64 [B, T]; labels[b, t] is input_ids[b, t], or -100 where the loss does not count it: first
    token of a document, padding, tokens outside the mask (the model shifts). cu_seqlens: int32 [n + 1], where documents
    start in the B * T tokens laid end to end, then B * T."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor


def make_batch(rows: list[tuple[np.ndarray, np.ndarray | None, list[int]]], pad_id: int) -> Batch:
    """A batch of rows of equal length, each (tokens, mask | None, bounds) as TokenShards.row gives it."""
    tokens = np.stack([row[0] for row in rows]).astype(np.int64)
    labels = tokens.copy()
    starts: list[int] = []
    for number, (_, mask, bounds) in enumerate(rows):
        if mask is not None:
            labels[number, ~mask] = IGNORED
        labels[number, bounds[:-1]] = IGNORED
        if is_padding(tokens[number, bounds[-2] :], pad_id):
            labels[number, bounds[-2] :] = IGNORED
        starts += [number * tokens.shape[1] + bound for bound in bounds[:-1]]
    cu_seqlens = torch.tensor([*starts, tokens.size], dtype=torch.int32)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), cu_seqlens)


def _mix(x: int) -> int:
    """The finaliser of splitmix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


def permuted(position: int, size: int, *key: int) -> int:
    """Where `position` goes in a pseudo-random permutation of range(size) chosen by `key`.

    A Feistel network on the smallest even number of bits that holds `size`, walked until it lands inside (Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): at most four steps on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    seed = 0
    for part in key:
        seed = _mix((seed + part + 0x9E3779B97F4A7C15) & _MASK64)
    while True:
        left, right = position >> half, position & low
        for round_number in range(6):
            left, right = right, left ^ (_mix(seed ^ _mix(right << 8 | round_number)) & low)
        position = left << half | right
        if position < size:
            return position


def shares(rows: list[int], weights: list[float] | None) -> list[int]:
    """Rows an epoch of sum(rows) rows draws from each source, by largest remainders. weights None: all they have."""
    if weights is None:
        return rows
    exact = [sum(rows) * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(rows)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: sum(rows) - sum(counts)]:
        counts[i] += 1
    return counts


class Loader:
    """Endless iterator of Batch; batches run on over the end of an epoch, so all are full.

    weights: {source name: share of an epoch's tokens}, for all sources; default: those written by `minids prepare`. A
    source with fewer rows than its share is repeated, shuffled anew. Same shards, seed and position: same batch.
    """

    def __init__(
        self, shards: TokenShards, split: str, batch_size: int, seed: int, weights: Mapping[str, float] | None = None
    ) -> None:
        self.shards, self.split, self.batch_size, self.seed = shards, split, batch_size, seed
        sources = shards.sources(split)
        if not shards.rows(split):
            raise InputError(f"{shards.path}: split {split!r} has no rows; give `minids prepare` more text")
        if weights is None:
            weights = {source.name: source.weight for source in sources if source.weight is not None}
        elif set(weights) != {source.name for source in sources}:
            names = ", ".join(source.name for source in sources)
            raise InputError(f"{shards.path}: weights for {', '.join(weights)}; wanted one for each of {names}")
        if weights and (min(weights.values()) < 0 or not sum(weights.values()) > 0):
            raise InputError(f"{shards.path}: weights {dict(weights)}; wanted numbers >= 0, not all 0")
        if batch_size * shards.seq_len >= 1 << 31:  # where documents begin is told in 32 bits
            raise InputError(
                f"train.batch_size: got {batch_size} rows of {shards.seq_len} tokens, wanted fewer than 2^31 tokens; "
                "train.grad_accumulation_steps makes a step larger"
            )
        self._rows = [source.rows for source in sources]
        self._shares = shares(self._rows, [weights[source.name] for source in sources] if weights else None)
        for source, share in zip(sources, self._shares, strict=True):
            if share and not source.rows:
                raise InputError(f"{shards.path}: source {source.name!r} has a weight but no rows in split {split!r}")
        self._ends = list(itertools.accumulate(self._shares))
        self.epoch, self.index = 0, 0  # of the next row

    @property
    def rows_per_epoch(self) -> int:
        return self._ends[-1]

    def _locate(self, epoch: int, index: int) -> tuple[int, int]:
        """(source, row of that source) of the row at a position."""
        slot = permuted(index, self.rows_per_epoch, self.seed, epoch)
        source = bisect.bisect_right(self._ends, slot)
        share, rows = self._shares[source], self._rows[source]
        drawn = epoch * share + slot - (self._ends[source] - share)  # of this source, in all epochs
        turn, place = divmod(drawn, rows)
        return source, permuted(place, rows, self.seed, source + 1, turn)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        rows = []
        for _ in range(self.batch_size):
            source, number = self._locate(self.epoch, self.index)
            rows.append(self.shards.source_row(self.split, source, number))
            self.index += 1
            if self.index == self.rows_per_epoch:
                self.epoch, self.index = self.epoch + 1, 0
        return make_batch(rows, self.shards.pad_id)

    def state(self) -> dict[str, Any]:
        """The position, for JSON: `load_state` of it in another process goes on with the same next batch."""
        return {
            "epoch": self.epoch,
            "index": self.index,
            "seed": self.seed,
            "shares": self._shares,
            "data": self.shards.fingerprint,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Raises InputError when the position belongs to other data, another seed or other weights."""
        own = self.state()
        for key in ("data", "seed", "shares"):
            if state.get(key) != own[key]:
                raise InputError(
                    f"{self.shards.path}: the saved position is for {key} {state.get(key)}, this run has {own[key]}; "
                    "resume with the data and settings the run began with"
                )
        self.epoch, self.index = int(state["epoch"]), int(state["index"])


def eval_batches(shards: TokenShards, split: str, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """The split once, in fixed order, at most `limit` batches. The last batch may be smaller.

    With a limit the rows are spread evenly over the split, so that every source and part of it is seen.
    """
    total = shards.rows(split)
    wanted = total if limit is None else min(total, limit * batch_size)
    numbers = [i * total // wanted for i in range(wanted)]
    for start in range(0, wanted, batch_size):
        rows = [shards.row(split, number) for number in numbers[start : start + batch_size]]
        yield make_batch(rows, shards.pad_id)
