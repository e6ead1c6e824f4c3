"""`pack_in_place` on PyLate's ColBERT: vectors, losses, gradients, training and files as before.

PyLate pins older versions of transformers and sentence-transformers, so this runs in an environment of its own.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modernbert import ColBERT
from modernbert.integrations.transformers import pack_in_place, unpack_in_place

pytest.importorskip("pylate")

from datasets import Dataset
from pylate import losses, models, utils
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

FIXTURES = Path(__file__).parents[1] / "fixtures" / "colbert"
TEXTS = ["How do I fold a tensor?", "", "the gradient of the norm, with respect to x.", "a " * 60, "x"]
CASES = ["plain", "expansion", "expansion_attended", "expansion_far", "dense_tanh_residual"]
TOLERANCE = 1e-5


@pytest.fixture
def model_of(tmp_path: Path) -> Callable[[str], models.ColBERT]:
    def load(case: str) -> models.ColBERT:
        folder = tmp_path / case
        if not folder.exists():
            shutil.copytree(FIXTURES / "backbone", folder)
            shutil.copytree(FIXTURES / "cases" / case, folder, dirs_exist_ok=True)
        return models.ColBERT(str(folder), device="cpu").eval()

    return load


def vectors_of(model: models.ColBERT) -> list[Tensor]:
    queries, documents = (model.encode(TEXTS, is_query=query, convert_to_tensor=True) for query in (True, False))
    return [*queries, *documents, *model.encode(TEXTS[:1], is_query=True, convert_to_tensor=True)]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, yours in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=TOLERANCE * max(1.0, yours.abs().max().item()))


@pytest.mark.parametrize("case", CASES)
def test_vectors_copies_and_files(case: str, model_of: Callable[[str], models.ColBERT], tmp_path: Path) -> None:
    """The rows of [MASK] tokens that no token sees were zero in such a model: pylate#109 and #125."""
    model = model_of(case)
    wanted = vectors_of(model)
    assert pack_in_place(model) is model
    assert_same(vectors_of(model), wanted)
    assert_same(vectors_of(copy.deepcopy(model)), wanted)
    model.save(str(tmp_path / "saved"))
    for loaded in (models.ColBERT(str(tmp_path / "saved"), device="cpu"), unpack_in_place(model)):
        assert not any(hasattr(module, "in_place") for module in loaded.modules())
        assert_same(vectors_of(loaded), wanted)
    assert_same(list(ColBERT.from_pretrained(tmp_path / "saved").encode_queries(TEXTS)), wanted[: len(TEXTS)])


@pytest.mark.parametrize("case", CASES)
def test_padding_of_documents_is_not_computed(case: str, model_of: Callable[[str], models.ColBERT]) -> None:
    """Although PyLate pads documents with [MASK] too, in training up to the longest length."""
    model = pack_in_place(model_of(case))
    rows = []
    model[0].auto_model.layers[1].mlp.Wi.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    features = model.tokenize(TEXTS, is_query=False, pad=True)
    tokens = int(features["attention_mask"].sum())
    model(features)
    assert rows == [tokens]


LOSSES: dict[str, Callable[[Any], nn.Module]] = {
    "contrastive": lambda model: losses.Contrastive(model),
    "cached contrastive": lambda model: losses.CachedContrastive(model, mini_batch_size=2),
    "distillation": lambda model: losses.Distillation(model, normalize_scores=False),
}
PAIRS = [
    ("what is a glacier?", "a body of dense ice", "a violin"),
    ("who folds", "the gradient of the norm folds twice and then once more", "x"),
    ("find the river", "water", "a long text about engines and their pressure " * 3),
]


def loss_and_gradients(model: models.ColBERT, name: str) -> list[Tensor]:
    queries, positives, negatives = zip(*PAIRS, strict=True)
    features = [model.tokenize(list(queries), is_query=True, pad=True)]
    if name == "distillation":
        documents = [text for pair in zip(positives, negatives, strict=True) for text in pair]
        features.append(model.tokenize(documents, is_query=False, pad=True))
        labels = torch.tensor([[3.0, 1.0], [2.0, 2.5], [1.0, 0.0]])
    else:
        features += [model.tokenize(list(texts), is_query=False, pad=True) for texts in (positives, negatives)]
        labels = None
    model.zero_grad()
    loss = LOSSES[name](model)(features, labels)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", ["plain", "expansion", "expansion_attended"])
def test_losses_and_gradients(case: str, name: str, model_of: Callable[[str], models.ColBERT]) -> None:
    model = model_of(case).train()
    wanted = loss_and_gradients(model, name)
    assert wanted[0] > 1e-3
    assert_same(loss_and_gradients(pack_in_place(model), name), wanted)


@pytest.mark.parametrize("name", LOSSES)
def test_two_steps_of_the_trainer(name: str, model_of: Callable[[str], models.ColBERT], tmp_path: Path) -> None:
    def trained(change: Callable[[Any], Any]) -> tuple[list[float], list[Tensor]]:
        model = change(model_of("expansion"))
        rows: dict[str, list[Any]] = {"query": [q for q, _, _ in PAIRS], "positive": [p for _, p, _ in PAIRS]}
        if name == "distillation":
            rows = {"query": rows["query"], "documents": [[p, n] for _, p, n in PAIRS], "scores": [[3.0, 1.0]] * 3}
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=3,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            seed=1,
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(rows),
            loss=LOSSES[name](model),
            data_collator=utils.ColBERTCollator(model.tokenize),
        )
        trainer.train()
        found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return found, [parameter.detach() for parameter in model.parameters()]

    wanted, weights = trained(lambda model: model)
    got, packed = trained(pack_in_place)
    assert len(wanted) == 2
    assert wanted[0] != wanted[1]
    assert got == pytest.approx(wanted, abs=1e-4)  # as far as the trainer rounds them
    # AdamW divides a gradient by its size, so that the rounding of one that is almost zero becomes a step.
    differences = torch.cat([(x - y).abs().flatten() for x, y in zip(packed, weights, strict=True)])
    assert differences.mean() < 1e-6


def test_the_snippet_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_readme.py plays the other blocks of the page, in an environment without PyLate."""
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    code = page.partition("\n```py\n")[2].partition("\n```\n")[0]
    assert "pack_in_place(model)" in code
    ColBERT.default().save_pretrained(tmp_path / "my-colbert")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/compatibility.md", "exec"), names)
    ours = ColBERT.default().encode_queries(["what moves downhill?"])[0]
    torch.testing.assert_close(torch.as_tensor(names["queries"][0]), ours, rtol=0, atol=TOLERANCE)
