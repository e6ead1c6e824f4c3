"""QuestionAnswering is transformers' head: logits, loss, gradients. Answers are those of the evaluation of SQuAD 2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from accuracy import assert_accurate
from head_twin import CONFIGS, SMALL, head_twins
from hf_twin import exact_rotary, make_loud, pad, random_ids
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.models.modernbert import modeling_modernbert

from modernbert import Encoder, QuestionAnswering, Tokenizer, pack
from modernbert.heads.answer import Answer, answer
from modernbert.outputs import SpanOutput

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
TEXTS = random_ids([1, 2, 40, 17, 66], 100)
IDS, MASK = pad(TEXTS)
REAL = MASK.bool()
# Of the second and of the last text one position or both are behind the text, and have no loss.
START, END = torch.tensor([0, 1, 30, -1, 70]), torch.tensor([0, 9, 39, 16, 99])


def alone(theirs: nn.Module) -> list[SpanOutput]:
    """transformers' output of each text without padding, which its loss would count."""
    found = []
    for text, start, end in zip(TEXTS, START.split(1), END.split(1), strict=True):
        output = theirs(torch.tensor([text]), start_positions=start, end_positions=end)
        found.append(SpanOutput(None, output.start_logits[0], output.end_logits[0]))
    return found


def their_loss(outputs: list[SpanOutput]) -> Tensor:
    """Their loss is the mean over the positions that count, and for each text the softmax over its own tokens."""
    losses = []
    for logits, positions in (([o.start_logits for o in outputs], START), ([o.end_logits for o in outputs], END)):
        pairs = [(x, at.clamp(min=0)) for x, at in zip(logits, positions, strict=True) if at < len(x)]
        losses.append(torch.stack([nn.functional.cross_entropy(x, at) for x, at in pairs]).mean())
    return (losses[0] + losses[1]) / 2


def gradients(model: nn.Module, output: SpanOutput) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(output.loss, parameters)
    logits = {} if output.start_logits is None else {"start": output.start_logits, "end": output.end_logits}
    return {"loss": output.loss.detach(), **logits, **dict(zip(names, grads, strict=True))}


def flat(found: dict[str, Tensor]) -> Tensor:
    """All numbers at once: one of them alone may have no error in one of two sums."""
    return torch.cat([value.flatten() for value in found.values()])


def real(output: SpanOutput) -> SpanOutput:
    return SpanOutput(output.loss, output.start_logits[REAL], output.end_logits[REAL])


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", exact_rotary)
    theirs, ours = head_twins("QuestionAnswering", CONFIGS[name])
    assert isinstance(ours, QuestionAnswering)
    positions = {"start_positions": START, "end_positions": END}

    def wanted() -> dict[str, Tensor]:
        outputs = alone(theirs)
        joined = (torch.cat([o.start_logits for o in outputs]), torch.cat([o.end_logits for o in outputs]))
        return gradients(theirs, SpanOutput(their_loss(outputs), *joined))

    runs: dict[str, Callable[[], SpanOutput]] = {
        "packed": lambda: ours(pack(TEXTS), **positions),
        "padded": lambda: real(ours(IDS, MASK, **positions)),
        "wider": lambda: SpanOutput(ours(*pad(TEXTS, extra=60), **positions).loss),
    }
    assert wanted()["start"].std() > 0.3, "the weights are so quiet that the test says nothing"
    plain, singles = wanted(), {way: gradients(ours, run()) for way, run in runs.items()}
    ours.double(), theirs.double()
    truth, doubles = wanted(), {way: gradients(ours, run()) for way, run in runs.items()}
    for key, value in truth.items():
        for way in runs:
            if key in doubles[way]:
                assert (doubles[way][key] - value).abs().max() <= 1e-11 * max(1, value.abs().max()), f"{way} {key}"
    for way, found in singles.items():
        assert_accurate(flat(found), flat({key: plain[key] for key in found}), flat({k: truth[k] for k in found}), way)


