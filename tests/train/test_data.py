import gc
import gzip
import json

import numpy as np
import pytest
import torch

from modernbert.config import EncoderConfig
from modernbert.encoder import Encoder
from modernbert.heads.colbert import ColBERT, ColBERTConfig
from modernbert.train import data
from modernbert.train.data import (
    Pair,
    TokenizedPairs,
    choose_pairs,
    digest,
    first_per_source,
    read_pairs,
    without_overlap,
)
from modernbert.train.examples import read_triples
from modernbert.train.teacher import Teacher, text_key
from modernbert.train.vocabulary import train_tokenizer


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
    assert list(read_pairs(tmp_path, exclude_sources={"b"})) == [
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


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"{oops", "Expecting property name"),
        (b"", "Expecting value"),
        (b"[1]", r"got \[1\]"),
        (b'{"query": null, "positive": "x"}', '"query" must be a string, got None'),
        (b'{"query": "a", "positive": "b", "group": [1]}', r'"group" must be a string, got \[1\]'),
        (b'{"query": "a", "positive": "b", "group": true}', '"group" must be a string, got True'),
        (b'{"query": "a", "positive": "b", "group": 1.5}', '"group" must be a string, got 1.5'),
        (b'{"query": 10, "positive": "b"}', '"query" must be a string, got 10'),
        (b'{"query": ["a"], "positive": "b"}', '"query" must be a string'),
        (b'{"query": "a", "positive": "b", "source": 3}', '"source" must be a string, got 3'),
        (b'{"query": "a", "positive": "\\ud800"}', "surrogates not allowed"),
        (b'{"query": "a", "positive": "\xff"}', "invalid start byte"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, sentence):
    (tmp_path / "x.jsonl").write_bytes(b'{"query": "q", "positive": "p", "group": 3}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: .*{sentence}"):
        list(read_pairs(tmp_path))


def test_a_damaged_compressed_file_is_named(tmp_path):
    pytest.importorskip("zstandard")
    write_lines(tmp_path / "x.jsonl.zst", [{"query": "this is", "positive": "not compressed"}])
    with pytest.raises(ValueError, match=r"x\.jsonl\.zst is damaged"):
        list(read_pairs(tmp_path))


def test_all_frames_of_a_compressed_file_are_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    frame = zstandard.ZstdCompressor().compress(b'{"query": "q", "positive": "p"}\n')
    (tmp_path / "x.jsonl.zst").write_bytes(frame + frame)
    assert len(list(read_pairs(tmp_path))) == 2


LINES = b"".join(b'{"query": "q%d", "positive": "p%d"}\n' % (i, i) for i in range(20_000))


def compressed(ending):
    if ending == "gz":
        return gzip.compress(LINES)
    return pytest.importorskip("zstandard").ZstdCompressor().compress(LINES)


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_files_are_read_to_the_end(tmp_path, ending):
    (tmp_path / f"x.jsonl.{ending}").write_bytes(compressed(ending))
    pairs = list(read_pairs(tmp_path))
    assert pairs == [Pair(f"q{i}", f"p{i}", "x", f"p{i}") for i in range(20_000)]


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("left", [0.5, 0.999])
def test_a_compressed_file_that_was_cut_is_an_error(tmp_path, ending, left):
    """The reader of zstandard takes it for a whole one, and a run would train on a part of the pairs."""
    content = compressed(ending)
    (tmp_path / f"x.jsonl.{ending}").write_bytes(content[: int(len(content) * left)])
    with pytest.raises(ValueError, match=rf"x\.jsonl\.{ending} is damaged: "):
        list(read_pairs(tmp_path))


def test_a_broken_line_of_a_compressed_file_is_named(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"query": "q", "positive": "p"}\n{oops\n'))
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz:2: Expecting property name"):
        list(read_pairs(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "bits"])
def test_damaged_tokens_are_named(model, tmp_path, damage):
    file = tmp_path / "tokens.npz"
    TokenizedPairs.from_pairs(PAIRS, model, None).save(file, {})
    whole = file.read_bytes()
    flipped = whole.replace(b"NUMPY", b"NUMPX", 1)
    file.write_bytes({"cut": whole[:-99], "noise": b"\xff" * 99, "empty": b"", "bits": flipped}[damage])
    with pytest.raises(ValueError, match=r"tokens\.npz is damaged; delete it, and the pairs are tokenised again"):
        TokenizedPairs.load(file, {})


def test_no_pair_left_is_an_error(tmp_path):
    write_lines(tmp_path / "x.jsonl", [{"query": " ", "positive": "p"}, {"query": "q", "positive": "p", "source": "s"}])
    assert len(choose_pairs(tmp_path, exclude_sources=(), decontaminate_against=())) == 1
    with pytest.raises(ValueError, match=r"no pair of .* is left"):
        choose_pairs(tmp_path, exclude_sources=("s",), decontaminate_against=())


def test_a_digest_is_of_names_and_content(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(b"12345")
    assert digest(files[:1]) != digest(files[1:])
    before = digest(files)
    assert digest(files) == before
    files[1].write_bytes(b"12346")
    assert digest(files) != before


PAIRS = [
    Pair("Read the FILE", "  in python, read_file: opens (the) file ", "a", "x"),
    Pair("file " * 50, "word " * 50, "b", 3),
    Pair("?", "how", "a", "x"),
]


@pytest.fixture
def model():
    """With all that a text goes through: prompts, stripping, a skiplist."""
    tokenizer = train_tokenizer(
        iter(["how to read a file in python read_file opens the file + word"] * 9), vocab_size=300
    )
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings = ColBERTConfig(query_length=9, document_length=12, query_prompt="how ", skiplist_words=("Ġfile",))
    encoder = Encoder(EncoderConfig(vocab_size=tokenizer.vocab_size, **sizes))
    return ColBERT.from_encoder(encoder, tokenizer, dim=4, config=settings)


def test_training_reads_what_the_model_will_read(model):
    """Ids to `Tokens` give the batch, and the rows, of `tokenize_queries` and `tokenize_documents`."""
    pairs = TokenizedPairs.from_pairs(PAIRS, model, None)
    queries = model.tokenize_queries([pair.query for pair in PAIRS])
    documents = model.tokenize_documents([pair.positive for pair in PAIRS])
    assert 0 < (~documents.keep).sum() < len(documents.keep)
    for got, wanted in (
        (model.query_tokens(pairs.queries.select(range(3))), queries),
        (model.document_tokens(pairs.positives.select(range(3))), documents),
    ):
        assert got.batch.input_ids.tolist() == wanted.batch.input_ids.tolist()
        assert got.batch.lengths == wanted.batch.lengths
        assert torch.equal(got.keep, wanted.keep)
    assert pairs.lengths.tolist() == [
        q + d for q, d in zip(queries.batch.lengths, documents.batch.lengths, strict=True)
    ]
    assert pairs.queries.lengths.tolist() == [4, 6, 1]  # with the prompt; special tokens and prefix are not stored
    assert pairs.sources.tolist() == [0, 1, 0]
    assert pairs.positive_groups.tolist() == [0, 1, 0]


def test_tokenized_pairs_come_back_from_their_file(model, tmp_path):
    text = PAIRS[1].query
    np.save(tmp_path / "keys.npy", np.array([text_key(text)], np.uint64))
    np.save(tmp_path / "vectors.npy", np.ones((1, 2), np.float16))
    pairs = TokenizedPairs.from_pairs(PAIRS, model, Teacher(tmp_path))
    assert pairs.teacher_index.tolist() == [[-1, -1], [0, -1], [-1, -1]]
    pairs.save(tmp_path / "tokens.npz", {"lengths": (1, 2)})
    back = TokenizedPairs.load(tmp_path / "tokens.npz", {"lengths": (1, 2)})
    for name in ("lengths", "sources", "positive_groups", "teacher_index"):
        np.testing.assert_array_equal(getattr(back, name), getattr(pairs, name))
    for name in ("queries", "positives"):
        assert getattr(back, name).select(range(3)) == getattr(pairs, name).select(range(3))
    with pytest.raises(ValueError, match=r"tokens\.npz .*lengths is \[1, 2\], now \[1, 3\]"):
        TokenizedPairs.load(tmp_path / "tokens.npz", {"lengths": (1, 3)})
    np.savez(tmp_path / "tokens.npz", sources=pairs.sources)  # of a version that did not remember
    with pytest.raises(ValueError, match="lengths is None, now"):
        TokenizedPairs.load(tmp_path / "tokens.npz", {"lengths": (1, 3)})


def test_chosen_pairs_are_read_again_and_not_kept(tmp_path):
    write_lines(
        tmp_path / "x.jsonl", [{"query": f"q{i}", "positive": f"p{i}", "source": "ab"[i % 2]} for i in range(9)]
    )
    chosen = choose_pairs(tmp_path, exclude_sources=("b",), decontaminate_against=())
    assert len(chosen) == len(list(chosen)) == len(list(chosen)) == 5
    assert first_per_source(chosen, 2, seed=1) == first_per_source(list(chosen), 2, seed=1)
    negatives = [
        {"query": "q", "positive": "p", "negatives": ["n"]},
        {"query": "q", "positive": "p", "negatives": [""]},
    ]
    write_lines(tmp_path / "x.jsonl", negatives)
    chosen = choose_pairs(tmp_path, exclude_sources=(), decontaminate_against=(), read=read_triples)
    assert list(chosen) == [Pair("q", "p", "x", "p", ("n",))]


def test_pairs_that_are_tokenised_are_never_all_in_memory(model, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 50)
    alive = []

    def pairs():
        for i in range(1000):
            yield Pair(f"how to {i}", "read the file", "s", i)
            if i % 100 == 99:
                alive.append(sum(type(each) is Pair for each in gc.get_objects()))

    assert len(TokenizedPairs.from_pairs(pairs(), model, None).lengths) == 1000
    assert max(alive) <= 120


@pytest.mark.parametrize("chunk", [1, 2, 4096])
def test_negatives_and_scores_of_pairs(model, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(data, "CHUNK", chunk)
    pairs = [
        Pair("how to", "read the file", "a", 1, ("word",), (0.5, 0.25)),
        Pair("file", "how", "a", 2, ("word file read", "python in"), (3.0, -1.0, 2.0)),
        Pair("read", "python", "b", 3, (), (9.0,)),
    ]
    made = TokenizedPairs.from_pairs(pairs, model, None)
    made.save(tmp_path / "tokens.npz", {})
    for tokens in (made, TokenizedPairs.load(tmp_path / "tokens.npz", {})):
        documents, offsets = tokens.documents([1, 0, 2])
        texts = ["how", "word file read", "python in", "read the file", "word", "python"]
        assert documents == model.document_ids(texts)
        assert offsets.tolist() == [0, 3, 5, 6]
        assert tokens.teacher_scores([1, 0, 2]).tolist() == [3, -1, 2, 0.5, 0.25, 9]
        assert tokens.teacher_scores([]).tolist() == []
        queries = model.tokenize_queries([pair.query for pair in pairs]).batch.lengths
        sizes = model.tokenize_documents(texts).batch.lengths
        wanted = [sizes[3] + sizes[4], sum(sizes[:3]), sizes[5]]
        assert tokens.lengths.tolist() == [q + d for q, d in zip(queries, wanted, strict=True)]


def test_pairs_without_negatives_have_one_document(model):
    tokens = TokenizedPairs.from_pairs(PAIRS, model, None)
    documents, offsets = tokens.documents([2, 0])
    assert documents == tokens.positives.select([2, 0])
    assert offsets.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="no scores of a teacher"):
        tokens.teacher_scores([0])


@pytest.mark.parametrize("scores", [(), (1.0,), (1.0, 2.0, 3.0)])
def test_scores_of_some_pairs_only_are_refused(model, scores):
    pairs = [Pair("how", "file", "a", 1, ("word",), (1.0, 2.0)), Pair("how", "file", "a", 2, ("word",), scores)]
    with pytest.raises(ValueError, match=rf"pair 1 has {len(scores)} scores for 2 documents"):
        TokenizedPairs.from_pairs(pairs, model, None)


def test_no_pairs_are_refused(model):
    with pytest.raises(ValueError, match="there are no pairs"):
        TokenizedPairs.from_pairs([], model, None)


def test_groups_are_numbered_in_order_and_a_number_is_not_its_name(model):
    pairs = [
        Pair("q", "p", source, group) for source, group in (("b", "3"), ("a", 3), ("b", 3), ("b", "3"), ("a", "3"))
    ]
    assert TokenizedPairs.from_pairs(pairs, model, None).positive_groups.tolist() == [0, 1, 2, 0, 3]
