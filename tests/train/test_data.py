import json
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modernbert.tokenizer import Tokenizer
from modernbert.train.data import (
    Pair,
    Rows,
    first_per_source,
    plan_batches,
    read_pairs,
    topic_vectors,
    train_tokenizer,
    without_overlap,
)
from modernbert.train.teacher import Teacher, text_key, write_teacher


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_pairs_of_plain_and_compressed_files_in_name_order(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    rows = [
        {"query": f"q{i} é", "positive": f"p{i}", "source": "ab"[i % 2], "group": f"g{i}", "extra": 1} for i in range(4)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "2.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(text))
    write_lines(tmp_path / "1.jsonl", [{"query": "q", "positive": "p"}])
    assert list(read_pairs(tmp_path, drop={"b"})) == [
        Pair("q", "p", "1", "p"),
        Pair("q0 é", "p0", "a", "g0"),
        Pair("q2 é", "p2", "a", "g2"),
    ]


def test_a_line_without_a_positive_is_named(tmp_path):
    write_lines(tmp_path / "x.jsonl", [{"query": "q", "positive": "p"}, {"query": "q", "text": "p"}])
    with pytest.raises(ValueError, match=r"x\.jsonl:2.*'query', 'text'"):
        list(read_pairs(tmp_path))


def test_a_folder_without_pairs_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no \*\.jsonl"):
        list(read_pairs(tmp_path))


def test_overlap_of_eight_words_leaves_a_pair_out():
    held_out = ["One two, three: four five SIX seven eight nine."]
    shares = Pair("q", "zero two three four five six seven eight nine ten", "s", "g")
    seven = Pair("q", "zero three four five six seven eight nine ten", "s", "g")
    assert list(without_overlap([shares, seven], held_out)) == [seven]


def test_first_per_source_is_a_fixed_draw():
    pairs = [Pair(str(i), str(i), "big" if i % 10 else "small", str(i)) for i in range(100)]
    drawn = first_per_source(pairs, 15, seed=3)
    assert [sum(pair.source == name for pair in drawn) for name in ("big", "small")] == [15, 10]
    assert drawn == first_per_source(pairs, 15, seed=3)
    assert drawn != first_per_source(pairs, 15, seed=4)


@pytest.fixture(scope="module")
def tokenizer():
    text = "how to read a file read_file(path) open the file in python write boundary layer flow 1234 5678 c++ "
    return train_tokenizer(iter([text] * 50), vocab_size=330)


def test_tokenizer_cuts_at_spaces_punctuation_and_underscores(tokenizer):
    tokens = tokenizer.encode("file (file) read_file, file.").tokens
    assert tokens == ["[CLS]", "Ġfile", "Ġfile", "Ġread", "Ġfile", "Ġfile", "[SEP]"]
    assert tokenizer.encode("c++ 12345678", add_special_tokens=False).tokens[-2:] == ["Ġ1234", "Ġ5678"]
    assert [tokenizer.id_to_token(i) for i in range(5)] == ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]


def test_tokenizer_offsets_name_the_text(tokenizer):
    text = "Read_File: naïve, 5678"
    encoding = Tokenizer(tokenizer, {"do_lower_case": True}).encode_batch([text])[0]
    words = [text[start:end] for start, end in encoding.offsets]
    assert words[1:3] == ["Read", "File"]
    assert words[-2] == "5678"


def test_rows_are_the_first_tokens_of_the_lowered_text(tokenizer):
    texts = ["Read the FILE in python", "", "file " * 100]
    rows = Rows.from_texts(texts, tokenizer, limit=7)
    for i, text in enumerate(texts):
        assert rows[i].tolist() == tokenizer.encode(text.lower(), add_special_tokens=False).ids[:7]
    assert rows.lengths.tolist() == [5, 0, 7]


def test_topics_are_weighted_means():
    rows = Rows(np.array([0, 1, 1, 1], np.uint16), np.array([0, 2, 2, 4]))
    table = np.eye(2, dtype=np.float32)
    rare, common = np.log(4 / 1), np.log(4 / 3)
    np.testing.assert_allclose(topic_vectors(rows, table), [[rare / 2, common / 2], [0, 0], [0, common]], rtol=1e-6)


def plan(seed=0, max_pairs=8, max_tokens=100):
    rng = np.random.default_rng(1)
    lengths, strata = rng.integers(1, 40, 1000), rng.integers(0, 3, 1000)
    lengths[17] = 500
    topics = rng.normal(size=(1000, 4))
    return (
        lengths,
        strata,
        plan_batches(lengths, strata, topics, max_pairs=max_pairs, max_tokens=max_tokens, seed=seed),
    )


def test_a_plan_covers_every_pair_once_within_its_limits():
    lengths, strata, batches = plan()
    assert sorted(np.concatenate(batches)) == list(range(1000))
    for batch in batches:
        assert len(set(strata[batch])) == 1
        assert len(batch) <= 8
        assert lengths[batch].sum() <= 100 or len(batch) == 1
    assert np.mean([len(batch) for batch in batches]) > 3


def test_a_plan_is_a_function_of_its_seed():
    same, other = plan()[2], plan(seed=1)[2]
    assert all(np.array_equal(a, b) for a, b in zip(plan()[2], same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(same, other, strict=False))


def test_a_batch_is_of_one_topic():
    """Two topics: a random batch of 16 would hold one of them only with probability 2 ** -15."""
    draw = random.Random(0)
    side = np.array([draw.choice([-1.0, 1.0]) for _ in range(512)])
    topics = np.stack([side, np.zeros(512)], axis=1)
    batches = plan_batches(np.ones(512), np.zeros(512), topics, max_pairs=16, max_tokens=10**6, seed=0)
    pure = np.mean([abs(side[batch].mean()) == 1 for batch in batches])
    assert pure > 0.5


def test_teacher_finds_vectors_by_text(tmp_path):
    texts, vectors = ["b", "a", "ä"], np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], np.float16)
    order = np.argsort([text_key(text) for text in texts])
    np.save(tmp_path / "keys.npy", np.array([text_key(texts[i]) for i in order], np.uint64))
    np.save(tmp_path / "vectors.npy", vectors[order])
    teacher = Teacher(tmp_path)
    rows = teacher.rows(["a", "unknown", "b"])
    assert (rows >= 0).tolist() == [True, False, True]
    np.testing.assert_allclose(teacher[rows[[0, 2]]].numpy(), [[0, 1], [0.6, 0.8]], rtol=1e-3)


def test_a_written_teacher_folder_reads_back(tmp_path, monkeypatch):
    """One vector per different text, found again whatever the order; the model here is a stub."""

    class Stub:
        device = torch.device("cpu")
        max_seq_length = 0

        def __init__(self, name):
            assert name == "some-model"

        def encode(self, texts, **_):
            return torch.tensor([[len(text), 1.0] for text in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Stub))
    write_teacher(["a", "four", "a", "ninechars"], "some-model", tmp_path)
    teacher = Teacher(tmp_path)
    assert len(teacher.keys) == 3
    rows = teacher.rows(["ninechars", "a"])
    wanted = torch.nn.functional.normalize(torch.tensor([[9.0, 1.0], [1.0, 1.0]]), dim=-1)
    torch.testing.assert_close(teacher[rows], wanted, rtol=1e-3, atol=0)
