"""Token ids, offsets and cuts against published goldens, transformers and the tokenizers library itself."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, processors

from modernbert.tokenizer import Tokenizer, TruncationWarning

GOLDENS = json.loads((Path(__file__).parents[1] / "fixtures/tokenizer/goldens.json").read_text(encoding="utf-8"))
TEXTS = [tuple(golden["text"]) if isinstance(golden["text"], list) else golden["text"] for golden in GOLDENS]
IDS = [golden["ids"] for golden in GOLDENS]
LONG = "The five boxing wizards jump quickly over the antidisestablishmentarian dog in the garden."


@pytest.fixture(scope="module")
def tokenizer(modernbert_tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(modernbert_tokenizer_file.parent)


@pytest.fixture(scope="module")
def hugging_face(modernbert_tokenizer_file: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(modernbert_tokenizer_file.parent)


@pytest.fixture
def folder(modernbert_tokenizer_file: Path, tmp_path: Path) -> Path:
    """A checkpoint folder that the test may change."""
    return Path(shutil.copytree(modernbert_tokenizer_file.parent, tmp_path / "checkpoint"))


def backend(file: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(file))


def words(*vocabulary: str) -> tokenizers.Tokenizer:
    """A tokenizer of whole words, for what does not depend on the real one."""
    return tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0])
    )


def test_goldens(tokenizer: Tokenizer) -> None:
    assert len(GOLDENS) == 41
    assert {str(text): encoding.ids for text, encoding in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True)} == {
        str(text): ids for text, ids in zip(TEXTS, IDS, strict=True)
    }


def test_ids_and_offsets_are_those_of_transformers(tokenizer: Tokenizer, hugging_face) -> None:
    for text, encoding in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        pair = text if isinstance(text, tuple) else (text,)
        expected = hugging_face(*pair, return_offsets_mapping=True)
        assert encoding.ids == expected["input_ids"], text
        assert encoding.offsets == expected["offset_mapping"], text
        assert encoding.truncated == 0


def test_a_batch_is_its_texts_in_one_row(tokenizer: Tokenizer) -> None:
    batch = tokenizer(TEXTS)
    assert batch.lengths == tuple(map(len, IDS))
    assert batch.input_ids.tolist() == [token for ids in IDS for token in ids]
    assert batch.input_ids.dtype == torch.int64
    assert [row.tolist() for row in batch.positions.split(batch.lengths)] == [list(range(len(ids))) for ids in IDS]
    assert int(batch.input_ids.max()) < tokenizer.vocab_size == 50368


def test_one_text_an_empty_text_and_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer("Hello World!").input_ids.tolist() == IDS[TEXTS.index("Hello World!")]
    assert tokenizer("").input_ids.tolist() == [50281, 50282]
    assert tokenizer.encode_batch("") == [([50281, 50282], [(0, 0), (0, 0)], 0)]
    assert (len(tokenizer([])), tokenizer([]).num_tokens, tokenizer.encode_batch([])) == (0, 0, [])
    assert tokenizer(np.array(["a", "b"])).input_ids.tolist() == tokenizer(iter(["a", "b"])).input_ids.tolist()


def test_offsets_of_a_byte_level_tokenizer_cover_the_text(tokenizer: Tokenizer) -> None:
    text = "naïve café 🤖 日本, e\u0301 and \x00 NUL"
    encoding = tokenizer.encode_batch(text)[0]
    covered = {at for start, end in encoding.offsets for at in range(start, end)}
    assert covered == set(range(len(text))) - {text.index("\u0301")}  # NFC joins it to its letter
    token = encoding.ids.index(tokenizer.encode_batch(" and")[0].ids[1])
    assert text[slice(*encoding.offsets[token])] == " and"


def test_decode_gives_the_text_back(tokenizer: Tokenizer, hugging_face) -> None:
    text = "def f(x):\n        return x**2 , naïve 🤖\x00"
    batch = tokenizer(text)
    assert tokenizer.decode(batch.input_ids) == f"[CLS]{text}[SEP]"
    expected = hugging_face.decode(batch.input_ids.tolist(), clean_up_tokenization_spaces=False)
    assert tokenizer.decode(batch.input_ids.tolist()) == expected


@pytest.mark.parametrize("side", ["right", "left"])
def test_cuts_are_those_of_the_tokenizers_library(modernbert_tokenizer_file: Path, side: str) -> None:
    """Every length from the special tokens alone to no cut; pairs with either half longer or equal ones."""
    ours = Tokenizer(backend(modernbert_tokenizer_file), {"truncation_side": side})
    theirs = backend(modernbert_tokenizer_file)
    texts = [LONG, (LONG, "short text"), ("short text", LONG), (LONG, LONG), ("", LONG), (LONG[:40], LONG)]
    whole = [len(encoding) for encoding in theirs.encode_batch(texts)]
    for length in range(3, max(whole) + 1):
        theirs.enable_truncation(length, strategy="longest_first", direction=side)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)
            encodings = ours.encode_batch(texts, max_length=length)
            packed = ours(texts, max_length=length)
        expected = theirs.encode_batch(texts)
        assert [encoding.ids for encoding in encodings] == [e.ids for e in expected]
        assert [encoding.offsets for encoding in encodings] == [e.offsets for e in expected]
        assert [encoding.truncated for encoding in encodings] == [max(0, n - length) for n in whole]
        assert packed.input_ids.tolist() == [token for e in expected for token in e.ids]


def test_cuts_are_those_of_transformers(tokenizer: Tokenizer, hugging_face) -> None:
    one, two = tokenizer.encode_batch([LONG, (LONG, LONG[:50])], max_length=16)
    assert one.ids == hugging_face(LONG, truncation=True, max_length=16)["input_ids"]
    assert two.ids == hugging_face(LONG, LONG[:50], truncation="longest_first", max_length=16)["input_ids"]


def test_a_cut_is_said_once_with_what_to_do(tokenizer: Tokenizer, modernbert_tokenizer_file: Path) -> None:
    texts = [LONG, "short", LONG + LONG, LONG]
    small = Tokenizer(backend(modernbert_tokenizer_file), {"model_max_length": 10})
    for run in (small, small.encode_batch):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(texts)
        assert len(caught) == 1
        longest = len(tokenizer.encode_batch(LONG + LONG)[0].ids)
        message = str(caught[0].message)
        assert message.startswith(f"3 of 4 texts were cut to 10 tokens, the longest of {longest}:")
        assert "max_length" in message
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(texts)
        tokenizer(texts, max_length=longest)
        small.encode_batch(texts, warn=False)
        warnings.simplefilter("ignore", TruncationWarning)
        assert small(texts).lengths == (10, 3, 10, 10)


def test_a_cut_that_the_caller_asked_for_is_not_said(tokenizer: Tokenizer) -> None:
    """Each batch of a training with `max_length` warned anew: 20 warnings in 20 steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in range(5, 15):
            assert tokenizer([LONG, "short"], max_length=length).lengths == (length, 3)
            (encoding,) = tokenizer.encode_batch(LONG, max_length=length)
            assert encoding.truncated


