"""Pairs with queries of more styles, and a validation set of held-out pairs.

python examples/query_styles.py PAIRS OUTPUT

PAIRS is a folder of rows of query, positive, source and group. OUTPUT/pairs has at most 25,000 rows of each source, so
that none outweighs the others, and new ones:

- searches: for a function, the main words of its docstring as people type them into a search engine; half of the
  functions have their docstring, as in real code;
- keywords: for a passage, two to five of its rarest words;
- sentences: for a passage, one of its sentences, which is taken out of it.

OUTPUT/validation is a BEIR folder: 100 queries of each source, whose groups are left out of OUTPUT/pairs, and 6,000
other passages.
"""

import ast
import json
import math
import random
import re
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from bm25s.stopwords import STOPWORDS_EN_PLUS

from modernbert.train.data import first_per_source
from modernbert.train.examples import Pair, read_pairs

LEFT_OUT = ("nl2bash",)  # GPL-3.0
CODE = ("pydoc", "tldr-example", "tldr-page")
KEYWORDS = SENTENCES = 40_000
MOST, HELD_OUT, OTHERS = 25_000, 100, 6_000

SHAPES = [
    "python {}",
    "{} python",
    "{} in python",
    "how to {} in python",
    "python how to {}",
    "python code to {}",
    "{}",
]
WORD = re.compile(r"[a-z][a-z0-9]+")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def search(pair: Pair, rng: random.Random) -> Pair | None:
    """A query of three to eight words for a function."""
    words = WORD.findall(re.split(r"[.\n;:(]", pair.query.lower())[0])
    if words and words[0].endswith("s") and not words[0].endswith("ss"):
        words[0] = words[0][:-1]  # "returns the ..." is asked for as "return ..."
    kept = [words[0]] if words else []
    kept += [word for word in words[1:] if word not in STOPWORDS_EN_PLUS or rng.random() < 0.3]
    if len(kept) < 3:
        return None
    query = rng.choice(SHAPES).format(" ".join(kept[: rng.randint(3, 8)]))
    function = documented(pair.positive, pair.query) if rng.random() < 0.5 else pair.positive
    return pair._replace(query=query, positive=function, source="searches")


def documented(function: str, docstring: str) -> str:
    """A function with its docstring, where it can be parsed."""
    lines = textwrap.dedent(function).splitlines()
    try:
        first = ast.parse("\n".join(lines)).body[0].body[0]
    except (SyntaxError, AttributeError, IndexError):
        return function
    indent = lines[first.lineno - 1][: first.col_offset]
    if indent.strip():  # on the line of its `def`
        return function
    lines.insert(first.lineno - 1, f'{indent}"""{docstring}"""')
    return "\n".join(lines)


def keywords(pair: Pair, rng: random.Random, rarity: dict[str, float]) -> Pair | None:
    """A query of the words that are rarest in the corpus and most frequent in the passage."""
    counts = Counter(
        word for word in WORD.findall(pair.positive.lower()) if word not in STOPWORDS_EN_PLUS and len(word) > 2
    )
    best = sorted(counts, key=lambda word: -rarity.get(word, 0.0) * (1 + math.log(counts[word])))[:8]
    if len(best) < 5:
        return None
    return pair._replace(query=" ".join(rng.sample(best, rng.randint(2, 5))), source="keywords")


def sentence(pair: Pair, rng: random.Random) -> Pair | None:
    """A sentence as the query, and the passage without it."""
    found = SENTENCE.split(pair.positive)
    places = [place for place, text in enumerate(found) if 6 <= len(text.split()) <= 30]
    if len(found) < 3 or not places:
        return None
    place = rng.choice(places)
    rest = " ".join(found[:place] + found[place + 1 :])
    return pair._replace(query=found[place].rstrip("."), positive=rest, source="sentences")


def new_pairs(pairs: list[Pair], rng: random.Random) -> Iterator[Pair]:
    """The queries of more styles, for passages of each source alike."""
    yield from filter(None, (search(pair, rng) for pair in pairs if pair.source == "pydoc"))
    passages = list({pair.positive: pair for pair in pairs if pair.source not in CODE}.values())
    seen = Counter(word for pair in passages for word in set(WORD.findall(pair.positive.lower())))
    rarity = {word: math.log(len(passages) / count) for word, count in seen.items() if count > 1}
    for made, count in (
        (lambda pair: keywords(pair, rng, rarity), KEYWORDS),
        (lambda pair: sentence(pair, rng), SENTENCES),
    ):
        by_source = defaultdict(list)
        for pair in passages:
            by_source[pair.source].append(pair)
        weights = {source: len(found) ** 0.5 for source, found in by_source.items()}
        for source, found in by_source.items():
            wanted = min(len(found), round(count * weights[source] / sum(weights.values())))
            yield from filter(None, map(made, rng.sample(found, wanted)))


def main(source: str, output: str) -> None:
    rng, folder = random.Random(17), Path(output)
    pairs = list(read_pairs(source, exclude_sources=LEFT_OUT, skip_empty=True))
    rng.shuffle(pairs)
    counts, held = Counter(), []
    for pair in pairs:
        if counts[pair.source] < HELD_OUT:
            counts[pair.source] += 1
            held.append(pair)
    groups, texts = {pair.group for pair in held}, {pair.positive for pair in held}
    pairs = [pair for pair in pairs if pair.group not in groups and pair.positive not in texts]
    kept = first_per_source(pairs, MOST)
    write_rows(folder / "pairs" / "pairs.jsonl", (row(pair) for pair in [*kept, *new_pairs(pairs, rng)]))

    passages = list(dict.fromkeys([pair.positive for pair in held + rng.sample(pairs, min(OTHERS, len(pairs)))]))
    numbers = {text: f"d{number}" for number, text in enumerate(passages)}
    validation = folder / "validation"
    write_rows(validation / "corpus.jsonl", ({"_id": numbers[text], "title": "", "text": text} for text in passages))
    write_rows(
        validation / "queries.jsonl", ({"_id": f"{pair.source}-{n}", "text": pair.query} for n, pair in enumerate(held))
    )
    lines = [f"{pair.source}-{n}\t{numbers[pair.positive]}\t1" for n, pair in enumerate(held)]
    (validation / "qrels").mkdir(exist_ok=True)
    (validation / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines, ""]))


def row(pair: Pair) -> dict[str, object]:
    return {"query": pair.query, "positive": pair.positive, "source": pair.source, "group": pair.group}


def write_rows(path: Path, rows: Iterator[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
