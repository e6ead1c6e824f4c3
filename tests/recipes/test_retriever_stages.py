"""The stages of a retriever: each learns, resumes to equal bits, starts from any checkpoint, refuses other inputs."""

import json
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from small_models import save_colbert, save_embedder, save_masked_lm, toy_pairs, write_rows

from modernbert.heads import folders
from modernbert.heads.classes import CLASSES
from modernbert.heads.colbert import ColBERT
from modernbert.heads.embedder import Embedder
from modernbert.recipes import colbert, contrastive, distill, embed, mine
from modernbert.train import teacher
from modernbert.train.options import parse
from modernbert.train.teacher_folder import fill

STAGES = {"pretrain": embed, "finetune": embed, "distill": distill, "colbert": colbert}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints and inputs of all stages."""
    folder = tmp_path_factory.mktemp("stages")
    for save in (save_masked_lm, save_colbert, save_embedder):
        save(folder / save.__name__)
    pairs, triples = toy_pairs(96), toy_pairs(96, negatives=3)
    write_rows(folder / "pairs" / "a.jsonl", pairs)
    write_rows(folder / "triples" / "a.jsonl", triples)
    scored = [
        {"query": row["query"], "documents": [row["positive"], *row["negatives"]], "scores": [9.0, 1.0, 0.5, -2.0]}
        for row in triples
    ]
    write_rows(folder / "scored" / "a.jsonl", scored)
    # A teacher to whom texts with the same word are alike.
    words = sorted({word for row in pairs for word in row["positive"].split() if not word.isdigit()})
    fill(
        folder / "vectors",
        (text for row in pairs for text in (row["query"], row["positive"])),
        lambda part: np.array([[1.0 + 9 * (word in text or word[::-1] in text) for word in words] for text in part]),
        {"model": "words"},
    )
    return folder


def config(made, output, stage, **changes):
    common = {"model": str(made / "save_masked_lm"), "output": str(output), "steps": 20, "threads": 1}
    common |= {"autocast": False, "save_minutes": 0.0, **changes}
    if stage == "distill":
        own = {"texts": (str(made / "pairs"),), "teacher": str(made / "vectors"), "head_learning_rate": 2e-2}
        own["learning_rate"] = 3e-3
        return distill.Config(**{**own, "batch_texts": 32, "rank_texts": 16, "max_length": 32, **common})
    if stage == "colbert":
        own = {"rows": str(made / "scored"), "ways": 4, "batch_queries": 16, "rank_queries": 8, "learning_rate": 3e-3}
        return colbert.Config(**{**own, "matrix_learning_rate": 1e-2, "dim": 16, **common})
    own = {"learning_rate": 3e-3, "batch_pairs": 24, "chunk_tokens": 300, "max_length": 32, "stage": stage}
    if stage == "finetune":
        return embed.Config(**{**own, "pairs": str(made / "triples"), "negatives": 3, **common})
    return embed.Config(**{**own, "pairs": str(made / "pairs"), **common})


def losses(module: ModuleType, monkeypatch, dies=10**9):
    """The losses of all batches; the run is killed in the batch `dies`."""
    seen, step = [], module.batch_loss

    def spied(*arguments):
        if len(seen) == dies:
            raise KeyboardInterrupt
        seen.append(part := step(*arguments))
        return part

    monkeypatch.setattr(module, "batch_loss", spied)
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_twenty_steps_learn(made, tmp_path, monkeypatch, stage):
    seen = losses(STAGES[stage], monkeypatch)
    STAGES[stage].main(config(made, tmp_path, stage))
    loss = [part.loss.item() for part in seen]
    assert np.mean(loss[-5:]) < 0.8 * np.mean(loss[:5]), loss


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_resumes_to_bit_equal_weights(made, tmp_path, monkeypatch, stage):
    module = STAGES[stage]
    whole = module.main(config(made, tmp_path / "whole", stage, steps=6))
    with monkeypatch.context() as patch:
        losses(module, patch, dies=5)
        with pytest.raises(KeyboardInterrupt):
            module.main(config(made, tmp_path / "killed", stage, steps=6))
    resumed = module.main(config(made, tmp_path / "killed", stage, steps=6))
    for (name, wanted), got in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(wanted, got), name


@pytest.mark.parametrize("stage", STAGES)
def test_other_settings_and_inputs_are_refused(made, tmp_path, stage):
    module, first = STAGES[stage], config(made, tmp_path, stage, steps=1)
    module.main(first)
    with pytest.raises(ValueError, match=r"belongs to another run: learning_rate is 0\.003, now 0\.1"):
        module.main(replace(first, learning_rate=0.1))
    with pytest.raises(ValueError, match="belongs to another run: hash of the model"):
        module.main(replace(first, model=str(made / "save_embedder")))


@pytest.mark.parametrize("kind", ["save_masked_lm", "save_colbert", "save_embedder"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_starts_from_any_checkpoint(made, tmp_path, stage, kind):
    model = STAGES[stage].main(config(made, tmp_path, stage, steps=1, model=str(made / kind)))
    loaded = type(model).from_pretrained(tmp_path / "model")
    for (name, wanted), got in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted, msg=name)
    assert isinstance(model, ColBERT if stage == "colbert" else Embedder)


def test_every_class_of_a_folder_may_be_the_start():
    """A head without a row would lose its tensors with a warning."""
    assert set(CLASSES) == {*folders.ARCHITECTURES.values(), *folders.MODELS.values()}


def test_a_head_is_kept(made, tmp_path):
    settings = config(made, tmp_path, "colbert", steps=0, model=str(made / "save_colbert"), head="keep", dim=None)
    model, first = colbert.build(settings), ColBERT.from_pretrained(made / "save_colbert")
    assert torch.equal(model.dense[0].linear.weight, first.dense[0].linear.weight)
    assert (model.dim, model.config.query_length, model.tokenizer.do_lower_case) == (16, 48, True)
    with pytest.raises(ValueError, match="gives 16 numbers, not 8"):
        colbert.build(replace(settings, dim=8))
    with pytest.raises(ValueError, match="holds a MaskedLM, not a ColBERT"):
        colbert.build(replace(settings, model=str(made / "save_masked_lm")))
    with pytest.raises(ValueError, match="the head is 'deep', but must be keep, or one of linear, wide, residual"):
        colbert.build(replace(settings, head="deep"))


@pytest.mark.parametrize("kind", ["save_masked_lm", "save_colbert", "save_embedder"])
def test_the_recipe_contrastive_starts_from_any_checkpoint(made, tmp_path, kind):
    """Twice the same command; with a ColBERT its head is trained on."""
    settings = contrastive.Config(
        pairs=str(made / "pairs"), output=str(tmp_path), start=str(made / kind), dim=16, steps=2, threads=1
    )
    model = contrastive.main(settings)
    again = contrastive.main(settings)
    for (name, wanted), got in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(wanted, got), name
    assert ColBERT.from_pretrained(tmp_path / "model").tokenizer.vocab_size == model.encoder.config.vocab_size
    other = "save_colbert" if kind != "save_colbert" else "save_embedder"
    with pytest.raises(ValueError, match="belongs to another run: hash of start"):
        contrastive.main(replace(settings, start=str(made / other)))


@pytest.mark.parametrize("head", ["linear", "wide", "residual"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_heads_and_optimizers_are_settings(made, tmp_path, head, optimizer):
    changes = {"head": head, "optimizer": optimizer, "query_expansion": head == "wide", "lower_case": head != "wide"}
    model = colbert.main(config(made, tmp_path, "colbert", steps=1, **changes))
    loaded = ColBERT.from_pretrained(tmp_path / "model")
    assert [(layer.linear.out_features, layer.residual is not None) for layer in loaded.dense] == {
        "linear": [(16, False)],
        "wide": [(64, False), (16, False)],
        "residual": [(64, True), (16, False)],
    }[head]
    assert loaded.config.do_query_expansion is (head == "wide")
    assert loaded.tokenizer.do_lower_case is (head != "wide")
    assert (loaded.config.query_length, loaded.config.document_length) == (48, 512)
    texts = ["The RIVER was seen", "find the river"]
    for wanted, got in zip(model.encode_queries(texts), loaded.encode_queries(texts), strict=True):
        torch.testing.assert_close(got, wanted)
    same = torch.equal(loaded.encode_queries(["A River"]).values[2:], loaded.encode_queries(["a river"]).values[2:])
    assert same is (head != "wide")


def test_a_colbert_scores_the_triples_for_another_one(made, tmp_path):
    """The scores of a folder are those that the teacher gives, and are asked for once."""
    changes = {"rows": str(made / "triples"), "teacher": str(tmp_path / "scores"), "steps": 1}
    first = config(made, tmp_path / "a", "colbert", teacher_model=str(made / "save_colbert"), **changes)
    colbert.main(first)
    ours = ColBERT.from_pretrained(made / "save_colbert")
    pair = next(colbert.scored(first))
    texts = (pair.positive, *pair.negatives)
    wanted = [
        float((ours.encode_queries([pair.query])[0] @ ours.encode_documents([text])[0].T).amax(1).sum())
        for text in texts
    ]
    np.testing.assert_allclose(pair.scores, wanted, rtol=1e-4)
    before = {path.name: path.read_bytes() for path in (tmp_path / "scores").iterdir()}
    colbert.main(config(made, tmp_path / "b", "colbert", **changes))  # without the teacher's model
    assert {path.name: path.read_bytes() for path in (tmp_path / "scores").iterdir()} == before
    with pytest.raises(ValueError, match="another teacher: hash is"):
        colbert.main(replace(first, output=str(tmp_path / "c"), teacher_model=str(made / "save_masked_lm")))


def test_texts_that_a_teacher_lacks_are_counted(made, tmp_path):
    write_rows(tmp_path / "more.jsonl", [{"text": "never seen"}, *toy_pairs(3)])
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ texts: give --teacher-model"):
        distill.main(replace(config(made, tmp_path / "out", "distill"), texts=(str(tmp_path / "more.jsonl"),)))


def test_a_vector_of_a_batch_is_taught_by_that_of_its_text(made, tmp_path):
    lessons = distill.read(config(made, tmp_path, "distill"), Embedder.from_pretrained(made / "save_embedder"))
    texts = list(dict.fromkeys(distill.texts(config(made, tmp_path, "distill"))))
    assert len(lessons.ids) == len(texts)
    assert lessons.rows.tolist() == lessons.teacher.index(texts).tolist()


@pytest.mark.parametrize("normalize", ["both", "teacher", "none"])
def test_a_student_that_agrees_with_its_teacher_has_no_loss(made, tmp_path, normalize):
    """With the scores of the model itself as the teacher's; both sides are stretched alike but for "teacher"."""
    settings = config(made, tmp_path, "colbert", normalize=normalize)
    torch.manual_seed(0)
    model = colbert.build(settings).eval()
    rows = colbert.data.TokenizedPairs.from_pairs(colbert.scored(settings), model, teacher=None)
    with torch.no_grad():
        queries, documents = model.query_tokens(rows.queries.select([0])), model.document_tokens(rows.documents([0])[0])
        own = colbert.n_way_scores(model(queries), model(documents))
        taught = replace(rows, scores=own.flatten().numpy().repeat(len(rows.lengths)).astype(np.float32))
        taught.scores[:4] = own.flatten()
        part = colbert.batch_loss(settings, model, taught, np.array([0]))
    assert part.metrics["same_first"] == 1
    assert (part.loss.abs() < 1e-6) == (normalize != "teacher")