def test_a_text_longer_than_the_model_is_cut_to_the_models_maximum(tokenizer: Tokenizer) -> None:
    assert tokenizer.max_length == 8192
    with pytest.warns(TruncationWarning, match=r"1 of 1 texts were cut to 8192 tokens, the longest of 100002:"):
        (encoding,) = tokenizer.encode_batch("word" + " word" * 99_999)
    assert (len(encoding.ids), encoding.truncated, encoding.ids[-1]) == (8192, 100_002 - 8192, 50282)
    assert tokenizer("word" + " word" * 99_999, max_length=100_002).lengths == (100_002,)


def test_a_maximum_without_room_for_the_special_tokens_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="max_length 1 is below the 2 special tokens"):
        tokenizer("a", max_length=1)
    with pytest.raises(ValueError, match="max_length 2 is below the 3 special tokens"):
        tokenizer([("a", "b")], max_length=2)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"model_max_length": 512}, 512),
        ({"model_max_length": int(1e30)}, None),
        ({"model_max_length": None}, None),
    ],
)
def test_where_the_config_names_no_maximum_nothing_is_cut(config: dict, expected: int | None) -> None:
    assert Tokenizer(words("[UNK]"), config).max_length == expected


def test_truncation_and_padding_of_the_file_are_switched_off(folder: Path) -> None:
    """LateOn's tokenizer.json cuts at 299 tokens and pads with [MASK]: a port that trusts it drops text."""
    file = backend(folder / "tokenizer.json")
    file.enable_truncation(8)
    file.enable_padding(pad_id=50284, pad_token="[MASK]", length=12)
    file.save(str(folder / "tokenizer.json"))
    loaded = Tokenizer.from_pretrained(folder)
    assert [encoding.ids for encoding in loaded.encode_batch(TEXTS)] == IDS
    stored = json.loads(loaded.files()["tokenizer.json"])
    assert (stored["truncation"], stored["padding"]) == (None, None)


CASED = [
    "Straße in İstanbul, İİ?",
    ("ABC İx", "İ DEF"),
    "ΑΣ Ünï  [UNUSED0] A\u030a",
    "plain",
    "İ",
    "Q: ﬀ Ⅷ Å 🤖İ🤖",
]


