"""Data sets in the layouts that are published on the hub, read from folders that hold the same files."""

from __future__ import annotations

import gzip
import json
import shutil
import sys

import pytest
from small_models import save_colbert, save_embedder

from modernbert.cli import main
from modernbert.retrieval import Store
from modernbert.retrieval.dataset import find_dataset, parts, read_qrels, read_queries
from modernbert.retrieval.documents.find import read_file

datasets = pytest.importorskip("datasets")

DOCUMENTS = {
    f"d{i}": (f"title {i}", f"the {word} was seen by {i} people") for i, word in enumerate(["owl", "ice", "sea"])
}
QUERIES = {"q1": "owl seen", "q2": "ice seen", "q3": "sea"}
QRELS = {"q1": {"d0": 1}, "q2": {"d1": 1, "d2": 1}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def rows(columns: str, pairs) -> list[dict]:
    return [dict(zip(columns.split(), pair, strict=True)) for pair in pairs]


def judgements(grade=1, prefix=""):
    return [(q, f"{prefix}{d}", grade) for q, found in QRELS.items() for d in found]


def write_lines(file, found):
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in found)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())


def write_parquet(file, found):
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(found).to_parquet(file)


INFO = """
dataset_info:
- config_name: corpus
  features:
  - name: _id
    dtype: string
  - name: title
    dtype: string
  - name: text
    dtype: string
  splits:
  - name: corpus
    num_bytes: 120
    num_examples: 3
  download_size: 120
  dataset_size: 120
"""