def test_mined_rows_train_an_embedder_and_a_colbert(made, tmp_path, monkeypatch):
    """mine, then both of its readers; the second run of the same command mines nothing."""
    asked = mine.Config(
        pairs=str(made / "pairs"),
        output=str(tmp_path / "mined"),
        sources=("random", str(made / "save_embedder"), str(made / "save_colbert")),
        mix=(1.0, 1.0, 2.0),
        negatives=3,
        share=0.0,
        threads=1,
    )
    assert mine.main(asked) == 96
    with monkeypatch.context() as patch:
        patch.setattr(mine.Random, "search", None)
        assert mine.main(asked) == 96
    with pytest.raises(ValueError, match="belongs to another run: depth is 200, now 7"):
        mine.main(replace(asked, depth=7))
    rows = str(tmp_path / "mined" / "rows")
    embed.main(replace(config(made, tmp_path / "embed", "finetune", steps=1), pairs=rows))
    changes = {"teacher": str(tmp_path / "scores"), "teacher_model": str(made / "save_colbert"), "steps": 1}
    colbert.main(replace(config(made, tmp_path / "colbert", "colbert", **changes), rows=rows))
    with pytest.raises(ValueError, match="--mix has 1 shares for 3 sources"):
        mine.main(replace(asked, mix=(1.0,)))


