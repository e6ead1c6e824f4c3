"""`mteb.evaluate` with our retrievers, on tasks that are made of local data. Its numbers are those of `evaluate`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from small_models import save_colbert, save_embedder
from stores import write_corpus

mteb = pytest.importorskip("mteb")
datasets = pytest.importorskip("datasets")
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.sts import AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from modernbert import ColBERT, Embedder  # noqa: E402
from modernbert.cli import main  # noqa: E402
from modernbert.integrations.mteb import MtebColBERT, MtebEmbedder  # noqa: E402
from modernbert.retrieval.dataset import find_dataset, read_qrels, read_queries  # noqa: E402
from modernbert.retrieval.documents.find import read_file  # noqa: E402

WORDS = ["river", "mountain", "engine", "pressure", "violin", "market", "planet", "protein", "seen", "people", "12"]


def metadata(name: str, kind: str, score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        description="local data",
        type=kind,
        dataset={"path": "local/none", "revision": "none"},
        eval_langs=["eng-Latn"],
        main_score=score,
    )


class BeirFolder(AbsTaskRetrieval):
    """A folder in BEIR's layout as a task."""

    metadata = metadata("LocalRetrieval", "Retrieval", "ndcg_at_10")
    ignore_identical_ids = True

    def __init__(self, folder, candidates=None):
        super().__init__()
        self.folder, self.candidates = folder, candidates

    def load_data(self, *_, **__):
        corpus, queries, qrels = find_dataset(self.folder)
        documents = [{"id": d.id, "title": d.title, "text": d.text} for d in read_file(corpus)]
        asked = [{"id": name, "text": text} for name, text in read_queries(queries).items()]
        split = {
            "corpus": datasets.Dataset.from_list(documents),
            "queries": datasets.Dataset.from_list(asked),
            "relevant_docs": read_qrels(qrels),
            "top_ranked": self.candidates,
        }
        self.dataset, self.data_loaded = {"default": {"test": split}}, True


class Sentences(AbsTaskSTS):
    metadata = metadata("LocalSTS", "STS", "cosine_spearman")
    min_score, max_score = 0, 1

    def load_data(self, *_, **__):
        random = np.random.default_rng(0)
        rows = [
            {"sentence1": text(random), "sentence2": text(random), "score": float(random.random())} for _ in range(12)
        ]
        self.dataset, self.data_loaded = {"test": datasets.Dataset.from_list(rows)}, True


