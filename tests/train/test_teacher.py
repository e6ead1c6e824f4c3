import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modernbert.train.teacher import Teacher, teach_embeddings, text_key, token_texts, write_teacher
from modernbert.train.vocabulary import train_tokenizer


def test_teacher_finds_vectors_by_text(tmp_path):
    texts, vectors = ["b", "a", "ä"], np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], np.float16)
    order = np.argsort([text_key(text) for text in texts])
    np.save(tmp_path / "keys.npy", np.array([text_key(texts[i]) for i in order], np.uint64))
    np.save(tmp_path / "vectors.npy", vectors[order])
    teacher = Teacher(tmp_path)
    index = teacher.index(["a", "unknown", "b"])
    assert (index >= 0).tolist() == [True, False, True]
    np.testing.assert_allclose(teacher[index[[0, 2]]].numpy(), [[0, 1], [0.6, 0.8]], rtol=1e-3)


def test_a_written_teacher_folder_reads_back(tmp_path, monkeypatch):
    """One vector per different text, found again whatever the order; the model here is a stub."""

    class Stub:
        device = torch.device("cpu")
        max_seq_length = 0

        def __init__(self, name, device):
            assert (name, device) == ("some-model", "cpu")

        def encode(self, texts, **_):
            return torch.tensor([[len(text), 1.0] for text in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Stub))
    write_teacher(["a", "four", "a", "ninechars"], "some-model", tmp_path, device="cpu")
    teacher = Teacher(tmp_path)
    assert len(teacher.keys) == 3
    index = teacher.index(["ninechars", "a"])
    wanted = torch.nn.functional.normalize(torch.tensor([[9.0, 1.0], [1.0, 1.0]]), dim=-1)
    torch.testing.assert_close(teacher[index], wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["keys.npy", "vectors.npy", "teacher.json"])
def test_a_folder_of_another_program_is_not_written_to(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=None))
    (tmp_path / name).write_text('{"model": 1}')
    with pytest.raises(FileExistsError, match=f"holds {name} of another program"):
        write_teacher(["a"], "some-model", tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: '{"model": 1}'}


@pytest.mark.parametrize("content", [b"", b"noise", b"\x93NUMPY"])
def test_a_damaged_teacher_is_named(tmp_path, content):
    np.save(tmp_path / "keys.npy", np.zeros(1, np.uint64))
    (tmp_path / "vectors.npy").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}: keys\.npy or vectors\.npy is damaged"):
        Teacher(tmp_path)


@pytest.fixture
def tokenizer():
    return train_tokenizer(iter(["some words of a small vocabulary"] * 9), vocab_size=320)


def write_folder(folder, texts, width):
    texts = sorted(set(texts), key=text_key)
    np.save(folder / "keys.npy", np.array([text_key(text) for text in texts], np.uint64))
    np.save(folder / "vectors.npy", np.random.default_rng(0).normal(size=(len(texts), width)).astype(np.float16))
    return Teacher(folder)


def test_each_token_has_a_text(tokenizer):
    texts = token_texts(tokenizer)
    assert texts[:5] == ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    assert {"some", "words"} <= set(texts)
    assert all(texts)


def test_embeddings_have_the_geometry_of_the_teacher(tokenizer, tmp_path):
    """The table is wider than the teacher's vectors: other columns stay."""
    teacher = write_folder(tmp_path, token_texts(tokenizer), 24)
    table = torch.full((tokenizer.vocab_size, 32), 7.0)
    teach_embeddings(table, tokenizer, teacher, deviation=0.02)
    assert (table[:, 24:] == 7).all()
    theirs = teacher[teacher.index(token_texts(tokenizer))]
    theirs = torch.nn.functional.normalize(theirs - theirs.mean(0), dim=-1)
    torch.testing.assert_close(table[:, :24] @ table[:, :24].T, theirs @ theirs.T * 32 * 0.02**2, rtol=0, atol=1e-6)


def test_a_teacher_that_lacks_a_token_gives_no_embeddings(tokenizer, tmp_path):
    teacher = write_folder(tmp_path, token_texts(tokenizer)[1:], 24)
    table = torch.full((tokenizer.vocab_size, 32), 7.0)
    teach_embeddings(table, tokenizer, teacher, deviation=0.02)
    assert (table == 7).all()