def test_validation_measures_the_vectors(made, tmp_path):
    pytest.importorskip("ir_measures")
    beir = tmp_path / "beir"
    write_rows(beir / "corpus.jsonl", [{"_id": str(i), "text": row["positive"]} for i, row in enumerate(toy_pairs(9))])
    write_rows(beir / "queries.jsonl", [{"_id": "q", "text": toy_pairs(1)[0]["query"]}])
    (beir / "qrels").mkdir()
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t0\t1\n")
    for stage in ("pretrain", "distill", "colbert"):
        output = tmp_path / stage
        settings = config(made, output, stage, steps=2, validation=str(beir), validate_steps=1)
        STAGES[stage].main(settings)
        log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        assert any("valid_nDCG@10" in row for row in log), log


def test_command_lines_are_the_published_runs():
    published = parse(embed.Config, None, ["--pairs", "p", "--model", "m", "--output", "o"])
    assert embed.point_of(published)[:3] == (6e-4, 24_576, 0)
    assert embed.point_of(replace(published, preset="32m"))[:2] == (5e-4, 12_288)
    assert embed.point_of(replace(published, stage="finetune", negatives=3)).negatives == 3
    last = parse(colbert.Config, None, ["--rows", "r", "--model", "m", "--output", "o"])
    assert (last.head, last.ways, last.batch_queries, last.train_document_length) == ("residual", 16, 128, 220)
    assert (last.optimizer, last.matrix_learning_rate, last.learning_rate, last.lower_case) == (
        "muon",
        1e-3,
        8e-5,
        True,
    )
    assert colbert.DIMS == {"17m": 48, "32m": 64}


