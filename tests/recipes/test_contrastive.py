import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from modernbert.heads.colbert import ColBERT
from modernbert.recipes import contrastive
from modernbert.recipes.contrastive import Config, main
from modernbert.tokenizer import Tokenizer
from modernbert.train import data
from modernbert.train.distributed import ALONE
from modernbert.train.options import parse
from modernbert.train.teacher import Teacher, text_key, token_texts

HERE = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
WORDS = ["river", "mountain", "engine", "pressure", "violin", "market", "planet", "protein"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A query asks in another word for what its document names, so that only learning finds it."""
    folder = tmp_path_factory.mktemp("pairs")
    draw = random.Random(0)
    rows = []
    for i in range(240):
        word = draw.choice(WORDS[:4])
        positive = f"the {word} was seen by {draw.randrange(100)} people who knew it"
        rows.append({"query": f"find {word[::-1]}", "positive": positive, "source": "ab"[i % 2], "group": word})
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def config(toy, output, **changes) -> Config:
    tiny = Config(
        pairs=str(toy),
        output=str(output),
        vocab_size=400,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        dim=16,
        steps=20,
        batch_pairs=24,
        batch_tokens=600,
        learning_rate=5e-3,
        embedding_learning_rate=5e-3,
        warmup=0.1,
        threads=1,
        save_minutes=0.0,
    )
    return replace(tiny, **changes)


def test_twenty_steps_learn(toy, tmp_path, monkeypatch):
    seen = []
    step = contrastive.batch_loss
    monkeypatch.setattr(contrastive, "batch_loss", lambda *args: seen.append(step(*args)) or seen[-1])
    main(config(toy, tmp_path))
    loss = [part.loss.item() for part in seen]
    assert np.mean(loss[-5:]) < 0.8 * np.mean(loss[:5])


def test_a_killed_run_resumes_to_bit_equal_weights(toy, tmp_path, monkeypatch):
    whole = main(config(toy, tmp_path / "whole"))
    step, calls = contrastive.batch_loss, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(contrastive, "batch_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        main(config(toy, tmp_path / "killed"))
    resumed = main(config(toy, tmp_path / "killed"))
    assert len(calls) == 9 + 12  # eight steps were kept
    for (name, wanted), got in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(wanted, got), name


def test_another_config_is_refused_for_a_checkpoint(toy, tmp_path):
    main(config(toy, tmp_path, steps=1))
    with pytest.raises(ValueError, match=r"temperature.*0\.5.*0\.1"):
        main(config(toy, tmp_path, steps=2, temperature=0.1))


def test_the_result_loads_and_is_float16_on_disk(toy, tmp_path):
    model = main(config(toy, tmp_path, steps=2))
    loaded = ColBERT.from_pretrained(tmp_path / "model")
    # Rounding every weight to float16 moves a unit vector by a few 2**-11.
    for wanted, got in zip(model.encode_documents(WORDS), loaded.encode_documents(WORDS), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0.02)
    assert (loaded.config.query_length, loaded.config.document_length) == (48, 224)
    size = sum(file.stat().st_size for file in (tmp_path / "model").rglob("*.safetensors"))
    assert size < 2.2 * sum(parameter.numel() for parameter in model.parameters())


def test_training_feeds_what_the_model_will_see(toy, tmp_path):
    """The ids that training assembles are those of `tokenize_queries` and `tokenize_documents`."""
    model = main(config(toy, tmp_path, steps=1))
    _, tokens, _ = contrastive.prepare(config(toy, tmp_path), tmp_path)
    pairs = list(data.read_pairs(toy))[:3]
    for training, inference in (
        (model.query_tokens(tokens.queries.select(range(3))), model.tokenize_queries([pair.query for pair in pairs])),
        (
            model.document_tokens(tokens.positives.select(range(3))),
            model.tokenize_documents([pair.positive for pair in pairs]),
        ),
    ):
        assert training.batch.input_ids.tolist() == inference.batch.input_ids.tolist()
        assert torch.equal(training.keep, inference.keep)


def test_texts_are_cut_to_the_lengths_of_training(toy, tmp_path, monkeypatch):
    seen = []
    forward = ColBERT.forward
    monkeypatch.setattr(
        ColBERT, "forward", lambda self, batch, **rest: seen.append(batch.batch) or forward(self, batch, **rest)
    )
    model = main(config(toy, tmp_path, steps=1, train_query_length=4, train_document_length=7))
    assert [max(batch.lengths) for batch in seen] == [4, 7]
    assert (model.config.query_length, model.config.document_length) == (48, 224)


def test_rows_on_the_skiplist_are_not_scored(toy, tmp_path):
    """As in inference: a document's row that is not kept changes no score; all documents hold the word."""
    settings = config(toy, tmp_path, steps=0)
    main(settings)
    model, pairs, _ = contrastive.prepare(settings, tmp_path)
    batch = np.arange(4)
    before = contrastive.batch_loss(settings, model, pairs, None, batch)
    tokens = model.document_tokens(pairs.positives.select(batch))
    word = max(set(tokens.batch.input_ids.tolist()), key=tokens.batch.input_ids.tolist().count)
    model.skip_ids = torch.tensor([word])
    documents = contrastive.vectors(model, model.document_tokens(pairs.positives.select(batch)))
    whole = contrastive.vectors(model, tokens)
    assert len(documents.values) == (tokens.batch.input_ids != word).sum() < len(whole.values)
    torch.testing.assert_close(documents.values, whole.values[tokens.batch.input_ids != word])
    assert contrastive.batch_loss(settings, model, pairs, None, batch).loss != before.loss


def test_a_teacher_gives_embeddings_and_its_loss(toy, tmp_path, monkeypatch):
    """Vectors for all tokens and all pairs: the table has the teacher's geometry, and KL enters the loss."""
    output = tmp_path / "out"
    main(config(toy, output, steps=0))
    tokenizer = Tokenizer.from_pretrained(output)
    texts = sorted(
        {
            *token_texts(tokenizer),
            *(t for p in data.read_pairs(toy) for t in (p.query, p.positive)),
        },
        key=text_key,
    )
    rng = np.random.default_rng(0)
    folder = tmp_path / "teacher"
    folder.mkdir()
    np.save(folder / "keys.npy", np.array([text_key(text) for text in texts], np.uint64))
    np.save(folder / "vectors.npy", rng.normal(size=(len(texts), 24)).astype(np.float16))
    taught = config(toy, tmp_path / "taught", teacher=str(folder), steps=3)
    calls = []
    kl = contrastive.kl_distill
    monkeypatch.setattr(contrastive, "kl_distill", lambda *args: calls.append(1) or kl(*args))
    main(taught)
    assert len(calls) == 3

    teacher = Teacher(folder)
    table = contrastive.build(taught, tokenizer, teacher).encoder.embeddings.tok_embeddings.weight
    ours = torch.nn.functional.normalize(table[: tokenizer.vocab_size, :24].detach(), dim=-1)
    theirs = teacher[teacher.index(token_texts(tokenizer))]
    theirs = torch.nn.functional.normalize(theirs - theirs.mean(0), dim=-1)  # 24 of the 32 columns are the teacher's
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-4)


