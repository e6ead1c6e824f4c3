"""Every script of examples/ runs, offline, and does what its docstring says."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_models import WORDS, save_embedder, toy_pairs, write_rows

from modernbert import ColBERT, EncoderConfig, MaskedLM
from modernbert.train.vocabulary import train_cased_tokenizer

ROOT = Path(__file__).parents[1]
ABLATION = ["--pairs", "pairs.jsonl", "--teacher", "vectors", "--teacher-model", "teacher", "--validation", "held"]
ABLATION += ["--output", "out", "--steps", "6", "--tokens", "600", "--vocab-size", "340", "--rows", "base", "no KL"]
ARGUMENTS = {
    "ablation": ABLATION,
    "encode": (),
    "search": ("how do I add a head?", str(ROOT / "CONTRIBUTING.md")),
    "finetune": ("tuned",),
    "export": ("encoder.pt2",),
    "glue": ("RTE", "train.tsv", "dev.tsv", "start", "1", "1"),
    "pretrain": ("texts.jsonl", "texts.jsonl", "2", "1"),
    "query_styles": ("pairs.jsonl", "styles"),
    "serve_load": ("30", "4"),
}


@pytest.fixture
def run(tmp_path):
    def run(name: str) -> str:
        paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        path = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, ROOT / "examples" / f"{name}.py", *ARGUMENTS[name]]
        result = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


def test_every_example_has_a_test():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(ARGUMENTS)


def test_encode(run):
    found = re.findall(r"^  \d\.\d\d  The (\w+)", run("encode"), re.MULTILINE)
    assert found == ["mitochondrion", "treaty"]


def test_search(run):
    first, text, *_ = run("search").splitlines()
    assert "CONTRIBUTING.md:" in first
    assert text.strip().startswith("**A head.**")


def test_finetune(run, tmp_path):
    loss = [float(figure) for figure in re.findall(r"loss ([\d.]+)", run("finetune"))]
    assert loss[-1] < 0.5 * loss[0]
    tuned, before = ColBERT.from_pretrained(tmp_path / "tuned"), ColBERT.default()
    assert not tuned.dense[0].linear.weight.equal(before.dense[0].linear.weight)


@pytest.mark.sweep
def test_export(run):
    (difference,) = re.findall(r"largest difference (\S+)", run("export"))
    assert float(difference) < 1e-5


@pytest.mark.sweep
def test_pretrain(run, tmp_path):
    pytest.importorskip("accelerate")  # of transformers' Trainer
    words = " ".join(f"word{i % 97}" for i in range(900))
    (tmp_path / "texts.jsonl").write_text(f"{json.dumps({'text': words})}\n" * 6)
    ours, theirs = (float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", run("pretrain")))
    assert abs(ours - theirs) < 1e-3


@pytest.mark.sweep
def test_glue(run, tmp_path):
    pytest.importorskip("accelerate")
    texts = [f"{place} is a town" for place in ("Paris", "Rome", "Oslo", "Bern")]
    tokenizer = train_cased_tokenizer(texts, vocab_size=280)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    MaskedLM.from_config(EncoderConfig(vocab_size=280, **shape, **ids)).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    rows = [f"{i}\t{text}\t{texts[0]}\t{'not_' * (i % 2)}entailment" for i, text in enumerate(texts * 10)]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n")
    assert len(re.findall(r"seed 0  (?:ours|theirs)\s+score [01]\.\d{4}", run("glue"))) == 2


def test_query_styles(run, tmp_path):
    """New queries for the passages of the pairs that are not held out."""
    draw, words = random.Random(0), [f"{a}{b}ing" for a in ("walk", "pack", "cod", "read") for b in "bdfgklmn"]
    passages = [". ".join(" ".join(draw.choices(words, k=9)).capitalize() for _ in range(4)) + "." for _ in range(150)]
    rows = [{"query": f"what is {i}?", "positive": text, "source": "qa"} for i, text in enumerate(passages)]
    code = {"query": "Returns the number of open files of a process.", "source": "pydoc"}
    rows += [{**code, "positive": f"def files_{i}(process):\n    return {i}"} for i in range(150)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({**row, "group": str(row)}) + "\n" for row in rows))
    run("query_styles")
    found = [json.loads(line) for line in (tmp_path / "styles" / "pairs" / "pairs.jsonl").read_text().splitlines()]
    sources = Counter(row["source"] for row in found)
    assert sources == {"qa": 50, "pydoc": 50, "searches": 50, "keywords": 50, "sentences": 50}
    documented = Counter()
    for row in found:
        asked = set(row["query"].split())
        if row["source"] == "searches":
            assert {"return", "number"} <= asked
            documented[code["query"] in row["positive"]] += 1
        if row["source"] == "keywords":
            assert asked <= set(re.findall(r"\w+", row["positive"].lower()))
        if row["source"] == "sentences":
            assert row["query"] not in row["positive"]
            assert any(row["query"] in passage for passage in passages)
    assert min(documented.values()) > 10
    queries = [
        json.loads(line)["text"] for line in (tmp_path / "styles/validation/queries.jsonl").read_text().splitlines()
    ]
    assert len(queries) == 200
    assert not {row["positive"] for row in found if row["source"] in ("qa", "pydoc")} & {
        json.loads(line)["text"]
        for line in (tmp_path / "styles/validation/corpus.jsonl").read_text().splitlines()[:200]
    }


@pytest.mark.sweep
def test_ablation(run, tmp_path):
    """Each row is trained once, and then only printed."""
    pytest.importorskip("sentence_transformers")
    save_embedder(tmp_path / "teacher")
    write_rows(tmp_path / "pairs.jsonl", toy_pairs(64))
    write_rows(tmp_path / "held" / "corpus.jsonl", [{"_id": word, "text": f"the {word} was seen"} for word in WORDS])
    write_rows(tmp_path / "held" / "queries.jsonl", [{"_id": word, "text": f"find {word[::-1]}"} for word in WORDS])
    (tmp_path / "held" / "qrels").mkdir()
    judged = [f"{word}\t{word}\t1" for word in WORDS]
    (tmp_path / "held" / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged, ""]))
    printed = run("ablation")
    found = printed.splitlines()[-4:]
    assert found[0] == "| row | held | mean |"
    assert re.fullmatch(r"\| base \| [01]\.\d{3} \| [01]\.\d{3} \|", found[2])
    assert re.fullmatch(r"\| no KL \| [01]\.\d{3} \([+-]\d\.\d{3} to [+-]\d\.\d{3}\) \| [01]\.\d{3} \|", found[3])
    kinds = Counter(path.name.split("-")[0] for path in (tmp_path / "out" / "runs").iterdir())
    assert kinds == {"mlm": 1, "distill": 1, "head": 1, "contrastive": 4, "colbert": 1}  # "no KL" shares two stages
    again = run("ablation")
    assert again.splitlines()[-4:] == found
    assert printed.count("row: ") == 2
    assert "row: " not in again


def test_rows_of_the_ablation_have_the_same_steps(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    ablation = importlib.import_module("ablation")
    config = ablation.Config("pairs", "teacher", "model", "held", str(tmp_path), steps=151)
    data = SimpleNamespace(start=lambda row, seed: Path("start"))
    seen: list[tuple[str, int]] = []
    for name in ablation.SHARES:
        monkeypatch.setitem(ablation.RUNS, name, lambda stage, name=name: seen.append((name, stage.steps)))
    for row in ablation.ROWS.values():
        seen.clear()
        ablation.train(config, data, row)
        assert [name for name, _ in seen] == list(row.stages)
        assert sum(steps for _, steps in seen) == 151 * row.budget


@pytest.mark.sweep
def test_serve_load(run):
    """No answer is lost or changed: the script checks each."""
    for package in ("fastapi", "prometheus_client", "uvicorn", "sentence_transformers"):
        pytest.importorskip(package)
    lines = run("serve_load").splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "modernbert serve",
        "sentence-transformers, each request",
        "sentence-transformers, batches",
        "modernbert serve, 160 clients for 32 places",
    ]
    assert all("0 lost, 0 changed" in line for line in lines)
