"""What may go wrong in the stages of a retriever: ranks, negatives that answer, other teachers, late refusals."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_models import toy_pairs, write_rows
from test_retriever_stages import STAGES, config, made  # noqa: F401  (a fixture)

from modernbert.recipes import colbert, contrastive, distill, embed, mine
from modernbert.train import data, teacher
from modernbert.train.examples import Pair, read_all_texts, read_triples

HERE = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
RANK = {"distill": "rank_texts", "colbert": "rank_queries"}


def words(config):
    """The command line of a config."""
    for name, value in vars(config).items():
        if value != getattr(type(config), name, None):
            option = f"--{'no-' * (value is False)}{name.replace('_', '-')}"
            yield from [option] if value is False else [option, *map(str, value if type(value) is tuple else [value])]


@pytest.mark.parametrize(
    "stage", ["finetune", *(pytest.param(s, marks=pytest.mark.sweep) for s in ("pretrain", "distill", "colbert"))]
)
def test_two_ranks_are_one_rank_with_the_same_batch(made, tmp_path, stage):  # noqa: F811
    """AnglE compares the pairs of all ranks, too."""
    slow = {"steps": 4, "learning_rate": 1e-4}
    one = config(made, tmp_path / "one", stage, **slow)
    if stage in RANK:
        one = replace(one, **{RANK[stage]: 2 * getattr(one, RANK[stage])})
    STAGES[stage].main(one)
    two = config(made, tmp_path / "two", stage, **slow)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python"]
    command = [*torchrun, sys.executable, "-m", f"modernbert.recipes.{STAGES[stage].__name__.rsplit('.', 1)[-1]}"]
    run = subprocess.run([*command, *words(two)], env=HERE, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-4000:]
    losses = [json.loads((tmp_path / name / "log.jsonl").read_text())["loss"] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    wanted, got = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name in wanted:
        # Optimizers make whole steps of gradients that are nothing but rounding, so single weights differ.
        assert (got[name].float() - wanted[name].float()).abs().mean() < 1e-3, name


class Words:
    """A model whose tokens are the hashes of words."""

    config = type("Lengths", (), {"query_length": 32, "document_length": 32})()

    def query_ids(self, texts):
        return [[sum(map(ord, word)) for word in text.split()] for text in texts]

    def query_tokens(self, ids):
        return type("Tokens", (), {"batch": type("Batch", (), {"lengths": [len(row) for row in ids]})()})()

    document_ids, document_tokens = query_ids, query_tokens


def test_a_negative_that_is_the_positive_of_another_pair_has_its_group(tmp_path):
    """Mined negatives are positives of other pairs. In a batch with such a pair they are not its negatives."""
    pairs = [
        Pair("a", "The owl", "s", "birds", ("a fish", "an eagle")),
        Pair("b", "An  Eagle", "s", "raptors", ("THE owl", "a stone", "an eagle")),  # the last is its own positive
        Pair("c", "a hawk", "s", "raptors", ("the owl",)),
        Pair("d", "a fish", "t", "fish", ("the owl",)),  # of another source, with groups of its own
    ]
    tokens = data.TokenizedPairs.from_pairs(pairs, Words(), None)
    tokens.save(tmp_path / "tokens.npz", {})
    for each in (tokens, data.TokenizedPairs.load(tmp_path / "tokens.npz", {})):
        assert each.groups(np.array([1, 0])).tolist() == [1, 0, 0, -1, 1, -1, 1]
        assert each.groups(np.array([2, 3])).tolist() == [1, 2, 0, -1]


def test_a_negative_that_answers_does_not_push(made, tmp_path):  # noqa: F811
    """InfoNCE of pairs whose negatives are each other's positives is that of the pairs alone."""
    rows = toy_pairs(8)
    for i, row in enumerate(rows):
        row |= {"group": f"{i}", "source": "one"}
    alone = write_rows(tmp_path / "alone" / "a.jsonl", rows)
    mined = [row | {"negatives": [rows[(i + 1) % 8]["positive"]]} for i, row in enumerate(rows)]
    both = write_rows(tmp_path / "both" / "a.jsonl", mined)
    logs = []
    for name, file, negatives in (("one", alone, 0), ("two", both, 1)):
        options = {"pairs": str(file), "negatives": negatives, "angle_weight": 0.0, "batch_pairs": 8, "steps": 1}
        embed.main(config(made, tmp_path / name, "finetune", **options))
        logs.append(json.loads((tmp_path / name / "log.jsonl").read_text())["loss"])
    # Each document is there twice, once as a negative: of the 8 candidates of a query none is new but the duplicates.
    assert logs[1] < logs[0] + np.log(2.0) - 0.01  # log 2 if a positive were its own negative