def test_lower_casing_offsets_are_into_the_callers_text(modernbert_tokenizer_file: Path) -> None:
    """Sentence-transformers 6 lower-cases inside the tokenizer, which then tracks the offsets alone.

    'İ' becomes two characters, so offsets into `text.lower()` point beside the word from there on.
    """
    ours = Tokenizer(backend(modernbert_tokenizer_file), {"do_lower_case": True})
    theirs = backend(modernbert_tokenizer_file)
    theirs.normalizer = normalizers.Sequence([normalizers.Lowercase(), theirs.normalizer])
    texts = [text for text in CASED if "Σ" not in text]  # str.lower knows the final sigma, they do not
    for text, encoding, expected in zip(texts, ours.encode_batch(texts), theirs.encode_batch(texts), strict=True):
        assert encoding.ids == expected.ids, text
        assert encoding.offsets == expected.offsets, text


def test_lower_casing_is_that_of_pylate(modernbert_tokenizer_file: Path, hugging_face) -> None:
    """PyLate (sentence-transformers 5) calls str.lower on the text, special tokens in it included."""
    ours = Tokenizer(backend(modernbert_tokenizer_file), {"do_lower_case": True})
    texts = [*CASED, "a literal [MASK] in Text"]
    for text, encoding in zip(texts, ours.encode_batch(texts), strict=True):
        pair = text if isinstance(text, tuple) else (text,)
        assert encoding.ids == hugging_face(*(part.lower() for part in pair))["input_ids"]
    assert [e.ids for e in ours.encode_batch(texts)] == [
        ids.tolist() for ids in ours(texts).input_ids.split(ours(texts).lengths)
    ]
    (encoding,) = ours.encode_batch("İİİİ tail", max_length=5)
    assert encoding.offsets[1:-1] == ours.encode_batch("İİİİ tail")[0].offsets[1:4]


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("sentence_bert_config.json", {"do_lower_case": True, "max_seq_length": 299}, True),
        ("sentence_bert_config.json", {"do_lower_case": False}, False),
        ("tokenizer_config.json", {"do_lower_case": True}, True),
        ("tokenizer_config.json", {}, False),
    ],
)
def test_the_checkpoint_says_whether_to_lower_case(folder: Path, file: str, content: dict, expected: bool) -> None:
    (folder / file).write_text(json.dumps(content))
    loaded = Tokenizer.from_pretrained(folder)
    assert loaded.do_lower_case is expected
    (encoding,) = loaded.encode_batch("Deep LEARNING")
    assert (loaded.decode(encoding.ids) == "[CLS]deep learning[SEP]") is expected


def test_sentence_transformers_word_on_lower_casing_goes_before_the_tokenizers(folder: Path) -> None:
    """Fast tokenizers of transformers ignore do_lower_case, so False in the former means cased text."""
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": false}')
    assert not Tokenizer.from_pretrained(folder).do_lower_case


def test_a_file_that_lower_cases_by_itself_keeps_its_special_tokens(tmp_path: Path) -> None:
    """BERT's tokenizer_config.json says do_lower_case too, and `[MASK]` in a text must stay one token."""
    bert = words("[UNK]", "[MASK]", "a")
    bert.normalizer = normalizers.BertNormalizer(lowercase=True)
    bert.add_special_tokens(["[MASK]"])
    bert.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert [encoding.ids for encoding in loaded.encode_batch(["A", "[MASK]"])] == [[2], [1]]


def test_special_tokens_are_those_that_the_checkpoint_names(tokenizer: Tokenizer, folder: Path, hugging_face) -> None:
    roles = ("cls_token_id", "sep_token_id", "pad_token_id", "mask_token_id", "unk_token_id")
    assert [getattr(tokenizer, role) for role in roles] == [getattr(hugging_face, role) for role in roles]
    config = {"pad_token": {"content": "[MASK]", "lstrip": True}, "cls_token": "[unused1]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"cls_token": "[unused2]", "sep_token": "[unused3]"}))
    loaded = Tokenizer.from_pretrained(folder)
    assert [loaded.id_to_token(getattr(loaded, role)) for role in roles] == [
        "[unused1]",
        "[unused3]",
        "[MASK]",
        "[MASK]",
        "[UNK]",
    ]


def test_special_tokens_that_nobody_names() -> None:
    roberta = Tokenizer(words("<unk>", "<s>", "</s>", "<pad>"))
    assert (roberta.cls_token_id, roberta.sep_token_id, roberta.pad_token_id, roberta.mask_token_id) == (
        1,
        2,
        3,
        None,
    )
    with pytest.raises(ValueError, match=r"mask_token is '\[MASK\]', which tokenizer.json lacks"):
        Tokenizer(words("<unk>"), {"mask_token": "[MASK]"})


def test_added_tokens(modernbert_tokenizer_file: Path) -> None:
    ours = Tokenizer(backend(modernbert_tokenizer_file))
    assert ours.add_tokens(["[Q] ", "[D] ", "the", "[MASK]"]) == 2  # "the" and "[MASK]" have ids already
    assert (ours.token_to_id("[Q] "), ours.id_to_token(50369), ours.vocab_size) == (50368, "[D] ", 50370)
    assert ours("[Q] a").input_ids.tolist() == [50281, 50368, ours.token_to_id("a"), 50282]
    assert (ours.add_tokens(["[Q] "]), ours.vocab_size) == (0, 50370)
    assert (ours.token_to_id("no such token"), ours.id_to_token(60_000)) == (None, None)


def test_the_vocabulary_size_is_what_an_embedding_table_needs() -> None:
    """A count of the tokens is too small where ids have gaps."""
    gaps = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 7}, unk_token="[UNK]"))
    assert (gaps.get_vocab_size(), Tokenizer(gaps).vocab_size) == (2, 8)