def test_the_command_line_is_the_config():
    words = ["--pairs", "p", "--output", "o", "--steps", "7", "--learning-rate", "1e-3"]
    got = parse(Config, None, [*words, "--decontaminate-against", "a", "b", "--exclude-sources", "c"])
    wanted = {"steps": 7, "learning_rate": 1e-3, "decontaminate_against": ("a", "b"), "exclude_sources": ("c",)}
    assert got == Config(pairs="p", output="o", **wanted)


def test_the_defaults_are_those_of_the_built_in_model():
    """All of its settings but the sources, corpora and teacher of its model card, which are this machine's files."""
    c, model = Config(pairs="p", output="o"), ColBERT.default()
    assert (model.encoder.config.hidden_size, model.encoder.config.intermediate_size) == (
        c.hidden_size,
        c.intermediate_size,
    )
    assert (len(model.encoder.layers), model.dim) == (c.num_hidden_layers, c.dim)
    assert (model.config.query_length, model.config.document_length) == (c.query_length, c.document_length)
    assert model.tokenizer.vocab_size == c.vocab_size + 2  # the prefixes


def killed_before_the_first_checkpoint(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(contrastive, "batch_loss", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main(config)


def test_other_pairs_are_refused_in_the_output_of_a_run_without_a_checkpoint(toy, tmp_path, monkeypatch):
    killed_before_the_first_checkpoint(config(toy, tmp_path / "out"), monkeypatch)
    other = tmp_path / "other"
    other.mkdir()
    (other / "toy.jsonl").write_text((toy / "toy.jsonl").read_text(encoding="utf-8").replace("river", "brook"))
    with pytest.raises(ValueError, match=r"tokens\.npz belongs to another run: hash of pairs and teacher is"):
        main(config(other, tmp_path / "out"))
    for change in ({"vocab_size": 300}, {"train_query_length": 9}, {"exclude_sources": ("a",)}):
        with pytest.raises(ValueError, match=rf"run\.json belongs to another run: {next(iter(change))} is"):
            main(config(toy, tmp_path / "out", **change))
    # A checkpoint knows its pairs too.
    main(config(toy, tmp_path / "done", steps=1))
    (tmp_path / "done" / "tokens.npz").unlink()
    with pytest.raises(ValueError, match=r"checkpoint\.pt belongs to another run: hash of pairs and teacher is"):
        main(config(other, tmp_path / "done"))
    # The same pairs from elsewhere are the same run.
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "toy.jsonl").write_bytes((toy / "toy.jsonl").read_bytes())
    main(config(moved, tmp_path / "out", steps=1))


def test_another_teacher_is_refused(toy, tmp_path, monkeypatch):
    np.save(tmp_path / "keys.npy", np.array([text_key("find revir")], np.uint64))
    np.save(tmp_path / "vectors.npy", np.ones((1, 4), np.float16))
    killed_before_the_first_checkpoint(config(toy, tmp_path / "out", teacher=str(tmp_path)), monkeypatch)
    np.save(tmp_path / "keys.npy", np.array([text_key("find enigne")], np.uint64))
    with pytest.raises(ValueError, match="hash of pairs and teacher"):
        main(config(toy, tmp_path / "out", teacher=str(tmp_path)))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_result_before(toy, tmp_path, monkeypatch):
    main(config(toy, tmp_path, steps=2))
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    loss = contrastive.batch_loss
    monkeypatch.setattr(contrastive, "batch_loss", lambda *args: loss(*args)._replace(loss=loss(*args).loss * np.nan))
    with pytest.raises(FloatingPointError, match="step 3: the loss is nan"):
        main(config(toy, tmp_path, steps=4))
    (tmp_path / "bad-step-3.pt").unlink()  # the batch, for a look at it
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept


def test_a_result_beyond_float16_is_not_written(toy, tmp_path):
    with pytest.raises(FloatingPointError, match="the result in float16"):
        main(config(toy, tmp_path, steps=1, learning_rate=1e9, warmup=0.0, decay=0.0))
    assert not (tmp_path / "model").exists()


def test_more_steps_may_be_asked_for_and_a_loss_may_be_accumulated(toy, tmp_path, monkeypatch):
    calls = []
    loss = contrastive.batch_loss
    monkeypatch.setattr(contrastive, "batch_loss", lambda *args: calls.append(args[-1]) or loss(*args))
    main(config(toy, tmp_path, steps=2, accumulate=2))
    main(config(toy, tmp_path, steps=3, accumulate=2))
    assert len(calls) == 6
    assert len({tuple(batch.tolist()) for batch in calls}) == 6


@pytest.fixture(scope="module")
def triples(toy, tmp_path_factory):
    """The pairs of `toy`, each with two documents about another word."""
    folder = tmp_path_factory.mktemp("triples")
    draw = random.Random(1)
    rows = [json.loads(line) for line in (toy / "toy.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        others = [word for word in WORDS[:4] if word != row["group"]]
        row["negatives"] = [f"the {draw.choice(others)} was seen by {draw.randrange(100)}" for _ in range(2)]
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def gradients(settings, output, loss, *rest):
    model, pairs, _ = contrastive.prepare(settings, output)
    part = loss(settings, model, pairs, *rest, np.arange(12))
    part.loss.backward()
    return part, {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("negatives", [0, 2])
def test_chunks_have_the_loss_and_the_gradients_of_the_whole_batch(toy, triples, tmp_path, negatives):
    settings = config(triples if negatives else toy, tmp_path, hard_negatives=negatives)
    tmp_path.mkdir(exist_ok=True)
    whole, wanted = gradients(settings, tmp_path, contrastive.batch_loss, None)
    chunked, got = gradients(replace(settings, chunk_tokens=60), tmp_path, contrastive.large_loss, ALONE)
    assert (whole.count, whole.tokens) == (chunked.count, chunked.tokens)
    torch.testing.assert_close(chunked.loss, whole.loss, rtol=1e-3, atol=1e-3)
    # Both compute in bfloat16, in products of other shapes.
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=0.03 * grad.abs().max().item() + 1e-6, msg=name)


def test_twenty_steps_in_chunks_learn_and_resume(toy, tmp_path, monkeypatch):
    settings = config(toy, tmp_path / "whole", chunk_tokens=100)
    whole = main(settings)
    losses = [json.loads(row)["loss"] for row in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 2.0  # of log(24) at the start
    step, calls = contrastive.large_loss, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(contrastive, "large_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        main(replace(settings, output=str(tmp_path / "killed")))
    resumed = main(replace(settings, output=str(tmp_path / "killed")))
    assert len(calls) == 9 + 12
    for (name, wanted), got in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(wanted, got), name


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("chunk_tokens", [0, 300])
def test_autocast_is_an_option(toy, tmp_path, monkeypatch, autocast, chunk_tokens):
    """Few CPUs are fast in bfloat16."""
    vectors, seen = contrastive.vectors, []
    monkeypatch.setattr(
        contrastive, "vectors", lambda *args: seen.append(torch.is_autocast_enabled("cpu")) or vectors(*args)
    )
    main(config(toy, tmp_path, steps=1, autocast=autocast, chunk_tokens=chunk_tokens))
    assert set(seen) == {autocast}


def test_hard_negatives_are_negatives_of_all_queries(triples, tmp_path):
    settings = config(triples, tmp_path, hard_negatives=1)
    tmp_path.mkdir(exist_ok=True)
    model, pairs, _ = contrastive.prepare(settings, tmp_path)
    batch = np.arange(5)
    queries, documents, groups = contrastive.tokens_of(model, pairs, batch)
    assert (len(queries), len(documents)) == (5, 10)  # one of the two negatives of each
    assert groups.tolist() == [*pairs.positive_groups[batch].tolist(), *[-1] * 5]
    with torch.autocast("cpu", torch.bfloat16):
        vectors = [contrastive.vectors(model, tokens) for tokens in (queries, documents)]
        scores = contrastive.maxsim(*vectors) / settings.temperature
    same = (groups[:5, None] == groups[None]) & ~torch.eye(5, 10, dtype=torch.bool)
    wanted = torch.nn.functional.cross_entropy(scores.masked_fill(same, -torch.inf), torch.arange(5))
    torch.testing.assert_close(contrastive.batch_loss(settings, model, pairs, None, batch).loss, wanted)


def test_negatives_are_refused_without_the_option(triples, tmp_path):
    with pytest.raises(ValueError, match=r'toy\.jsonl:1: "negatives" would be ignored'):
        main(config(triples, tmp_path))


def test_a_beir_folder_finds_the_best_checkpoint(toy, tmp_path):
    pytest.importorskip("ir_measures")
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    texts = {word: f"the {word} was seen by 7 people who knew it" for word in WORDS[:4]}
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"_id": w, "text": t}) + "\n" for w, t in texts.items()))
    queries = "".join(json.dumps({"_id": f"q{word}", "text": f"find {word[::-1]}"}) + "\n" for word in texts)
    (folder / "queries.jsonl").write_text(queries)
    rows = "".join(f"q{word}\t{word}\t1\n" for word in texts)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    rates = {"learning_rate": 1e-3, "embedding_learning_rate": 1e-3}  # slow: the first measurement is not yet the best
    model = main(config(toy, tmp_path / "out", validation=str(folder), validate_steps=5, **rates))
    log = [json.loads(row) for row in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    found = [row["valid_nDCG@10"] for row in log if "valid_nDCG@10" in row]
    assert len(found) == 4
    assert found[-1] > found[0]
    assert (model.config.query_length, model.config.document_length) == (48, 224)
    assert (tmp_path / "out" / "best.pt").exists()


def test_pairs_of_a_teacher_need_whole_batches(toy, tmp_path):
    texts = sorted({t for p in data.read_pairs(toy) for t in (p.query, p.positive)}, key=text_key)
    np.save(tmp_path / "keys.npy", np.array([text_key(text) for text in texts], np.uint64))
    np.save(tmp_path / "vectors.npy", np.ones((len(texts), 4), np.float16))
    with pytest.raises(ValueError, match="240 pairs have a teacher's vectors"):
        main(config(toy, tmp_path / "out", teacher=str(tmp_path), chunk_tokens=100))


@pytest.mark.sweep
def test_two_ranks_score_the_documents_of_both(toy, tmp_path):
    """A step of two ranks is that of one rank with batches twice as large, up to rounding."""
    slow = {"steps": 3, "learning_rate": 1e-4, "embedding_learning_rate": 1e-4}
    one = main(config(toy, tmp_path / "one", batch_pairs=24, batch_tokens=600, chunk_tokens=10_000, **slow))
    settings = config(toy, tmp_path / "two", batch_pairs=12, batch_tokens=300, **slow)
    changed = {name: value for name, value in vars(settings).items() if value != getattr(Config, name, None)}
    words = [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python"]
    command = [*torchrun, sys.executable, "-m", "modernbert.recipes.contrastive", *words]
    run = subprocess.run(command, env=HERE, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-4000:]
    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)["model"]
    for name, wanted in one.state_dict().items():
        # Adam makes steps of the learning rate of gradients that are nothing but rounding, so single weights differ.
        assert (two[name] - wanted).abs().mean() < 2e-5, name
    losses = [json.loads((tmp_path / name / "log.jsonl").read_text())["loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
