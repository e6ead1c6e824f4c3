"""Embedder is sentence-transformers' SentenceTransformer: vectors, gradients, prompts, folders in both directions."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from folders import check_refused, tree
from hf_twin import exact_rotary, make_loud
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as models
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers.models.modernbert import modeling_modernbert

from modernbert import Embedder, Encoder, Session, Tokenizer, pack
from modernbert.heads.dense import Dense
from modernbert.heads.embedder import EmbedderConfig
from modernbert.inference.graphs import Graphs
from modernbert.packing import Texts
from modernbert.truncation import TruncationWarning

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
TEXTS = ["How do I fold a tensor?", "", "the gradient of the norm", " blanks ", "a " * 60, "x"]
TOLERANCE = 2e-5
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
POOLINGS: dict[str, str | tuple[str, ...]] = {
    **{mode: mode for mode in MODES},
    "two": ("mean", "cls"),
    "all": MODES,
}
HEADS: dict[str, Callable[[int], list[Dense]]] = {
    "plain": lambda width: [],
    "projected": lambda width: [Dense(width, 24, bias=True, activation="Tanh"), Dense(24, 16, residual=True)],
}


def make(pooling: str | tuple[str, ...] = "mean", head: str = "plain", **settings: Any) -> Embedder:
    torch.manual_seed(0)
    encoder, tokenizer = Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)
    config = EmbedderConfig(pooling=pooling, **settings)
    dense = HEADS[head](64 * len(config.poolings))
    for layer in dense:
        make_loud(layer)
    return Embedder(encoder, tokenizer, dense, config).eval()


def their_model(model: Embedder, folder: Path, **options: Any) -> SentenceTransformer:
    """Made of sentence-transformers' own modules, with the numbers of ours; nothing that we wrote is read."""
    layers: list[nn.Module] = [models.Transformer(str(BACKBONE)), models.Pooling(64, model.config.pooling)]
    for ours in model.projection:
        assert isinstance(ours, Dense)
        layer = models.Dense(
            ours.linear.in_features,
            ours.linear.out_features,
            bias=ours.linear.bias is not None,
            activation_function=ours.activation,
            use_residual=ours.residual is not None,
        )
        layer.load_state_dict(ours.state_dict(), strict=True)
        layers.append(layer)
    if model.config.normalize:
        layers.append(models.Normalize())
    theirs = SentenceTransformer(modules=layers, device="cpu", **options)
    theirs.save_pretrained(str(folder), create_model_card=False)
    return theirs


# Vectors


CASES = [(pooling, "plain", True) for pooling in POOLINGS]
CASES += [("cls", "projected", True), ("two", "projected", False), ("mean", "plain", False)]


