"""A packed model under the trainers of transformers and sentence-transformers: the steps are those of before."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from hf_twin import make_loud
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.multi_vector_encoder import losses as vector_losses
from sentence_transformers.multi_vector_encoder import modules as vector_modules
from sentence_transformers.sentence_transformer import losses, modules
from torch import Tensor, nn

from modernbert.integrations.transformers import pack_in_place

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
PAIRS = {
    "anchor": ["what is a glacier?", "who folds", "find the river", "x"],
    "positive": ["a body of dense ice", "the gradient of the norm folds twice", "water", "engines and pressure " * 9],
}
TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "seed": 1,
}


def backbone(name: str = "ModernBertModel") -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(BACKBONE)
    model = getattr(transformers, name)(config)
    make_loud(model)
    return model


def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(BACKBONE, pad_token="[PAD]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("backbone")
    tokenizer().save_pretrained(path)
    backbone().save_pretrained(path)
    return str(path)


def steps(trainer: Any, model: nn.Module) -> tuple[list[float], list[float], list[Tensor]]:
    """The losses, the norms of the gradients, and the weights after two steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    losses, norms = [row["loss"] for row in rows], [row["grad_norm"] for row in rows]
    return losses, norms, [parameter.detach() for parameter in model.parameters()]


def assert_same_steps(packed: tuple[Any, Any, Any], plain: tuple[Any, Any, Any]) -> None:
    losses, norms, weights = plain
    assert len(losses) == 2
    assert losses[0] != losses[1]
    assert min(norms) > 1e-4
    assert packed[0] == pytest.approx(losses, abs=1e-4)
    assert packed[1] == pytest.approx(norms, rel=1e-3)
    # AdamW divides a gradient by its size, so that the rounding of one that is almost zero becomes a step.
    differences = torch.cat([(x - y).abs().flatten() for x, y in zip(packed[2], weights, strict=True)])
    assert differences.mean() < 1e-6


def twice(run: Callable[[Callable[[Any], Any]], tuple[Any, Any, Any]]) -> None:
    plain = run(lambda model: model)
    assert_same_steps(run(pack_in_place), plain)


# transformers


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}])
def test_trainer_of_masked_tokens(options: dict[str, Any], tmp_path: Path) -> None:
    def run(change: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
        model = change(backbone("ModernBertForMaskedLM"))
        texts = [tokenizer()(text) for text in (*PAIRS["positive"], *PAIRS["anchor"])]
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(output_dir=str(tmp_path), **{**TRAINING, **options}),
            train_dataset=Dataset.from_list([dict(text) for text in texts]),
            data_collator=transformers.DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4, seed=3),
        )
        return steps(trainer, model)

    twice(run)


def test_trainer_with_bfloat16(tmp_path: Path) -> None:
    """accelerate wraps the forward of the model in autocast; the loss is near that of float32."""

    def run(**options: Any) -> list[float]:
        model = pack_in_place(backbone("ModernBertForMaskedLM"))
        texts = [tokenizer()(text) for text in PAIRS["positive"]]
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(output_dir=str(tmp_path), **TRAINING, **options),
            train_dataset=Dataset.from_list([dict(text) for text in texts]),
            data_collator=transformers.DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4, seed=3),
        )
        return steps(trainer, model)[0]

    assert run(bf16=True) == pytest.approx(run(), rel=0.05)


def test_trainer_saves_resumes_and_loads(tmp_path: Path) -> None:
    """Its checkpoints hold an ordinary model, and its optimizer goes on."""
    model = pack_in_place(backbone("ModernBertForMaskedLM"))
    rows = [dict(tokenizer()(text)) for text in PAIRS["positive"]]
    texts = Dataset.from_list([row | {"labels": row["input_ids"]} for row in rows])
    collator = transformers.DataCollatorForTokenClassification(tokenizer())
    settings = TRAINING | {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}

    def trainer(model: Any) -> Any:
        arguments = transformers.TrainingArguments(**settings)
        return transformers.Trainer(model=model, args=arguments, train_dataset=texts, data_collator=collator)

    steps(trainer(model), model)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "checkpoint-2")
    for mine, yours in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, yours)
    again = pack_in_place(backbone("ModernBertForMaskedLM"))
    trainer(again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for mine, yours in zip(again.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=1e-5)


# sentence-transformers


LOSSES: dict[str, Callable[[Any], nn.Module]] = {
    "mnrl": lambda model: losses.MultipleNegativesRankingLoss(model),
    "cached mnrl": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
    "matryoshka": lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [64, 16]),
    "cached matryoshka": lambda model: losses.MatryoshkaLoss(
        model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3), [64, 16]
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_sentence_transformer_trainer(name: str, folder: str, tmp_path: Path) -> None:
    def run(change: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
        layers = [modules.Transformer(folder), modules.Pooling(64, "mean")]
        model = change(SentenceTransformer(modules=layers, device="cpu"))
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(output_dir=str(tmp_path), **TRAINING),
            train_dataset=Dataset.from_dict(PAIRS),
            loss=LOSSES[name](model),
        )
        return steps(trainer, model)

    twice(run)


VECTOR_LOSSES: dict[str, Callable[[Any], nn.Module]] = {
    "mnrl": lambda model: vector_losses.MultiVectorMultipleNegativesRankingLoss(model),
    "cached mnrl": lambda model: vector_losses.CachedMultiVectorMultipleNegativesRankingLoss(model, mini_batch_size=2),
    "distillation": lambda model: vector_losses.MultiVectorDistillKLDivLoss(model),
}


@pytest.mark.parametrize("name", VECTOR_LOSSES)
@pytest.mark.parametrize("attend", [False, True])
def test_multi_vector_encoder_trainer(name: str, attend: bool, folder: str, tmp_path: Path) -> None:
    def run(change: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
        torch.manual_seed(2)
        layers = [modules.Transformer(folder), modules.Dense(64, 16, module_input_name="token_embeddings")]
        layers += [vector_modules.MultiVectorMask(["."]), modules.Normalize(module_input_name="token_embeddings")]
        model = MultiVectorEncoder(modules=layers, device="cpu")
        model[0].query_expansion = {"strategy": "fixed", "length": 16, "attend": attend}
        model = change(model)
        rows: dict[str, list[Any]] = dict(PAIRS)
        if name == "distillation":
            rows |= {"negative": PAIRS["anchor"][::-1], "label": [[3.0, 1.0], [2.0, 2.5], [1.0, 0.0], [0.0, 1.0]]}
        trainer = MultiVectorEncoderTrainer(
            model=model,
            args=MultiVectorEncoderTrainingArguments(output_dir=str(tmp_path), **TRAINING),
            train_dataset=Dataset.from_dict(rows),
            loss=VECTOR_LOSSES[name](model),
        )
        return steps(trainer, model)

    twice(run)


def test_cross_encoder_trainer(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(BACKBONE, num_labels=1)
    transformers.ModernBertForSequenceClassification(config).save_pretrained(tmp_path / "model")

    def run(change: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
        model = change(CrossEncoder(str(tmp_path / "model"), device="cpu"))
        trainer = CrossEncoderTrainer(
            model=model,
            args=CrossEncoderTrainingArguments(output_dir=str(tmp_path), **TRAINING),
            train_dataset=Dataset.from_dict(PAIRS | {"label": [1.0, 0.0, 1.0, 1.0]}),
            loss=BinaryCrossEntropyLoss(model),
        )
        return steps(trainer, model)

    twice(run)