def test_a_batch_without_padding_has_their_loss() -> None:
    theirs, ours = head_twins("QuestionAnswering")
    ids = torch.tensor(random_ids([24] * 6, 100))
    for start, end in (
        (torch.arange(6), torch.arange(6) + 3),
        (torch.tensor([0, -1, -100, 24, 23, 99]), torch.tensor([0, 5, 24, 25, 23, 1])),
        (torch.arange(6)[:, None], torch.arange(6)[:, None]),
        (torch.arange(6, dtype=torch.int32), torch.arange(6, dtype=torch.int32)),
    ):
        wanted = theirs.double()(ids, start_positions=start.long(), end_positions=end.long())
        got = ours.double()(ids, start_positions=start, end_positions=end)
        torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(got.start_logits, wanted.start_logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(got.end_logits, wanted.end_logits, rtol=0, atol=1e-5)
        assert got.keys() == [name for name in wanted if wanted[name] is not None]


def test_left_padding_and_its_columns() -> None:
    _, ours = head_twins("QuestionAnswering")
    ids, mask = pad(TEXTS, "left", extra=2)
    shift = mask.argmax(1)
    inside = torch.tensor([len(text) - 1 for text in TEXTS])
    with torch.inference_mode():
        wanted = ours(pack(TEXTS), start_positions=torch.zeros(5, dtype=torch.int64), end_positions=inside)
        got = ours(ids, mask, start_positions=shift, end_positions=shift + inside)
        in_padding = ours(ids, mask, start_positions=torch.zeros(5, dtype=torch.int64), end_positions=shift + inside)
    torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(got.start_logits[mask.bool()], wanted.start_logits, rtol=0, atol=1e-5)
    assert got.start_logits[mask == 0].eq(0).all()
    assert in_padding.loss < got.loss, "positions in padding have no loss"


def test_rows_empty_batches_and_half_precision() -> None:
    _, ours = head_twins("QuestionAnswering")
    batch, none = pack(TEXTS), torch.full((2,), 5)
    rows = torch.tensor([0, 3, 20, 100])
    seen: list[int] = []
    ours.model.layers[-1].mlp.Wi.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with torch.inference_mode():
        torch.testing.assert_close(ours(batch, rows=rows), ours(batch)[rows], rtol=0, atol=1e-5)
    assert seen[0] == 4
    for batch in (pack([]), pack([[], []]), pack([[], [1]])):
        positions = none[: len(batch)]
        output = ours(batch, start_positions=positions, end_positions=positions)
        assert output.loss == 0
        output.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())
    first = torch.tensor([0, 0])
    for text in ([3, 4], []):
        output = ours(pack([text, [1, 2]]), start_positions=first, end_positions=first)
        output.loss.backward()
        assert output.loss > 0
        assert all(p.grad.isfinite().all() for p in ours.parameters())
    assert ours.bfloat16()(IDS, MASK, start_positions=START, end_positions=END).loss.dtype == torch.float32
    with torch.no_grad():
        ours.classifier.bias[0] = torch.nan
    assert ours(pack(TEXTS), start_positions=START, end_positions=END).loss.isnan()


def test_wrong_arguments() -> None:
    _, ours = head_twins("QuestionAnswering")
    batch, five = pack(TEXTS), torch.zeros(5, dtype=torch.int64)
    calls: list[tuple[dict[str, Any], str]] = [
        ({"start_positions": five}, "pass both start_positions and end_positions, or neither"),
        (
            {"start_positions": five, "end_positions": five.float()},
            r"end_positions must be integers of shape \[B\], got",
        ),
        ({"start_positions": five[:, None].expand(5, 2), "end_positions": five}, "start_positions must be integers"),
        ({"start_positions": five[:4], "end_positions": five[:4]}, "there are 4 positions, but 5 texts"),
        ({"start_positions": five, "end_positions": five, "rows": five}, "leave out rows"),
        ({"attention_mask": MASK}, "leave out attention_mask"),
    ]
    for options, words in calls:
        with pytest.raises(ValueError, match=words):
            ours(batch, **options)
    with pytest.raises(ValueError, match="rows count the tokens of a Packed"):
        ours(IDS, MASK, rows=five)


