import json
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from small_models import WORDS, tiny_encoder, tiny_tokenizer, toy_pairs

from modernbert.heads.colbert import ColBERT
from modernbert.heads.embedder import Embedder, EmbedderConfig
from modernbert.late_interaction import maxsim
from modernbert.train import mining, mining_vectors
from modernbert.train.examples import Pair, read_pairs, read_triples
from modernbert.train.mining import Candidates, Filter, Random, choose, mine, quotas_of
from modernbert.train.mining_vectors import Vectors
from modernbert.train.passages import write_passages


def pairs_of(rows):
    return [Pair(row["query"], row["positive"], row["source"], row["group"]) for row in rows]


def read(folder):
    return list(read_triples(folder / "rows"))


class Ranks:
    """A source with the scores that a function gives."""

    def __init__(self, passages, score):
        self.passages, self.score, self.calls = passages, score, 0

    def search(self, rows, queries, positives, depth):
        self.calls += 1
        found = []
        for query, positive in zip(queries, positives.tolist(), strict=True):
            scores = np.array([self.score(query, self.passages[n]) for n in range(len(self.passages))], np.float32)
            order = np.argsort(-scores, kind="stable")[:depth]
            found.append((order, scores[order], scores[positive]))
        return Candidates(
            *(np.stack([each[i] for each in found]) for i in (0, 1)), np.array([each[2] for each in found])
        )


@pytest.mark.parametrize(
    ("filter", "positive", "passing"),
    [
        (Filter(0.95), 10.0, [9.4, 0.0, -3.0]),
        (Filter(None), 10.0, [11.0, 9.5, 9.4, 0.0, -3.0]),
        (Filter(None, margin=0.5), 10.0, [9.5, 9.4, 0.0, -3.0]),
        (Filter(0.95, margin=1.0), 10.0, [0.0, -3.0]),
        (Filter(0.5), -2.0, [-3.1]),
        (Filter(0.95), 0.0, [-3.0]),
    ],
)
def test_a_negative_scores_less_than_the_positive(filter, positive, passing):
    scores = np.array([[11.0, 9.5, 9.4, 0.0, -3.0, np.nan, -np.inf]], np.float32)
    if positive < 0:  # half of it would be above it
        scores[0, 4] = -3.1
    found = Candidates(np.array([[0, 1, 2, 3, 4, 5, -1]]), scores, np.array([positive], np.float32))
    got = scores[filter.passes(found)]
    np.testing.assert_allclose(got[~np.isnan(got)], passing)
    assert np.isnan(got).sum() == 1  # a source that does not score is not filtered


def test_sources_are_mixed_by_their_shares():
    assert quotas_of([0.35, 0.3, 0.35], 15) == [5, 5, 5]
    assert quotas_of([0.35, 0.3, 0.35], 7) == [3, 2, 2]
    assert quotas_of([1, 0], 3) == [3, 0]
    assert quotas_of([1, 1, 1], 1) == [1, 0, 0]
    for wrong in ([0, 0], [-1, 2]):
        with pytest.raises(ValueError, match="shares of the sources"):
            quotas_of(wrong, 3)
    assert choose([[1, 2, 3], [2, 4, 5]], [2, 2]) == [1, 2, 4, 5]
    assert choose([[1], [1, 2]], [2, 2]) == [1, 2]  # there are no more
    assert choose([[1, 2, 3, 4], [9]], [1, 3]) == [1, 9, 2, 3]  # the first pool fills up


def test_what_may_be_a_positive_is_left_out(tmp_path):
    """Texts that differ in case and blanks, other positives of the query, of its groups, and the query."""
    pairs = [
        Pair("which bird", "The owl", "s", "birds"),
        Pair("Which  bird", "An eagle", "s", "raptors"),  # the same query
        Pair("who hunts", "A hawk", "s", "raptors"),  # the group of another pair of that query
        Pair("what flies", "THE   OWL", "s", "night"),  # the text of a positive
        Pair("what swims", "which bird", "s", "odd"),  # the text of the query
        Pair("what reads", "A student", "t", "birds"),  # another source has groups of its own
    ]
    count = mine(
        pairs, tmp_path, lambda passages: [(Ranks(passages, lambda q, p: 1.0), 1)], negatives=1, filter=Filter(None)
    )
    found = read(tmp_path)
    assert count == len(found) == len(pairs)
    assert found[0].negatives == found[1].negatives == ("A student",)
    assert found[2].negatives == ("The owl",)
    assert found[5].negatives == ("The owl",)
    assert [(row.query, row.positive, row.group) for row in found] == [(p.query, p.positive, p.group) for p in pairs]


