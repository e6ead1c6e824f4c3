"""Texts that are split into words, and windows of long texts, against transformers' fast tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import normalizers

from modernbert.packing import pack
from modernbert.tokenizer import Tokenizer

LONG = "The five boxing wizards jump quickly over the antidisestablishmentarian dog, naïve café 🤖 and more. " * 3
QUESTION = "Which dog do they jump over?"
TEXTS = [LONG, "short", "", LONG[:70]]
SENTENCES = [
    ["EU", "rejects", " German", "call", "to", "boycott", "antidisestablishmentarian", "lamb", "."],
    ["naïve", "🤖", "日本語", "", "x"],
    [],
    ["one"],
    ["two", "words"],
]


@pytest.fixture(scope="module", params=["right", "left"])
def folder(modernbert_tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    """The real tokenizer, which cuts at either side."""
    found = Path(shutil.copytree(modernbert_tokenizer_file.parent, tmp_path_factory.mktemp(request.param) / "side"))
    config = json.loads((found / "tokenizer_config.json").read_text("utf-8"))
    (found / "tokenizer_config.json").write_text(json.dumps(config | {"truncation_side": request.param}))
    return found


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def hugging_face(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def assert_same(ours: list[Any], theirs: Any) -> None:
    assert [window.ids for window in ours] == theirs["input_ids"]
    assert [window.offsets for window in ours] == theirs["offset_mapping"]
    assert [window.text for window in ours] == theirs["overflow_to_sample_mapping"]
    for index, window in enumerate(ours):
        assert window.word_ids == theirs.word_ids(index)
        assert window.sequence_ids == theirs.sequence_ids(index)


@pytest.mark.parametrize(("length", "stride"), [(8, 0), (8, 5), (17, 4), (40, 20), (64, 1), (1000, 10)])
def test_windows_are_those_of_transformers(tokenizer: Tokenizer, hugging_face: Any, length: int, stride: int) -> None:
    options = {"return_overflowing_tokens": True, "return_offsets_mapping": True}
    options |= {"max_length": length, "stride": stride, "truncation": True}
    assert_same(tokenizer.encode_windows(TEXTS, max_length=length, stride=stride), hugging_face(TEXTS, **options))


@pytest.mark.parametrize(("length", "stride"), [(16, 0), (24, 6), (200, 10)])
def test_a_question_is_in_each_window(tokenizer: Tokenizer, hugging_face: Any, length: int, stride: int) -> None:
    options = {"return_overflowing_tokens": True, "return_offsets_mapping": True}
    options |= {"max_length": length, "stride": stride, "truncation": "only_second"}
    theirs = hugging_face([QUESTION] * 2, [LONG, LONG[:90]], **options)
    pairs = [(QUESTION, LONG), (QUESTION, LONG[:90])]
    assert_same(tokenizer.encode_windows(pairs, max_length=length, stride=stride), theirs)


@pytest.mark.parametrize(("length", "stride"), [(5, 1), (7, 0), (30, 3)])
def test_words_are_those_of_transformers(tokenizer: Tokenizer, hugging_face: Any, length: int, stride: int) -> None:
    options = {"return_overflowing_tokens": True, "return_offsets_mapping": True, "is_split_into_words": True}
    options |= {"max_length": length, "stride": stride, "truncation": True}
    ours = tokenizer.encode_windows(SENTENCES, max_length=length, stride=stride, is_split_into_words=True)
    assert_same(ours, hugging_face(SENTENCES, **options))


def test_words_in_a_batch(tokenizer: Tokenizer, hugging_face: Any) -> None:
    theirs = hugging_face(SENTENCES, is_split_into_words=True, return_offsets_mapping=True)
    ours = tokenizer.encode_batch(SENTENCES, is_split_into_words=True)
    assert [encoding.ids for encoding in ours] == theirs["input_ids"]
    assert [encoding.offsets for encoding in ours] == theirs["offset_mapping"]
    batch = tokenizer(SENTENCES, is_split_into_words=True)
    assert batch.input_ids.tolist() == pack(theirs["input_ids"]).input_ids.tolist()
    one = tokenizer(SENTENCES[0], is_split_into_words=True)
    assert one.input_ids.tolist() == theirs["input_ids"][0]
    cut = hugging_face(SENTENCES, is_split_into_words=True, truncation=True, max_length=6)
    assert [e.ids for e in tokenizer.encode_batch(SENTENCES, is_split_into_words=True, max_length=6)] == cut[
        "input_ids"
    ]


def test_pairs_of_words(tokenizer: Tokenizer, hugging_face: Any) -> None:
    first, second = SENTENCES[4], SENTENCES[0]
    options = {"return_overflowing_tokens": True, "return_offsets_mapping": True, "is_split_into_words": True}
    options |= {"max_length": 10, "stride": 2, "truncation": "only_second"}
    ours = tokenizer.encode_windows([(first, second)], max_length=10, stride=2, is_split_into_words=True)
    assert_same(ours, hugging_face([first], [second], **options))


def test_every_token_is_in_a_window(tokenizer: Tokenizer) -> None:
    (whole,) = tokenizer.encode_windows(LONG)
    for length in (3, 9, 30):
        for stride in (0, (length - 2) // 2):
            windows = tokenizer.encode_windows(LONG, max_length=length, stride=stride)
            assert {span for window in windows for span in window.offsets} == set(whole.offsets)
            assert all(len(window.ids) <= length for window in windows)


def test_lower_cased_words_keep_their_own_offsets(modernbert_tokenizer_file: Path) -> None:
    """A capital letter that becomes two characters shifts what follows in its own word, and in no other."""
    ours = Tokenizer(tokenizers.Tokenizer.from_file(str(modernbert_tokenizer_file)), {"do_lower_case": True})
    theirs = tokenizers.Tokenizer.from_file(str(modernbert_tokenizer_file))
    theirs.normalizer = normalizers.Sequence([normalizers.Lowercase(), theirs.normalizer])
    for text in (["İstanbul", "İx", "plain"], (["İa", "b"], ["Cİ", "İİd"])):
        (window,) = ours.encode_windows([text], is_split_into_words=True)
        pair = text if isinstance(text, tuple) else (text,)
        expected = theirs.encode(*pair, is_pretokenized=True)
        assert window.ids == expected.ids
        assert window.offsets == expected.offsets
        assert window.word_ids == expected.word_ids


@pytest.mark.parametrize("stride", [-1, 1.5, True, "2", None])
def test_a_wrong_stride_is_refused(tokenizer: Tokenizer, stride: Any) -> None:
    with pytest.raises(ValueError, match="stride must be a whole number from 0, got"):
        tokenizer.encode_windows([LONG], max_length=9, stride=stride)


def test_windows_without_room_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"leaves room for 4 tokens beside the 2 of every window: .* stride, 4"):
        tokenizer.encode_windows([LONG], max_length=6, stride=4)
    with pytest.raises(ValueError, match="max_length 5 leaves room for 0 tokens"):
        tokenizer.encode_windows([(QUESTION, LONG)], max_length=5)
    assert len(tokenizer.encode_windows(["short"], max_length=6, stride=4)) == 1


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ("one text", "wanted a list of words or a list of such lists, got str"),
        (None, "got NoneType"),
        ({"tokens": []}, "got dict"),
        ([["a"], "b c"], r"texts\[1\]: wanted a list of words .* got str 'b c'"),
        ([["a"], None], r"texts\[1\]: .* got NoneType"),
        ([["a", "b"], ["c", 1]], r"texts\[1\]: word 1 must be a str, got int 1"),
        (["a", None], r"texts\[0\]: word 1 must be a str, got NoneType"),
        ([(["a"], ["b", 2.0])], r"texts\[0\]: word 1 must be a str, got float"),
    ],
)
def test_what_is_not_words_is_refused(tokenizer: Tokenizer, texts: Any, words: str) -> None:
    for run in (tokenizer, tokenizer.encode_batch, tokenizer.encode_windows):
        with pytest.raises(TypeError, match=words):
            run(texts, is_split_into_words=True)
