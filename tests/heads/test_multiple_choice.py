"""MultipleChoice is transformers' head: logits, loss, gradients, packed and padded; `choose` on texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from head_twin import CONFIGS, SMALL, head_twins
from hf_twin import exact_rotary, make_loud, pad, random_ids
from torch import Tensor, nn
from transformers import AutoTokenizer, ModernBertForMultipleChoice
from transformers.models.modernbert import modeling_modernbert

from modernbert import Encoder, MultipleChoice, Tokenizer, pack
from modernbert.heads.choose import choose
from modernbert.outputs import HeadOutput
from modernbert.truncation import TruncationWarning

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
TEXTS = random_ids([1, 12, 40, 17, 66, 3], 100)  # two questions of three choices
IDS, MASK = (x.view(2, 3, -1) for x in pad(TEXTS))
LABELS = torch.tensor([2, 0])


def gradients(model: nn.Module, output: HeadOutput) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(output.loss, parameters)
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **dict(zip(names, grads, strict=True))}


def flat(found: dict[str, Tensor]) -> Tensor:
    """All numbers at once: one of them alone may have no error in one of two sums."""
    return torch.cat([value.flatten() for value in found.values()])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("labels", [[2, 0], [-100, 1]])
def test_logits_loss_and_gradients(name: str, labels: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", exact_rotary)
    theirs, ours = head_twins("MultipleChoice", CONFIGS[name])
    given = torch.tensor(labels)
    left = tuple(x.view(2, 3, -1) for x in pad(TEXTS, "left", extra=3))
    runs: dict[str, Callable[[], HeadOutput]] = {
        "packed": lambda: ours(pack(TEXTS), labels=given),
        "padded": lambda: ours(IDS, MASK, labels=given),
        "left": lambda: ours(*left, labels=given),
    }
    wanted = lambda: gradients(theirs, theirs(IDS, attention_mask=MASK, labels=given))  # noqa: E731
    plain, singles = wanted(), {way: gradients(ours, run()) for way, run in runs.items()}
    assert plain["logits"].shape == (2, 3)
    assert plain["logits"].std() > 0.3, "the weights are so quiet that the test says nothing"
    ours.double(), theirs.double()
    truth, doubles = wanted(), {way: gradients(ours, run()) for way, run in runs.items()}
    for key, value in truth.items():
        for way in runs:
            assert (doubles[way][key] - value).abs().max() <= 1e-11 * max(1, value.abs().max()), f"{way} {key}"
    for way, found in singles.items():
        assert_accurate(flat(found), flat(plain), flat(truth), way)


def test_without_labels_and_alone() -> None:
    """A choice does not depend on the others, and the logits of a packed batch are a column."""
    _, ours = head_twins("MultipleChoice")
    with torch.inference_mode():
        padded, packed = ours(IDS, MASK), ours(pack(TEXTS))
        alone = torch.cat([ours(pack([text])) for text in TEXTS])
    assert (padded.loss, packed.shape) == (None, (6, 1))
    torch.testing.assert_close(packed.view(2, 3), padded.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, packed, rtol=0, atol=1e-5)
    for batch, rows in ((pack([]), 0), (pack([[], []]), 2)):
        assert ours(batch).shape == (rows, 1)
    empty = ours(pack([]), labels=torch.zeros(0, dtype=torch.int64))
    assert (empty.loss, empty.logits.shape) == (0, (0, 0))


def test_only_the_rows_that_are_read_leave_the_last_layer() -> None:
    _, ours = head_twins("MultipleChoice", replace(SMALL, classifier_pooling="cls"))
    seen: list[int] = []
    ours.model.layers[-1].mlp.Wi.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    ours(pack(TEXTS), labels=LABELS)
    ours(IDS, MASK)
    assert seen == [6, 6]


def test_wrong_arguments() -> None:
    _, ours = head_twins("MultipleChoice")
    calls: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (
            (pack(TEXTS),),
            {"labels": torch.tensor([0, 0, 0, 0])},
            "of 4 questions, but 6 texts are not as many for each",
        ),
        ((pack(TEXTS),), {"labels": torch.tensor([0, 3])}, r"labels\[1\] is 3, but there are 3 classes"),
        ((pack(TEXTS),), {"labels": torch.tensor([0.0, 1.0])}, "labels must be integers"),
        ((pack(TEXTS),), {"rows": torch.tensor([0])}, "leave out rows"),
        ((IDS[0], MASK[0]), {}, r"input_ids must be \[questions, choices, length\], got shape \(3, 66\)"),
        ((), {}, "got nothing"),
        ((IDS, MASK[:1]), {}, "attention_mask has shape"),
        ((pack(TEXTS), MASK), {}, "leave out attention_mask"),
        ((IDS, MASK), {"labels": torch.tensor([0])}, r"labels must be integers of shape \[2\]"),
    ]
    for arguments, options, words in calls:
        with pytest.raises(ValueError, match=words):
            ours(*arguments, **options)


# On texts

PROMPT = "To fold a tensor"
CHOICES = ["you need both hands.", "", "call unfold first and then fold it with the same sizes", "x " * 30]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_choose_has_the_probabilities_of_transformers(pooling: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = MultipleChoice(Encoder.from_pretrained(BACKBONE, classifier_pooling=pooling)).eval()
    make_loud(ours)
    ours.save_pretrained(tmp_path)
    theirs = ModernBertForMultipleChoice.from_pretrained(tmp_path).eval()
    encoded = AutoTokenizer.from_pretrained(BACKBONE)([PROMPT] * 4, CHOICES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = theirs(encoded["input_ids"][None], attention_mask=encoded["attention_mask"][None]).logits[0]
    wanted = logits.softmax(0)
    tokenizer = Tokenizer.from_pretrained(BACKBONE)
    got = choose(ours.train(), tokenizer, PROMPT, CHOICES)
    assert [each.index for each in got] == wanted.argsort(descending=True).tolist()
    assert [each.score for each in got] == pytest.approx(wanted.sort(descending=True).values.tolist(), abs=1e-5)
    assert [each.index for each in choose(ours, tokenizer, PROMPT, CHOICES, batch_tokens=20)] == [e.index for e in got]
    assert choose(ours, tokenizer, PROMPT, []) == []
    assert choose(ours, tokenizer, PROMPT, ["one"]) == [(0, 1.0)]
    with pytest.raises(TypeError, match="put it in a list"):
        choose(ours, tokenizer, PROMPT, "one choice")
    with pytest.raises(TypeError, match="prompt must be a str, got NoneType None"):
        choose(ours, tokenizer, None, CHOICES)  # pyright: ignore[reportArgumentType]
    tokenizer.max_length = 20
    with pytest.warns(TruncationWarning, match=r"choices\[0\] with its prompt has at least .* reads 20"):
        choose(ours, tokenizer, PROMPT, CHOICES)
