"""Files of one shape repeated: what once took far more time or memory than plain text of the same size."""

from __future__ import annotations

import gzip
import json

SENTENCE = "The keeper of the old lighthouse climbed the tower every evening and lit the big lamp for the ships. "

REPEATED = {
    "txt": [
        "=",
        "a",
        "qzxj",
        " ",
        "\n",
        "x\n\n",
        "a\r\n",
        "\ufffd",
        "\u200b",
        "\u00ad",
        "ﬁ",
        "ab-\n",
        "e\u0301",
        "א\u200f",
        "🦉",
        "猫",
        "!?",
        "7",
        ".",
    ],
    "md": [
        "=",
        "#",
        "# a # # #",
        "# a # # #\n",
        "# a\n",
        "## s\n\nx\n\n",
        "a\n===\n",
        "[",
        "```",
        "```\n",
        "|",
        "---\n",
        "> ",
        "- a\n",
        "---\na: b\n",
    ],
    "rst": ["=", "a\n===\n", "===\na\n===\n", "~"],
    "html": [
        "<",
        "&",
        "<a",
        "<div>",
        "<b>",
        "<p>x",
        "<h1>x",
        "<table><tr><td>x",
        "<ol><li>x",
        "<a>x",
        "<pre>`x",
        "<!--",
        "<![CDATA[",
        '<p style="display :   ">x',
        "&#0;",
        "<meta ",
        "<br>",
        "<script>",
        "<title>x",
        "<main>x",
    ],
}


def repeat(unit: str, size: int) -> str:
    return (unit * (size // len(unit.encode()) + 1)).encode()[:size].decode("utf-8", "ignore")


def shapes(size: int) -> dict[str, bytes]:
    """Files of about `size` bytes by name, the first of them plain text."""
    plain = repeat(SENTENCE, size)
    half = plain[: size // 2]
    texts = {"plain.txt": plain}
    for suffix, units in REPEATED.items():
        texts |= {f"{number}.{suffix}": repeat(unit, size) for number, unit in enumerate(units)}
    texts |= {
        "long-heading.md": "# " + half[: size // 4] + "\n\n" + repeat("## s\n\nx\n\n", 3 * size // 4),
        "long-title.md": f"---\ntitle: {half}\n---\n" + repeat("## s\n\nx\n\n", size // 2),
        "long-title.html": f"<title>{half}</title>" + repeat("<h2>s</h2>x", size // 2),
        "one-heading.md": "# " + plain,
        "hashes.md": "# a" + repeat(" #", size),
        "blank.txt": "a" + repeat(" ", size) + "b",
        "lines.txt": "a" + repeat("\n", size) + "b",
        "blank-title.md": "---\ntitle:" + repeat(" ", size),
        "nuls.txt": plain[:9000] + "\0" * (size - 9000),
        "record.jsonl": json.dumps({"text": plain}),
        "title.jsonl": json.dumps({"title": plain, "text": "x"}),
        "title-and-text.jsonl": json.dumps({"title": half, "text": half}),
        "id.jsonl": json.dumps({"_id": half, "text": half}),
        "field.jsonl": json.dumps({"text": "x", "field": plain}),
        "nuls.jsonl": '{"text": "' + "\0" * size + '"}',
        "escaped.jsonl": '{"text": "' + repeat("\\u0000", size) + '"}',
        "nested.jsonl": '{"text": "x", "field": ' + "[" * size,
        "cell.csv": f'text\n"{plain}"\n',
        "title.tsv": f"title\ttext\n{half}\t{half}\n",
        "open.tsv": "a\ttext\tc\n" + repeat('x"\t"y\n', size),
        "quotes.csv": 'text\n"' + repeat('""', size // 2 * 2) + '"',
        "cells.csv": "text\n" + repeat(",", size),
        "columns.csv": "text" + repeat(",", size) + "\nx",
    }
    return (
        {name: text.encode() for name, text in texts.items()}
        | {
            "packed.jsonl.gz": gzip.compress(texts["record.jsonl"].encode()),
            "latin.txt": plain.replace("old", "öld").encode("cp1252"),
            "bytes.html": b"<p>" + b"\xff" * (size // 2),  # Two bytes each in UTF-8.
            "bytes.txt": plain[:9000].encode() + b"\xff" * (size - 9000),
        }
    )
