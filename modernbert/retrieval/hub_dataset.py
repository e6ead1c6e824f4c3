"""Data sets for evaluation that Hugging Face's `datasets` loads: from the hub, or from a folder that holds the same.

They come in three layouts, of which each has its function here: that of BEIR, MTEB and NanoBEIR (a config for each
part), that of LongEmbed (a config for each set, with a split for each part), and that of MLDR (queries that hold their
judgements). All become three parquet files with the columns of BEIR.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..files import replacing
from .hub_source import Source, open_source

if TYPE_CHECKING:
    import datasets

PREFIX = "hf:"
"""How the name of such a data set begins: `hf:NAME` or `hf:NAME:CONFIG`, with a hub id or a folder for NAME."""

# The names that the layouts give to a column of BEIR.
COLUMNS = {
    "corpus": {"_id": ("_id", "id", "doc_id", "docid"), "text": ("text",)},
    "queries": {"_id": ("_id", "id", "qid", "query_id"), "text": ("text", "query")},
    "qrels": {"query-id": ("query-id", "qid"), "corpus-id": ("corpus-id", "doc_id")},
}
OPTIONAL = {"corpus": "title", "qrels": "score"}

LENGTHS = "context_length"
"""The column of LongEmbed that divides its synthetic sets: the split `test_256` has texts of 256 tokens."""


class Parts(NamedTuple):
    """The tables of a data set."""

    corpus: datasets.Dataset
    queries: datasets.Dataset
    qrels: datasets.Dataset


def fetch(name: str, split: str | None) -> tuple[Path, Path, Path]:
    """Load the data set with this name, without `PREFIX`. Returns its corpus, queries and judgements in parquet files.

    They are kept in the cache of `datasets`, under the same paths each time, so that a store of the corpus stays valid.

    Args:
        split: of the judgements; None: test, or else the only one.

    Raises:
        ModuleNotFoundError: datasets is not installed.
        OSError: the hub cannot be reached, or has no such data set.
        ValueError: the data set has none of the layouts, or the name lacks a config or the split.
    """
    try:
        from datasets import config as settings
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to load data sets of the hub: pip install datasets") from error
    repository, colon, config = (name, "", "") if os.path.isdir(name) or ":" not in name else name.rpartition(":")
    if not repository:
        raise ValueError(f"{PREFIX}{name} has no name: give that of a data set on the hub, or a folder")
    try:
        parts = _parts(open_source(repository), config, split)
    except (OSError, RuntimeError, DatasetsError) as error:
        instead = f"hf download {repository} --repo-type dataset --local-dir FOLDER"
        raise OSError(
            f"datasets cannot load {repository} ({error}): check its name, or fetch it where the hub can be reached, "
            f"with {instead}, and evaluate {PREFIX}FOLDER{colon}{config}"
        ) from error
    whole = os.path.abspath(repository) if os.path.isdir(repository) else repository
    digest = hashlib.sha256(repr((whole, config, split)).encode()).hexdigest()
    folder = Path(settings.HF_DATASETS_CACHE, "modernbert", digest[:16])
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{part}.parquet" for part in COLUMNS]
    for file, (part, columns), table in zip(files, COLUMNS.items(), parts, strict=True):
        with replacing(file) as beside:
            _renamed(table, part, columns, repository).to_parquet(beside)
    return files[0], files[1], files[2]


def _parts(source: Source, config: str, split: str | None) -> Parts:
    """The tables of the set that `config` names, in any of the layouts."""
    configs = source.configs()
    prefix = f"{config}-" if config else ""
    if f"{prefix}corpus" in configs:
        return _beir(source, configs, config, prefix, split)
    if f"corpus-{config}" in configs and config in configs:
        return _mldr(source, config, split)
    only = configs[0] if len(configs) == 1 and not config else config
    if only in configs:
        if {*Parts._fields} <= set(source.splits(only)):
            return _long_embed(source, only, split)
        raise ValueError(
            f"{source.name} {config}".rstrip() + f" has no {', '.join(Parts._fields)}: it cannot be searched"
        )
    named = [name.removesuffix("-corpus") for name in configs if name.endswith("-corpus")] or [
        name for name in configs if not name.startswith("corpus-")
    ]
    lacks = f"no config {config}" if config else "several sets"
    raise ValueError(
        f"{source.name} has {lacks}: name one of {', '.join(named)}, as in {PREFIX}{source.name}:{named[0]}"
    )


def _beir(source: Source, configs: Sequence[str], config: str, prefix: str, split: str | None) -> Parts:
    queries = _first((f"{prefix}queries", "query"), configs, source.name)
    known = [name for name in (f"{prefix}qrels", config or "default", "qrels") if name in configs]
    judged = source if known else open_source(_beir_qrels(source.name))
    where = known[0] if known else judged.configs()[0]
    chosen = _chosen(judged.splits(where), split, judged.name)
    corpus, asked = (
        source.load(part, _same_or_only(source.splits(part), chosen, f"{source.name}: {part}"))
        for part in (f"{prefix}corpus", queries)
    )
    return Parts(corpus, asked, judged.load(where, chosen))


def _beir_qrels(name: str) -> str:
    """BEIR keeps the judgements in a repository of their own."""
    found = f"{name}-qrels"
    if os.path.isdir(name) and not os.path.isdir(found):
        raise ValueError(f"{name} has no qrels, and there is no folder {found}: fetch this repository of BEIR too")
    return found


def _mldr(source: Source, config: str, split: str | None) -> Parts:
    from datasets import Dataset

    rows = source.load(config, _chosen(source.splits(config), split, source.name))
    judged = {"query-id": list[str](), "corpus-id": list[str]()}
    for name, passages in zip(rows["query_id"], rows["positive_passages"], strict=True):
        found = passages["docid"] if isinstance(passages, dict) else [passage["docid"] for passage in passages]
        judged["query-id"] += [name] * len(found)
        judged["corpus-id"] += found
    return Parts(source.load(f"corpus-{config}", "corpus"), rows, Dataset.from_dict(judged))


def _long_embed(source: Source, config: str, split: str | None) -> Parts:
    parts = Parts(*(source.load(config, part) for part in Parts._fields))
    if LENGTHS not in parts.corpus.column_names:
        _chosen(["test"], split, source.name)
        return parts
    lengths = {f"test_{length}": length for length in sorted(set(parts.corpus[LENGTHS]))}
    wanted = lengths[_chosen(list(lengths), split, source.name)]
    return Parts(
        *(part.select([row for row, length in enumerate(part[LENGTHS]) if length == wanted]) for part in parts)
    )


def _chosen(splits: Sequence[str], split: str | None, name: str) -> str:
    """The split of the judgements."""
    if split is None and len(splits) > 1 and "test" not in splits:
        raise ValueError(f"{name} has the splits {', '.join(splits)}: say which split")
    chosen = split or ("test" if "test" in splits else splits[0])
    if chosen not in splits:
        raise ValueError(f"{name} has no split {chosen}; it has {', '.join(splits)}")
    return chosen


def _same_or_only(splits: Sequence[str], chosen: str, name: str) -> str:
    return splits[0] if len(splits) == 1 else _chosen(splits, chosen, name)


def _first(names: Iterable[str], among: Sequence[str], where: str) -> str:
    names = list(names)
    found = next((name for name in names if name in among), None)
    if found is None:
        raise ValueError(f"{where} has {', '.join(among)}, but not {' or '.join(names)}: it is not a set for retrieval")
    return found


def _renamed(table: datasets.Dataset, part: str, columns: Mapping[str, Sequence[str]], name: str) -> datasets.Dataset:
    """The table with the columns that BEIR has, under its names."""
    found = {_first(names, table.column_names, f"{name}: {part}"): column for column, names in columns.items()}
    optional = OPTIONAL.get(part)
    if optional in table.column_names:
        found[optional] = optional
    return table.select_columns(list(found)).rename_columns(found)
