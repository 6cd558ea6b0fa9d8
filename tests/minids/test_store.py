from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.data.pack import PackedRow
from minids.data.store import HOLDOUT, TRAIN, ShardWriter, TokenShards
from minids.errors import InputError

FACTS = {TRAIN: {"bytes": 84}, HOLDOUT: {"bytes": 0}}


def write(folder, rows, seq_len, vocab_size=6400, has_mask=False, shard_bytes=1 << 20, sources=1):
    folder.mkdir()
    writer = ShardWriter(folder, seq_len, vocab_size, 2, "f" * 64, has_mask, shard_bytes)
    for number, row in enumerate(rows):
        writer.add(row, TRAIN, number % sources)
    writer.finish([{"name": str(i), "weight": None} for i in range(sources)], FACTS)
    return folder


@st.composite
def packed_rows(draw):
    seq_len = draw(st.integers(2, 33))
    vocab_size = draw(st.sampled_from([300, 1 << 16, (1 << 16) + 1, 129280]))
    has_mask = draw(st.booleans())
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        tokens = draw(st.lists(st.integers(0, vocab_size - 1), min_size=seq_len, max_size=seq_len))
        starts = draw(st.sets(st.integers(1, seq_len - 1)))
        mask = np.array(draw(st.lists(st.booleans(), min_size=seq_len, max_size=seq_len)))
        rows.append(PackedRow(np.array(tokens), mask if has_mask else None, [0, *sorted(starts), seq_len]))
    return seq_len, vocab_size, has_mask, rows


@settings(deadline=None, max_examples=60)
@given(packed_rows(), st.sampled_from([1, 200, 1 << 20]), st.integers(1, 3))
def test_rows_come_back_as_written(tmp_path_factory, case, shard_bytes, sources):
    seq_len, vocab_size, has_mask, rows = case
    folder = write(tmp_path_factory.mktemp("s") / "x", rows, seq_len, vocab_size, has_mask, shard_bytes, sources)
    shards = TokenShards(folder)
    assert (shards.seq_len, shards.vocab_size, shards.has_mask) == (seq_len, vocab_size, has_mask)
    assert shards.rows(TRAIN) == len(rows) and shards.rows(HOLDOUT) == 0
    by_source = [row for source in range(sources) for row in rows[source::sources]]
    for number, row in enumerate(by_source):
        tokens, mask, bounds = shards.row(TRAIN, number)
        assert tokens.dtype == (np.uint16 if vocab_size <= 65536 else np.uint32)
        assert np.array_equal(tokens, row.tokens) and bounds == row.bounds
        assert (mask is None) if row.mask is None else np.array_equal(mask, row.mask)
    if shard_bytes == 1:
        assert len(shards.index["shards"]) == len(rows)


@pytest.fixture
def folder(tmp_path):
    rows = [PackedRow(np.arange(i, i + 16), None, [0, 5, 16]) for i in range(3)]
    return write(tmp_path / "shards", rows, 16)


def test_a_flipped_bit_is_refused_by_file_name(folder):
    path = folder / "train-000-00000.bin"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"train-000-00000\.bin: damaged"):
        TokenShards(folder)
    assert TokenShards(folder, verify=False).rows(TRAIN) == 3


@pytest.mark.parametrize("harm", ["cut", "remove"])
def test_a_cut_or_missing_file_is_refused_even_unverified(folder, harm):
    path = folder / "train-000-00000.bin"
    path.write_bytes(path.read_bytes()[:-1]) if harm == "cut" else path.unlink()
    with pytest.raises(InputError, match=r"train-000-00000\.bin: (missing|101 bytes long), the index says 102 bytes"):
        TokenShards(folder, verify=False)


def test_what_is_no_shard_folder_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="nowhere: no token shards here"):
        TokenShards(tmp_path / "nowhere")
    index = json.loads((folder / "index.json").read_text())
    del index["seq_len"]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="seq_len"):
        TokenShards(folder)
    (folder / "index.json").write_text('{"format": "other"}')
    with pytest.raises(InputError, match="not an index of format"):
        TokenShards(folder)


def test_mismatch_with_tokenizer_and_model_is_named(folder):
    shards = TokenShards(folder)
    shards.require(tokenizer_fingerprint="f" * 64, vocab_size=6400, max_seq_len=16)
    with pytest.raises(InputError, match="another tokenizer"):
        shards.require(tokenizer_fingerprint="0" * 64)
    with pytest.raises(InputError, match="vocabulary of 6400, the model has 6000"):
        shards.require(vocab_size=6000)
    with pytest.raises(InputError, match="rows of 16 tokens, the model takes at most 8"):
        shards.require(max_seq_len=8)


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match="token 6400 outside the vocabulary of 6400"):
        write(tmp_path / "x", [PackedRow(np.array([1, 6400]), None, [0, 2])], 2)


def test_rows_and_splits_that_do_not_exist(folder):
    shards = TokenShards(folder)
    with pytest.raises(InputError, match="row 3 of 'train' asked for; it has 3"):
        shards.row(TRAIN, 3)
    with pytest.raises(InputError, match="split 'test' asked for; there are train, holdout"):
        shards.rows("test")
    # 48 tokens but for 6 starts; two that are the pad token are no padding, in the middle of documents
    assert shards.bytes_per_token(TRAIN) == 84 / 42