def write_readme(folder, configs: dict[str, dict[str, str]], info: str = ""):
    """The header that names the files of each config and split, as on the hub."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: '{config}'", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    lines += [*info.splitlines()]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# A data set", ""]))


CORPUS = rows("_id title text", ((name, *texts) for name, texts in DOCUMENTS.items()))
ASKED = rows("_id text", QUERIES.items())
JUDGED = rows("query-id corpus-id score", judgements())


def beir(folder):
    """BeIR/scifact, and BeIR/scifact-qrels beside it. Queries have an empty title."""
    write_parquet(folder / "corpus" / "corpus-00000-of-00001.parquet", CORPUS)
    write_parquet(folder / "queries" / "queries-00000-of-00001.parquet", [{**row, "title": ""} for row in ASKED])
    write_readme(folder, {"corpus": {"corpus": "corpus/corpus-*"}, "queries": {"queries": "queries/queries-*"}}, INFO)
    judged = folder.with_name(f"{folder.name}-qrels")
    judged.mkdir()
    (judged / "README.md").write_text("---\nlanguage:\n- en\n---\n")
    for split, lines in (("test", JUDGED), ("train", JUDGED[:1])):
        table = "".join(f"{row['query-id']}\t{row['corpus-id']}\t{row['score']}\n" for row in lines)
        (judged / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{table}")
    return str(folder)


def mteb(folder):
    """mteb/scifact: files at the top, judgements in the config `default`, scores that are fractions."""
    write_lines(folder / "corpus.jsonl", CORPUS)
    write_lines(folder / "queries.jsonl", ASKED)
    for split in ("train", "test"):
        write_lines(folder / "qrels" / f"{split}.jsonl", [{**row, "score": 1.0} for row in JUDGED])
    write_readme(
        folder,
        {
            "default": {split: f"qrels/{split}.jsonl" for split in ("train", "test")},
            "corpus": {"corpus": "corpus.jsonl"},
            "queries": {"queries": "queries.jsonl"},
        },
    )
    return str(folder)


def mteb_languages(folder):
    """mteb/MultiLongDocRetrieval: configs en-corpus, en-queries and en-qrels, each with dev and test."""
    configs = {}
    for part, found in (("corpus", CORPUS), ("queries", ASKED), ("qrels", JUDGED)):
        for language in ("de", "en"):
            for split in ("dev", "test"):
                some = found if (language, split) == ("en", "test") else found[:1]
                write_parquet(folder / f"{language}-{part}" / f"{split}-00000-of-00001.parquet", some)
            name = f"{language}-{part}"
            configs[name] = {split: f"{name}/{split}-*" for split in ("dev", "test")}
    write_readme(folder, configs)
    return f"{folder}:en"


def nano(folder):
    """zeta-alpha-ai/NanoSciFact: everything is in a split `train`, and judgements have no score."""
    without = [{key: value for key, value in row.items() if key != "score"} for row in JUDGED]
    for part, found in (("corpus", CORPUS), ("queries", ASKED), ("qrels", without)):
        write_parquet(folder / part / "train-00000-of-00001.parquet", found)
    write_readme(folder, {part: {"train": f"{part}/train-*"} for part in ("corpus", "queries", "qrels")})
    return str(folder)


def mldr_rows(queries=QUERIES):
    def passages(names):
        return [{"docid": name, "text": DOCUMENTS[name][1]} for name in names]

    return [
        {"query_id": q, "query": text, "positive_passages": passages(QRELS.get(q, ())), "negative_passages": []}
        for q, text in queries.items()
        if q in QRELS
    ]


MLDR_CORPUS = [{"docid": name, "text": text} for name, (_, text) in DOCUMENTS.items()]


def mldr(folder):
    """Shitao/MLDR: a script, which `datasets` no longer runs, and its files."""
    folder.mkdir()
    (folder / "README.md").write_text("---\nlanguage:\n- en\n---\n")
    (folder / "MLDR.py").write_text("raise SystemExit('never run')\n")
    for language in ("en", "de"):
        for split in ("train", "dev", "test"):
            write_lines(folder / f"mldr-v1.0-{language}" / f"{split}.jsonl.gz", mldr_rows())
        write_lines(folder / f"mldr-v1.0-{language}" / "corpus.jsonl.gz", MLDR_CORPUS)
    return f"{folder}:en"


def mldr_saved(folder):
    """What `load_dataset("Shitao/MLDR", config)` gave when it ran the script, saved by config."""
    table = datasets.Dataset.from_list(mldr_rows())
    splits = {"train": table, "dev": table.select([0]), "test": table}
    datasets.DatasetDict(splits).save_to_disk(folder / "en")
    datasets.DatasetDict({"corpus": datasets.Dataset.from_list(MLDR_CORPUS)}).save_to_disk(folder / "corpus-en")
    return f"{folder}:en"


LONG_EMBED = {
    "corpus": [{"doc_id": name, "text": text} for name, (_, text) in DOCUMENTS.items()],
    "queries": rows("qid text", QUERIES.items()),
    "qrels": rows("qid doc_id", ((q, d) for q, d, _ in judgements())),
}


def long_embed(folder):
    """dwzhu/LongEmbed: a config for each set, whose splits are the parts."""
    for name in ("narrativeqa", "qmsum"):
        for part, found in LONG_EMBED.items():
            write_lines(folder / name / f"{part}.jsonl", found)
    paths = {name: {part: f"{name}/{part}.jsonl" for part in LONG_EMBED} for name in ("narrativeqa", "qmsum")}
    write_readme(folder, paths)
    return f"{folder}:narrativeqa"


def long_embed_files(folder):
    """The same without the README.md, as parquet."""
    for part, found in LONG_EMBED.items():
        write_parquet(folder / "narrativeqa" / f"{part}-00000-of-00001.parquet", found)
    return f"{folder}:narrativeqa"


def long_embed_saved(folder):
    """One set of it, saved."""
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in LONG_EMBED.items()}).save_to_disk(folder)
    return str(folder)


def nano_saved(folder):
    """Each config saved, as a `DatasetDict` and as a `Dataset`."""
    for part, found in (("corpus", CORPUS), ("queries", ASKED), ("qrels", JUDGED)):
        table = datasets.Dataset.from_list(found)
        (table if part == "queries" else datasets.DatasetDict({"train": table})).save_to_disk(folder / part)
    return str(folder)


def exported(folder):
    """The branch refs/convert/parquet of a repository: a folder for each config and split."""
    for part, found in (("corpus", CORPUS), ("queries", ASKED), ("qrels", JUDGED)):
        for number, some in enumerate((found[:1], found[1:])):
            write_parquet(folder / part / "train" / f"{number:04}.parquet", some)
    return str(folder)


LAYOUTS = [
    beir,
    mteb,
    mteb_languages,
    nano,
    mldr,
    mldr_saved,
    long_embed,
    long_embed_files,
    long_embed_saved,
    nano_saved,
    exported,
]


def read(name, split=None):
    corpus, queries, qrels = find_dataset(f"hf:{name}", split)
    documents = {d.id: (d.title, d.text) for file in parts(corpus) for d in read_file(file)}
    return documents, read_queries(queries), read_qrels(qrels)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same(tmp_path, layout):
    documents, queries, qrels = read(layout(tmp_path / "set"))
    assert qrels == QRELS
    assert {name: queries[name] for name in QRELS} == {name: QUERIES[name] for name in QRELS}
    assert [text for _, text in documents.values()] == [text for _, text in DOCUMENTS.values()]
    assert list(documents) == list(DOCUMENTS)
    titled = layout not in (mldr, mldr_saved, long_embed, long_embed_files, long_embed_saved)
    assert [title for title, _ in documents.values()] == [title * titled for title, _ in DOCUMENTS.values()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_relative_name_is_found_too(tmp_path, layout):
    name = layout(tmp_path / "set")
    assert read(name.replace(f"{tmp_path}/", ""))[2] == QRELS
    assert read(name.replace(f"{tmp_path}/", "./"))[2] == QRELS


def test_a_split_is_chosen(tmp_path):
    assert read(beir(tmp_path / "beir"), "train")[2] == {"q1": {"d0": 1}}
    assert read(mteb_languages(tmp_path / "mteb"), "dev") == (
        {"d0": DOCUMENTS["d0"]},
        {"q1": "owl seen"},
        {"q1": {"d0": 1}},
    )
    assert read(mldr_saved(tmp_path / "mldr"), "dev")[2] == {"q1": {"d0": 1}}
    with pytest.raises(ValueError, match="has no split dev; it has test, train"):
        read(tmp_path / "beir", "dev")
    with pytest.raises(ValueError, match="has no split dev; it has test"):
        read(long_embed(tmp_path / "long"), "dev")


def test_synthetic_sets_of_long_embed_are_split_by_length(tmp_path):
    """As mteb does: the passkey of one length is searched among the texts of that length."""
    lengths = (256, 32768)
    for part, found in LONG_EMBED.items():
        split = [
            {**row, "context_length": n} | {k: f"{v}-{n}" for k, v in row.items() if k != "text"}
            for n in lengths
            for row in found
        ]
        write_lines(tmp_path / "LongEmbed" / "passkey" / f"{part}.jsonl", split)
    documents, queries, qrels = read("LongEmbed:passkey", "test_32768")
    assert list(documents) == [f"{name}-32768" for name in DOCUMENTS]
    assert list(queries) == [f"{name}-32768" for name in QUERIES]
    assert qrels == {f"{q}-32768": {f"{d}-32768": 1 for d in found} for q, found in QRELS.items()}
    with pytest.raises(ValueError, match="has the splits test_256, test_32768: say which split"):
        read("LongEmbed:passkey")


@pytest.mark.parametrize(
    ("layout", "config", "message"),
    [
        (long_embed, "", "has several sets: name one of narrativeqa, qmsum, as in hf:.*set:narrativeqa"),
        (long_embed, ":passkey", "has no config passkey: name one of narrativeqa, qmsum"),
        (mteb_languages, "", "has several sets: name one of de, en, as in"),
        (mteb_languages, ":fr", "has no config fr: name one of de, en"),
        (mldr, "", "has several sets: name one of ar, de, en"),
        (mldr, ":xx", "has no config xx: name one of ar, de, en"),
        (mldr_saved, "", "has several sets: name one of en"),
        (nano, ":en", "has no config en"),
    ],
)
def test_the_sets_are_named_if_none_of_them_is_chosen(tmp_path, layout, config, message):
    layout(tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        read(f"{tmp_path / 'set'}{config}")


def test_a_set_that_is_not_for_retrieval_is_named(tmp_path):
    write_parquet(tmp_path / "glue" / "cola" / "train-00000-of-00001.parquet", [{"sentence": "x", "label": 0}])
    with pytest.raises(ValueError, match="glue cola has no corpus, queries, qrels: it cannot be searched"):
        read("glue:cola")
    with pytest.raises(ValueError, match="glue has no corpus, queries, qrels: it cannot be searched"):
        read("glue")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no corpus, queries, qrels"):
        read("empty")
    for name in ("", ":en"):
        with pytest.raises(ValueError, match=f"hf:{name} has no name"):
            read(name)
    for part in ("corpus", "queries", "qrels"):
        write_parquet(tmp_path / "odd" / part / "train-00000-of-00001.parquet", [{"sentence": "x", "label": 0}])
    with pytest.raises(ValueError, match="odd: corpus has sentence, label, but not _id or id or doc_id or docid"):
        read("odd")


def test_judgements_of_beir_that_were_not_fetched_are_named(tmp_path):
    shutil.rmtree(f"{beir(tmp_path / 'set')}-qrels")
    with pytest.raises(ValueError, match=r"set has no qrels, and there is no folder .*set-qrels"):
        read("set")


@pytest.mark.parametrize("name", ["zeta-alpha-ai/NanoSciFact", "Shitao/MLDR:en", "./nowhere", "dwzhu/LongEmbed:needle"])
def test_without_the_hub_the_error_names_a_way(name, monkeypatch):
    """The suite runs without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository, *config = name.split(":")
    then = ":".join(["hf:FOLDER", *config])
    way = f"hf download {repository} --repo-type dataset --local-dir FOLDER, and evaluate {then}"
    with pytest.raises(OSError, match=f"datasets cannot load {repository} .*with {way}$"):
        find_dataset(f"hf:{name}")


