"""Reranker is sentence-transformers' CrossEncoder: scores, order, long pairs, folders in both directions."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import check_refused, tree
from hf_twin import make_loud
from sentence_transformers import CrossEncoder

from modernbert import Encoder, Reranker, SequenceClassifier, Session, Tokenizer, pack
from modernbert.heads.pairs import Ranked
from modernbert.heads.reranker_files import RerankerConfig
from modernbert.truncation import TruncationWarning

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
QUERY = "how do I fold a tensor"
DOCUMENTS = [
    "Fold it in the middle.",
    "",
    "the gradient " * 30,
    " blanks ",
    "\N{GRINNING FACE} x",
    "Fold it in the middle.",
]
SETTINGS = "config_sentence_transformers.json"


def make(*, pooling: str = "mean", **settings: Any) -> Reranker:
    torch.manual_seed(0)
    encoder = Encoder.from_pretrained(BACKBONE, classifier_pooling=pooling)
    classifier = SequenceClassifier(encoder, labels=1).eval()
    make_loud(classifier)
    return Reranker(classifier, Tokenizer.from_pretrained(BACKBONE), RerankerConfig(**settings))


def gte_folder(model: Reranker, folder: Path, **config: object) -> Path:
    """The layout of gte-reranker-modernbert-base: a classifier and a tokenizer, without modules.json."""
    model.classifier.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    edit(folder / "config.json", **config)
    return folder


def edit(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def their_scores(folder: Path, query: str = QUERY) -> torch.Tensor:
    theirs = CrossEncoder(str(folder), device="cpu")
    return theirs.predict([(query, document) for document in DOCUMENTS], convert_to_tensor=True)


# Scores


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("activation", ["Sigmoid", "Identity", "Tanh"])
def test_scores_and_folders_in_both_directions(pooling: str, activation: str, tmp_path: Path) -> None:
    named = f"torch.nn.modules.activation.{activation}".replace("activation.Identity", "linear.Identity")
    model = make(pooling=pooling, activation=activation)
    gte = gte_folder(model, tmp_path / "gte", sentence_transformers={"activation_fn": named, "version": "4.1.0"})
    wanted = their_scores(gte)
    assert wanted.std() > 0.05, "the weights are so quiet that the test says nothing"
    theirs = CrossEncoder(str(gte), device="cpu")
    theirs.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    for folder in (gte, tmp_path / "theirs"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = Reranker.from_pretrained(folder)
        assert loaded.config.activation == activation
        got = loaded.score(QUERY, DOCUMENTS)
        assert (got.dtype, got.shape, got.device.type) == (torch.float32, (6,), "cpu")
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded.score(QUERY, iter(DOCUMENTS), batch_tokens=20), got, rtol=0, atol=1e-5)
    loaded = Reranker.from_pretrained(gte)
    assert loaded.classifier.config.sentence_transformers["version"] == "4.1.0"
    loaded.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(their_scores(tmp_path / "ours"), wanted, rtol=0, atol=1e-6)
    assert torch.equal(SequenceClassifier.from_pretrained(tmp_path / "ours")(pack([[3, 4]])), loaded(pack([[3, 4]])))
    Reranker.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "twice")
    assert tree(tmp_path / "ours").keys() == tree(tmp_path / "twice").keys()
    assert all(
        json.loads(data) == json.loads(tree(tmp_path / "twice")[name]) if name.endswith("json") else True
        for name, data in tree(tmp_path / "ours").items()
    )


def test_rank_is_theirs(tmp_path: Path) -> None:
    model = make()
    theirs = CrossEncoder(str(gte_folder(model, tmp_path)), device="cpu")
    for top_k in (None, 1, 3, 100):
        wanted = theirs.rank(QUERY, DOCUMENTS, top_k=top_k)
        got = model.rank(QUERY, DOCUMENTS, top_k=top_k)
        assert [hit.index for hit in got] == [hit["corpus_id"] for hit in wanted]
        assert [hit.score for hit in got] == pytest.approx([hit["score"] for hit in wanted], abs=1e-5)
    same = [hit.index for hit in model.rank(QUERY, DOCUMENTS) if hit.index in (0, 5)]
    assert same == [0, 5], "of equal scores the first comes first"
    assert model.rank(QUERY, []) == []
    assert model.score(QUERY, []).shape == (0,)
    assert model.rank(QUERY, ["a"]) == [Ranked(0, model.score(QUERY, ["a"]).item())]


@pytest.mark.parametrize("side", ["right", "left"])
def test_long_pairs_are_cut_as_theirs_and_named(side: str, tmp_path: Path) -> None:
    """The longer text first, then both. Each length puts the cut at another place of another pair."""
    model = make(activation="Identity")
    gte_folder(model, tmp_path / "gte")
    documents, query = ["a b c " * n for n in (1, 5, 9, 40)], "one two three four five"
    seen: set[int] = set()
    for limit in (7, 8, 21, 22, 40):
        edit(tmp_path / "gte" / "tokenizer_config.json", model_max_length=limit, truncation_side=side)
        theirs = CrossEncoder(str(tmp_path / "gte"), device="cpu")
        wanted = theirs.predict([(query, document) for document in documents], convert_to_tensor=True)
        loaded = Reranker.from_pretrained(tmp_path / "gte")
        assert loaded.max_length == theirs.max_seq_length == limit
        with pytest.warns(TruncationWarning, match=rf"of which the model reads {limit:,}"):
            torch.testing.assert_close(loaded.score(query, documents), wanted, rtol=0, atol=1e-5)
        seen.add(loaded.tokenize(documents, query=query).batch.num_tokens)
    assert len(seen) == 5
    # A max_seq_length of sentence-transformers' own settings goes before that of the tokenizer.
    short = Reranker(model.classifier, model.tokenizer, RerankerConfig(max_length=9))
    short.save_pretrained(tmp_path / "ours")
    assert CrossEncoder(str(tmp_path / "ours"), device="cpu").max_seq_length == 9
    assert Reranker.from_pretrained(tmp_path / "ours").max_length == 9


def test_a_prompt_is_in_front_of_the_query(tmp_path: Path) -> None:
    gte_folder(make(), tmp_path / "gte")
    prompts = {"find": "find: ", "none": ""}
    theirs = CrossEncoder(str(tmp_path / "gte"), device="cpu", prompts=prompts, default_prompt_name="find")
    theirs.save_pretrained(str(tmp_path / "theirs"), create_model_card=False)
    loaded = Reranker.from_pretrained(tmp_path / "theirs")
    wanted = their_scores(tmp_path / "theirs")
    torch.testing.assert_close(loaded.score(QUERY, DOCUMENTS), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(make().score(f"find: {QUERY}", DOCUMENTS), wanted, rtol=0, atol=1e-5)
    loaded.save_pretrained(tmp_path / "ours")
    torch.testing.assert_close(their_scores(tmp_path / "ours"), wanted, rtol=0, atol=1e-5)
    again = Reranker.from_pretrained(tmp_path / "ours").config
    assert (again.prompts, again.default_prompt) == (prompts, "find")


def test_no_score_depends_on_the_batch() -> None:
    model = make(activation="Identity").double()
    alone = torch.cat([model.score(QUERY, [document]) for document in DOCUMENTS])
    torch.testing.assert_close(model.score(QUERY, DOCUMENTS), alone, rtol=0, atol=1e-6)
    assert torch.equal(model.train().score(QUERY, DOCUMENTS), model.eval().score(QUERY, DOCUMENTS))


def test_only_the_rows_that_are_read_leave_the_last_layer() -> None:
    model = make(pooling="cls")
    seen: list[int] = []
    model.classifier.model.layers[-1].mlp.Wi.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model.score(QUERY, DOCUMENTS)
    assert sum(seen) == len(DOCUMENTS)


# Folders


ACTIVATION = "torch.nn.modules.linear.Identity"
PLACES: dict[str, Callable[[Path], None]] = {
    "the settings": lambda folder: edit(folder / SETTINGS, activation_fn=ACTIVATION),
    "config.json": lambda folder: edit(folder / "config.json", sentence_transformers={"activation_fn": ACTIVATION}),
    "an old config.json": lambda folder: edit(
        folder / "config.json", sbert_ce_default_activation_function=ACTIVATION, sentence_transformers=None
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_activation_is_found_where_theirs_is(place: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    PLACES[place](tmp_path)
    loaded = Reranker.from_pretrained(tmp_path)
    assert loaded.config.activation == "Identity"
    torch.testing.assert_close(loaded.score(QUERY, DOCUMENTS), their_scores(tmp_path), rtol=0, atol=1e-5)


def test_settings_without_modules_are_not_read(tmp_path: Path) -> None:
    """sentence-transformers reads its settings only beside modules.json."""
    make().save_pretrained(tmp_path)
    edit(tmp_path / SETTINGS, activation_fn=ACTIVATION)
    (tmp_path / "modules.json").unlink()
    assert Reranker.from_pretrained(tmp_path).config.activation == "Sigmoid"
    torch.testing.assert_close(make().score(QUERY, DOCUMENTS), their_scores(tmp_path), rtol=0, atol=1e-5)


def save_classifier(folder: Path) -> None:
    SequenceClassifier(Encoder.from_pretrained(BACKBONE), labels=["no", "yes"]).save_pretrained(folder)
    Tokenizer.from_pretrained(BACKBONE).save_pretrained(folder)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "several labels": (
        save_classifier,
        "needs a classifier with one label, but the classifier has the labels no, yes: use a SequenceClassifier",
    ),
    "an encoder": (
        lambda folder: Encoder.from_pretrained(BACKBONE).save_pretrained(folder),
        r"holds an Encoder, not a Reranker: put a new head on its encoder with Reranker\(SequenceClassifier\(encoder",
    ),
    "a function of the caller": (
        lambda folder: edit(folder / "config.json", sentence_transformers={"activation_fn": "os.system"}),
        r"config\.json: sentence_transformers: activation_fn is 'os\.system', but must be a class of torch\.nn",
    ),
    "more modules": (
        lambda folder: (folder / "modules.json").write_text(
            json.dumps([{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}])
        ),
        r"module 'x\.Pooling' is not supported",
    ),
    "a length of nothing": (
        lambda folder: edit(folder / "sentence_bert_config.json", max_seq_length=0),
        "max_seq_length is 0",
    ),
    "other processing": (
        lambda folder: edit(folder / "sentence_bert_config.json", processing_kwargs={"text": {"max_length": 3}}),
        r"sentence_bert_config\.json: processing_kwargs is not supported",
    ),
    "a prompt without a name": (
        lambda folder: edit(folder / SETTINGS, default_prompt_name="x"),
        "default_prompt is 'x', but prompts has",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    if name not in ("several labels", "an encoder"):
        make().save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        Reranker.from_pretrained(tmp_path)


def test_what_would_not_load_is_not_written(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.classifier.classifier.bias[0] = torch.nan
    check_refused(model, tmp_path / "model", r"classifier\.bias has NaN")
    model = make()
    model.tokenizer.add_tokens([f"[{place}]" for place in range(1000)])
    check_refused(model, tmp_path / "model", "but the encoder only")
    state = {name: tensor + 1 for name, tensor in make().state_dict().items()}
    make().save_pretrained(tmp_path / "state", state_dict=state)
    loaded = Reranker.from_pretrained(tmp_path / "state").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in state.items())


# Use


def test_wrong_arguments() -> None:
    model = make()
    with pytest.raises(TypeError, match=r"query must be a str, got list \['a'\]"):
        model.score(["a"], ["b"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="put it in a list"):
        model.score("a", "one document")
    with pytest.raises(TypeError, match=r"texts\[1\] must be a str, got tuple"):
        model.rank("a", ["b", ("c", "d")])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="half a surrogate pair"):
        model.score("\ud800", ["b"])
    with pytest.raises(ValueError, match="top_k"):
        model.rank("a", ["b"], top_k=0)
    with pytest.raises(ValueError, match="leave out rows"):
        model(pack([[1, 2]]), rows=torch.tensor([0]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="called with a Packed, got list"):
        model([[1, 2]])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="activation is 'Softmax', but must be one of"):
        RerankerConfig(activation="Softmax")


def test_copies_processes_sessions_and_compiled_classifiers(tmp_path: Path) -> None:
    model = make()
    wanted = model.score(QUERY, DOCUMENTS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.score(QUERY, DOCUMENTS), wanted)
    batch = model.tokenize(DOCUMENTS, query=QUERY)
    with torch.inference_mode():
        torch.testing.assert_close(Session(model)(batch.batch)[:, 0].sigmoid(), wanted, rtol=0, atol=1e-5)
        assert torch.equal(model(batch), model(batch.batch))
    model.classifier = torch.compile(model.classifier, backend="eager")
    torch.testing.assert_close(model.score(QUERY, DOCUMENTS), wanted, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = Reranker.from_pretrained(tmp_path).score(QUERY, DOCUMENTS)
    torch.testing.assert_close(again, wanted, rtol=0, atol=1e-6)


def test_training_moves_every_parameter() -> None:
    model = make().train()
    batch = model.tokenize(DOCUMENTS, query=QUERY).batch
    model.classifier(batch, labels=torch.linspace(0, 1, 6)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.classifier.head.parameters())
