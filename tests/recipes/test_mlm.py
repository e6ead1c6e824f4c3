import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from folders import tree

from modernbert.encoder import Layer
from modernbert.heads.masked_lm import MaskedLM
from modernbert.recipes import mlm
from modernbert.recipes.mlm import Config, main, stages
from modernbert.tokenizer import Tokenizer
from modernbert.train.claim import LOCK, RUN
from modernbert.train.distributed import Ranks
from modernbert.train.options import parse
from modernbert.train.stages import STAGES
from modernbert.train.vocabulary import train_cased_tokenizer

HERE = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
WORDS = ["the", "river", "runs", "to", "sea", "and", "an", "engine", "makes", "pressure", "while", "markets", "turn"]
TINY = Config(
    texts="",
    output="",
    tokenizer="",
    vocab_size=300,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    tokens=14_000,
    batch_tokens=512,
    rank_tokens=256,
    longest=64,
    learning_rate=1e-2,
    threads=1,
    autocast=False,
    validate_steps=10,
    save_minutes=0.0,
)


def lines(seed, count=60):
    """Sentences that follow a cycle of words, so that a masked one can be known from its neighbours."""
    draw = random.Random(seed)
    starts = [(draw.randrange(len(WORDS)), draw.randrange(5, 60)) for _ in range(count)]
    texts = (" ".join(WORDS[(first + i) % len(WORDS)] for i in range(length)) for first, length in starts)
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "texts.jsonl").write_text(lines(0))
    (tmp_path / "held-out.jsonl").write_text(lines(1, 12))
    return replace(
        TINY,
        texts=str(tmp_path / "texts.jsonl"),
        validation=str(tmp_path / "held-out.jsonl"),
        output=str(tmp_path / "out"),
    )


