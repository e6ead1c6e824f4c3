"""find_entities is the token-classification pipeline of transformers, with each of its strategies."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from head_twin import SMALL, head_twins
from torch import nn
from transformers import AutoTokenizer, pipeline

from modernbert import TokenClassifier, Tokenizer
from modernbert.heads.find_entities import STRATEGIES, FoundEntity, Strategy, find_entities

TEXTS = [
    "Angela Merkel besuchte Nordrhein-Westfalen, 2013.",
    "\N{GRINNING FACE}\N{GRINNING FACE} antidisestablishmentarianism",
    "  two  blanks\n\nand a line-break\tand a tab ",
    "x",
    "a word[UNK]goes on [SEP] and [CLS]on[MASK]",
    " ".join(["The incomprehensibilities of New York are O'Neill's."] * 9),
]
SCHEMES = {
    "BIO": ["O", "B-person", "I-person", "B-place", "I-place"],
    "plain": ["O", "person", "place"],
    "odd": ["O", "B-a-b", "I-a-b", "x-y", "B-"],
}


class Host:
    """A model twice, and the pipeline around transformers'."""

    def __init__(self, files: Path, folder: Path, labels: list[str]) -> None:
        self.tokenizer = Tokenizer.from_pretrained(files)
        self.tokenizer.save_pretrained(folder)
        config = replace(SMALL, vocab_size=self.tokenizer.vocab_size)
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
        names["id2label"] = {str(key): value for key, value in names["id2label"].items()}
        self.theirs, ours = head_twins("TokenClassification", config, **names)
        assert isinstance(ours, TokenClassifier)
        self.ours = ours
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.pipeline = pipeline("token-classification", model=self.theirs, tokenizer=tokenizer, device="cpu")

    def wanted(self, text: str, max_length: int = 8192, **options: Any) -> list[FoundEntity]:
        self.pipeline.tokenizer.model_max_length = max_length
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "does not support real words"
            found = self.pipeline(text, **options)
        names = ("entity" if options["aggregation_strategy"] == "none" else "entity_group", "score")
        return [FoundEntity(each["start"], each["end"], *(each[name] for name in names)) for each in found]


@pytest.fixture(params=SCHEMES, scope="module")
def host(
    request: pytest.FixtureRequest, modernbert_tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Host:
    return Host(modernbert_tokenizer_file.parent, tmp_path_factory.mktemp("host"), SCHEMES[request.param])


def assert_same(got: list[FoundEntity], wanted: list[FoundEntity]) -> None:
    assert [each[:3] for each in got] == [each[:3] for each in wanted]
    assert [each.score for each in got] == pytest.approx([each.score for each in wanted], abs=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_is_theirs(strategy: Strategy, host: Host) -> None:
    got = find_entities(host.ours.train(), host.tokenizer, TEXTS, strategy=strategy)
    assert host.ours.training
    for text, found in zip(TEXTS, got, strict=True):
        assert_same(found, host.wanted(text, aggregation_strategy=strategy))
    assert sum(map(len, got)) > 20, "the test says nothing"
    small = find_entities(host.ours, host.tokenizer, TEXTS, strategy=strategy, batch_tokens=20)
    for found, wanted in zip(small, got, strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("strategy", ["simple", "first", "average", "max"])
@pytest.mark.parametrize(("max_length", "stride"), [(30, 0), (30, 7), (12, 5)])
def test_windows_of_long_texts_are_theirs(strategy: Strategy, max_length: int, stride: int, host: Host) -> None:
    options = {"aggregation_strategy": strategy, "stride": stride}
    got = find_entities(host.ours, host.tokenizer, TEXTS, strategy=strategy, max_length=max_length, stride=stride)
    for text, found in zip(TEXTS, got, strict=True):
        assert_same(found, host.wanted(text, max_length, **options))


def test_the_strategies_differ(modernbert_tokenizer_file: Path, tmp_path: Path) -> None:
    host = Host(modernbert_tokenizer_file.parent, tmp_path, SCHEMES["BIO"])
    found = [str(find_entities(host.ours, host.tokenizer, TEXTS, strategy=each)) for each in STRATEGIES]
    assert len(set(found)) == 5
    assert get_args(Strategy) == STRATEGIES


def test_only_the_rows_that_are_read_leave_the_last_layer(modernbert_tokenizer_file: Path, tmp_path: Path) -> None:
    host = Host(modernbert_tokenizer_file.parent, tmp_path, SCHEMES["BIO"])
    seen: list[int] = []
    last = host.ours.model.layers[-1].mlp.Wi
    assert isinstance(last, nn.Module)
    last.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    find_entities(host.ours, host.tokenizer, ["antidisestablishmentarianism is long"], strategy="first")
    tokens = len(host.tokenizer.encode_batch("antidisestablishmentarianism is long")[0].ids)
    assert tokens > 6
    find_entities(host.ours, host.tokenizer, ["antidisestablishmentarianism is long"], strategy="max")
    assert seen == [3, tokens - 2]


def test_texts_without_entities_and_wrong_arguments(modernbert_tokenizer_file: Path, tmp_path: Path) -> None:
    host = Host(modernbert_tokenizer_file.parent, tmp_path, SCHEMES["plain"])
    assert find_entities(host.ours, host.tokenizer, []) == []
    with torch.no_grad():
        host.ours.classifier.bias[0] += 1000
    assert find_entities(host.ours, host.tokenizer, ["", "a b"]) == [[], []]
    with pytest.raises(ValueError, match="strategy is 'last', but must be one of none, simple, first, average, max"):
        find_entities(host.ours, host.tokenizer, ["a"], strategy="last")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="put it in a list"):
        find_entities(host.ours, host.tokenizer, "a")
    with pytest.raises(ValueError, match="stride"):
        find_entities(host.ours, host.tokenizer, ["a b c d e f"], max_length=5, stride=3)