def test_a_cross_encoder_scores_pairs(tmp_path, monkeypatch):
    """Logits of a seeded tiny one, each pair once."""
    pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    from small_models import tiny_tokenizer

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertConfig(vocab_size=tokenizer.vocab_size, num_labels=1, **shape)
    scorer = transformers.BertForSequenceClassification(bert).eval()
    torch.nn.init.normal_(scorer.classifier.weight, std=9.0)
    scorer.save_pretrained(tmp_path / "cross")
    tokenizer.save_pretrained(tmp_path / "cross")
    pairs = [("find the river", "the river was seen"), ("find", "people"), ("find the river", "the river was seen")]
    found = teacher.write_scores(pairs, str(tmp_path / "cross"), tmp_path / "scores", max_length=64)
    assert len(found.keys) == 2
    encoder = __import__("sentence_transformers").CrossEncoder(str(tmp_path / "cross"), max_length=64)
    wanted = encoder.predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(found.scores(found.index(pairs)), wanted, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(teacher, "_cross_encoder", None)  # not loaded again
    teacher.write_scores(pairs, str(tmp_path / "cross"), tmp_path / "scores", max_length=64)
    with pytest.raises(ValueError, match="another teacher: max_length is 64, now 65"):
        teacher.write_scores(pairs, str(tmp_path / "cross"), tmp_path / "scores", max_length=65)
