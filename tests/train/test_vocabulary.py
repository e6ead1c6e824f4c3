import pytest

from modernbert.tokenizer import Tokenizer
from modernbert.train.vocabulary import train_cased_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    text = "how to read a file read_file(path) open the file in python write boundary layer flow 1234 5678 c++ "
    return train_tokenizer(iter([text] * 50), vocab_size=330)


def tokens_of(tokenizer, text):
    return [tokenizer.id_to_token(i) for i in tokenizer.encode_batch([text])[0].ids]


def test_tokenizer_cuts_at_spaces_punctuation_and_underscores(tokenizer):
    tokens = tokens_of(tokenizer, "file (file) read_file, file.")
    assert tokens == ["[CLS]", "Ġfile", "Ġfile", "Ġread", "Ġfile", "Ġfile", "[SEP]"]
    assert tokens_of(tokenizer, "c++ 12345678")[-3:-1] == ["Ġ1234", "Ġ5678"]
    assert [tokenizer.id_to_token(i) for i in range(5)] == ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]


def test_tokenizer_offsets_name_the_text(tokenizer):
    text = "Read_File: naïve, 5678"
    encoding = tokenizer.encode_batch([text])[0]
    words = [text[start:end] for start, end in encoding.offsets]
    assert words[1:3] == ["Read", "File"]
    assert words[-2] == "5678"


@pytest.fixture(scope="module")
def cased():
    return train_cased_tokenizer(["Read a file, then Read_File(path): naïve 5678. "] * 50, vocab_size=330)


def test_a_cased_tokenizer_loses_nothing_of_a_text(cased):
    for text in ("Read a File,  then\tre-read it!", "naïve Été 5678\n"):
        ids = cased.encode_batch([text])[0].ids
        assert cased.decode(ids) == f"[CLS]{text}[SEP]"


def test_a_cased_tokenizer_has_the_special_tokens_of_modernbert(cased, tmp_path):
    assert [cased.id_to_token(i) for i in range(5)] == ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    assert 5 + 256 < cased.vocab_size <= 330
    # As in ModernBERT, [MASK] includes the space in front of it.
    assert tokens_of(cased, "a [MASK]") == ["[CLS]", "a", "[MASK]", "[SEP]"]
    cased.save_pretrained(tmp_path)
    assert tokens_of(Tokenizer.from_pretrained(tmp_path), "a [MASK]") == ["[CLS]", "a", "[MASK]", "[SEP]"]