@pytest.mark.parametrize("kind", ["embedder", "colbert", "cross-encoder"])
def test_a_teacher_is_on_the_device_of_the_run(made, tmp_path, monkeypatch, kind):  # noqa: F811
    """The device "meta" is not a CPU, and is everywhere."""
    seen = []

    def load(name, device=None, **_):
        seen.append(device)
        raise KeyboardInterrupt

    monkeypatch.setitem(
        sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=load, CrossEncoder=load)
    )
    monkeypatch.setattr(teacher.ColBERT, "from_pretrained", load)
    if kind == "embedder":
        run = replace(config(made, tmp_path, "distill"), teacher=str(tmp_path / "v"), teacher_model=str(made / "pairs"))
        ask = distill.ask
    else:
        model = str(made / ("save_colbert" if kind == "colbert" else "save_masked_lm"))
        changes = {"rows": str(made / "triples"), "teacher": str(tmp_path / "scores"), "teacher_model": model}
        run, ask = config(made, tmp_path, "colbert", **changes), colbert.ask
    with pytest.raises(KeyboardInterrupt):
        ask(run, torch.device("meta"))
    assert seen == ["meta"]


@pytest.mark.parametrize("kind", ["masked_lm", "embedder"])
def test_scores_of_a_new_head_are_refused(made, tmp_path, kind):  # noqa: F811
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ValueError, match=r"holds a ModernBert.*, not a cross-encoder"):
        teacher.write_scores([("a", "b")], str(made / f"save_{kind}"), tmp_path / "scores")


LATE = {
    "a model that is not there": {"model": "nowhere/at/all/it"},
    "a batch that cannot be cut": {"batch_texts": 30, "batch_queries": 30},
    "the folder of another program": {"output": "taken"},
}


@pytest.mark.parametrize("stage", ["distill", "colbert"])
@pytest.mark.parametrize("name", LATE)
def test_what_is_refused_is_refused_before_the_teacher_is_asked(made, tmp_path, monkeypatch, stage, name):  # noqa: F811
    """A teacher takes hours."""
    module = STAGES[stage]
    monkeypatch.setattr(module, "ask", lambda config: pytest.fail("the teacher was asked"))
    write_rows(tmp_path / "taken" / "a.jsonl", [])
    known = set(module.Config.__dataclass_fields__)
    changes = {key: value for key, value in LATE[name].items() if key in known}
    changes |= {"output": str(tmp_path / changes.get("output", "out")), "teacher_model": str(made / "save_colbert")}
    changes |= {"teacher": str(tmp_path / "scores")}
    with pytest.raises((ValueError, OSError)):
        module.main(replace(config(made, tmp_path / "out", stage), **changes))


def test_rows_with_too_few_documents_are_named(made, tmp_path):  # noqa: F811
    options = {"teacher": str(tmp_path / "scores"), "teacher_model": str(made / "save_colbert")}
    for changes in ({"rows": str(made / "triples"), **options}, {}):
        with pytest.raises(ValueError, match=r"no row of .* has 9 documents: give a smaller --ways"):
            colbert.main(config(made, tmp_path / "out", "colbert", ways=9, **changes))


