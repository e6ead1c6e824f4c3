"""A saved ColBERT loads with the same vectors; one that would not is refused, and the old folder is as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from folders import check_refused, tree
from tokenizers.pre_tokenizers import PreTokenizer
from torch import nn

from modernbert import ColBERT, Encoder, Tokenizer
from modernbert.heads.dense import Dense

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
TEXTS = ["How do I fold a tensor?", "the gradient of the norm"]


def make() -> ColBERT:
    torch.manual_seed(0)
    encoder, tokenizer = Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)
    return ColBERT.from_encoder(encoder, tokenizer, dim=24).eval()


def tied(model: ColBERT) -> None:
    model.encoder.layers[2] = model.encoder.layers[1]


def shared_head(model: ColBERT) -> None:
    """Two layers of the head with one matrix."""
    model.dense = nn.ModuleList([Dense(64, 64), Dense(64, 64), *model.dense])
    model.dense[1].linear.weight = model.dense[0].linear.weight


def longer(model: ColBERT) -> None:
    model.config = replace(model.config, query_length=40, document_length=50, do_query_expansion=True)


@pytest.mark.parametrize("change", [tied, shared_head, longer], ids=lambda change: change.__name__)
def test_what_is_saved_loads_with_the_same_vectors(change: Callable[[ColBERT], None], tmp_path: Path) -> None:
    model = make()
    change(model)
    model.save_pretrained(tmp_path)
    loaded = ColBERT.from_pretrained(tmp_path)
    for encode in ("encode_queries", "encode_documents"):
        got, wanted = (getattr(each, encode)(TEXTS).values for each in (loaded, model))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert loaded.config == model.config


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Gated(Dense):
    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return super().forward(x_TD).sigmoid()


def head(layer: Callable[[], nn.Module]) -> Callable[[ColBERT], None]:
    def change(model: ColBERT) -> None:
        model.dense[0] = layer()

    return change


def inside(name: str, value: Callable[[], object]) -> Callable[[ColBERT], None]:
    """Set an attribute of the only layer of the head."""

    def change(model: ColBERT) -> None:
        setattr(model.dense[0], name, value())

    return change


def nan(model: ColBERT) -> None:
    model.dense[0].linear.weight.data[0, 0] = float("nan")


def settings(**values: object) -> Callable[[ColBERT], None]:
    def change(model: ColBERT) -> None:
        model.config = replace(model.config, **values)  # pyright: ignore[reportArgumentType]

    return change


class Spaces:
    def pre_tokenize(self, text: tokenizers.PreTokenizedString) -> None: ...


def python_code(model: ColBERT) -> None:
    backend = tokenizers.Tokenizer.from_str(model.tokenizer.files()["tokenizer.json"].decode())
    backend.pre_tokenizer = PreTokenizer.custom(Spaces())
    model.tokenizer = Tokenizer(backend)


def another_tokenizer(model: ColBERT) -> None:
    """With more tokens than the encoder has rows."""
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.add_tokens([f"[{i}]" for i in range(1000)])


REFUSED: dict[str, tuple[Callable[[ColBERT], None], str]] = {
    "nan in the head": (nan, r"Dense cannot be saved: linear\.weight has NaN"),
    "an adapter in the head": (inside("linear", lambda: Scaled(64, 24, bias=False)), r"dense\.0\.linear is Scaled\("),
    "a head of another class": (head(lambda: Gated(64, 24)), r"dense\.0 is Gated\("),
    "an activation with a parameter": (
        inside("activation", lambda: nn.LeakyReLU(0.5)),
        r"is LeakyReLU\(negative_slope=0",
    ),
    "an activation with weights": (inside("activation", nn.PReLU), "is not one of"),
    "an activation of another package": (inside("activation", lambda: Gated(24, 24)), "is not one of"),
    "a head that does not fit": (head(lambda: Dense(32, 24)), "a Dense takes 32 features, but is given 64"),
    "a length without room": (settings(document_length=1), "document_length: a length of 1 has no room"),
    "a length of another type": (settings(query_length=9.5), r"query_length is 9\.5, but must be"),
    "a prefix without a token": (settings(query_prefix="[QUERY] "), r"prefix '\[QUERY\] ' is not a token"),
    "a skiplist of numbers": (settings(skiplist_words=(1, 2)), "skiplist_words"),
    "a tokenizer of Python code": (python_code, "the tokenizer cannot be saved"),
    "a tokenizer of another model": (another_tokenizer, "but the encoder only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_load_is_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    make().save_pretrained(tmp_path / "model")
    model = make()
    change(model)
    check_refused(model, tmp_path / "model", words)


def test_files_of_others_survive(tmp_path: Path) -> None:
    others = {".env": b"1", ".git/config": b"2", "shards/0.tar": b"3", "README.md": b"4", "1_Dense/notes": b"5"}
    for name, content in others.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for _ in range(2):
        make().save_pretrained(tmp_path)
        assert others.items() <= tree(tmp_path).items()


def test_a_tokenizer_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    model.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("card")
    before = tree(tmp_path)
    python_code(model)
    with pytest.raises(ValueError, match="the tokenizer cannot be saved"):
        model.tokenizer.save_pretrained(tmp_path)
    assert tree(tmp_path) == before
    monkeypatch.chdir(tmp_path)
    for folder, error in (("", ValueError), ("README.md", NotADirectoryError)):
        with pytest.raises(error):
            make().tokenizer.save_pretrained(folder)
    assert tree(tmp_path) == before


def test_an_encoder_does_not_take_the_place_of_a_colbert(tmp_path: Path) -> None:
    """The head stayed, so that `ColBERT.from_pretrained` put it on another encoder, with vectors of neither model."""
    model = make()
    model.save_pretrained(tmp_path / "model")
    before = tree(tmp_path)
    other = Encoder(model.encoder.config)
    with pytest.raises(ValueError, match=r"model holds a model of several modules \(see its modules\.json\)"):
        other.save_pretrained(tmp_path / "model")
    assert tree(tmp_path) == before
    other.save_pretrained(tmp_path / "encoder")
    model.save_pretrained(tmp_path / "encoder")  # the other way round nothing is left of the old one
    loaded = ColBERT.from_pretrained(tmp_path / "encoder")
    assert torch.equal(loaded.encode_queries(TEXTS).values, model.encode_queries(TEXTS).values)
