"""A default device other than the model's (COMET#249): "meta" in the place of "cuda", which has no numbers to give."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hf_twin import TINY, pad, random_ids
from stores import corpus, small_colbert, write_corpus
from torch import Tensor

import modernbert_kernels as ops
from modernbert import ColBERT, Encoder, Session, maxsim, pack, unpack
from modernbert.integrations.transformers import TransformersEncoder
from modernbert.retrieval import Store, index
from modernbert.retrieval.store.prefilter import build_lists, shortlist, train_centroids
from modernbert.train.losses import info_nce, kl_distill

ROOT = Path(__file__).parents[1]
TEXTS = ["owl", "an owl in the night", " ".join(f"mouse {n} and hail" for n in range(40))]


@pytest.fixture(scope="module")
def colbert(modernbert_tokenizer_file: Path) -> ColBERT:
    torch.manual_seed(0)
    return small_colbert(modernbert_tokenizer_file.parent)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder.from_config(TINY).eval()


def same_elsewhere(call: Callable[[], Tensor]) -> None:
    """A call gives the same numbers on the CPU, in the same dtype, under another default device or dtype."""
    wanted = call().clone()
    for change, usual in (
        (partial(torch.set_default_device, "meta"), partial(torch.set_default_device, None)),
        (partial(torch.set_default_dtype, torch.float64), partial(torch.set_default_dtype, torch.float32)),
    ):
        change()
        try:
            got = call()
        finally:
            usual()
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


LENGTHS = {"windows": [3, 40, 17], "short": [5, 9], "one": [12], "long": [300, 280], "bulk": [60] * 50, "empty": [0, 4]}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_the_encoder(encoder: Encoder, lengths: list[int]) -> None:
    sequences = random_ids(lengths, 100)
    ids, mask = pad(sequences, "left")
    keys = mask * (mask.cumsum(1) < 8)
    session, drop_in, embeds = Session(encoder), TransformersEncoder(encoder), torch.ones(2, 5, 64)
    rows = pack(ids, mask).cu_seqlens[:-1].unique().long()

    def trained() -> Tensor:
        encoder(ids, mask).last_hidden_state.square().sum().backward()
        gradient = encoder.layers[0].attn.Wqkv.weight.grad.clone()
        encoder.zero_grad()
        return gradient / gradient.abs().max()

    with torch.no_grad():
        same_elsewhere(lambda: encoder(ids, mask).last_hidden_state)
        same_elsewhere(lambda: encoder(ids).last_hidden_state)
        same_elsewhere(lambda: encoder(pack(sequences), rows=rows[rows < sum(lengths)]))
        same_elsewhere(lambda: unpack(encoder(pack(ids, keys, query_mask=mask - keys)), pack(ids, mask)))
        same_elsewhere(lambda: drop_in(ids, mask, output_hidden_states=True).hidden_states[1])
        same_elsewhere(lambda: drop_in(inputs_embeds=embeds).last_hidden_state)
        same_elsewhere(lambda: session(pack(ids, mask)))
    same_elsewhere(trained)


def test_texts_and_scores(colbert: ColBERT) -> None:
    queries = colbert.encode_queries(TEXTS)
    documents = colbert.encode_documents(TEXTS * 3)
    same_elsewhere(lambda: colbert.encode_queries(TEXTS).values)
    same_elsewhere(lambda: colbert.encode_documents(TEXTS, pool_factor=2).values)
    same_elsewhere(lambda: torch.cat(list(colbert.stream_documents(TEXTS))))
    same_elsewhere(lambda: Session(colbert).encode_documents(TEXTS).values)
    same_elsewhere(lambda: colbert.encode_documents([]).values)
    same_elsewhere(lambda: maxsim(queries, documents))
    same_elsewhere(lambda: maxsim(queries, documents, top_k=2)[1])
    same_elsewhere(lambda: maxsim(queries, documents[:3], paired=True))
    same_elsewhere(lambda: ops.pool(documents.values, documents.offsets.int(), "mean"))


def test_losses(colbert: ColBERT) -> None:
    vectors = colbert.encode_documents(TEXTS)

    def gradient() -> Tensor:
        x = vectors.values.clone().requires_grad_()
        scores = maxsim(type(vectors)(x, vectors.offsets), vectors)
        loss = info_nce(scores, torch.arange(3, device="cpu")) + kl_distill(scores, scores.detach().flip(0))
        loss = loss + ops.linear_cross_entropy(x, vectors.values, None, torch.arange(len(x), device="cpu") - 2)
        return torch.autograd.grad(loss, x)[0]

    same_elsewhere(gradient)


def test_files_and_new_heads(colbert: ColBERT, encoder: Encoder, tmp_path: Path) -> None:
    """A folder is loaded to the CPU, as documented, and a new head is drawn where it can be drawn."""
    encoder.save_pretrained(tmp_path / "encoder")
    colbert.save_pretrained(tmp_path / "colbert")
    same_elsewhere(lambda: Encoder.from_pretrained(tmp_path / "encoder").embeddings.tok_embeddings.weight)
    same_elsewhere(lambda: ColBERT.from_pretrained(tmp_path / "colbert").encode_queries(TEXTS).values)

    def head() -> Tensor:
        torch.manual_seed(3)
        body = Encoder.from_pretrained(tmp_path / "encoder")
        return ColBERT.from_encoder(body, colbert.tokenizer, dim=8).dense[0].linear.weight.detach()

    with torch.device("meta"):
        on_the_cpu = head()
    assert torch.equal(on_the_cpu, head())


def test_a_store(colbert: ColBERT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modernbert.retrieval.store.search.LARGE", 1)
    source = write_corpus(tmp_path / "corpus.jsonl", corpus(30))

    def found() -> Tensor:
        folder = tmp_path / f"store{len(list(tmp_path.iterdir()))}"
        index([source], folder, colbert, prefilter=True)
        with Store(folder, colbert) as store:
            exact, fast = (store.search(["owl night"], top_k=5, prefilter=choice)[0] for choice in (False, True))
            store.explain("owl night", exact[0])
        index([source], folder, colbert)
        return torch.tensor([(hit.passage_id, hit.score) for hit in (*exact, *fast)], dtype=torch.float64, device="cpu")

    same_elsewhere(found)


def test_the_prefilter(colbert: ColBERT) -> None:
    vectors, queries = colbert.encode_documents(TEXTS * 20), colbert.encode_queries(TEXTS[:1])

    def found() -> Tensor:
        centroids = train_centroids([vectors])
        return shortlist(queries, centroids, [build_lists(vectors, centroids)], candidates=5)[0]

    same_elsewhere(found)


# A factory that names no device

FACTORIES = {"arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
FACTORIES |= {"randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "logspace", "normal"}
NEW_MODEL = {"modernbert/encoder.py": 1}
"""A new model is made on the default device, as every module of torch is."""


def factories(source: str) -> Iterator[int]:
    """Lines with a call of a factory of torch that leaves the device to the default."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            if of_torch and "device" not in {keyword.arg for keyword in node.keywords}:
                yield node.lineno


def test_every_factory_names_its_device() -> None:
    assert list(factories("torch.zeros(3)\ntorch.zeros(3, device=x)\nx.new_zeros(3)")) == [1]
    found = {}
    for path in sorted([*(ROOT / "modernbert").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        if lines := list(factories(path.read_text("utf-8"))):
            found[str(path.relative_to(ROOT).as_posix())] = len(lines)
    assert found == NEW_MODEL