def test_a_head_on_an_encoder_of_another_task_has_two_labels() -> None:
    encoder = Encoder(head_twins("TokenClassification")[1].config)
    assert QuestionAnswering(encoder).config.id2label == {"0": "LABEL_0", "1": "LABEL_1"}
    named = head_twins("QuestionAnswering")[1]
    assert QuestionAnswering(named.model).config.id2label == {"0": "start", "1": "end"}


# Answers

QUESTION = "How do I fold a tensor?"
CONTEXT = (
    "  Fold it in the middle.\n\n" + "The gradient of the norm is a vector. " * 12 + "It ends \N{GRINNING FACE} here.  "
)


@pytest.fixture(scope="module")
def model() -> QuestionAnswering:
    torch.manual_seed(0)
    model = QuestionAnswering(Encoder.from_pretrained(BACKBONE)).eval()
    make_loud(model)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(BACKBONE)


def reference(
    model: QuestionAnswering, question: str, context: str, *, max_length: int, stride: int, max_tokens: int
) -> tuple[float, dict[tuple[int, int], float]]:
    """`postprocess_qa_predictions` of transformers' run_qa.py with an n_best of all: the score of no answer, and the
    best of each span. Windows are those of transformers' tokenizer, and logits those of one window alone.
    """
    theirs = AutoTokenizer.from_pretrained(BACKBONE)
    encoded = theirs(
        question, context, truncation="only_second", max_length=max_length, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    null, spans = float("inf"), {}
    for index, ids in enumerate(encoded["input_ids"]):
        with torch.inference_mode():
            output = model(torch.tensor([ids]))
        start_logits, end_logits = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        owners = encoded.sequence_ids(index)
        offsets = [where if owners[k] == 1 else None for k, where in enumerate(encoded["offset_mapping"][index])]
        null = min(null, start_logits[0] + end_logits[0])
        for start, first in enumerate(offsets):
            for end, last in enumerate(offsets[: start + max_tokens]):
                if first is None or last is None or end < start:
                    continue
                text = context[first[0] : last[1]]
                if text.strip():
                    begin = first[0] + len(text) - len(text.lstrip())
                    span = (begin, begin + len(text.strip()))
                    spans[span] = max(spans.get(span, -1e9), start_logits[start] + end_logits[end])
    return null, spans


@pytest.mark.parametrize("max_tokens", [1, 7, 30])
@pytest.mark.parametrize(("max_length", "stride"), [(400, 128), (40, 0), (40, 9), (25, 3)])
def test_answers_are_those_of_squad(
    max_length: int, stride: int, max_tokens: int, model: QuestionAnswering, tokenizer: Tokenizer
) -> None:
    options = {"max_length": max_length, "stride": stride, "max_tokens": max_tokens}
    null, spans = reference(model, QUESTION, CONTEXT, **options)
    best = sorted(spans, key=lambda span: -spans[span])[:20]
    (got,) = answer(model, tokenizer, [(QUESTION, CONTEXT)], top_k=20, **options)
    assert [each.score for each in got] == pytest.approx([spans[span] - null for span in best], abs=1e-4)
    for each in got:
        assert each.text == CONTEXT[each.start : each.stop] == each.text.strip() != ""
        assert spans[each.start, each.stop] - null == pytest.approx(each.score, abs=1e-4)
    assert len({(each.start, each.stop) for each in got}) == 20, "no answer comes twice"
    # No answer, with the rule and a threshold on either side of the best score.
    for threshold in (got[0].score - 1e-3, got[0].score + 1e-3):
        ((first,),) = answer(model, tokenizer, [(QUESTION, CONTEXT)], no_answer=threshold, **options)
        assert first == (got[0] if threshold < got[0].score else Answer("", 0, 0, threshold))


def test_pairs_do_not_depend_on_each_other(model: QuestionAnswering, tokenizer: Tokenizer) -> None:
    pairs = [(QUESTION, CONTEXT), ("x", ""), ("Where?", "Here."), ("", "Fold it."), ("blanks", " \n ")]
    together = answer(model, tokenizer, pairs, top_k=3, max_length=40, stride=5)
    for pair, got in zip(pairs, together, strict=True):
        (wanted,) = answer(model, tokenizer, [pair], top_k=3, max_length=40, stride=5, batch_tokens=50)
        assert [each[:3] for each in got] == [each[:3] for each in wanted]
        assert [each.score for each in got] == pytest.approx([each.score for each in wanted], abs=1e-4)
    assert together[1] == together[4] == []
    assert answer(model, tokenizer, [("x", "")], no_answer=0.0) == [[Answer("", 0, 0, 0.0)]]
    assert answer(model, tokenizer, []) == []
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_only_the_context_leaves_the_last_layer(model: QuestionAnswering, tokenizer: Tokenizer) -> None:
    seen: list[int] = []
    hook = model.model.layers[-1].mlp.Wi.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    answer(model, tokenizer, [("a long question about tensors", "Fold it.")])
    hook.remove()
    assert sum(seen) == 1 + len(tokenizer.encode_batch(["Fold it."])[0].ids) - 2


def test_wrong_pairs_are_named(model: QuestionAnswering, tokenizer: Tokenizer) -> None:
    calls: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ("text", {}, TypeError, r"pairs must be a list of \(question, context\), got one str"),
        (["text"], {}, TypeError, r"pairs\[0\] must be \(question, context\), got str 'text'"),
        ([("a", "b"), ("a",)], {}, TypeError, r"pairs\[1\] must be \(question, context\), got tuple"),
        ([("a", None)], {}, TypeError, r"pairs\[0\] must be"),
        ([("a", "b")], {"top_k": 0}, ValueError, "top_k"),
        ([("a", "b")], {"max_tokens": 0}, ValueError, "max_tokens"),
        ([("a " * 50, "b " * 50)], {"max_length": 20}, ValueError, "max_length 20 leaves room for 0 tokens"),
        ([("a", "\ud800")], {}, ValueError, "half a surrogate pair"),
    ]
    for pairs, options, error, words in calls:
        with pytest.raises(error, match=words):
            answer(model, tokenizer, pairs, **options)