def words(config):
    """The command line of a config."""
    changed = {name: value for name, value in vars(config).items() if value != getattr(Config, name, None)}
    assert changed.pop("autocast") is False
    return [
        "--no-autocast",
        *[word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", str(value))],
    ]


def rows_of(folder, name):
    return [row for row in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if name in row]


def same(one, other):
    for (name, wanted), got in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(wanted, got), name


def test_all_stages_run_and_the_loss_falls(config, tmp_path, monkeypatch):
    seen, thetas = [], []
    step = mlm.batch_loss

    def counted(model, group, batch):
        thetas.append(model.model.thetas)
        seen.append(step(model, group, batch))
        return seen[-1]

    monkeypatch.setattr(mlm, "batch_loss", counted)
    model = main(config)
    assert [stage.steps for stage in stages(config)] == [25, 4, 1]
    losses = [part.loss.item() for part in seen if part.loss.requires_grad]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    # Global layers change their theta at the extension, local ones do not.
    assert (thetas[0], thetas[-1]) == ((1e4, 1e4), (160e3, 1e4))
    held_out = [row["valid_loss"] for n in (1, 2, 3) for row in rows_of(tmp_path / "out" / f"stage-{n}", "valid_loss")]
    assert len(held_out) == 5
    assert held_out[-1] < held_out[0]
    loaded = MaskedLM.from_pretrained(tmp_path / "out" / "model")
    same(model, loaded)
    assert loaded.config.global_rope_theta == 160e3
    assert Tokenizer.from_pretrained(tmp_path / "out" / "model").vocab_size == loaded.config.vocab_size == 300


@pytest.mark.parametrize("call", [11, 40, 52])
def test_a_killed_run_resumes_to_bit_equal_weights(config, tmp_path, monkeypatch, call):
    """In the first stage, at the beginning of the second, and in it."""
    config = replace(config, validation="")
    whole = main(replace(config, output=str(tmp_path / "whole")))
    step, calls = mlm.batch_loss, []

    def killed(*args):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(mlm, "batch_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    same(whole, main(config))


@pytest.mark.sweep
def test_kill_9_at_any_time_loses_nothing(config, tmp_path):
    config = replace(config, validation="")
    whole = main(replace(config, output=str(tmp_path / "whole")))
    run = subprocess.Popen(
        [sys.executable, "-m", "modernbert.recipes.mlm", *words(config)], env=HERE, stdout=subprocess.DEVNULL
    )
    log, limit = tmp_path / "out" / "stage-1" / "checkpoint.pt", time.monotonic() + 120
    while not log.exists() and run.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert log.exists()
    same(whole, main(config))


@pytest.mark.sweep
def test_two_ranks_are_one_rank(config, tmp_path):
    # One bin in a batch of either: which tokens are masked is decided for each batch.
    config = replace(config, validation="", dropout=0.0, tokens=7_000, learning_rate=1e-3, rank_tokens=64)
    one = main(replace(config, output=str(tmp_path / "one")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "--no-python"]
    command = [*torchrun, sys.executable, "-m", "modernbert.recipes.mlm", *words(config)]
    run = subprocess.run(command, env=HERE, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-4000:]
    two = MaskedLM.from_pretrained(tmp_path / "out" / "model")
    for (name, wanted), got in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        # Adam makes steps of the learning rate of gradients that are nothing but rounding, so single weights differ.
        assert (got - wanted).abs().mean() < 2e-5, name
    losses = [
        [row["loss"] for n in (1, 2, 3) for row in rows_of(tmp_path / name / f"stage-{n}", "loss")]
        for name in ("one", "out")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)


def test_the_defaults_are_the_published_run():
    config = Config(texts="t", output="o")
    assert tuple(stages(config)) == STAGES["modernbert-base"]
    assert tuple(stages(replace(config, model="ettin-17m"))) == STAGES["ettin-17m"]
    assert (config.dropout, config.seed, config.tokenizer) == (0.1, 17, "answerdotai/ModernBERT-base")


def test_a_smaller_run_keeps_the_shares():
    small = stages(Config(texts="t", output="o", tokens=2_019_000, batch_tokens=8192, longest=512, learning_rate=8e-3))
    published = STAGES["modernbert-base"]
    assert [stage.tokens for stage in small] == [1_719_000, 250_000, 50_000]
    assert [stage.sequence_length for stage in small] == [512] * 3
    assert [stage.batch_size for stage in small] == [16] * 3
    for ours, theirs in zip(small, published, strict=True):
        assert ours.learning_rate == pytest.approx(10 * theirs.learning_rate)
        assert ours.warmup_tokens / ours.tokens == pytest.approx(theirs.warmup_tokens / theirs.tokens, abs=1e-5)
        assert ours.decay_tokens == ours.tokens * bool(theirs.decay_tokens)


def test_dropout_is_of_the_output_of_attention_alone(config, tmp_path):
    model = mlm.build(config, train_cased_tokenizer(WORDS, vocab_size=300))
    for layer in model.model.layers:
        assert isinstance(layer, Layer)
        assert (layer.attn.output_dropout_p, layer.attn.dropout_p, layer.mlp.dropout_p) == (0.1, 0.0, 0.0)
    assert model.config.attention_dropout == 0.0  # what fine-tuning starts from


def test_a_run_starts_from_a_smaller_model(config, tmp_path):
    small = main(replace(config, validation=""))
    start = str(tmp_path / "out" / "model")
    large = replace(config, output=str(tmp_path / "large"), tokenizer=start, start=start, hidden_size=64,
                    num_attention_heads=4, num_hidden_layers=3)  # fmt: skip
    model = mlm.build(large, Tokenizer.from_pretrained(start))
    table = small.model.embeddings.tok_embeddings.weight
    torch.testing.assert_close(model.model.embeddings.tok_embeddings.weight[:, 16:48], table)


def test_other_settings_are_refused_in_the_folder_of_a_run(config, tmp_path):
    config = replace(config, tokens=2_000)
    main(config)
    before = tree(tmp_path)
    for change in ({"tokens": 3_000}, {"seed": 1}, {"hidden_size": 64}, {"vocab_size": 310}, {"dropout": 0.0}):
        with pytest.raises(ValueError, match=rf"run\.json belongs to another run: {next(iter(change))} is"):
            main(replace(config, **change))
    assert tree(tmp_path) == before


def test_other_texts_are_refused_in_the_folder_of_a_run(config, tmp_path):
    config = replace(config, tokens=2_000)
    main(config)
    (tmp_path / "texts.jsonl").write_text(lines(3))
    with pytest.raises(ValueError, match=r"out/shards has other shards: source is"):
        main(config)


def test_shards_of_another_tokenizer_are_refused(config, tmp_path):
    config = replace(config, tokens=2_000)
    main(config)
    train_cased_tokenizer(["another text"] * 9, vocab_size=290).save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="tokenizer is"):
        main(config)


def test_a_checkpoint_of_another_model_is_refused(config, tmp_path):
    config = replace(config, tokens=2_000)
    main(config)
    file = tmp_path / "out" / "stage-1" / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    state["model"]["head.dense.weight"] = torch.zeros(16, 16)
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"checkpoint\.pt is of another model: head\.dense\.weight is"):
        main(config)


def test_a_folder_of_another_program_is_refused_untouched(config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match=rf"out holds notes\.txt, but no {RUN} of a run"):
        main(config)
    assert tree(tmp_path) == before


WRONG = {
    "model": ("modernbert-tiny", "--model is 'modernbert-tiny', but must be one of modernbert-base"),
    "dropout": (1.0, "--dropout is 1.0, but must be"),
    "tokens": (0, "--tokens is 0, but must be"),
    "learning_rate": (float("nan"), "--learning-rate is nan, but must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_refused_before_anything_is_written(config, tmp_path, name):
    value, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        main(replace(config, **{name: value}))
    assert not (tmp_path / "out").exists()


def test_an_empty_text_or_a_missing_field_is_named_by_file_and_line(config, tmp_path):
    for bad, message in (('{"text": ""}', '"text" is empty'), ('{"txt": "a"}', '"text" is missing')):
        (tmp_path / "texts.jsonl").write_text(lines(0, 3) + bad + "\n")
        with pytest.raises(ValueError, match=rf"texts\.jsonl:4: {message}"):
            main(replace(config, output=str(tmp_path / message[1:5])))


def test_the_command_line_is_the_config():
    got = parse(Config, None, ["--texts", "t", "--output", "o", "--tokens", "7", "--compile"])
    assert got == Config(texts="t", output="o", tokens=7, compile=True)


@pytest.mark.parametrize("name", ["texts", "validation"])
def test_files_that_are_missing_are_found_missing_before_any_work(config, tmp_path, name):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(replace(config, **{name: str(tmp_path / "nowhere")}))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {RUN, LOCK}


def test_a_step_that_no_number_of_batches_makes_is_refused_before_any_work(config, tmp_path, monkeypatch):
    monkeypatch.setattr(mlm, "ranks", lambda device: nullcontext(Ranks(0, 3)))
    with pytest.raises(ValueError, match=r"a step of .* sequences cannot be cut into 3 ranks: choose"):
        main(config)
    assert not (tmp_path / "out").exists()
