"""ColBERT's vectors equal those of PyLate 1.6 and of sentence-transformers 6.2, from their folders and ours.

PyLate lives in an environment of its own, so its vectors are stored: `fixtures/colbert/make_goldens.py` made
them and says how; its `--check` also loads in PyLate what we save. sentence-transformers runs here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modernbert import ColBERT, maxsim
from modernbert_kernels import backend

FIXTURES = Path(__file__).parents[1] / "fixtures" / "colbert"
CASES = sorted(path.name for path in (FIXTURES / "cases").iterdir())
CALLS: dict[str, dict[str, Any]] = {
    name: json.loads((FIXTURES / "cases" / name / "call.json").read_text("utf-8")) for name in CASES
}
TEXTS: dict[str, list[str]] = json.loads((FIXTURES / "texts.json").read_text("utf-8"))
KINDS = ("queries", "documents")
TOLERANCE = 2e-5

Assemble = Callable[[str], Path]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Assemble:
    """The model folder of a case as PyLate saved it: the shared backbone and the files of the case."""
    root = tmp_path_factory.mktemp("pylate")

    def assemble(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            shutil.copytree(FIXTURES / "backbone", folder)
            shutil.copytree(FIXTURES / "cases" / name, folder, dirs_exist_ok=True)
        return folder

    return assemble


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "cases" / name / "golden.npz") as arrays:
        return dict(arrays)


def texts_of(name: str, kind: str) -> list[str]:
    # PyLate puts a prompt in front of the raw text, so a caller of ours who has one does the same.
    prompt = CALLS[name]["encode"].get("prompt", "")
    return [prompt + TEXTS[kind][i] for i in CALLS[name][kind]]


def rows(arrays: dict[str, np.ndarray], label: str) -> list[np.ndarray]:
    return np.split(arrays[f"{label}_values"], arrays[f"{label}_offsets"][1:-1])


def encode(model: ColBERT, kind: str, texts: Sequence[str], **options: Any) -> Any:
    return (model.encode_queries if kind == "queries" else model.encode_documents)(texts, **options)


def assert_same_rows(got: Iterable[Tensor], wanted: Sequence[np.ndarray], texts: Sequence[str]) -> None:
    got = list(got)
    assert len(got) == len(wanted) == len(texts)
    for ours, theirs, text in zip(got, wanted, texts, strict=True):
        assert ours.dtype == torch.float32
        assert tuple(ours.shape) == theirs.shape, f"{tuple(ours.shape)} instead of {theirs.shape} for {text!r}"
        worst = float(np.abs(ours.numpy() - theirs).max())
        assert worst <= TOLERANCE, f"off by {worst:.1e} for {text!r}"


GOLDEN_CALLS = [(name, kind) for name in CASES for kind in KINDS if CALLS[name][kind]]


@pytest.mark.parametrize(("name", "kind"), GOLDEN_CALLS)
def test_pylate_folder_gives_pylates_vectors(name: str, kind: str, folder_of: Assemble) -> None:
    texts = texts_of(name, kind)
    got = encode(ColBERT.from_pretrained(folder_of(name)), kind, texts)
    assert_same_rows(got, rows(golden(name), kind), texts)


@pytest.mark.parametrize("name", ["expansion", "expansion_attended", "expansion_far", "window_16"])
def test_reference_ops_give_pylates_vectors(name: str, folder_of: Assemble) -> None:
    """Rows that are queries only, and rows that see no key at all, are the same thing on every backend."""
    texts = texts_of(name, "queries")
    with backend("reference"):
        got = ColBERT.from_pretrained(folder_of(name)).encode_queries(texts)
    assert_same_rows(got, rows(golden(name), "queries"), texts)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_token_pooling_is_pylates(factor: int, folder_of: Assemble) -> None:
    texts = texts_of("pooling", "documents")
    got = ColBERT.from_pretrained(folder_of("pooling")).encode_documents(texts, pool_factor=factor)
    assert_same_rows(got, rows(golden("pooling"), f"documents_pool{factor}"), texts)


@pytest.mark.parametrize("name", [name for name in CASES if "scores" in golden(name)])
def test_maxsim_is_pylates_score(name: str, folder_of: Assemble) -> None:
    model, wanted = ColBERT.from_pretrained(folder_of(name)), golden(name)
    queries = model.encode_queries(texts_of(name, "queries"))
    documents = model.encode_documents(texts_of(name, "documents"))
    # A query of 48 rows sums 48 cosines, each off by at most one rounding of the vectors' tolerance.
    np.testing.assert_allclose(maxsim(queries, documents).numpy(), wanted["scores"], rtol=0, atol=48 * TOLERANCE)


@pytest.mark.parametrize("name", ["plain", "expansion", "window_16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_does_not_matter(name: str, kind: str, folder_of: Assemble) -> None:
    """One text at a time, in small token budgets and in reverse order: the rows are PyLate's all the same."""
    model, texts, wanted = (
        ColBERT.from_pretrained(folder_of(name)),
        texts_of(name, kind),
        rows(golden(name), kind),
    )
    assert_same_rows([encode(model, kind, [text])[0] for text in texts], wanted, texts)
    assert_same_rows(encode(model, kind, texts, batch_tokens=50), wanted, texts)
    assert_same_rows(encode(model, kind, texts[::-1]), wanted[::-1], texts[::-1])


