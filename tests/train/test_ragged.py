import numpy as np
import pytest
import torch

from modernbert.packing import pack
from modernbert.tokenizer import Tokenizer
from modernbert.train.ragged import RaggedBuilder, packed_row, tokenize_texts

ROWS = [[[1, 2], [], [3]], [], [[4, 5, 6]]]


def test_ids_that_come_a_few_at_a_time():
    built = RaggedBuilder()
    for rows in ROWS:
        built.add(rows)
    ids = built.build()
    assert len(ids) == 4
    assert ids.select(range(4)) == [[1, 2], [], [3], [4, 5, 6]]
    assert ids.lengths.tolist() == [2, 0, 1, 3]
    assert ids.values.dtype == np.uint16
    assert len(RaggedBuilder().build()) == 0


@pytest.mark.parametrize("largest", [65_535, 65_536])
def test_small_ids_take_two_bytes(largest):
    built = RaggedBuilder()
    built.add([[largest]])
    ids = built.build()
    assert ids.values.dtype == (np.uint16 if largest < 1 << 16 else np.int32)
    assert ids.packed([0]).input_ids.tolist() == [largest]


@pytest.mark.parametrize("rows", [[], [[]], [[], [1]], [[1, 2, 3], [4], [], [5, 6]]])
def test_a_batch_is_that_of_pack(rows):
    built = RaggedBuilder()
    built.add(rows)
    got, wanted = built.build().packed(range(len(rows))), pack(rows)
    for name in ("input_ids", "positions", "cu_seqlens"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
        assert getattr(got, name).dtype == getattr(wanted, name).dtype, name
    assert (got.lengths, got.max_seqlen) == (wanted.lengths, wanted.max_seqlen)
    assert packed_row(wanted.input_ids, np.array(list(map(len, rows)), np.int64)).lengths == wanted.lengths


def test_texts_and_pairs_of_texts_are_cut(modernbert_tokenizer_file):
    tokenizer = Tokenizer.from_pretrained(modernbert_tokenizer_file.parent)
    texts = ["one", ("one two", "three"), "word " * 50]
    ids = tokenize_texts(iter(texts), tokenizer, max_length=8)
    assert ids.select(range(3)) == [each.ids for each in tokenizer.encode_batch(texts, max_length=8)]
    assert ids.lengths.max() == 8
