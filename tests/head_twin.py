"""A head twice: transformers' with loud weights, and ours with the same numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers
from hf_twin import BIASES, TINY, hf_dict, make_loud
from torch import Tensor, nn
from transformers import ModernBertConfig

from modernbert import (
    Encoder,
    EncoderConfig,
    MaskedLM,
    MultipleChoice,
    QuestionAnswering,
    SequenceClassifier,
    TokenClassifier,
)

Head = MaskedLM | SequenceClassifier | TokenClassifier | QuestionAnswering | MultipleChoice
HEADS: dict[str, type[Head]] = {
    "MaskedLM": MaskedLM,
    "SequenceClassification": SequenceClassifier,
    "TokenClassification": TokenClassifier,
    "QuestionAnswering": QuestionAnswering,
    "MultipleChoice": MultipleChoice,
}
LABELLED = ("MaskedLM", "SequenceClassification", "TokenClassification")
"""Those that take `[B, S]` ids with labels, and give logits."""
OF_HEADS = (
    "decoder_bias tie_word_embeddings classifier_pooling classifier_activation classifier_bias classifier_dropout"
)
LABELS = {"id2label": {"0": "no", "1": "yes", "2": "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
SMALL = replace(TINY, num_hidden_layers=3)
# Every field that a head reads, each with both of its values.
CONFIGS = {
    "tied": SMALL,
    "untied": replace(SMALL, tie_word_embeddings=False, classifier_pooling="mean", **BIASES),
    "no bias": replace(SMALL, decoder_bias=False, classifier_activation="silu"),
    "biases": replace(SMALL, classifier_bias=True, classifier_pooling="mean"),
}


SPANS = {"id2label": {"0": "start", "1": "end"}, "label2id": {"start": 0, "end": 1}}


def written(config: EncoderConfig, **settings: object) -> dict[str, Any]:
    """config.json of a head, by hand."""
    return hf_dict(config, 5) | {name: getattr(config, name) for name in OF_HEADS.split()} | LABELS | settings


def head_twins(task: str, config: EncoderConfig = SMALL, **settings: object) -> tuple[nn.Module, Head]:
    """`ModernBertFor<task>` and our head in evaluation mode, with parameters of their own."""
    torch.manual_seed(0)
    settings = (SPANS if task == "QuestionAnswering" else {}) | settings
    hf = ModernBertConfig.from_dict(written(config, **settings))
    theirs = getattr(transformers, f"ModernBertFor{task}")._from_config(hf, attn_implementation="sdpa").eval()
    make_loud(theirs)
    ours = HEADS[task](Encoder(EncoderConfig.from_hf(written(config, **settings)))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def some_labels(task: str, mask: Tensor, classes: int) -> Tensor:
    """Labels for a padded batch: of each text, or of a third of its tokens."""
    generator = torch.Generator().manual_seed(5)
    if task == "SequenceClassification":
        return torch.randint(classes, (len(mask),), generator=generator)
    labels = torch.randint(classes, mask.shape, generator=generator)
    chosen = torch.rand(mask.shape, generator=generator) < 0.35
    return labels.masked_fill(~chosen | (mask == 0), -100)