@pytest.mark.parametrize("lower", [False, True])
def test_what_is_saved_loads_in_transformers_and_here(folder: Path, tmp_path: Path, lower: bool) -> None:
    from transformers import AutoTokenizer

    (folder / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": lower}))
    stale = {"50284": {"content": "[MASK]", "lstrip": False, "special": True}}  # tokenizer.json: lstrip
    config = {"added_tokens_decoder": stale, "pad_token": "[MASK]", "model_max_length": 299}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_pretrained(folder)
    ours.add_tokens(["[Q] ", "[D] "])
    saved = tmp_path / "saved"
    ours.save_pretrained(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == ours.files()

    theirs = AutoTokenizer.from_pretrained(saved)
    again = Tokenizer.from_pretrained(saved)
    assert (again.do_lower_case, again.max_length, again.vocab_size) == (lower, 299, 50370)
    assert (theirs.model_max_length, len(theirs), theirs.pad_token_id) == (299, 50370, 50284)
    texts = [*TEXTS, "[Q] What? [D] That", *CASED]
    for text, mine, reloaded in zip(texts, ours.encode_batch(texts), again.encode_batch(texts), strict=True):
        assert mine == reloaded
        pair = text if isinstance(text, tuple) else (text,)
        assert mine.ids == theirs(*(part.lower() if lower else part for part in pair))["input_ids"], text


def test_copies_pickles_and_threads(tokenizer: Tokenizer) -> None:
    expected = tokenizer.encode_batch(TEXTS)
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode_batch(TEXTS) == expected
        assert (other.mask_token_id, other.max_length) == (50284, 8192)
        other.add_tokens(["[Q] "])
    assert tokenizer.vocab_size == 50368
    lengths = list(range(3, 43))
    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        for length, batch in zip(lengths, pool.map(lambda n: tokenizer(TEXTS, max_length=n), lengths), strict=True):
            assert batch.lengths == tuple(min(length, len(ids)) for ids in IDS)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "wanted a str or a list of str and pairs, got NoneType"),
        (b"bytes", "got bytes b'bytes'"),
        (("a", "b"), r"got tuple \('a', 'b'\)"),
        ({"a": 1}, "got dict"),
        (["a", None], r"texts\[1\]: .* got NoneType None"),
        (["a", float("nan")], r"texts\[1\]: .* got float nan"),
        ([b"a"], r"texts\[0\]: .* got bytes b'a'"),
        ([["a", "b"]], r"texts\[0\]: .* got list"),
        ([("a", "b", "c")], r"texts\[0\]: .* got tuple"),
        (["a", ("a", 1)], r"texts\[1\]: .* got int 1"),
    ],
)
def test_what_is_not_text_is_refused(tokenizer: Tokenizer, texts, message: str) -> None:
    for run in (tokenizer, tokenizer.encode_batch):
        with pytest.raises(TypeError, match=message):
            run(texts)


def test_half_a_surrogate_pair_is_refused_and_the_advice_helps(tokenizer: Tokenizer) -> None:
    for text in ("ab\ud800c", ("fine", "ab\udcffc")):
        with pytest.raises(ValueError, match=r"texts\[1\] has half a surrogate pair at character 2"):
            tokenizer(["fine", text])
    assert tokenizer("ab\ud800c".encode("utf-8", "replace").decode()).num_tokens > 2


def test_a_folder_without_a_tokenizer_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_template_with_another_order_keeps_its_special_tokens() -> None:
    """A cut must keep special tokens wherever the template puts them, here one in front and two behind."""
    ours = Tokenizer(words("<unk>", "<s>", "</s>", "a"))
    raw = words("<unk>", "<s>", "</s>", "a")
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s> </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ours = Tokenizer(raw)
    assert ours("a a a a", max_length=5).input_ids.tolist() == [1, 3, 3, 2, 2]
