from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minids.data.pack import Packer, Sample, fim_join, fim_split, pack
from minids.errors import InputError

PAD = 2
lengths_lists = st.lists(st.integers(0, 70), max_size=60)


def numbered(lengths: list[int], masks: bool = False) -> list[Sample]:
    """Documents of globally distinct tokens, so that every token of a row tells where it came from."""
    ends = np.cumsum([10, *lengths])
    return [
        Sample(np.arange(start, end), np.arange(start, end) % 3 == 0 if masks else None)
        for start, end in itertools.pairwise(ends)
    ]


@settings(deadline=None, max_examples=200)
@given(lengths_lists, st.integers(2, 24), st.integers(0, 12), st.booleans())
def test_cutting_packs_every_token_once_in_document_order_without_padding(lengths, seq_len, buffer, masks):
    documents = numbered(lengths, masks)
    rows = list(pack(documents, seq_len, PAD, buffer=buffer))
    total = sum(lengths)
    assert len(rows) == -(-total // seq_len)  # full but for the last
    packed = np.concatenate([row.tokens for row in rows]) if rows else np.zeros(0, int)
    assert sorted(packed[packed != PAD]) == list(range(10, 10 + total))
    assert np.all(packed[:total] != PAD)
    place = {int(token): position for position, token in enumerate(packed)}
    for document in documents:
        places = [place[int(token)] for token in document.tokens]
        assert places == sorted(places)
    for row in rows:
        assert row.bounds[0] == 0 and row.bounds[-1] == seq_len and row.bounds == sorted(set(row.bounds))
        real = int((row.tokens != PAD).sum())
        jumps = [i for i in range(1, real) if row.tokens[i] != row.tokens[i - 1] + 1]
        inner = [bound for bound in row.bounds[1:-1] if bound < real]
        # every jump in the numbering is a boundary; a boundary without a jump lies between two whole neighbours
        assert set(jumps) <= set(inner)
        starts = {int(document.tokens[0]) for document in documents if len(document.tokens)}
        assert all(int(row.tokens[i]) in starts for i in set(inner) - set(jumps))
        assert real == seq_len or real in row.bounds
        if masks:
            assert row.mask is not None and np.array_equal(row.mask, (row.tokens % 3 == 0) & (row.tokens != PAD))


@settings(deadline=None, max_examples=100)
@given(lengths_lists, st.integers(2, 24))
def test_not_cutting_keeps_documents_whole_and_long_ones_start(lengths, seq_len):
    documents = numbered(lengths)
    rows = list(pack(documents, seq_len, PAD, cut=False, buffer=8))
    pieces = [
        row.tokens[a:b].tolist() for row in rows for a, b in itertools.pairwise(row.bounds) if row.tokens[a] != PAD
    ]
    assert sorted(pieces) == [d.tokens[:seq_len].tolist() for d in documents if len(d.tokens)]


def test_realistic_lengths_are_cut_rarely():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(4.5, 0.8, 10_000) + 4, 600).astype(int)
    packer = Packer(512, PAD)
    rows = [row for length in lengths for row in packer.add(Sample(np.full(length, 7)))] + list(packer.flush())
    report = packer.report
    assert report.padding < 512 and report.rows == len(rows) and report.tokens == lengths.sum()
    assert report.cut_long == (lengths > 512).sum()
    # laid end to end, every row's end would cut a document: a quarter of them
    assert report.cut - report.cut_long < 0.01 * report.documents < 0.05 * report.rows


def test_the_report_counts_unavoidable_cuts():
    packer = Packer(8, PAD)
    list(packer.add(Sample(np.full(20, 7))))
    list(packer.flush())
    assert (packer.report.documents, packer.report.cut, packer.report.cut_long) == (1, 1, 1)


def test_a_row_of_one_token_is_refused():
    with pytest.raises(InputError, match="seq_len: got 1"):
        Packer(1, PAD)


@given(st.text(max_size=40), st.integers(0, 1000))
def test_fim_reassembles_to_the_document(text, seed):
    parts = fim_split(text, 1.0, random.Random(seed))
    if parts is None:
        assert len(text) < 3
        return
    prefix, middle, suffix = parts
    assert prefix + middle + suffix == text and prefix and middle and suffix
    tokens = fim_join(list(prefix.encode()), list(middle.encode()), list(suffix.encode()), 1000, 1001, 1002)
    assert tokens[0] == 1000
    hole, end = tokens.index(1001), tokens.index(1002)
    assert bytes(tokens[1:hole] + tokens[end + 1 :] + tokens[hole + 1 : end]) == text.encode()


def test_fim_takes_its_share_of_documents():
    taken = sum(fim_split("some text", 0.1, random.Random(seed)) is not None for seed in range(5000))
    assert 400 < taken < 600
    assert fim_split("some text", 0.0, random.Random(0)) is None