def test_the_goldens_hold_the_edge_cases() -> None:
    """The fixtures say what they claim to; read from PyLate's rows, without our code."""
    lengths = {
        (name, kind, TEXTS[kind][i]): len(row)
        for name, kind in GOLDEN_CALLS
        for i, row in zip(CALLS[name][kind], rows(golden(name), kind), strict=True)
    }
    long_query, long_document = TEXTS["queries"][3], TEXTS["documents"][7]
    assert lengths["plain", "documents", "?!...,;:-()[]"] == 3  # [CLS] [D] [SEP]; all punctuation is skipped
    assert lengths["no_skiplist", "documents", "?!...,;:-()[]"] > 3
    assert lengths["plain", "queries", ""] == 3
    assert lengths["plain", "queries", long_query] == 32
    assert lengths["expansion", "queries", ""] == 32
    assert lengths["expansion_far", "queries", ""] == 128
    assert lengths["no_prefix", "queries", ""] == 12
    assert 130 < lengths["long", "documents", long_document] <= 180
    pooled = [len(rows(golden("pooling"), f"documents_pool{f}")[7]) for f in (2, 3, 4)]
    assert pooled == sorted(pooled, reverse=True)


# sentence-transformers reads the same folders, but by design differs from PyLate in some: it keeps blanks
# around a text; on a lower-casing model it finds "[Q] ", "[MASK]" and the like before it lower-cases, and it
# lower-cases character by character (final sigma); it drops skiplist words that the vocabulary lacks; it
# always uses the prompts; and a folder without any ColBERT setting is a single-vector model to it.
UNSTRIPPED = {"queries": {6}, "documents": {4}}
SPECIAL = {"queries": {7, 9, 10}, "documents": {5, 10, 11}}
SHARED = [name for name in CASES if not name.startswith("prompt_") and name != "old_files"]


@pytest.fixture(scope="session")
def multi_vector_encoder() -> Any:
    """sentence-transformers' class; its import takes seconds, so only tests that need it pay."""
    return pytest.importorskip("sentence_transformers", minversion="6.2").MultiVectorEncoder


def shared_texts(name: str, kind: str) -> list[str]:
    odd = UNSTRIPPED[kind] | (SPECIAL[kind] if name in ("lower", "own_skiplist") else set())
    return [TEXTS[kind][i] for i in range(len(TEXTS[kind])) if i not in odd]


def their_rows(model: Any, kind: str, texts: list[str]) -> list[np.ndarray]:
    return (model.encode_query if kind == "queries" else model.encode_document)(texts, convert_to_numpy=True)


# Of Stanford's format it makes "[unused0] " + text; the blank is a token of its own to a byte-level BPE.
@pytest.mark.parametrize("name", [name for name in SHARED if name != "stanford"])
def test_pylate_folder_gives_sentence_transformers_vectors(
    name: str, folder_of: Assemble, multi_vector_encoder: Any
) -> None:
    ours = ColBERT.from_pretrained(folder_of(name))
    theirs = multi_vector_encoder(str(folder_of(name)), device="cpu")
    for kind in KINDS:
        texts = shared_texts(name, kind)
        assert_same_rows(encode(ours, kind, texts), their_rows(theirs, kind, texts), texts)


@pytest.mark.parametrize("name", [*SHARED, "prompt_unused"])
def test_folder_saved_by_sentence_transformers(
    name: str, folder_of: Assemble, multi_vector_encoder: Any, tmp_path: Path
) -> None:
    """Its native format, where prefixes are text and tokenizer.json lower-cases: all texts are equal."""
    theirs = multi_vector_encoder(str(folder_of(name)), device="cpu")
    theirs.save_pretrained(str(tmp_path / "native"))
    ours = ColBERT.from_pretrained(tmp_path / "native")
    for kind in KINDS:
        assert_same_rows(encode(ours, kind, TEXTS[kind]), their_rows(theirs, kind, TEXTS[kind]), TEXTS[kind])


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("prompt_call", "old_files")])
def test_folder_saved_by_us_is_the_same_model(name: str, folder_of: Assemble, tmp_path: Path) -> None:
    before = ColBERT.from_pretrained(folder_of(name))
    before.save_pretrained(tmp_path / "ours")
    after = ColBERT.from_pretrained(tmp_path / "ours")
    assert after.config == before.config
    for kind in KINDS:
        wanted = [x.numpy() for x in encode(before, kind, TEXTS[kind])]
        assert_same_rows(encode(after, kind, TEXTS[kind]), wanted, TEXTS[kind])


@pytest.mark.parametrize("name", SHARED)
def test_folder_saved_by_us_loads_in_sentence_transformers(
    name: str, folder_of: Assemble, multi_vector_encoder: Any, tmp_path: Path
) -> None:
    ours = ColBERT.from_pretrained(folder_of(name))
    ours.save_pretrained(tmp_path / "ours")
    theirs = multi_vector_encoder(str(tmp_path / "ours"), device="cpu")
    for kind in KINDS:
        texts = shared_texts(name, kind)
        assert_same_rows(encode(ours, kind, texts), their_rows(theirs, kind, texts), texts)


@pytest.mark.parametrize("name", ["plain", "lower", "expansion"])
def test_native_folder_that_went_through_us(
    name: str, folder_of: Assemble, multi_vector_encoder: Any, tmp_path: Path
) -> None:
    """From sentence-transformers to us, as a PyLate folder back to sentence-transformers: nothing is lost."""
    before = multi_vector_encoder(str(folder_of(name)), device="cpu")
    before.save_pretrained(str(tmp_path / "native"))
    ColBERT.from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "ours")
    after = multi_vector_encoder(str(tmp_path / "ours"), device="cpu")
    for kind in KINDS:
        got = [torch.from_numpy(x) for x in their_rows(after, kind, TEXTS[kind])]
        assert_same_rows(got, their_rows(before, kind, TEXTS[kind]), TEXTS[kind])