@pytest.mark.parametrize(("pooling", "head", "normalized"), CASES)
def test_folders_in_both_directions(pooling: str, head: str, normalized: bool, tmp_path: Path) -> None:
    """StarlightSearch/EmbedAnything#212: the pooling of the folder was not read, and all models had the mean."""
    model = make(POOLINGS[pooling], head, normalize=normalized)
    wanted = their_model(model, tmp_path / "theirs").encode(TEXTS, convert_to_tensor=True)
    loaded = Embedder.from_pretrained(tmp_path / "theirs")
    assert (loaded.config.pooling, loaded.config.normalize) == (POOLINGS[pooling], normalized)
    scale = wanted.abs().max().item()
    for embedder in (model, loaded):
        got = embedder.encode(TEXTS)
        assert (got.dtype, got.shape, got.device.type) == (torch.float32, (len(TEXTS), embedder.dim), "cpu")
        torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE * max(1, scale))
    loaded.save_pretrained(tmp_path / "ours")
    again = SentenceTransformer(str(tmp_path / "ours"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(again, wanted, rtol=0, atol=TOLERANCE * max(1, scale))
    Embedder.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "twice")
    ours, twice = tree(tmp_path / "ours"), tree(tmp_path / "twice")
    # Only the order of its keys differs, once: special_tokens_map.json comes first in what is read.
    assert json.loads(ours.pop("tokenizer_config.json")) == json.loads(twice.pop("tokenizer_config.json"))
    assert ours == twice


@pytest.mark.parametrize(("pooling", "head"), [*((pooling, "plain") for pooling in POOLINGS), ("cls", "projected")])
def test_gradients(pooling: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal in float64; in float32 no worse than twice the error of sentence-transformers' own."""
    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", exact_rotary)
    ours = make(POOLINGS[pooling], head)
    make_loud(ours.encoder)
    theirs = their_model(ours, tmp_path)
    theirs[0].auto_model.load_state_dict(ours.encoder.state_dict(), strict=True)
    theirs.eval()
    tokens, features = ours.tokenize(TEXTS), theirs.preprocess(TEXTS)
    cotangent = torch.randn(len(TEXTS), ours.dim)

    def gradients(model: nn.Module, vectors: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad((vectors * cotangent.to(vectors.dtype)).sum(), list(model.parameters()))
        return {"vectors": vectors.detach(), **{str(place): grad for place, grad in enumerate(grads)}}

    their_run = lambda: gradients(theirs, theirs(dict(features))["sentence_embedding"])  # noqa: E731
    plain, single = their_run(), gradients(ours, ours(tokens))
    ours.double(), theirs.double()
    truth, double = their_run(), gradients(ours, ours(tokens))
    names = [name for name, _ in ours.named_parameters()]
    assert len(names) == len(truth) - 1
    for key, value in truth.items():
        assert (double[key] - value).abs().max() <= 1e-11 * max(1, value.abs().max()), key
        assert_accurate(single[key], plain[key], value, key)


def test_no_vector_depends_on_the_batch() -> None:
    for pooling in ("cls", "max", "weightedmean"):
        model = make(pooling)
        whole = model.encode(TEXTS)
        for texts in (TEXTS[::-1], [text for text in TEXTS for _ in range(20)]):
            got = model.encode(texts, batch_tokens=70)
            assert (got[0] - whole[TEXTS.index(texts[0])]).abs().max() <= TOLERANCE * whole.abs().max()
            assert (got[-1] - whole[TEXTS.index(texts[-1])]).abs().max() <= TOLERANCE * whole.abs().max()
        alone = torch.cat([model.encode([text]) for text in TEXTS])
        torch.testing.assert_close(alone, whole, rtol=0, atol=TOLERANCE * float(whole.abs().max()))


@pytest.mark.parametrize(
    ("pooling", "rows"), [("cls", 6), ("lasttoken", 6), ("mean", None), (("cls", "lasttoken"), None)]
)
def test_only_the_rows_that_are_read_leave_the_last_layer(pooling: str | tuple[str, ...], rows: int | None) -> None:
    model, seen = make(pooling), []
    model.encoder.layers[-1].mlp.Wi.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    tokens = model.tokenize(TEXTS)
    model(tokens)
    assert seen == [rows or tokens.batch.num_tokens]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_empty_texts_and_rows_that_only_query(pooling: str) -> None:
    """A text without a token has zeros; tokens under the mask count in no pooling."""
    model = make(POOLINGS[pooling], normalize=False)
    ids = [list(each) for each in model.document_ids(TEXTS)]
    with torch.inference_mode():
        wanted = model(pack(ids))
        got = model(pack([[], *ids[:2], [], *ids[2:], []]))
        torch.testing.assert_close(got[[1, 2, 4, 5, 6, 7]], wanted, rtol=0, atol=1e-4)
        assert got[[0, 3, 8]].eq(0).all()
        assert model(pack([])).shape == (0, model.dim)
        length = max(map(len, ids)) + 2
        padded = torch.tensor([[*each, *[7] * (length - len(each))] for each in ids])
        mask = torch.tensor([[1] * len(each) + [0] * (length - len(each)) for each in ids])
        expanded = model(pack(padded, mask, query_mask=1 - mask))
    torch.testing.assert_close(expanded, wanted, rtol=0, atol=1e-4)


# Prompts, widths, lengths


PROMPTS = {"query": "search_query: ", "document": "search_document: ", "clustering": "cluster: "}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_prompts(pooling: str, tmp_path: Path) -> None:
    model = make(pooling, prompts=PROMPTS, default_prompt="clustering")
    theirs = their_model(model, tmp_path / "theirs", prompts=PROMPTS, default_prompt_name="clustering")
    model.save_pretrained(tmp_path / "ours")
    loaded = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    read = Embedder.from_pretrained(tmp_path / "theirs")
    assert read.config == Embedder.from_pretrained(tmp_path / "ours").config == model.config
    for twin in (theirs, loaded):
        for embedder in (model, read):
            pairs = [
                (embedder.encode(TEXTS), twin.encode(TEXTS)),
                (embedder.encode_queries(TEXTS), twin.encode_query(TEXTS)),
                (embedder.encode_documents(TEXTS), twin.encode_document(TEXTS)),
                (embedder.encode(TEXTS, prompt_name="query"), twin.encode(TEXTS, prompt_name="query")),
                (embedder.encode(TEXTS, prompt="a: "), twin.encode(TEXTS, prompt="a: ")),
                (embedder.encode(TEXTS, prompt=""), twin.encode(TEXTS, prompt="")),
            ]
            for got, wanted in pairs:
                torch.testing.assert_close(got, torch.from_numpy(wanted), rtol=0, atol=TOLERANCE)
    assert not torch.equal(model.encode_queries(TEXTS), model.encode_documents(TEXTS))
    batch = pack(model.query_ids(TEXTS))
    torch.testing.assert_close(model(batch).detach(), model.encode_queries(TEXTS), rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match="prompt_name is 'question', but the model has query, document, clustering"):
        model.encode(TEXTS, prompt_name="question")
    with pytest.raises(ValueError, match="two prompts"):
        model.encode(TEXTS, prompt_name="query", prompt="a: ")


def test_a_passage_prompt_is_not_that_of_documents(tmp_path: Path) -> None:
    """As in sentence-transformers 6, where "document" always has a prompt."""
    prompts = {"query": "q: ", "passage": "p: "}
    model = make(prompts=prompts)
    theirs = their_model(model, tmp_path, prompts=prompts)
    for embedder in (model, Embedder.from_pretrained(tmp_path)):
        for got, wanted in (
            (embedder.encode_documents(TEXTS), theirs.encode_document(TEXTS)),
            (embedder.encode_queries(TEXTS), theirs.encode_query(TEXTS)),
        ):
            torch.testing.assert_close(got, torch.from_numpy(wanted), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("normalized", [True, False])
def test_a_matryoshka_width(normalized: bool, tmp_path: Path) -> None:
    model = make("cls", normalize=normalized, width=20)
    theirs = their_model(model, tmp_path / "theirs", truncate_dim=20)
    wanted = torch.from_numpy(theirs.encode(TEXTS, normalize_embeddings=normalized))
    model.save_pretrained(tmp_path / "ours")
    for folder in ("theirs", "ours"):
        loaded = Embedder.from_pretrained(tmp_path / folder)
        assert (loaded.dim, loaded.config.width) == (20, 20)
        torch.testing.assert_close(loaded.encode(TEXTS), wanted, rtol=0, atol=TOLERANCE)
    again = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    got = torch.from_numpy(again.encode(TEXTS, normalize_embeddings=normalized))
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE)
    full = make("cls", normalize=normalized).encode(TEXTS)[:, :20]
    torch.testing.assert_close(model.encode(TEXTS), normalize(full) if normalized else full, rtol=0, atol=TOLERANCE)
    with pytest.raises(ValueError, match="width is 65, but vectors have 64 numbers"):
        make("cls", width=65)


def test_long_texts_are_cut_and_named(tmp_path: Path) -> None:
    model = make(max_length=9)
    model.save_pretrained(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    assert theirs.max_seq_length == 9
    with pytest.warns(TruncationWarning, match=r"texts\[0\] has at least .* tokens, of which the model reads 9"):
        got = model.encode(TEXTS)
    torch.testing.assert_close(got, torch.from_numpy(theirs.encode(TEXTS)), rtol=0, atol=TOLERANCE)
    assert Embedder.from_pretrained(tmp_path).max_length == 9
    assert make().max_length == theirs_length(make(), tmp_path / "free")


def theirs_length(model: Embedder, folder: Path) -> int | None:
    model.save_pretrained(folder)
    return SentenceTransformer(str(folder), device="cpu").max_seq_length


def test_lower_case_is_kept(tmp_path: Path) -> None:
    their_model(make(), tmp_path)
    path = tmp_path / "sentence_bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_lower_case": True}))
    model = Embedder.from_pretrained(tmp_path)
    assert torch.equal(model.encode(["ABC"]), model.encode(["abc"]))
    model.save_pretrained(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    torch.testing.assert_close(model.encode(["ABC"]), torch.from_numpy(theirs.encode(["ABC"])), rtol=0, atol=TOLERANCE)


# Folders


def edit(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_files_of_older_versions(tmp_path: Path) -> None:
    """Flags in the place of a name, no kind of model, no folder for Normalize, a Dense without its activation."""
    model = make("cls", "projected")
    wanted = model.encode(TEXTS)
    model.save_pretrained(tmp_path)
    pooling = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_cls_token"] is True
    assert "pooling_mode" not in pooling
    assert not (tmp_path / "4_Normalize").exists()
    edit(tmp_path / "config_sentence_transformers.json", model_type=None, similarity_fn_name=None, prompts=None)
    edit(tmp_path / "2_Dense" / "config.json", activation_function=None)
    torch.testing.assert_close(Embedder.from_pretrained(tmp_path).encode(TEXTS), wanted, rtol=0, atol=1e-6)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    torch.testing.assert_close(torch.from_numpy(theirs.encode(TEXTS)), wanted, rtol=0, atol=TOLERANCE)
    (tmp_path / "config_sentence_transformers.json").unlink()
    torch.testing.assert_close(Embedder.from_pretrained(tmp_path).encode(TEXTS), wanted, rtol=0, atol=1e-6)


def modules(*kinds: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        entries = [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(entries))

    return change


def edits(name: str, **values: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, **values)


POOLING, DENSE = "1_Pooling/config.json", "2_Dense/config.json"
SETTINGS = "config_sentence_transformers.json"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no modules": (lambda folder: (folder / "modules.json").unlink(), "has no modules.json, and so no pooling: choose"),
    "another module": (modules("Transformer", "Pooling", "LSTM"), "LSTM' is not supported"),
    "no pooling": (modules("Transformer", "Normalize"), "lists Transformer, Normalize; supported are"),
    "normalised first": (modules("Transformer", "Pooling", "Normalize", "Dense"), "in this order"),
    "a prompt that does not count": (edits(POOLING, include_prompt=False), "include_prompt is false"),
    "another pooling": (edits(POOLING, pooling_mode="attention"), "pooling_mode is 'attention', but must be of cls"),
    "no name of a pooling": (edits(POOLING, pooling_mode=[]), r"pooling_mode is \[\]"),
    "another width": (edits(POOLING, word_embedding_dimension=32), "word_embedding_dimension is 32, but the encoder"),
    "a flag that is not one": (edits(POOLING, pooling_mode_cls_token="yes"), "pooling_mode_cls_token is 'yes'"),
    "a prompt without a text": (edits(SETTINGS, prompts={"query": 5}), "query is 5"),
    "a prompt without a name": (edits(SETTINGS, default_prompt_name="x"), "default_prompt is 'x', but prompts has"),
    "a width of half a number": (edits(SETTINGS, truncate_dim=1.5), r"truncate_dim is 1\.5"),
    "a width beyond": (edits(SETTINGS, truncate_dim=99), "width is 99, but vectors have 16"),
    "a layer of tokens": (
        edits("2_Dense/config.json", module_input_name="token_embeddings"),
        "only 'sentence_embedding'",
    ),
    "a layer that does not fit": (modules("Transformer", "Pooling", "Dense", "Dense", "Dense"), "missing"),
    "a sparse model": (edits(SETTINGS, model_type="SparseEncoder"), "holds a SparseEncoder, not an Embedder"),
    "late interaction": (
        edits(SETTINGS, model_type="ColBERT"),
        "holds a ColBERT, not an Embedder: load it",
    ),
    "a cross-encoder": (edits(SETTINGS, model_type="CrossEncoder"), "holds a CrossEncoder, not an Embedder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    make("cls", "projected").save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        Embedder.from_pretrained(tmp_path)


def nan(model: Embedder) -> None:
    model.projection[0].linear.weight.data[0, 0] = float("nan")


def replaced(model: Embedder) -> None:
    model.projection[0] = nn.Sequential(model.projection[0])


def another_tokenizer(model: Embedder) -> None:
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.add_tokens([f"[{i}]" for i in range(1000)])


def too_narrow(model: Embedder) -> None:
    model.projection[1] = Dense(5, 16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nan, r"Dense cannot be saved: linear\.weight has NaN"),
        (replaced, "layer 1 of the head is a Sequential"),
        (another_tokenizer, "but the encoder only"),
        (too_narrow, "a Dense takes 5 features, but is given 24"),
    ],
)
def test_what_would_not_load_is_not_written(change: Callable[[Embedder], None], words: str, tmp_path: Path) -> None:
    model = make("cls", "projected")
    model.save_pretrained(tmp_path / "model")
    change(model)
    if change is replaced:
        with pytest.raises(TypeError, match=words):
            model.save_pretrained(tmp_path / "model")
    else:
        check_refused(model, tmp_path / "model", words)
    got, wanted = Embedder.from_pretrained(tmp_path / "model"), make("cls", "projected")
    torch.testing.assert_close(got.encode(["a"]), wanted.encode(["a"]), rtol=0, atol=1e-6)


# Use


def test_wrong_arguments() -> None:
    model = make()
    with pytest.raises(TypeError, match="put it in a list"):
        model.encode("one text")
    with pytest.raises(TypeError, match=r"texts\[1\] must be a str, got int"):
        model.encode(["a", 5])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"called with a Packed, got list: make one with pack"):
        model([[1, 2]])  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(ValueError, match="one vector for each text: leave out rows"):
        model(pack([[1, 2]]), rows=torch.tensor([0]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="pooling is 'cls_token', but must be of cls"):
        EmbedderConfig(pooling="cls_token")
    with pytest.raises(ValueError, match="max_length is 0"):
        EmbedderConfig(max_length=0)
    with pytest.raises(ValueError, match="a Dense takes 5 features, but is given 64"):
        Embedder(model.encoder, model.tokenizer, [Dense(5, 5)])
    assert model.encode([]).shape == (0, 64)


def test_what_other_processes_need_can_be_pickled() -> None:
    """`devices` sends the model, and how it makes tokens of texts, to processes of their own."""
    model = make("cls", prompts=PROMPTS)
    sent = pickle.loads(pickle.dumps((model, partial(Embedder.tokenize, prompt="a: "))))
    tokens = partial(sent[1], sent[0])(TEXTS, spans=False)
    assert torch.equal(tokens.batch.input_ids, model.tokenize(TEXTS, prompt="a: ").batch.input_ids)


def test_texts_as_a_batch() -> None:
    texts = make().tokenize(TEXTS)
    assert isinstance(texts, Texts)
    assert (len(texts), texts.rows, texts.offsets.tolist()) == (6, None, list(range(7)))
    few = texts.select([4, 0])
    assert few.batch.lengths == (texts.batch.lengths[4], texts.batch.lengths[0])
    assert few.to("meta").batch.input_ids.is_meta
    leaves = torch.utils._pytree.tree_leaves(texts)
    assert any(leaf is texts.batch.input_ids for leaf in leaves)


def test_copies_are_equal_and_apart() -> None:
    model = make("cls", "projected", prompts=PROMPTS)
    wanted = model.encode(TEXTS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.encode(TEXTS), wanted)
        with torch.no_grad():
            twin.projection[0].linear.weight += 1
    assert torch.equal(model.encode(TEXTS), wanted)


@pytest.mark.parametrize("pooling", ["lasttoken", "weightedmean"])
def test_compiled(pooling: str) -> None:
    model = make(pooling)
    model.encoder = Encoder(replace(model.encoder.config, num_hidden_layers=1)).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for texts in (TEXTS, TEXTS[3:]):
            batch = model.tokenize(texts).batch
            torch.testing.assert_close(compiled(batch), model(batch), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_session_and_its_graphs(pooling: str) -> None:
    """One row a text, of micro-batches too, and of a graph's bucket, which has more places than there are texts."""
    model = make(pooling)
    batch = model.tokenize(TEXTS * 30).batch
    with torch.inference_mode():
        torch.testing.assert_close(Session(model)(batch), model(batch), rtol=0, atol=TOLERANCE)
        small = model.tokenize(TEXTS[:3]).batch
        torch.testing.assert_close(Session(model)(small), model(small), rtol=0, atol=TOLERANCE)

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        output = run().clone()
        return lambda: output.copy_(run()), output

    graphs = Graphs(model, torch.device("cpu"), capture=capture)
    bucket = graphs.bucket(small)
    assert bucket is not None
    with torch.no_grad():
        got = graphs.replay(bucket, small, None)
        torch.testing.assert_close(got, model(small), rtol=0, atol=TOLERANCE)
    with pytest.raises(TypeError, match="not of Embedder"):
        Session(model, engine="onnxruntime")
    with pytest.raises(TypeError, match="a Session of Embedder encodes no texts"):
        Session(model).encode_queries(TEXTS)


def test_training_moves_every_parameter() -> None:
    model = make("mean", "projected").train()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    queries, documents = (model(model.tokenize(texts)) for texts in (TEXTS, TEXTS[::-1]))
    nn.functional.cross_entropy(queries @ documents.T * 20, torch.arange(len(TEXTS))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_lora_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model = make("cls", "projected")
    wanted = model(model.tokenize(TEXTS))
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["Wqkv", "linear"]))
    torch.testing.assert_close(adapted(model.tokenize(TEXTS)), wanted, rtol=0, atol=1e-6)
    adapted(model.tokenize(TEXTS)).sum().backward()
    assert {name for name, p in adapted.named_parameters() if p.grad is not None and "lora" not in name} == set()


def test_a_resized_vocabulary_is_saved(tmp_path: Path) -> None:
    model = make("cls")
    model.resize_token_embeddings(510)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = Embedder.from_pretrained(tmp_path)
    assert loaded.base_model.config.vocab_size == 510
    assert torch.equal(loaded.encode(["a"]), model.encode(["a"]))


def test_settings_are_compared_and_copied() -> None:
    config = EmbedderConfig(pooling=["cls"], prompts={"query": "q"})  # pyright: ignore[reportArgumentType]
    assert config == EmbedderConfig(pooling="cls", prompts={"query": "q", "document": ""})
    assert replace(config, width=3) != config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    prompts: dict[str, str] = {"query": "q"}
    config = EmbedderConfig(prompts=prompts)
    prompts["query"] = "other"
    assert config.prompts["query"] == "q"
