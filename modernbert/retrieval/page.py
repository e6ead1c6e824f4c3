"""An HTML page that explains hits: a heat map of their words, and a table with every contribution.

The page loads nothing. Its content security policy allows only its own style and script (`assets/explain.html`). The
script only adds the selection of query tokens; the heat map and the tables work without it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from .explain import Place, TokenMatch, brief, level, places, strongest_words

if TYPE_CHECKING:
    from .passages import Passage
    from .store.search import Hit

TEMPLATE = Path(__file__).parents[1] / "assets" / "explain.html"
LEVELS = 5  # of shading; the template has a colour for each
NONE = '<p class="none">No passage was found.</p>'
FORM = (
    '<form role="search" method="get"><input type="search" name="q" value="{}" aria-label="Question" maxlength="2000" '
    'required dir="auto"><button>Search</button></form>'
)


def explain_page(query: str, hits: Sequence[tuple[Hit, list[TokenMatch]]], *, ask: bool = False) -> str:
    """The page for a query and its hits, in the order given, each with its matches (`explain`, `Store.explain`).

    Deterministic. Raises ValueError if matches belong to another query or another hit.

    Args:
        ask: with a form for the next query, for a server that answers with this page; only the form for the query "".
    """
    _check(query, hits)
    found = [places(hit.passage.content, matches) for hit, matches in hits]
    words = [place.contribution for row in found for place in row]
    strongest = max([0.0, *words, *(match.contribution for _, matches in hits for match in matches if match.query)])
    best = max((sum(max(0.0, match.contribution) for match in matches) for _, matches in hits), default=0.0)
    names = _names([hit.passage for hit, _ in hits])
    articles = [
        _article(query, hit, matches, row, name, strongest, best)
        for (hit, matches), row, name in zip(hits, found, names, strict=True)
    ]
    template = TEMPLATE.read_text(encoding="utf-8")
    return Template(template).substitute(
        policy=_policy(template, "'self'" if ask else "'none'"),
        title=_text(f"{query[:80]}{'…' * (len(query) > 80)} · modernbert"),
        query=_text(query),
        form=FORM.format(_text(query)) if ask else "",
        tokens=_query_line(query, [matches for _, matches in hits], strongest),
        legend=_legend(strongest, len(hits)),
        hits=f'<ol class="hits">{"".join(articles)}</ol>' if hits else NONE if query or not ask else "",
    )


def _check(query: str, hits: Sequence[tuple[Hit, list[TokenMatch]]]) -> None:
    for hit, matches in hits:
        total = sum(match.contribution for match in matches)
        if abs(hit.score - total) > 0.01 + 0.001 * len(matches):  # room for scores from half-precision vectors
            raise ValueError(
                f"hit {hit.rank} scores {hit.score:.3f}, but its matches sum to {total:.3f}: they belong to another hit"
            )
        if any(match.query and match.query[1] > len(query) for match in matches):
            raise ValueError(f"hit {hit.rank} was explained for a longer query than {query[:80]!r}")
        if [match.query for match in matches] != [match.query for match in hits[0][1]]:
            raise ValueError(f"hits {hits[0][0].rank} and {hit.rank} were explained for different queries")


def _policy(template: str, form: str) -> str:
    """Allow the template's style and script, by their hashes, and nothing else but forms to `form`."""
    allowed = [
        f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"
        for tag, inner in re.findall(r"<(style|script)>(.*?)</\1>", template, re.DOTALL)
    ]
    return "; ".join(["default-src 'none'", *allowed, "base-uri 'none'", f"form-action {form}"])


def _query_line(query: str, explained: Sequence[Sequence[TokenMatch]], strongest: float) -> str:
    """The query with its tokens as buttons over their mean contribution. They are disabled until the script runs."""
    pieces, at, others = [], 0, []
    for number, column in enumerate(zip(*explained, strict=True)):
        span, mean = column[0].query, sum(match.contribution for match in column) / len(column)
        if span is None:
            others.append(mean)
            continue
        # Tokens that share a character, such as the bytes of an emoji, all show it.
        token = query[max(at, span[0]) : span[1]] or query[span[0] : span[1]]
        gap = query[at : span[0]] + token[: len(token) - len(token.lstrip())]
        if gap:
            pieces.append(f"<span>{_text(gap)}</span>")
        part = ' class="part"' if at and not gap else ""  # of the same word as the token before
        strength = level(mean, strongest, LEVELS)
        pieces.append(_button(f"t{number}", part, f'<b class="s{strength}">{_text(_visible(token))}</b>', mean))
        at = max(at, span[1])
    if query[at:]:
        pieces.append(f"<span>{_text(query[at:])}</span>")
    if others:
        name = f"<b>{len(others)} token{'s' * (len(others) > 1)} without text</b>"
        pieces.append(_button("other", ' class="other" lang="en" dir="ltr"', name, sum(others)))
    size = "line long" if len(query) > 80 else "line"
    return f'<div class="{size}" role="toolbar" aria-label="Tokens" lang="" dir="auto">{"".join(pieces)}</div>'


def _button(key: str, attributes: str, name: str, mean: float) -> str:
    return f'<button type="button" data-q="{key}"{attributes} disabled>{name} {_data(mean, 2)}</button>'


def _legend(strongest: float, count: int) -> str:
    if not strongest:
        return ""
    steps = [f'<li class="s{i}">{_number(strongest * i / LEVELS, 2)}</li>' for i in range(1, LEVELS + 1)]
    mean = f"<span>Under a token: its mean over {count} hits</span>" if count > 1 else ""
    return f"<span>Contribution to the score, up to</span><ol>{''.join(steps)}</ol>{mean}"