ROWS = {
    "a row without a text": ('{"texts": "a"}', 'a row needs "text"'),
    "half a surrogate pair": ('{"text": "a \\ud800"}', "surrogates not allowed"),
    "half of one in a list": ('{"negatives": ["b", "\\udc00"]}', "surrogates not allowed"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_text_that_cannot_be_embedded_is_named_by_its_place(made, tmp_path, name):  # noqa: F811
    row, words = ROWS[name]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + row + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: .*{words}"):
        distill.main(config(made, tmp_path / "out", "distill", texts=(str(tmp_path / "a.jsonl"),)))


def test_numbered_negatives_are_texts_too(tmp_path):
    row = {"query": "a", "positive": "b", "negative": "c", "negative_10": "e", "negative_2": "d"}
    assert list(read_all_texts([row])) == ["a", "b", "c", "d", "e"]


IMPOSSIBLE = {
    "shares without an end": ({"mix": (1.0, float("inf"))}, "must be finite"),
    "shares that are not numbers": ({"mix": (1.0, float("nan"))}, "must be finite"),
    "a share below 0": ({"mix": (1.0, -1.0)}, "0 or more"),
    "more than the depth": ({"negatives": 41, "depth": 20}, "--depth 20 gives 40 candidates at most"),
    "candidates without MaxSim": ({"candidates": 99}, "--candidates is for MaxSim, and none of --sources is a ColBERT"),
    "more than there are": ({"negatives": 99}, "99 negatives of each pair are more than 96 passages"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_mined_is_refused_before_anything_is_encoded(made, tmp_path, monkeypatch, name):  # noqa: F811
    changes, words = IMPOSSIBLE[name]
    monkeypatch.setattr(mine, "vectors", lambda *_: pytest.fail("passages were encoded"))
    options = {"sources": ("random", str(made / "save_embedder")), "threads": 1, **changes}
    with pytest.raises(ValueError, match=words):
        mine.main(mine.Config(pairs=str(made / "pairs"), output=str(tmp_path / "out"), **options))


def test_separators_of_lines_in_texts_are_kept(made, tmp_path):  # noqa: F811
    rows = toy_pairs(12)
    for i, row in enumerate(rows):
        row["positive"] += [" a\u2028b", " \x85 c", "\r d", " \x00 e", "\x0b f"][i % 5]
    pairs = write_rows(tmp_path / "a.jsonl", rows)
    mine.main(mine.Config(pairs=str(pairs), output=str(tmp_path / "out"), sources=("random",), negatives=3, threads=1))
    found = list(read_triples(tmp_path / "out" / "rows"))
    assert [row.positive for row in found] == [row["positive"] for row in rows]
    assert {text for row in found for text in row.negatives} <= {row["positive"] for row in rows}


def test_vectors_that_are_not_finite_are_not_mined_with(made, tmp_path, monkeypatch):  # noqa: F811
    """NaN, which a source without scores gives, passes each filter."""

    def broken(self, texts, **_):
        return torch.full((len(list(texts)), 32), float("nan"), device="cpu")

    monkeypatch.setattr(mine.Embedder, "encode_documents", broken)
    options = {"sources": (str(made / "save_embedder"),), "negatives": 3, "threads": 1}
    with pytest.raises(ValueError, match="a vector of a passage is not finite"):
        mine.main(mine.Config(pairs=str(made / "pairs"), output=str(tmp_path / "out"), **options))


@pytest.mark.parametrize("stage", [*STAGES, "contrastive", "mine"])
def test_of_two_runs_in_one_folder_the_second_is_refused(made, tmp_path, monkeypatch, stage):  # noqa: F811
    """Its checkpoints would replace those of the first one, and BM25 makes its blocks anew."""
    recipe = {"contrastive": contrastive, "mine": mine, **STAGES}[stage]
    if stage in STAGES:
        first = config(made, tmp_path, stage)
    else:
        first = recipe.Config(pairs=str(made / "pairs"), output=str(tmp_path), threads=1)

    def second(*_, **__):
        with pytest.raises(BlockingIOError, match=f"another run is writing to {tmp_path}: wait until it has ended"):
            recipe.main(first)
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "mine" if stage == "mine" else "train", second)
    for _ in range(2):  # what has ended holds nothing
        with pytest.raises(KeyboardInterrupt):
            recipe.main(first)
