"""The page as text: well-formed, harmless whatever the passages hold, and right to the last number."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import sys
from math import ceil
from pathlib import Path
from typing import NamedTuple

import pytest
from strict_html import Node, parse

from modernbert.retrieval.explain import TokenMatch
from modernbert.retrieval.page import explain_page
from modernbert.retrieval.passages import Passage

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><img src=x onerror=alert(1)><!-- ${hits} $title &amp; \"quoted\" 'single' </p><style>*{}</style>"


class Hit(NamedTuple):
    """What the page reads of a hit."""

    rank: int
    score: float
    passage: Passage


def found(rank: int, passage: Passage, matches: list[TokenMatch]) -> tuple[Hit, list[TokenMatch]]:
    return Hit(rank, sum(match.contribution for match in matches), passage), matches


def passage(text: str, title: str = "", path: str = "/home/ann/docs/ice.md", line: int = 7, name: str = "") -> Passage:
    return Passage(path, name or path, title, text, 0, len(text), line)


QUERY = "how does hail form?"
CONTENT = "Rain Like other rain, hail forms in storms."
SPANS = [None, (0, 3), (3, 8), (8, 10), (10, 13), (13, 18), (18, 19), None]


def matches(*contributions: float, there: list[tuple[int, int] | None]) -> list[TokenMatch]:
    return [TokenMatch(*each) for each in zip(SPANS, there, contributions, strict=True)]


def two_hits() -> list[tuple[Hit, list[TokenMatch]]]:
    one = matches(
        0.5, 0.3, 0.25, 0.9, 0.95, 0.7, -0.0001, 0.125,
        there=[None, (5, 9), (33, 35), (21, 24), (24, 26), (26, 32), (20, 21), (26, 32)],
    )  # fmt: skip
    two = matches(0.4, 0.2, 0.1, 0.3, 0.2, 0.4, 0.05, 0.5, there=[(0, 3), None, *[(0, 3)] * 4, (4, 7), (4, 7)])
    hits = [
        found(1, passage(CONTENT.removeprefix("Rain "), "Rain", line=12), one),
        found(2, passage("Ice age", path="/home/ann/docs/more/a.jsonl", line=3, name="p3"), two),
    ]
    assert all(hit.passage.content in (CONTENT, "Ice age") for hit, _ in hits)
    return hits


def test_the_page_is_one_well_formed_document():
    page = explain_page(QUERY, two_hits())
    root = parse(page)
    assert page.startswith('<!doctype html>\n<html lang="en">')
    for tag in ("html", "head", "title", "body", "header", "h1", "main", "footer", "style", "script"):
        assert len(root.all(tag)) == 1, tag
    assert root.all("title")[0].text == "how does hail form? · modernbert"
    ids = [node.attributes["id"] for node in root.all("*") if "id" in node.attributes]
    named = [node.attributes["aria-labelledby"] for node in root.all("article")]
    assert named == ids == ["hit-1", "hit-2"]
    assert all(node.attributes["scope"] in ("row", "col") for node in root.all("th"))


def test_nothing_is_loaded_and_only_its_own_script_may_run():
    page = explain_page(HOSTILE, hostile_hits(HOSTILE))
    root = parse(page)
    (policy,) = [node.attributes["content"] for node in root.all("meta", http_equiv="Content-Security-Policy")]
    hashes = {
        tag: base64.b64encode(hashlib.sha256(root.all(tag)[0].text.encode()).digest()).decode()
        for tag in ("style", "script")
    }
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}'; "
        "base-uri 'none'; form-action 'none'"
    )
    attributes = {name for node in root.all("*") for name in node.attributes}
    assert not attributes & {"src", "href", "srcset", "action", "style"}
    assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"@import|url\(|https?:", page)


def test_a_page_that_asks_has_a_form_which_only_its_own_server_answers():
    for query, hits in ((HOSTILE, hostile_hits(HOSTILE)), ("", [])):
        root = parse(explain_page(query, hits, ask=True))
        (form,), (field,) = root.all("form"), root.all("input")
        assert form.attributes["method"] == "get"
        assert "action" not in form.attributes
        assert field.attributes["value"] == root.all("h1")[0].text
        (policy,) = [node.attributes["content"] for node in root.all("meta", http_equiv="Content-Security-Policy")]
        assert policy.endswith("; base-uri 'none'; form-action 'self'")
        assert len(root.all("article")) == len(hits)
        assert root.all("p", _class="none") == []
    assert parse(explain_page(QUERY, [])).all("form") == []
    assert len(parse(explain_page(QUERY, [], ask=True)).all("p", _class="none")) == 1


def hostile_hits(text: str) -> list[tuple[Hit, list[TokenMatch]]]:
    inside = [TokenMatch((at, at + 2), (at + 5, at + 7), 0.5) for at in range(0, len(text) - 1, 2)]
    return [found(1, passage(text, "tit<b>", path=f"/a{HOSTILE}/b", name=f"<i>{HOSTILE}"), inside)]


def test_markup_in_passages_stays_text():
    page = explain_page(HOSTILE, hostile_hits(HOSTILE))
    root = parse(page)
    assert len(root.all("script")) == len(root.all("style")) == 1
    assert not root.all("img")
    assert {frozenset(mark.attributes) for mark in root.all("mark")} == {frozenset(("class", "data-q", "title"))}
    assert root.all("h1")[0].text == HOSTILE
    assert root.all("p", _class="text")[0].text == HOSTILE
    assert root.all("h2")[0].text == "tit<b>"
    assert root.all("p", _class="place")[0].text.startswith(f"<i>{HOSTILE} in ")
    assert root.all("title")[0].text == f"{HOSTILE[:80]}… · modernbert"
    assert [b.text for b in root.all("b")] == [HOSTILE[at : at + 2].strip() for at in range(0, len(HOSTILE) - 1, 2)]

    mark_only = found(1, passage("</>"), [TokenMatch((0, 1), (0, 3), 1.0)])
    (note,) = parse(explain_page("a", [mark_only])).all("p", _class="note")
    assert note.text == "a → </> 1.000"


def test_characters_that_html_cannot_hold_are_shown():
    text = "a\x00b\x1bc\x7fd\x85e\ud800f\ufffeg\U0001fffff\r\ng\x0ch\ti"
    page = explain_page(text, hostile_hits(text))
    page.encode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", page)
    assert parse(page).all("p", _class="text")[0].text == "a␀b␛c␡d\ufffde\ufffdf\ufffdg\ufffdf \ng␌h\ti"


def test_tables_hold_every_token_and_sum_to_the_score():
    hits = two_hits()
    articles = parse(explain_page(QUERY, hits)).all("article")
    for (hit, expected), article in zip(hits, articles, strict=True):
        content = hit.passage.content
        rows = [list(row.children) for row in article.all("tbody")[0].all("tr")]
        shown = [[cell.text for cell in row] for row in rows]
        assert shown == [
            [
                QUERY[slice(*m.query)].strip() if m.query else "no text",
                content[slice(*m.document)].strip() if m.document else "no text",
                f"{m.document[0]}–{m.document[1]}" if m.document else "",
                f"{m.contribution:.3f}".replace("-0.000", "0.000"),
            ]
            for m in expected
        ]
        values = [float(row[3].all("data")[0].attributes["value"]) for row in rows]
        assert max(abs(v - m.contribution) for v, m in zip(values, expected, strict=True)) < 1e-6
        kinds = [row[3].all("data")[0].attributes.get("class") for row in rows]
        assert [kind for kind, m in zip(kinds, expected, strict=True) if m.query is None] == [None, None]
        assert None not in kinds[1:-2]
        (total,), (score,) = article.all("tfoot")[0].all("data"), article.all("p", _class="score")[0].all("data")
        assert total.text == score.text == f"{hit.score:.3f}"
        assert abs(sum(values) - float(score.attributes["value"])) < 1e-5


def test_words_are_shaded_by_what_the_text_of_the_query_gave():
    """Sums over tokens of a word, tokens such as [CLS] left out, on one scale for all hits: here up to 1.85."""
    first, second = parse(explain_page(QUERY, two_hits())).all("article")

    def shades(article: Node) -> list[tuple[str, str, str]]:
        return [(mark.text, mark.attributes["class"], mark.attributes["data-q"]) for mark in article.all("mark")]

    step = (0.9 + 0.95) / 5
    assert shades(first) == [
        ("Like", f"s{ceil(0.3 / step)}", "t1"),
        (",", "s0", "t6"),
        ("hail", "s5", "t4 t3"),
        ("forms", f"s{ceil(0.7 / step)}", "t5 other"),
        ("in", f"s{ceil(0.25 / step)}", "t2"),
    ]
    assert shades(second) == [
        ("Ice", f"s{ceil(1.0 / step)}", "other t5 t3 t4 t2"),
        ("age", f"s{ceil(0.05 / step)}", "other t6"),
    ]
    assert first.all("mark")[2].attributes["title"] == "ail 0.950, h 0.900"
    assert first.all("mark")[3].attributes["title"] == "form 0.700, no text 0.125"
    assert [first.all("h2")[0].text, first.all("p", _class="text")[0].text] == ["Rain", CONTENT[5:]]
    assert (
        first.all("p", _class="note")[0].text
        == "hail → hail 1.850, form → forms 0.700, how → Like 0.300, does → in 0.250"
    )


def test_title_and_text_are_shaded_each_on_its_own():
    """A match across the border of title and text is marked on both sides of it."""
    content = passage("𝔹 c", "a").content
    page = parse(explain_page("q", [found(1, passage("𝔹 c", "a"), [TokenMatch((0, 1), (0, 3), 1.0)])]))
    assert content == "a 𝔹 c"
    assert [mark.text for mark in page.all("h2")[0].all("mark")] == ["a"]
    assert [mark.text for mark in page.all("p", _class="text")[0].all("mark")] == ["𝔹"]


def test_the_query_is_a_line_of_buttons_over_their_means():
    line = parse(explain_page(QUERY, two_hits())).all("div", role="toolbar")[0]
    buttons = line.all("button")
    shown = [(button.all("b")[0].text, button.all("data")[0].text, button.attributes["data-q"]) for button in buttons]
    assert shown == [
        ("how", "0.25", "t1"),
        ("does", "0.17", "t2"),  # 0.175 in binary is below 0.175
        ("h", "0.60", "t3"),
        ("ail", "0.57", "t4"),
        ("form", "0.55", "t5"),
        ("?", "0.02", "t6"),
        ("2 tokens without text", "0.76", "other"),
    ]
    assert [button.attributes.get("class") for button in buttons] == [*[None] * 3, "part", None, "part", "other"]
    # Without the script they do nothing, and say so.
    assert all("disabled" in button.attributes for button in buttons)
    text = "".join(child.text if child.tag == "span" else child.all("b")[0].text for child in line.children[:-1])
    assert text == QUERY


def test_a_query_with_shared_gaps_and_cut_tokens_is_whole():
    """Bytes of an emoji share a character; what a model skips or cuts off is text all the same."""
    query = "  a 🌩, and the cut rest"
    spans = [(0, 3), (3, 5), (4, 5), (4, 5), (6, 9), (8, 10)]
    hit = found(1, passage("x"), [TokenMatch(span, (0, 1), 0.5) for span in spans])
    line = parse(explain_page(query, [hit])).all("div", role="toolbar")[0]
    shown = [child.text if child.tag == "span" else child.all("b")[0].text for child in line.children]
    assert shown == ["  ", "a", " ", "🌩", "🌩", "🌩", ", ", "an", "d", " the cut rest"]


def test_places_are_named_without_the_folders_they_share():
    names = [p.text for p in parse(explain_page(QUERY, two_hits())).all("p", _class="place")]
    assert names == ["ice.md:12", "p3 in more/a.jsonl:3"]
    (alone,) = parse(explain_page("q", [found(1, passage("x"), [])])).all("p", _class="place")
    assert alone.text == "ice.md:7"
    places = [passage("x", path="/home/ann/docs/a.md", line=1), passage("x", path="/home/bob/docs/b.md", line=None)]
    shown = parse(explain_page("q", [found(rank, each, []) for rank, each in enumerate(places, start=1)]))
    assert [p.text for p in shown.all("p", _class="place")] == ["ann/docs/a.md:1", "bob/docs/b.md"]


def test_the_bar_is_the_score_in_parts():
    hits = two_hits()
    for (hit, _), bar in zip(hits, parse(explain_page(QUERY, hits)).all("svg"), strict=True):
        widths = [float(rect.attributes["width"]) for rect in bar.all("rect")]
        ends = [float(rect.attributes["x"]) + width for rect, width in zip(bar.all("rect"), widths, strict=True)]
        assert abs(ends[-1] - 100 * hit.score / hits[0][0].score) < 0.05
        assert [rect.attributes["data-q"] for rect in bar.all("rect")][-2:] == ["other", "other"]
    negative = [TokenMatch((0, 1), (0, 1), 1.0), TokenMatch((1, 2), (0, 1), -0.5)]
    (bar,) = parse(explain_page("ab", [found(1, passage("x"), negative)])).all("svg")
    assert [rect.attributes["width"] for rect in bar.all("rect")] == ["100.00", "0.00"]


@pytest.mark.parametrize(
    "hits",
    [
        [],
        [found(1, passage("", ""), [])],
        [found(1, passage("", "only a title"), [TokenMatch((0, 1), (0, 4), 1.0)])],
        [found(1, passage("x"), [TokenMatch(None, None, 0.0)] * 32)],
        [found(1, passage("x"), [TokenMatch((0, 1), (0, 1), -0.5)])],
        [found(1, passage("x"), [TokenMatch((0, 1), None, 0.5)])],
    ],
    ids=["no hit", "no text", "no body", "nothing with text", "negative", "only found in [CLS]"],
)
def test_pages_with_little_on_them(hits):
    root = parse(explain_page("q", hits))
    assert len(root.all("article")) == len(hits)
    assert ("No passage was found." in root.text) == (not hits)
    assert root.all("h1")[0].text == "q"
    best = max((match.contribution for _, matches in hits for match in matches if match.query), default=0.0)
    assert [li.text for li in root.all("div", _class="legend")[0].all("li")][4:] == [f"{best:.2f}"] * (best > 0)
    for article in root.all("article"):
        assert article.all("h2")[0].text in ("ice.md:7", "only a title")


def test_matches_of_something_else_are_refused():
    (one, of_one), (two, of_two) = two_hits()
    with pytest.raises(ValueError, match=r"hit 1 scores 3\.725, but its matches sum to 2\.150"):
        explain_page(QUERY, [(one, of_two)])
    with pytest.raises(ValueError, match="hit 1 was explained for a longer query than 'how'"):
        explain_page("how", [(one, of_one)])
    with pytest.raises(ValueError, match="hits 1 and 2 were explained for different queries"):
        explain_page(QUERY, [(one, of_one), (two, [*of_two[::-1][:7], TokenMatch((0, 2), None, 0.4)])])
    with pytest.raises(ValueError, match="characters 5 to 9, but the text has 7"):
        explain_page(QUERY, [(one._replace(passage=two.passage), of_one)])


def test_the_same_arguments_give_the_same_page():
    """In another process too, whose hashes of strings differ."""
    names = "from modernbert.retrieval.page import explain_page; from test_explain_page import QUERY, two_hits"
    code = f"{names}; import sys; sys.stdout.buffer.write(explain_page(QUERY, two_hits()).encode())"
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests", Path(__file__).parent)))
    there = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "7"}
    page = subprocess.run([sys.executable, "-c", code], env=there, capture_output=True, check=True).stdout
    assert page.decode() == explain_page(QUERY, two_hits())


def test_ten_long_hits_fit_into_a_mail():
    """500 words and 32 query tokens each: the page is at most thrice the text and its tables."""
    text = " ".join(f"word{i % 97}" for i in range(500))
    explained = [TokenMatch((i, i + 1), (i * 60, i * 60 + 4), 0.5) for i in range(32)]
    page = explain_page("q" * 32, [found(rank, passage(text, "Title"), explained) for rank in range(1, 11)])
    assert len(page.encode()) < 200_000
