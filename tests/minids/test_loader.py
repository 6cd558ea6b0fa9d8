from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.data.loader import IGNORED, Loader, eval_batches, make_batch, permuted, shares
from minids.data.pack import PackedRow
from minids.data.store import HOLDOUT, TRAIN, ShardWriter, TokenShards
from minids.errors import InputError

SEQ_LEN = 4


def make_shards(folder, rows: list[int], weights: list[float | None] | None = None) -> TokenShards:
    """`rows[s]` rows of source s, each of tokens 1000 * s + row number."""
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, SEQ_LEN, 6400, 2, "f" * 64, shard_bytes=60)
    for source, count in enumerate(rows):
        for number in range(count):
            writer.add(PackedRow(np.full(SEQ_LEN, 1000 * source + number + 10), None, [0, SEQ_LEN]), TRAIN, source)
    facts = {"bytes": 1}
    names = [{"name": f"s{i}", "weight": weights[i] if weights else None} for i in range(len(rows))]
    writer.finish(names, {TRAIN: facts, HOLDOUT: facts})
    return TokenShards(folder)


def drawn(loader: Loader, batches: int) -> list[int]:
    return [int(row[0]) for _ in range(batches) for row in next(loader).input_ids]


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64), st.integers(0, 5))
def test_permuted_is_a_permutation(size, seed, epoch):
    assert sorted(permuted(i, size, seed, epoch) for i in range(size)) == list(range(size))


def test_permutations_mix_and_differ_by_key():
    orders = [[permuted(i, 1000, seed, epoch) for i in range(1000)] for seed in range(3) for epoch in range(3)]
    for i, a in enumerate(orders):
        assert abs(np.corrcoef(a, range(1000))[0, 1]) < 0.12  # 3.8 standard deviations
        assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.12
        for b in orders[:i]:
            assert sum(x == y for x, y in zip(a, b, strict=True)) < 10  # one expected


def test_an_epoch_shows_every_row_once_in_a_new_order_each_time(tmp_path):
    loader = Loader(make_shards(tmp_path / "x", [12, 5]), TRAIN, 1, seed=3)
    first, second = drawn(loader, 17), drawn(loader, 17)
    assert sorted(first) == sorted(second) == [*range(10, 22), *range(1010, 1015)]
    assert first != second
    assert first != drawn(Loader(loader.shards, TRAIN, 1, seed=4), 17)
    assert first == drawn(Loader(loader.shards, TRAIN, 1, seed=3), 17)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 7),
    st.integers(0, 12),
    st.integers(0, 9),
    st.booleans(),
)
def test_resumed_equals_uninterrupted(tmp_path_factory, rows, batch_size, before, seed, weighted):
    weights = [float(i + 1) for i in range(len(rows))] if weighted else None
    shards = make_shards(tmp_path_factory.mktemp("s") / "x", rows, weights)
    loader = Loader(shards, TRAIN, batch_size, seed)
    drawn(loader, before)
    state = json.loads(json.dumps(loader.state()))
    resumed = Loader(TokenShards(shards.path), TRAIN, batch_size, seed)
    resumed.load_state(state)
    for _ in range(2 * sum(rows)):
        ours, theirs = next(loader), next(resumed)
        assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.cu_seqlens, theirs.cu_seqlens)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**9), st.floats(0.01, 100)), min_size=1, max_size=8))
def test_shares_are_exact(pairs):
    rows, weights = [p[0] for p in pairs], [p[1] for p in pairs]
    counts = shares(rows, weights)
    assert sum(counts) == sum(rows)
    assert all(abs(n - sum(rows) * w / sum(weights)) <= 1 for n, w in zip(counts, weights, strict=True))


def test_weights_set_the_share_of_every_epoch_and_short_sources_repeat_evenly(tmp_path):
    loader = Loader(make_shards(tmp_path / "x", [5, 15], [0.75, 0.25]), TRAIN, 4, seed=0)
    for _ in range(3):
        counts = Counter(drawn(loader, 5))
        few = [counts[10 + i] for i in range(5)]
        assert few == [3] * 5  # 15 of 20 rows from 5
        assert sum(counts.values()) == 20
    assert drawn(loader, 5) != drawn(loader, 5)
    # over three epochs the 15 rows of the other source were each drawn once
    again = Counter(drawn(Loader(loader.shards, TRAIN, 4, seed=0), 15))
    assert [again[1010 + i] for i in range(15)] == [1] * 15