def test_characters_of_several_tokens(model: QuestionAnswering, tokenizer: Tokenizer) -> None:
    """Tokens of one emoji have the same characters: they are one answer."""
    ((first, *others),) = answer(model, tokenizer, [("what", "\N{GRINNING FACE}")], top_k=9)
    assert (first.text, first.start, first.stop, others) == ("\N{GRINNING FACE}", 0, 1, [])


def test_a_tokenizer_without_special_tokens(model: QuestionAnswering, tokenizer: Tokenizer) -> None:
    """The first row may be of the context, or not be there."""
    backend = copy.deepcopy(tokenizer._backend)
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    plain = Tokenizer(backend)
    assert plain.encode_batch([("", "")])[0].ids == []
    ((best,), none) = answer(model, plain, [("", "Fold it."), ("", "")], max_tokens=1)
    (ids,) = (encoding.ids for encoding in plain.encode_batch(["Fold it."]))
    with torch.inference_mode():
        scores = model(pack([ids])).sum(1)
    assert best.score == pytest.approx((scores.max() - scores[0]).item(), abs=1e-4)
    assert (none, best.text in "Fold it.") == ([], True)


def test_the_config_of_the_twins_is_that_of_two_labels() -> None:
    assert head_twins("QuestionAnswering", SMALL)[0].config.num_labels == 2
