"""Labels of words and characters to tokens and back, with the real tokenizer and windows of long texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from modernbert import Encoder, TokenClassifier, Tokenizer, pack
from modernbert.config import EncoderConfig
from modernbert.heads.token_labels import (
    IGNORED,
    Entity,
    entities,
    labels_of_spans,
    labels_of_words,
    rows_of_words,
    scores_of_words,
)

WORDS = ["Angela", "Merkel", "besuchte", "Nordrhein-Westfalen", ",", "2013", "\N{GRINNING FACE}!"]
LABELS = [1, 2, 0, 3, 0, 0, 0]
IDS = {"O": 0, "B-person": 1, "I-person": 2, "B-place": 3, "I-place": 4}


@pytest.fixture(scope="module")
def tokenizer(modernbert_tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(modernbert_tokenizer_file.parent)


def test_a_word_has_its_label_at_its_first_token(tokenizer: Tokenizer) -> None:
    (window,) = tokenizer.encode_windows(WORDS, is_split_into_words=True)
    rows = rows_of_words(window)
    assert list(rows) == list(range(len(WORDS)))
    assert len(rows[3]) > 2, "the word is one token, and the test says nothing"
    found = labels_of_words(window, LABELS)
    assert [found[rows[word][0]] for word in rows] == LABELS
    assert sum(label != IGNORED for label in found) == len(WORDS)
    every = labels_of_words(window, LABELS, every_token=True)
    assert [every[row] for row in rows[3]] == [3] * len(rows[3])
    assert (every[0], every[-1]) == (IGNORED, IGNORED)
    with pytest.raises(ValueError, match="text 0: word 6 has no label, because there are 6"):
        labels_of_words(window, LABELS[:-1])


@pytest.mark.parametrize("stride", [0, 3])
@pytest.mark.parametrize("max_length", [8, 13])
def test_windows_lose_no_word_and_count_none_twice(tokenizer: Tokenizer, stride: int, max_length: int) -> None:
    """What a whole text gives, its windows give, although words are cut."""
    words = WORDS[:-1] * 10
    (whole,) = tokenizer.encode_windows(words, is_split_into_words=True)
    windows = tokenizer.encode_windows(words, is_split_into_words=True, max_length=max_length, stride=stride)
    assert len(windows) > 5
    assert any(window.offsets[1][0] > 0 for window in windows), "no word is cut, and the test says nothing"
    labels = list(range(len(words)))
    seen = [label for window in windows for label in labels_of_words(window, labels) if label != IGNORED]
    assert sorted(set(seen)) == labels
    if not stride:
        assert seen == labels
    first = {word: rows[0] for word, rows in rows_of_words(whole).items()}
    scores = torch.randn(len(whole.ids), 5)
    place = {id(window): 0 for window in windows}
    start, parts = 1, []
    for window in windows:  # the scores of a window are those of its tokens in the whole text
        own = len(window.ids) - 2
        place[id(window)] = start
        parts.append(torch.cat([scores[:1], scores[start : start + own], scores[-1:]]))
        start += own - stride
    got = scores_of_words(windows, parts)
    assert torch.equal(got, scores[[first[word] for word in range(len(words))]])


def test_scores_of_words_from_several_tokens(tokenizer: Tokenizer) -> None:
    (window,) = tokenizer.encode_windows(WORDS, is_split_into_words=True)
    scores, rows = torch.randn(len(window.ids), 3), rows_of_words(window)
    for how, wanted in (("mean", scores[rows[3]].mean(0)), ("max", scores[rows[3]].amax(0))):
        got = scores_of_words([window], [scores], how=how)
        assert got.shape == (len(WORDS), 3)
        torch.testing.assert_close(got[3], wanted)
    assert scores_of_words([], []).shape == (0, 0)
    with pytest.raises(ValueError, match="how is 'last', but must be one of first, mean, max"):
        scores_of_words([window], [scores], how="last")
    with pytest.raises(ValueError, match=r"window 0 has .* tokens, but scores of 2"):
        scores_of_words([window], [scores[:2]])
    (window,) = tokenizer.encode_windows(["a", "", "b"], is_split_into_words=True)
    with pytest.raises(ValueError, match="word 1 has no token"):
        scores_of_words([window], [scores[: len(window.ids)]])


def test_of_several_windows_the_one_with_most_of_a_word_counts(tokenizer: Tokenizer) -> None:
    """A word that the first window cuts off is whole in the second."""
    words = ["a", "Nordrhein-Westfalen"]
    windows = tokenizer.encode_windows(words, is_split_into_words=True, max_length=6, stride=3)
    parts = [torch.full((len(window.ids), 1), float(index)) for index, window in enumerate(windows)]
    counts = [len(rows_of_words(window).get(1, [])) for window in windows]
    assert scores_of_words(windows, parts)[1] == counts.index(max(counts))


TEXT = "Angela Merkel besuchte Nordrhein-Westfalen, 2013 \N{GRINNING FACE}!"
SPANS = [(23, 42, "place"), (0, 13, "person")]


def test_labels_of_characters(tokenizer: Tokenizer) -> None:
    assert [TEXT[start:stop] for start, stop, _ in SPANS] == ["Nordrhein-Westfalen", "Angela Merkel"]
    (window,) = tokenizer.encode_windows(TEXT)
    found = labels_of_spans(window, SPANS, IDS)
    assert (found[0], found[-1]) == (IGNORED, IGNORED)
    assert found.count(1) == found.count(3) == 1
    for label, (start, stop) in zip(found[1:-1], window.offsets[1:-1], strict=True):
        inside = {1: SPANS[1], 2: SPANS[1], 3: SPANS[0], 4: SPANS[0]}.get(label)
        text = TEXT[start:stop].strip()
        assert (inside is not None) == any(text in TEXT[s[0] : s[1]] and s[0] < stop and start < s[1] for s in SPANS)
    plain = labels_of_spans(window, SPANS, {"O": 0, "person": 5, "place": 6})
    assert [label for label in plain if label > 0] == [5] * (found.count(1) + found.count(2)) + [6] * (
        found.count(3) + found.count(4)
    )


def test_a_span_that_two_windows_share_begins_once(tokenizer: Tokenizer) -> None:
    windows = tokenizer.encode_windows(TEXT, max_length=6)
    labels = [label for window in windows for label in labels_of_spans(window, SPANS, IDS) if label != IGNORED]
    (whole,) = tokenizer.encode_windows(TEXT)
    assert labels == [label for label in labels_of_spans(whole, SPANS, IDS) if label != IGNORED]


def test_a_character_of_several_tokens_begins_a_span_once(tokenizer: Tokenizer) -> None:
    (window,) = tokenizer.encode_windows("\N{GOTHIC LETTER AHSA}")
    found = labels_of_spans(window, [(0, 1, "person")], IDS)
    assert len(found) > 3
    assert found[1:-1] == [1] + [2] * (len(found) - 3)


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([(3, 3, "place")], "3 to 3 is empty"),
        ([(0, 5, "place"), (4, 6, "person")], "4 to 6 is empty or over another"),
        ([(0, 5, "time")], "'time' is not among the labels"),
    ],
)
def test_wrong_spans_are_named(tokenizer: Tokenizer, spans: list[tuple[int, int, str]], words: str) -> None:
    (window,) = tokenizer.encode_windows(TEXT)
    with pytest.raises(ValueError, match=words):
        labels_of_spans(window, spans, IDS)
    with pytest.raises(ValueError, match="ids has no 'O'"):
        labels_of_spans(window, [], {"person": 0})


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ("", []),
        ("O O", []),
        ("B-a I-a O B-b", [(0, 2, "a"), (3, 4, "b")]),
        ("B-a B-a", [(0, 1, "a"), (1, 2, "a")]),
        ("I-a I-a O I-a", [(0, 2, "a"), (3, 4, "a")]),
        ("B-a I-b I-b", [(0, 1, "a"), (1, 3, "b")]),
        ("B-a I-a E-a S-b", [(0, 3, "a"), (3, 4, "b")]),
        ("a a O b", [(0, 2, "a"), (3, 4, "b")]),
        ("B-group-name I-group-name", [(0, 2, "group-name")]),
    ],
)
def test_entities(labels: str, wanted: list[tuple[int, int, str]]) -> None:
    assert entities(labels.split()) == [Entity(*each) for each in wanted]


def test_a_classifier_learns_words(tokenizer: Tokenizer) -> None:
    """From words to labels of tokens, a few steps, and from scores of tokens to entities."""
    config = EncoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = TokenClassifier(Encoder(config), labels=list(IDS))
    windows = tokenizer.encode_windows([WORDS], is_split_into_words=True)
    labels = torch.tensor([label for window in windows for label in labels_of_words(window, LABELS)])
    batch, rows = pack([window.ids for window in windows]), (labels >= 0).nonzero().squeeze(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        loss = model(batch, rows=rows, labels=labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = scores_of_words(windows, model.eval()(batch).split(batch.lengths))
    names = [model.labels[label] for label in scores.argmax(1).tolist()]
    assert entities(names) == [Entity(0, 2, "person"), Entity(3, 4, "place")]