def test_pairs_with_too_few_candidates_are_left_out(tmp_path):
    pairs = pairs_of(toy_pairs(40))

    def sources(passages):
        return [(Ranks(passages, lambda q, p: len(p) / 100), 1), (Random(len(passages)), 1)]

    assert mine(pairs, tmp_path, sources, negatives=4, filter=Filter(1.0, eligible=10)) < 40
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none of 40 pairs has 4 negatives"):
        mine(pairs, tmp_path / "none", sources, negatives=4, filter=Filter(1.0, eligible=41))


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(mining, "ROWS", 16)
    pairs, made = pairs_of(toy_pairs(60)), []

    def run(name, dies=99):
        class Dies(Ranks):
            def search(self, *arguments):
                if self.calls == dies:
                    raise KeyboardInterrupt
                return super().search(*arguments)

        def sources(passages):
            made.append(Dies(passages, lambda q, p: (hash(q[5:8]) % 7 + len(p)) / 100))
            return [(made[-1], 1), (Random(len(passages), seed=3), 1)]

        (tmp_path / name).mkdir(exist_ok=True)
        mine(pairs, tmp_path / name, sources, negatives=5, filter=Filter(None))
        return {path.name: path.read_bytes() for path in (tmp_path / name / "rows").iterdir()}

    whole = run("whole")
    assert len(whole) == 4
    with pytest.raises(KeyboardInterrupt):
        run("killed", dies=2)
    (tmp_path / "killed" / "rows" / ".000002.jsonl.0123abcd").write_text("half")
    resumed = run("killed")
    assert made[-1].calls == 2
    assert {name: data for name, data in resumed.items() if not name.startswith(".")} == whole
    assert len(read(tmp_path / "killed")) == 60


def test_random_negatives_are_drawn_by_the_number_of_the_pair():
    source = Random(1000, seed=1)
    rows = np.arange(6)
    whole = source.search(rows, [""] * 6, rows, 20).numbers_BK
    part = source.search(rows[4:], [""] * 2, rows[4:], 20).numbers_BK
    np.testing.assert_array_equal(whole[4:], part)
    assert all(len(set(row)) == 20 for row in whole.tolist())
    few = Random(7).search(rows[:1], [""], rows[:1], 20).numbers_BK[0]
    assert sorted(few.tolist()) == [-1] * 13 + list(range(7))


@pytest.fixture(scope="module")
def models():
    tokenizer = tiny_tokenizer()
    encoder = tiny_encoder(tokenizer)
    embedder = Embedder(encoder, tokenizer, config=EmbedderConfig(max_length=64)).eval()
    return {"colbert": ColBERT.from_encoder(tiny_encoder(tokenizer), tokenizer, dim=16).eval(), "embedder": embedder}


@pytest.mark.parametrize("kind", ["colbert", "embedder"])
def test_an_encoder_finds_the_best_of_all_passages(models, kind, tmp_path, monkeypatch):
    """In shards, blocks and groups of queries as over all at once; scores differ by the rounding to float16."""
    for name, value in (("SHARD", 7), ("QUERIES", 3), ("TOKENS", 40)):
        monkeypatch.setattr(mining_vectors, name, value)
    model, texts = models[kind], [f"the {word} was seen by {i} people" for i, word in enumerate(WORDS * 4)]
    passages = write_passages(lambda: texts, tmp_path)
    queries, positives = [f"find {word}" for word in WORDS], np.arange(8)
    found = Vectors(model, passages, tmp_path).search(positives, queries, positives, 5)
    q, d = model.encode_queries(queries), model.encode_documents(texts)
    wanted = q @ d.T if isinstance(q, torch.Tensor) else maxsim(q, d)
    best = wanted.topk(5, dim=1)
    np.testing.assert_allclose(found.scores_BK, best.values, rtol=0, atol=0.02)
    np.testing.assert_allclose(found.positive_B, wanted.diagonal(), rtol=0, atol=0.02)
    np.testing.assert_allclose(wanted.gather(1, torch.from_numpy(found.numbers_BK)), best.values, rtol=0, atol=0.02)
    # The shards are there now.
    monkeypatch.setattr(type(model), "encode_documents", None)
    again = Vectors(model, passages, tmp_path).search(positives, queries, positives, 5)
    np.testing.assert_array_equal(found.numbers_BK, again.numbers_BK)


def test_more_is_asked_for_than_there_is(models, tmp_path):
    passages = write_passages(lambda: WORDS[:3], tmp_path)
    found = Vectors(models["embedder"], passages, tmp_path).search(np.arange(2), WORDS[:2], np.arange(2), 5)
    assert (found.numbers_BK[:, 3:] == -1).all()
    assert sorted(found.numbers_BK[0, :3].tolist()) == [0, 1, 2]


