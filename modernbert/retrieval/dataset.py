"""Data sets for evaluation: their corpus, queries and judgements, in the layouts of BEIR, MTEB and NanoBEIR.

Each of the three is a file (`corpus.jsonl`), or a folder of splits (`qrels/test.tsv`, `queries/test/0000.parquet`,
`corpus/train-00000-of-00002.parquet`). MTEB also calls the folder of the judgements `default` or `data`.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .documents.find import read_file
from .documents.parquet import PARQUET, read_rows
from .documents.text import file_name, gzip_errors
from .hub_dataset import PREFIX, fetch

JSON_LINES = (".jsonl", ".jsonl.gz")
KINDS = {  # suffixes, the preferred first
    "corpus": (*JSON_LINES, PARQUET),
    "queries": (*JSON_LINES, PARQUET),
    "qrels": (".tsv", ".tsv.gz", *JSON_LINES, PARQUET),
}
FOLDERS = {"corpus": ("corpus",), "queries": ("queries", "query"), "qrels": ("qrels", "default", "data")}

_PART = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")


class Dataset(NamedTuple):
    """The three files of a data set. The name of one that is in several parts is a pattern: see `parts`."""

    corpus: Path
    queries: Path
    qrels: Path


def find_dataset(folder: str | os.PathLike[str], split: str | None = None) -> Dataset:
    """The files of the data set in a folder, or of `hf:NAME` or `hf:NAME:CONFIG`, which `datasets` loads: see `fetch`.

    The default `split` of the judgements is test, or else the only one. If the corpus or the queries have splits too,
    theirs is the same, or else the only one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there are several splits, and none of them is the right one.
        ModuleNotFoundError: datasets is not installed.
    """
    name = os.fspath(folder)
    if name.startswith(PREFIX):
        return Dataset(*fetch(name.removeprefix(PREFIX), split))
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}; the name of a data set on the hub begins with {PREFIX}")
    corpora, queries, qrels = (_splits(folder, name) for name in ("corpus", "queries", "qrels"))
    for name, found in (("corpus", corpora), ("queries", queries)):
        if not found:
            raise _missing(f"{name}.jsonl", folder)
    if not qrels:
        raise _missing(f"{split or 'test'}.tsv", folder / "qrels")
    if split is None and len(qrels) > 1 and "test" not in qrels:
        raise ValueError(f"{folder / 'qrels'} holds {', '.join(sorted(qrels))}: say which split")
    chosen = split or ("test" if "test" in qrels else next(iter(qrels)))
    if chosen not in qrels:
        raise FileNotFoundError(f"{folder / 'qrels'} has no split {chosen}; it holds {', '.join(sorted(qrels))}")
    return Dataset(_of_split(corpora, chosen), _of_split(queries, chosen), qrels[chosen])


def parts(path: Path) -> list[Path]:
    """The files of a data set that are meant by the name of one. Raises FileNotFoundError if there is none."""
    found = [path] if path.is_file() else sorted(path.parent.glob(path.name))
    if not found:
        raise FileNotFoundError(f"no such file: {path}")
    return found


def parts_pattern(path: Path) -> str:
    """The shell pattern for the paths of `parts`, as `Store.run` takes it."""
    name = glob.escape(path.name) if path.is_file() else path.name
    return f"{glob.escape(file_name(os.path.abspath(path.parent)))}/{file_name(name)}"


def read_ids(corpus: Path) -> Iterator[str]:
    """The ids of the documents in a corpus, which is read but not kept. Raises as `read_file` does."""
    for file in parts(corpus):
        for document in read_file(file, on_note=lambda message: None):
            yield document.id


def read_queries(path: str | os.PathLike[str]) -> dict[str, str]:
    """Query texts by id, from records with `_id` or `id`, and `text`, in order. They are JSON lines or parquet.

    Raises ValueError with file and line for a broken record or a repeated id.
    """
    queries: dict[str, str] = {}
    for where, record in numbered_records(Path(path)):
        name = record.get("_id", record.get("id")) if isinstance(record, dict) else None
        if isinstance(name, bool) or not isinstance(name, (str, int)) or not isinstance(record.get("text"), str):
            shown = json.dumps(record, ensure_ascii=False, default=str)[:80]
            raise ValueError(f'{where}: expected an object with "_id" and a string "text", got {shown}')
        if str(name) in queries:
            raise ValueError(f"{where}: the query id {name} comes twice; ids must be unique")
        # JSON can contain half a surrogate pair ("\ud800"), which is not a character: tokenizers fail on it.
        queries[str(name)] = record["text"].encode("utf-8", "replace").decode()
    if not queries:
        raise ValueError(f"{path} holds no query")
    return queries


def read_qrels(path: str | os.PathLike[str]) -> dict[str, dict[str, int]]:
    """Judgements, from BEIR's tsv (`query-id corpus-id score` under a header), TREC's four columns, or MTEB's records.

    Records have the fields of BEIR's header, and are JSON lines or parquet; without a score they mean 1.

    Raises ValueError with file and line for a broken line or a pair with two different judgements.
    """
    qrels: dict[str, dict[str, int]] = {}
    path = Path(path)
    is_table = not path.name.lower().endswith((*JSON_LINES, PARQUET))
    for where, query, document, grade in _table_rows(path) if is_table else _record_rows(path):
        if not re.fullmatch(r"-?\d{1,9}(\.0*)?", grade):
            raise ValueError(f"{where}: the score must be a whole number, got {grade!r}")
        score = int(float(grade))
        if qrels.setdefault(query, {}).setdefault(document, score) != score:
            raise ValueError(f"{where}: query {query} and document {document} are judged twice, differently")
    if not qrels:
        raise ValueError(f"{path} holds no judgement")
    return qrels


def _table_rows(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Place, query, document and grade of each line but the header of a BEIR file."""
    for number, (where, line) in enumerate(numbered_lines(path)):
        columns = line.rstrip("\r\n").split("\t")
        is_beir = len(columns) == 3
        fields = columns if is_beir else line.split()
        if len(fields) not in (3, 4):
            raise ValueError(f"{where}: expected 3 columns (BEIR) or 4 (TREC), got {len(fields)}: {line.strip()[:80]}")
        grade = fields[-1].strip()
        if not (number == 0 and is_beir and not re.fullmatch(r"-?\d+(\.\d*)?", grade)):
            yield where, fields[0], fields[-2], grade


