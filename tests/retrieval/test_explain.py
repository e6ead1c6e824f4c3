"""Matched words in a text: where they are, how a terminal shows them, which part of the text holds most of them."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from rich.console import Console

from modernbert.retrieval.explain import Place, TokenMatch, excerpt, highlight, level, places


def match(document: tuple[int, int] | None, contribution: float, query: tuple[int, int] | None = (0, 1)) -> TokenMatch:
    return TokenMatch(query, document, contribution)


def test_places_are_whole_words_with_contributions_added():
    """Tokens of a word, whatever blanks they come with, are the word; matches of [CLS] are listed, but not added."""
    content = "  Hail forms,\tin storms (GR)."
    matches = [
        match((6, 9), 0.25),  # " fo" of forms
        match((2, 4), 0.5),
        match((1, 6), 1.0),  # blank and all of Hail
        match((0, 4), 2.0, query=None),
        match(None, 4.0),
        match((14, 17), 0.125, query=None),
        match((23, 25), -0.5),  # " (" is not a word
    ]
    assert places(content, matches) == [
        Place(2, 6, (3, 2, 1), 1.5),
        Place(7, 12, (0,), 0.25),
        Place(14, 16, (5,), 0),
        Place(24, 25, (6,), -0.5),
    ]
    assert content[24:25] == "("


def test_places_of_scripts_without_spaces_are_what_the_token_covers():
    """A character is a word there; a token of two characters is both, and two that share one become one place."""
    content = "猫は夜に狩りをする。"
    assert places(content, [match((4, 6), 0.5), match((0, 1), 1.0)]) == [Place(0, 1, (1,), 1.0), Place(4, 6, (0,), 0.5)]
    assert places(content, [match((5, 7), 0.25), match((4, 6), 0.5)]) == [Place(4, 7, (1, 0), 0.75)]
    assert places(content, [match((4, 7), 0.5), match((5, 6), 0.25)]) == [Place(4, 7, (0, 1), 0.75)]
    assert places(content, [match((4, 5), 0.5), match((5, 6), 0.25)]) == [
        Place(4, 5, (0,), 0.5),
        Place(5, 6, (1,), 0.25),
    ]
    assert places(content, [match((9, 10), 1.0)]) == [Place(9, 10, (0,), 1.0)]


def test_bytes_of_an_emoji_are_one_place():
    content = "storm 🌩️!"
    assert places(content, [match((6, 7), 0.5), match((6, 7), 0.25), match((5, 7), 1.0)]) == [
        Place(6, 7, (2, 0, 1), 1.75)
    ]


def test_blank_tokens_and_empty_texts():
    assert places("", []) == []
    assert places("a  b", [match((1, 3), 1.0)]) == [Place(1, 3, (0,), 1.0)]


@pytest.mark.parametrize("span", [(0, 6), (5, 6), (3, 3), (4, 2), (-1, 2)])
def test_a_span_of_another_text_is_refused(span):
    with pytest.raises(ValueError, match=rf"characters {span[0]} to {span[1]}, but the text has 5"):
        places("storm", [match(span, 1.0)])


@pytest.mark.parametrize("seed", range(20))
def test_places_against_characters(seed):
    """Character by character: every character of a match is in one place, and no contribution is lost or doubled."""
    content, matches = random_text(seed)
    found = places(content, matches)
    cover = [number for number, place in enumerate(found) for _ in range(place.start, place.end)]
    assert all(a.end <= b.start for a, b in pairwise(found))
    assert len(cover) == sum(place.end - place.start for place in found)
    assert sorted(number for place in found for number in place.matches) == [
        number for number, each in enumerate(matches) if each.document
    ]
    for place in found:
        of_text = [matches[number].contribution for number in place.matches if matches[number].query]
        assert abs(place.contribution - sum(of_text)) < 1e-9
        for number in place.matches:
            start, end = matches[number].document
            inside = [at for at in range(start, end) if not content[at].isspace()]
            assert all(place.start <= at < place.end for at in inside)
        # Words end where letters and digits do.
        for at in (place.start, place.end):
            assert not content[max(0, at - 1) : at + 1].isalnum() or at in (0, len(content)) or content[at] > "\u3000"


def test_levels_are_equal_steps():
    values = (-1.0, 0.0, 1e-9, 0.5, 0.51, 1.0, 1.5, 1.51, 2.0)
    assert [level(value, 2.0, 4) for value in values] == [0, 0, 1, 1, 2, 2, 3, 4, 4]
    assert level(2.1, 2.0, 4) == 4


def test_highlight_shows_strength_without_colour():
    """In a terminal that knows no colour: underlined, bold and underlined, bold and reversed."""
    content = "one two three four"
    matches = [match((0, 3), 0.1), match((4, 7), 1.2), match((8, 13), 1.5), match((8, 13), 0.5), match((14, 18), -1.0)]
    console = Console(force_terminal=True, color_system="standard", no_color=True, width=80)
    with console.capture() as captured:
        console.print(highlight(content, matches))
    assert captured.get() == "\x1b[4mone\x1b[0m \x1b[1;4mtwo\x1b[0m \x1b[1;7mthree\x1b[0m four\n"
    console = Console(force_terminal=True, color_system="standard", width=80)
    with console.capture() as captured:
        console.print(highlight(content, matches))
    assert captured.get() == "\x1b[4;32mone\x1b[0m \x1b[1;4;32mtwo\x1b[0m \x1b[1;7;32mthree\x1b[0m four\n"


def test_highlight_into_a_pipe_is_plain():
    console = Console(force_terminal=False, width=80)
    with console.capture() as captured:
        console.print(highlight("hail forms", [match((0, 4), 1.0)]))
    assert captured.get() == "hail forms\n"


def test_highlight_keeps_every_position_and_drives_no_terminal():
    """Control characters and line breaks of all kinds become blanks, one for one."""
    content = "a\x1b[31mb\x00\r\n\tc\x07\x08\x0b\x0c\x85\u2028d\x9b2Je"
    shown = highlight(content, [match((content.index("d"), content.index("d") + 1), 1.0)])
    assert shown.plain == "a [31mb    c      d 2Je"
    assert len(shown) == len(content)
    assert [shown.plain[span.start : span.end] for span in shown.spans] == ["d"]
    assert highlight("", []).plain == ""
    assert highlight("hail", [match(None, 1.0), match((0, 4), 1.0, query=None)]).spans == []


def test_excerpt_is_the_middle_of_what_matched():
    content = " ".join(f"w{i}" for i in range(200)) + "."
    there = content.index("w100"), content.index("w100") + 4
    start, end = excerpt(content, [match(there, 1.0), match((0, 2), 0.5)], words=21)
    assert content[start:end].split() == [f"w{i}" for i in range(90, 111)]
    start, end = excerpt(content, [match(there, 0.25), match((0, 2), 0.5)], words=21)
    assert content[start:end].split() == [f"w{i}" for i in range(21)]
    last = len(content) - 5, len(content) - 1
    assert excerpt(content, [match(last, 1.0)], words=3) == (content.index("w197"), len(content))


def test_excerpt_of_a_text_that_fits_or_does_not_match():
    assert excerpt("", []) == (0, 0)
    assert excerpt("  (hail) ", [match((3, 7), 1.0)]) == (0, 9)
    assert excerpt("a b c d!", [], words=4) == (0, 8)
    assert excerpt("(a) b c d!", [], words=3) == (0, 7)
    assert excerpt("a b c d!", [match((6, 7), -1.0), match((4, 5), 1.0, query=None)], words=2) == (0, 3)
    assert excerpt("猫は夜に狩りをする。", [match((4, 6), 1.0)], words=3) == (3, 6)
    assert excerpt("a b ?!", [match((4, 6), 1.0)], words=1) == (2, 6)
    assert excerpt("a b c d !", [match((2, 3), 1.0), match((8, 9), 1.0)], words=3) == (2, 9)
    with pytest.raises(ValueError, match="words is 0"):
        excerpt("a b", [], words=0)


@pytest.mark.parametrize("seed", range(40))
def test_no_window_holds_more_than_the_excerpt(seed):
    """Against all windows of as many words, added up one by one."""
    content, matches = random_text(seed)
    found = [place for place in places(content, matches) if place.contribution > 0]
    words = [(at, at + len(word)) for word, at in zip(content.split(" "), starts(content), strict=True)]
    for size in (1, 3, 10):
        windows = [(words[i][0], words[i + size - 1][1]) for i in range(len(words) - size + 1)]
        held = [sum(p.contribution for p in found if a <= p.start and p.end <= b) for a, b in windows]
        start, end = excerpt(content, matches, words=size)
        inside = sum(place.contribution for place in found if start <= place.start and place.end <= end)
        assert abs(inside - max(held)) < 1e-9
        assert len(content[start:end].split()) == size


def starts(content: str) -> list[int]:
    return [0, *(at + 1 for at, char in enumerate(content) if char == " ")]


def random_text(seed: int) -> tuple[str, list[TokenMatch]]:
    """40 words with matches on parts of them, some by tokens without text, some against the query."""
    draw = random.Random(seed)
    content = " ".join("".join(draw.choices("abcdé9", k=draw.randint(1, 6))) for _ in range(40))
    matches = []
    for number in range(draw.randint(0, 12)):
        start = draw.randrange(len(content) - 1)
        end = start + 1 if content[start] != " " else start + 2
        query = None if draw.random() < 0.2 else (number, number + 1)
        matches.append(TokenMatch(query, (start, end), draw.uniform(-0.2, 1.0)))
    return content, matches