def test_the_prefilter_finds_what_maxsim_finds(models, tmp_path):
    """With as many candidates as passages it is exact."""
    texts = [f"the {word} was seen by {i} people" for i, word in enumerate(WORDS * 4)]
    passages = write_passages(lambda: texts, tmp_path)
    rows = np.arange(8)
    exact = Vectors(models["colbert"], passages, tmp_path).search(rows, WORDS, rows, 5)
    near = Vectors(models["colbert"], passages, tmp_path, candidates=32).search(rows, WORDS, rows, 5)
    np.testing.assert_array_equal(exact.numbers_BK, near.numbers_BK)
    (tmp_path / "dense").mkdir()
    with pytest.raises(ValueError, match="candidates are for MaxSim"):
        Vectors(models["embedder"], passages, tmp_path / "dense", candidates=5)


@pytest.mark.sweep
def test_memory_does_not_hold_the_texts(tmp_path, monkeypatch):
    """Of passages of 2,000 characters, less than 200 bytes each are in memory, beside the two parts that are."""
    monkeypatch.setattr(mining, "ROWS", 256)

    def peak(count):
        folder = tmp_path / str(count)
        folder.mkdir()

        class Pairs:
            def __iter__(self):
                filler = "some words of a long passage " * 68
                return (Pair(f"query {i}", f"{i} {filler}", "s", i) for i in range(count))

        tracemalloc.start()
        mine(Pairs(), folder, lambda passages: [(Random(len(passages)), 1)], negatives=2, depth=8)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small, large = peak(2_000), peak(14_000)
    assert (large - small) / 12_000 < 200, (small, large)


def okapi(texts, query, k1=0.9, b=0.4):
    """BM25 as Lucene has it, without its stop words, in float64."""
    words = [text.lower().split() for text in texts]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for row in words:
        counts = Counter(row)
        score = 0.0
        for word in query.lower().split():
            documents = sum(word in other for other in words)
            idf = math.log(1 + (len(words) - documents + 0.5) / (documents + 0.5))
            score += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(row) / mean)) if documents else 0.0
        scores.append(score)
    return np.array(scores)


@pytest.mark.parametrize("block", [5, 16, 1000])
def test_bm25_scores_do_not_depend_on_the_blocks(block, tmp_path):
    pytest.importorskip("bm25s")
    from modernbert.train.mining_bm25 import BM25

    draw = np.random.default_rng(0)
    texts = [f"x{i} " + " ".join(draw.choice(WORDS, draw.integers(2, 12))) for i in range(37)]
    passages = write_passages(lambda: texts, tmp_path)
    queries = ["river market planet", "engine", "unknown words", "river river violin"]
    rows = np.array([0, 36, 3, 20])
    found = BM25(passages, tmp_path / "bm25", block=block).search(np.arange(4), queries, rows, 10)
    for place, query in enumerate(queries):
        wanted = okapi(texts, query)
        best = np.sort(wanted[wanted > 0])[::-1][:10]
        got = found.scores_BK[place][found.numbers_BK[place] >= 0]
        np.testing.assert_allclose(got, best, rtol=1e-5)
        np.testing.assert_allclose(wanted[found.numbers_BK[place][: len(got)]], best, rtol=1e-5)
        np.testing.assert_allclose(found.positive_B[place], wanted[rows[place]], rtol=1e-5, atol=1e-6)


def test_a_block_of_bm25_does_not_keep_the_vocabulary(tmp_path):
    """It is as large as all words: with a million passages, gigabytes over all blocks."""
    pytest.importorskip("bm25s")
    from modernbert.train.mining_bm25 import BM25

    made = BM25(write_passages(lambda: [f"word{i}" for i in range(40)], tmp_path), tmp_path / "bm25", block=4)
    assert len(made._indexes) == 10
    assert not any(
        len(kept)
        for index in made._indexes
        for kept in vars(index).values()
        if isinstance(kept, (dict, set)) and kept is not index.scores
    )


def test_mined_rows_are_read_as_pairs_of_a_trainer(tmp_path):
    pairs = pairs_of(toy_pairs(12))
    mine(pairs, tmp_path, lambda passages: [(Random(len(passages)), 1)], negatives=2)
    row = json.loads((tmp_path / "rows" / "000000.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row.keys() == {"query", "positive", "negatives", "source", "group"}
    with pytest.raises(ValueError, match='"negatives" would be ignored'):
        list(read_pairs(tmp_path / "rows"))