def text(random, most=12) -> str:
    return " ".join(random.choice(WORDS, random.integers(2, most)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Titles, long documents, equal ones, graded judgements, and a document with the id of a query."""
    folder, random = tmp_path_factory.mktemp("beir"), np.random.default_rng(1)
    records = [{"_id": f"d{i}", "title": "the title" * (i % 3), "text": text(random) + f" {i}"} for i in range(60)]
    records += [{"_id": f"long{i}", "text": text(random, 400) + f" {i}"} for i in range(10)]
    # Equal scores, whose order among tools is that of the ids, ascending or descending.
    records[40:50] = [{"_id": name, "text": "river violin"} for name in "fcbeahgdij"]
    records += [{"_id": "q3", "text": "a document with the id of a query"}]
    write_corpus(folder / "corpus.jsonl", records)
    asked = ["river violin", *(text(random) for _ in range(11))]
    write_corpus(folder / "queries.jsonl", [{"_id": f"q{i}", "text": one} for i, one in enumerate(asked)])
    (folder / "qrels").mkdir()
    lines = [
        f"q{i}\t{records[j]['_id']}\t{1 + j % 2}\n" for i in range(12) for j in random.choice(70, 3, replace=False)
    ]
    (folder / "qrels" / "test.tsv").write_text("".join(lines) + "q0\tb\t1\n")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_embedder(folder / "embedder")
    save_colbert(folder / "colbert")
    return folder


def adapter(models, kind):
    if kind == "colbert":
        return MtebColBERT(ColBERT.from_pretrained(models / kind))
    return MtebEmbedder(Embedder.from_pretrained(models / kind))


def scores(model, task):
    (result,) = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False).task_results
    (found,) = result.scores["test"]
    return found


@pytest.mark.parametrize("kind", ["colbert", "embedder"])
def test_the_numbers_are_those_of_evaluate(models, folder, kind, capsys):
    theirs = scores(adapter(models, kind), BeirFolder(folder))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["evaluate", str(folder), "--model", str(models / kind), "--json"])
    ours = json.loads(capsys.readouterr().out)
    assert theirs["ndcg_at_10"] == pytest.approx(ours["nDCG@10"]["mean"], abs=1e-5)
    assert theirs["recall_at_100"] == pytest.approx(ours["recall@100"]["mean"], abs=1e-5)
    assert theirs["mrr_at_10"] == pytest.approx(ours["MRR@10"]["mean"], abs=1e-5)
    assert 0 < theirs["ndcg_at_10"] < 1


@pytest.mark.parametrize("kind", ["colbert", "embedder"])
def test_reranking_scores_only_the_candidates(models, folder, kind):
    candidates = {f"q{i}": [f"d{i}", f"d{i + 7}", f"d{i + 20}"] for i in range(12)}  # before the equal ones
    task, model = BeirFolder(folder, candidates), adapter(models, kind)
    task.load_data()
    model.index(task.dataset["default"]["test"]["corpus"], **places(task))
    queries = task.dataset["default"]["test"]["queries"]
    run = model.search(queries, top_k=100, top_ranked=candidates, **places(task))
    assert {name: set(found) for name, found in run.items()} == {name: set(all) for name, all in candidates.items()}
    whole = model.search(queries, top_k=100, **places(task))
    for name, found in run.items():
        assert found == pytest.approx({document: whole[name][document] for document in found}, abs=1e-5)
    assert 0 <= scores(model, BeirFolder(folder, candidates))["ndcg_at_10"] <= 1


def places(task) -> dict:
    return {
        "task_metadata": task.metadata,
        "hf_split": "test",
        "hf_subset": "default",
        "encode_kwargs": {},
        "num_proc": None,
    }


def test_an_embedder_runs_other_tasks(models):
    model = adapter(models, "embedder")
    found = scores(model, Sentences())
    assert -1 <= found["cosine_spearman"] <= 1
    assert found["spearman"] == pytest.approx(found["cosine_spearman"])
    x, y = (model.encode([{"text": [text(np.random.default_rng(i)) for i in range(k, k + 5)]}]) for k in (0, 5))
    np.testing.assert_allclose(model.similarity(x, y).diagonal(), model.similarity_pairwise(x, y), rtol=1e-6)


def test_the_prompt_follows_the_task(models):
    from mteb.types import PromptType

    from modernbert.heads.embedder import EmbedderConfig

    plain = Embedder.from_pretrained(models / "embedder")
    prompts = {"query": "find: ", "document": "text: ", "other": "any: "}
    config = EmbedderConfig(max_length=64, prompts=prompts, default_prompt="other")
    model = MtebEmbedder(Embedder(plain.encoder, plain.tokenizer, config=config).eval())
    for prompt_type, prompt in ((PromptType.query, "find: "), (PromptType.document, "text: "), (None, "any: ")):
        found = model.encode([{"text": ["a river"]}, {"text": ["an engine"]}], prompt_type=prompt_type)
        expected = plain.encode([f"{prompt}a river", f"{prompt}an engine"])
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["colbert", "embedder"])
def test_results_are_kept_for_these_weights_only(models, kind):
    """mteb does not run a task again for a model of the same name and revision."""
    first, again = adapter(models, kind).mteb_model_meta, adapter(models, kind).mteb_model_meta
    assert (first.name, first.revision) == (f"local/{kind}", again.revision)
    changed = {"colbert": ColBERT, "embedder": Embedder}[kind].from_pretrained(models / kind)
    changed.encoder.final_norm.weight.data[0] += 1
    other = MtebColBERT(changed) if kind == "colbert" else MtebEmbedder(changed, name="me/mine")
    assert other.mteb_model_meta.revision != first.revision
    assert kind == "colbert" or other.mteb_model_meta.name == "me/mine"
    assert first.n_parameters == sum(parameter.numel() for parameter in changed.parameters())


def test_an_instruction_follows_its_query():
    from modernbert.integrations.mteb import _query_texts

    rows = datasets.Dataset.from_list([{"id": "a", "text": "x", "instruction": "y"}, {"id": "b", "text": "z"}])
    assert _query_texts(rows) == {"a": "x y", "b": "z"}