def test_a_repository_is_asked_for_by_config_and_split(tmp_path, monkeypatch):
    """A stand-in for the hub, which hands out the tables of a folder."""
    folder, load, build, asked = nano(tmp_path / "set"), datasets.load_dataset, datasets.load_dataset_builder, []
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["corpus", "queries", "qrels"])
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train"])
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: build(folder, config))

    def stand_in(name, data_files, split):
        asked.append((name, *data_files, split))
        return load(folder, data_files=data_files, split=split)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    assert read("zeta-alpha-ai/NanoSciFact")[2] == QRELS
    assert asked == [("zeta-alpha-ai/NanoSciFact", "train", "train")] * 3


def test_the_files_of_mldr_are_asked_for_by_name(tmp_path, monkeypatch):
    mldr(tmp_path / "set")
    load = datasets.load_dataset

    def stand_in(builder, data_files, split):
        assert data_files.startswith("hf://datasets/Shitao/MLDR/mldr-v1.0-en/")
        return load(
            builder, data_files=data_files.replace("hf://datasets/Shitao/MLDR", str(tmp_path / "set")), split=split
        )

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    assert read("Shitao/MLDR:en")[2] == QRELS


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        find_dataset("hf:zeta-alpha-ai/NanoSciFact")


def test_a_folder_that_is_not_there_may_be_a_name_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder: BeIR/scifact; .* begins with hf:"):
        find_dataset("BeIR/scifact")


def test_the_command_measures_it_and_a_store_stays_valid(tmp_path, capsys, monkeypatch):
    pytest.importorskip("ir_measures")

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["evaluate", *map(str, arguments), "--json"])
        return end.value.code, json.loads(capsys.readouterr().out or "{}")

    nano(tmp_path / "set")
    save_embedder(tmp_path / "embedder")
    save_colbert(tmp_path / "colbert")
    for model in ("embedder", "colbert"):
        code, plain = run("set", "--model", model)
        again, found = run("hf:set", "--model", model)
        assert (code, again, plain.pop("dataset"), found.pop("dataset")) == (0, 0, "set", "hf:set")
        assert plain == found
    index = ["--model", "colbert", "--index", "store"]
    assert run("hf:set", *index)[1] == plain | {"dataset": "hf:set"}
    monkeypatch.setattr("modernbert.retrieval.store.writer.StoreWriter.add_windows", None)  # nothing is encoded again
    assert run("hf:set", *index)[1] == plain | {"dataset": "hf:set"}
    with Store("store") as store:
        assert store.documents == 3