def test_weights_can_be_given_to_the_loader(tmp_path):
    shards = make_shards(tmp_path / "x", [5, 5], [0.5, 0.5])
    assert max(drawn(Loader(shards, TRAIN, 2, 0, {"s0": 1, "s1": 0}), 10)) < 1000
    with pytest.raises(InputError, match="wanted one for each of s0, s1"):
        Loader(shards, TRAIN, 2, 0, {"s0": 1})
    with pytest.raises(InputError, match="wanted numbers >= 0"):
        Loader(shards, TRAIN, 2, 0, {"s0": 0, "s1": 0})


def test_a_position_in_other_data_or_of_another_seed_is_refused(tmp_path):
    shards = make_shards(tmp_path / "x", [5])
    state = Loader(shards, TRAIN, 2, seed=0).state()
    with pytest.raises(InputError, match="saved position is for seed 0, this run has 1"):
        Loader(shards, TRAIN, 2, seed=1).load_state(state)
    with pytest.raises(InputError, match="saved position is for data"):
        Loader(make_shards(tmp_path / "y", [6]), TRAIN, 2, seed=0).load_state(state)


def test_an_empty_split_cannot_be_trained_on_and_evaluates_to_nothing(tmp_path):
    shards = make_shards(tmp_path / "x", [5])
    with pytest.raises(InputError, match="split 'holdout' has no rows"):
        Loader(shards, HOLDOUT, 2, seed=0)
    assert list(eval_batches(shards, HOLDOUT, 2, 3)) == []


def test_labels_skip_starts_padding_and_the_masked():
    rows = [
        (np.array([5, 6, 7, 8]), None, [0, 2, 4]),
        (np.array([5, 6, 7, 2]), None, [0, 3, 4]),  # 2 is padding
        (np.array([5, 6, 7, 8]), np.array([True, True, False, True]), [0, 4]),
    ]
    batch = make_batch(rows, pad_id=2)
    no = IGNORED
    assert batch.labels.tolist() == [[no, 6, no, 8], [no, 6, 7, no], [no, 6, no, 8]]
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 7, 8, 12]
    assert (batch.input_ids.dtype, batch.labels.dtype, batch.cu_seqlens.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )


def test_documents_end_where_the_pad_token_is_their_end(tmp_path):
    """Many tokenizers pad with the token that ends a document: only a row's last segment can be padding."""
    rows = [
        (np.array([5, 6, 2, 8, 2, 2]), None, [0, 3, 5, 6]),
        (np.array([5, 6, 2, 2, 2, 2]), np.array([False, True, True, False, False, False]), [0, 3, 6]),
        (np.array([5, 2, 2, 8, 9, 2]), None, [0, 3, 6]),
    ]
    no = IGNORED
    want = [[no, 6, 2, no, 2, no], [no, 6, 2, no, no, no], [no, 2, 2, no, 9, 2]]
    assert make_batch(rows, pad_id=2).labels.tolist() == want
    for has_mask, chosen in ((False, (0, 2)), (True, (1,))):
        writer = ShardWriter(tmp_path, 6, 10, 2, "x", has_mask)
        for number in chosen:
            tokens, mask, bounds = rows[number]
            writer.add(PackedRow(tokens, mask, bounds))
        writer.close()
        assert writer.targets["train"] == sum(label != no for number in chosen for label in want[number])


def test_evaluation_reads_the_split_once_in_order(tmp_path):
    shards = make_shards(tmp_path / "x", [5, 4])
    seen = [int(row[0]) for batch in eval_batches(shards, TRAIN, 2) for row in batch.input_ids]
    assert seen == [*range(10, 15), *range(1010, 1014)]
    limited = [int(row[0]) for batch in eval_batches(shards, TRAIN, 2, limit=2) for row in batch.input_ids]
    assert len(limited) == 4 and min(limited) < 1000 < max(limited)
