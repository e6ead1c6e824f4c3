"""Answers to questions, in the words of a text of any length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inference.encode import Modules, encode_tokens
from ..late_interaction import check_count
from ..packing import Tokens, pack
from ..tokenizer import TextWindow, Tokenizer
from .pairs import check_pairs, longest
from .question_answering import QuestionAnswering


class Answer(NamedTuple):
    """Characters `start` to before `stop` of a context.

    `score` is the logit of its first token plus that of its last, less the same of [CLS], which means that there is no
    answer.
    """

    text: str
    start: int
    stop: int
    score: float


def answer(
    model: QuestionAnswering,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    top_k: int = 1,
    no_answer: float | None = None,
    max_tokens: int = 30,
    max_length: int | None = None,
    stride: int = 128,
    batch_tokens: int | None = None,
) -> list[list[Answer]]:
    """For each (question, context) the `top_k` best answers, best first, without white space around them.

    A long context is read in windows, each with the question. The score of [CLS] is the lowest of all windows, as in
    the evaluation of SQuAD 2, and an answer in two windows has its better score.

    Args:
        no_answer: the score of an empty answer, which is among those of each pair. 0 is the rule of SQuAD 2, and minus
            a threshold that was tuned is its rule with the threshold. None: the context has an answer.
        max_tokens: of an answer at most.
        max_length: tokens of a window; None: as many as the tokenizer and the encoder allow.
        stride: tokens of the context that two windows share, fewer than there is room for.
        batch_tokens: tokens of one forward pass; None: a good value for the device.

    Raises:
        TypeError: something in the place of a pair of str, with its index.
        ValueError: a `top_k` or `max_tokens` below 1; half a surrogate pair; a question that fills a window.
    """
    for name, count in (("top_k", top_k), ("max_tokens", max_tokens)):
        check_count(name, count)
    pairs = check_pairs("(question, context)", pairs)
    limit = longest(tokenizer, model.base_model.config) if max_length is None else max_length
    windows = tokenizer.encode_windows(pairs, max_length=limit, stride=stride)
    # Only [CLS], the first row, and those of the context leave the last layer.
    keep = [not row or owner == 1 for window in windows for row, owner in enumerate(window.sequence_ids)]
    batch = pack([window.ids for window in windows], vocab_size=model.base_model.config.vocab_size)
    tokens = Tokens(batch, torch.tensor(keep, dtype=torch.bool, device="cpu"))
    logits = encode_tokens(Modules(model), tokens, batch_tokens=batch_tokens)
    found: list[dict[tuple[int, int], float]] = [{} for _ in pairs]
    null = [torch.inf] * len(pairs)
    for window, logits_N2 in zip(windows, logits, strict=True):
        text = window.text
        null[text] = min(null[text], logits_N2[:1].sum().item())
        for start, stop, score in _spans(window, pairs[text][1], logits_N2, top_k, max_tokens):
            found[text][start, stop] = max(score, found[text].get((start, stop), score))
    answers = []
    for (_, context), spans, without in zip(pairs, found, null, strict=True):
        own = [Answer(context[start:stop], start, stop, score - without) for (start, stop), score in spans.items()]
        own += [] if no_answer is None else [Answer("", 0, 0, no_answer)]
        answers.append(sorted(own, key=lambda each: -each.score)[:top_k])
    return answers


def _spans(
    window: TextWindow, context: str, logits_N2: Tensor, top_k: int, max_tokens: int
) -> Iterator[tuple[int, int, float]]:
    """The `top_k` best spans of characters of a window with their scores, best first.

    A span of which the tokens share characters, as those of an emoji do, may come again with a lower score.
    """
    offsets = [where for where, owner in zip(window.offsets, window.sequence_ids, strict=True) if owner == 1]
    if not offsets:
        return
    width = min(max_tokens, len(offsets))
    start_N, end_N = logits_N2[-len(offsets) :].unbind(1)  # in front of these is [CLS]
    # Row n has the spans that begin at token n, of 1, 2, ... tokens.
    scores_NW = start_N[:, None] + F.pad(end_N, (0, width - 1), value=-torch.inf).unfold(0, width, 1)
    best = scores_NW.flatten().sort(descending=True, stable=True)
    seen: set[tuple[int, int]] = set()
    for place, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        first, more = divmod(place, width)
        if len(seen) == top_k or score == -torch.inf:
            return
        start, stop = offsets[first][0], offsets[first + more][1]
        text = context[start:stop]
        start, stop = start + len(text) - len(text.lstrip()), stop - len(text) + len(text.rstrip())
        if start < stop:
            seen.add((start, stop))
            yield start, stop, score