def _record_rows(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Place, query, document and grade of each record."""
    for where, record in numbered_records(path):
        ids = [record.get(key) for key in ("query-id", "corpus-id")] if isinstance(record, dict) else [None]
        if not all(isinstance(name, (str, int)) for name in ids):
            shown = json.dumps(record, ensure_ascii=False, default=str)[:80]
            raise ValueError(f'{where}: expected an object with "query-id" and "corpus-id", got {shown}')
        yield where, str(ids[0]), str(ids[1]), str(record.get("score", 1))


def _splits(folder: Path, name: str) -> dict[str, Path]:
    """The files of a part of a data set, by split; the split of one that is not in a folder is ""."""
    for suffix in KINDS[name]:
        if (folder / f"{name}{suffix}").is_file():
            return {"": folder / f"{name}{suffix}"}
    for place in (folder / each for each in FOLDERS[name]):
        found: dict[str, Path] = {}
        for suffix in reversed(KINDS[name]):
            splits: dict[str, list[Path]] = {}
            for file in sorted([*place.glob(f"*{suffix}"), *place.glob(f"*/*{suffix}")]):
                split = file.parent.name if file.parent != place else _PART.sub("", file.name.removesuffix(suffix))
                splits.setdefault(split, []).append(file)
            found |= {split: _pattern(files, split, suffix, place) for split, files in splits.items()}
        if found:
            return found
    return {}


def _pattern(files: list[Path], split: str, suffix: str, place: Path) -> Path:
    """One file, or the pattern of several in the same folder."""
    if len(files) == 1:
        return files[0]
    # The digit tells the parts of "test" from those of "test-hard".
    parts_of = f"{glob.escape(split)}-[0-9]*" if files[0].parent == place else "*"
    return files[0].parent / f"{parts_of}{suffix}"


def _of_split(splits: dict[str, Path], chosen: str) -> Path:
    if chosen in splits or len(splits) == 1:
        return splits.get(chosen, next(iter(splits.values())))
    names = ", ".join(sorted(splits))
    raise ValueError(f"{next(iter(splits.values())).parent} holds {names}, and the judgements are those of {chosen!r}")


def _missing(name: str, folder: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"no {name} or {name}.gz in {folder}: a BEIR folder has corpus.jsonl, queries.jsonl and qrels/test.tsv, and "
        f"one of MTEB has folders corpus, queries and qrels; {PREFIX}{folder} reads more layouts"
    )


def numbered_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and content of each record in JSON lines or parquet, in all parts of the file."""
    for part in parts(path):
        if part.suffix.lower() == PARQUET:
            for number, row in enumerate(read_rows(part), start=1):
                yield f"{part}, row {number}", row
            continue
        for where, line in numbered_lines(part):
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error}); expected one JSON object a line") from error


def numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """File and line number of every line that is not blank, as text for messages, and the line."""
    for part in parts(path):
        with gzip_errors(str(part)), gzip.open(part) if part.suffix == ".gz" else part.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                where = f"{part}, line {number}"
                try:
                    line = raw.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where}: not UTF-8 ({error})") from error
                if line.strip():
                    yield where, line