def _article(
    query: str, hit: Hit, matches: list[TokenMatch], found: list[Place], name: str, strongest: float, best: float
) -> str:
    passage = hit.passage
    content, begin = passage.content, len(passage.content) - len(passage.text)
    keys = ["other" if match.query is None else f"t{number}" for number, match in enumerate(matches)]

    def marked(first: int, last: int) -> str:
        pieces, at = [], first
        for place in found:
            start, end = max(place.start, first), min(place.end, last)
            if start >= end:
                continue
            given = [f"{_token(query, matches[i].query)} {_number(matches[i].contribution)}" for i in place.matches]
            attributes = (
                f'class="s{level(place.contribution, strongest, LEVELS)}" '
                f'data-q="{" ".join(dict.fromkeys(keys[i] for i in place.matches))}" title="{_text(", ".join(given))}"'
            )
            pieces.append(f"{_text(content[at:start])}<mark {attributes}>{_text(content[start:end])}</mark>")
            at = end
        return "".join([*pieces, _text(content[at:last])])

    words = strongest_words(matches, query, content, limit=4)
    note = ", ".join(
        f"<span><bdi>{_text(word.query)}</bdi> → <bdi>{_text(word.document or 'the passage')}</bdi> "
        f"{_number(word.contribution)}</span>"
        for word in words
    )
    heading = marked(0, len(passage.title)) if passage.title else _text(name)
    return (
        f'<li><article aria-labelledby="hit-{hit.rank}"><p class="score"><span class="rank">Hit {hit.rank}</span> '
        f'{_data(hit.score)}</p><h2 id="hit-{hit.rank}" lang="" dir="auto">{heading}</h2>'
        f'<div class="body"><p class="place"><bdi>{_text(name)}</bdi></p>{_bar(matches, keys, best)}'
        f'<p class="note">{note}</p><p class="text" lang="" dir="auto">{marked(begin, len(content))}</p>'
        f"{_table(query, content, matches, keys, strongest)}</div></article></li>"
    )


def _bar(matches: Sequence[TokenMatch], keys: Sequence[str], best: float) -> str:
    """The positive contributions side by side, on a scale that ends at `best`."""
    pieces, at = [], 0.0
    for match, key in sorted(zip(matches, keys, strict=True), key=lambda pair: pair[1] == "other"):
        width = max(0.0, 100 * match.contribution / best) if best > 0 else 0.0
        kind = ' class="other"' if key == "other" else ""
        pieces.append(f'<rect{kind} data-q="{key}" x="{at:.2f}" width="{width:.2f}" height="1"/>')
        at += width
    return f'<svg class="sum" viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">{"".join(pieces)}</svg>'


def _table(query: str, content: str, matches: Sequence[TokenMatch], keys: Sequence[str], strongest: float) -> str:
    rows = []
    for match, key in zip(matches, keys, strict=True):
        token = f"<bdi>{_text(_token(query, match.query))}</bdi>"
        there = f"<bdi>{_text(_token(content, match.document))}</bdi>"
        span = f"{match.document[0]}–{match.document[1]}" if match.document else ""
        strength = level(match.contribution, strongest, LEVELS) if match.query else 0
        rows.append(
            f'<tr data-q="{key}"><th scope="row">{token if match.query else f"<i>{token}</i>"}</th>'
            f"<td>{there if match.document else f'<i>{there}</i>'}</td><td>{span}</td>"
            f'<td class="number">{_data(match.contribution, 3, strength)}</td></tr>'
        )
    total = sum(match.contribution for match in matches)
    return (
        f"<details><summary>All {len(matches)} tokens of the query</summary><table>"
        '<caption class="hidden">Tokens of the query, what they found in the passage, at which characters of its title '
        'and text, and what that gave to the score</caption><thead><tr><th scope="col">query</th>'
        '<th scope="col">passage</th><th scope="col">place</th>'
        f'<th scope="col" class="number">contribution</th></tr></thead><tbody>{"".join(rows)}</tbody>'
        f'<tfoot><tr><th scope="row" colspan="3">sum = score</th><td class="number">{_data(total)}</td></tr></tfoot>'
        "</table></details>"
    )


def _names(passages: Sequence[Passage]) -> list[str]:
    """The location of each passage, such as `id in path:line`, without the folders that all share."""
    paths = [Path(passage.path) for passage in passages]
    folders = zip(*(path.parent.parts for path in paths), strict=False)
    shared = len(list(takewhile(lambda parts: len(set(parts)) == 1, folders)))
    names = []
    for passage, path in zip(passages, paths, strict=True):
        location = f"{Path(*path.parts[shared:])}{passage.place}"
        names.append(location if passage.id == passage.path else f"{passage.id} in {location}")
    return names


def _token(text: str, span: tuple[int, int] | None) -> str:
    return "no text" if span is None else _visible(text[span[0] : span[1]])


def _visible(token: str) -> str:
    return brief(token.strip()) or "␣"


def _data(value: float, digits: int = 3, strength: int = 0) -> str:
    kind = f' class="s{strength}"' if strength else ""
    return f'<data{kind} value="{value:.6f}">{_number(value, digits)}</data>'


def _number(value: float, digits: int = 3) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.000"


# HTML does not allow control characters, halves of surrogate pairs and noncharacters: visible characters replace them.
_VISIBLE = {
    **{code: 0x2400 + code for code in range(0x20)},
    **{code: code for code in b"\t\n"},
    ord("\r"): " ",
    0x7F: "␡",
    **dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000), *range(0xFDD0, 0xFDF0)], "\ufffd"),
    **{plane + end: "\ufffd" for plane in range(0, 0x110000, 0x10000) for end in (0xFFFE, 0xFFFF)},
}


def _text(text: str) -> str:
    """Text, escaped for an element or a quoted attribute."""
    return html.escape(text.translate(_VISIBLE))
