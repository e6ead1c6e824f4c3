"""Words that do not read as English of the field, found in Python and Markdown files.

As a command, `python tests/test_words.py [FILE]...` prints each as `file:line: words` and fails if there is one. It
needs no package, so pre-commit runs it in any environment.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOMES = ("modernbert", "kernels", "benchmarks", "tests", "examples", "docs")
PATTERNS = (
    r"\b(whoever|whomever|nobody|somebody)\b",
    r"(?<!there )(?<!here )\bis no (?!longer\b)\w+",  # write "is not a"
    r"\bby (itself|themselves)\b",  # write "automatically" or "alone"
    r"\b(is|are|was|were|be|been) (said|told|spoken)\b",
    r"(?<!to )\bspeaks? of\b",
    r"(?<!as it )\b(stands?|stood|standing)\b(?!-| (for|in for|in the way|alone|out)\b)",  # write "is"
    r"(\b(?-i:Who)|[:;] (?-i:who)|\bfor who(?! in\b)) \w+(?![^.]*\?)",  # write "if you"
    r"\b(un)?proven\b",  # write "tested"
    r"\b(exacter|more right)\b",
    r"\b(and|or) its like\b",  # write "such as"
)
FOUND = re.compile("|".join(PATTERNS).replace(" ", r"\s"), re.IGNORECASE)
DATA = ("Nobody may print this.", "Seven short words stand in this sentence. ")
"""What the tests read and encode may use these words."""


def files() -> list[Path]:
    paths = [*ROOT.glob("*.md"), *(path for home in HOMES for path in (ROOT / home).rglob("*"))]
    return sorted(path for path in paths if path.suffix in (".py", ".md") and path != Path(__file__))


def found(text: str) -> Iterator[tuple[int, str]]:
    """Line number and words of each match. A sentence may continue in the next line of a comment."""
    for words in DATA:
        text = text.replace(words, "")
    text = re.sub(r"[ \t]*\n[ \t]*(# )?", "\n", text)
    for match in FOUND.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, " ".join(match.group().split())


def report(paths: list[Path]) -> list[str]:
    found_in = ((os.path.relpath(path), found(path.read_text(encoding="utf-8"))) for path in paths)
    return [f"{path}:{line}: {words}" for path, matches in found_in for line, words in matches]


def test_no_file_uses_these_words():
    assert report(files()) == []


def test_words_are_found_across_lines_and_good_english_is_not():
    text = """
    # What is read is no
    # checkpoint, and Nobody told it by
    # itself. There is no file; it is no longer there.
    # The index stands for a row, a stand-in. Who wrote this, and why?
    raise ValueError(f"{path} is no file")  # Not here; who looks: Who looks.
    """
    assert list(found(text)) == [
        (2, "is no checkpoint"),
        (3, "Nobody"),
        (3, "by itself"),
        (6, "is no file"),
        (6, "; who looks"),
        (6, "Who looks"),
    ]


if __name__ == "__main__":
    sys.exit("\n".join(report([Path(name) for name in sys.argv[1:]] or files())) or None)
