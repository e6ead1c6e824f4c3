import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from modernbert.heads.colbert import ColBERT
from modernbert.recipes import contrastive
from modernbert.recipes.contrastive import Config, main, parse, schedule
from modernbert.train import data
from modernbert.train.teacher import text_key

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
        learning_rate=2e-2,
        embedding_learning_rate=2e-2,
        warmup=0.1,
        threads=1,
        save_minutes=0.0,
    )
    return replace(tiny, **changes)


def test_twenty_steps_learn(toy, tmp_path, monkeypatch):
    seen = []
    step = contrastive.train_step
    monkeypatch.setattr(contrastive, "train_step", lambda *args: seen.append(step(*args)) or seen[-1])
    main(config(toy, tmp_path))
    loss = [loss.item() for loss, _, _ in seen]
    assert np.mean(loss[-5:]) < 0.7 * np.mean(loss[:5])


def test_a_killed_run_resumes_to_bit_equal_weights(toy, tmp_path, monkeypatch):
    whole = main(config(toy, tmp_path / "whole"))
    step, calls = contrastive.train_step, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(contrastive, "train_step", killed)
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
    c = model.config
    for rows, prefix, texts in (
        (tokens.queries, c.query_prefix, model.tokenize_queries([pair.query for pair in pairs])),
        (tokens.positives, c.document_prefix, model.tokenize_documents([pair.positive for pair in pairs])),
    ):
        batch = contrastive.with_specials(model, rows, np.arange(3), prefix)
        assert batch.input_ids.tolist() == texts.batch.input_ids.tolist()


def test_a_teacher_gives_embeddings_and_its_loss(toy, tmp_path, monkeypatch):
    """Vectors for all tokens and all pairs: the table has the teacher's geometry, and KL enters the loss."""
    output = tmp_path / "out"
    main(config(toy, output, steps=0))
    backend = contrastive.prepare(config(toy, output), output)[0]
    texts = sorted(
        {
            *contrastive.token_texts(backend),
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

    teacher = contrastive.Teacher(folder)
    table = contrastive.build(taught, backend, teacher).encoder.embeddings.tok_embeddings.weight
    ours = torch.nn.functional.normalize(table[: backend.get_vocab_size(), :24].detach(), dim=-1)
    theirs = teacher[teacher.rows(contrastive.token_texts(backend))]
    theirs = torch.nn.functional.normalize(theirs - theirs.mean(0), dim=-1)  # 24 of the 32 columns are the teacher's
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-4)


def test_schedule_rises_stays_and_falls():
    c = Config(pairs="", output="", steps=100, warmup=0.1, decay=0.4)
    rates = [schedule(step, c) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:61] == pytest.approx([1.0] * 52)
    assert rates[80] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 40)


def test_the_command_line_is_the_config():
    got = parse(["--pairs", "p", "--output", "o", "--steps", "7", "--held-out", "a", "b", "--learning-rate", "1e-3"])
    assert got == Config(pairs="p", output="o", steps=7, held_out=("a", "b"), learning_rate=1e-3)
