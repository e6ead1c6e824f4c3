"""The command line, as used by a person or in a pipe."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from modernbert import ColBERT, Encoder, EncoderConfig, Tokenizer
from modernbert.cli import main
from modernbert.cli.show import short_path
from modernbert.heads.colbert import ColBERTConfig
from modernbert.retrieval import index
from modernbert.retrieval.store.search import Store

OWLS = "# Birds\n\nDay birds sing in the trees all morning.\n\n## Owls\n\nOwls hunt mice at midnight in barns.\n"
ICE = "Glaciers move under their own weight.\n"


@pytest.fixture(scope="module")
def model(modernbert_tokenizer_file, tmp_path_factory) -> str:
    """The folder of a small untrained ColBERT."""
    config = EncoderConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        global_rope_theta=80_000.0,
        local_rope_theta=12_345.0,
        local_attention=64,
        hidden_activation="silu",
    )
    tokenizer = Tokenizer.from_pretrained(modernbert_tokenizer_file.parent)
    settings = ColBERTConfig(query_length=24, document_length=99, skiplist_words=(",", "!"))
    folder = tmp_path_factory.mktemp("colbert") / "model"
    ColBERT.from_encoder(Encoder.from_config(config), tokenizer, dim=16, config=settings).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def notes(tmp_path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "night.md").write_text(OWLS)
    (folder / "ice.txt").write_text(ICE)
    (folder / "photo.png").write_bytes(b"\0")
    return folder


def test_help_imports_nothing_heavy():
    """So it is instant: no torch, no numpy, no tokenizers, no hub client."""
    heavy = "torch numpy tokenizers safetensors huggingface_hub transformers"
    code = (
        "import sys; from modernbert.cli import main\n"
        "try: main(['search', '--help'])\n"
        f"except SystemExit: sys.exit(str(set(sys.modules) & set({heavy!r}.split()) or '') or 0)"
    )
    where = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # where the tests find the package
    run = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "--why" in run.stdout


def test_json_is_the_whole_output_and_says_what_the_library_says(modernbert, model, notes, tmp_path):
    status, out, err = modernbert("search", "owls hunt mice", notes, "--model", model, "--json", "--top", 2)
    assert status == 0
    assert err == f"note: skipped 1 files and folders in {notes} that are not read: 1 .png\n"
    printed = json.loads(out)
    colbert = ColBERT.from_pretrained(model)
    index([notes], tmp_path / "store", colbert, dtype="fp32", note=lambda _: None)
    with Store(tmp_path / "store", colbert) as store:
        hits = store.search(["owls hunt mice"], top_k=2)[0]
    assert (printed["query"], len(printed["hits"])) == ("owls hunt mice", 2)
    for got, hit in zip(printed["hits"], hits, strict=True):
        why, matches = got.pop("why"), got.pop("matches")
        assert got == {"rank": hit.rank, "score": hit.score, **vars(hit.passage)}
        assert {word["query"] for word in why} == {"owls", "hunt", "mice"}
        assert sum(word["contribution"] for word in why) < hit.score
        assert abs(sum(match["contribution"] for match in matches) - hit.score) < 1e-4
    status, out, _ = modernbert("search", "owls", notes, "--model", model, "--json", "--no-why")
    assert "why" not in json.loads(out)["hits"][0]


def test_a_pipe_gets_a_line_for_the_place_and_a_line_for_the_passage(modernbert, model, notes):
    status, out, _ = modernbert("search", "owls hunt mice", notes, "--model", model, "--top", 1)
    place, title, text, why, blank, summary = out.splitlines()
    assert status == 0
    assert re.fullmatch(r"1\. \d+\.\d{3}  " + re.escape(f"{notes}/night.md:7"), place)
    assert (title, text, blank) == ("   Birds: Owls", "   Owls hunt mice at midnight in barns.", "")
    assert re.fullmatch(r"3 passages of 2 documents, read and encoded in \d+\.\d s", summary)
    # The parts that are shown sum to the score that is shown.
    parts = [float(number) for number in re.findall(r"-?\d+\.\d\d", why)]
    assert abs(sum(parts) - float(place.split()[1])) < 0.005 * len(parts) + 0.0005
    assert "why" not in modernbert("search", "owls", notes, "--model", model, "--no-why")[1]


def test_a_path_is_short_and_a_url_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [os.fspath(tmp_path / "a" / "b.md"), "/elsewhere/b.md", "s3://bucket/docs/b.md"]
    assert [short_path(name) for name in names] == [os.path.join("a", "b.md"), *names[1:]]


def test_a_record_is_named_by_its_id(modernbert, model, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"_id": "d7", "title": "Owls", "text": "hunt mice"}\n')
    _, out, _ = modernbert("search", "owls", corpus, "--model", model)
    assert f"  d7 in {corpus}:1\n   Owls\n   hunt mice\n" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "owls", "nowhere"], "modernbert: no such file or folder: nowhere\n"),
        (["search", "owls", "empty"], "modernbert: there is no text to index in the files and folders given"),
        (["search", "owls", "bad.jsonl"], "modernbert: {here}/bad.jsonl, line 1: not JSON"),
        (
            ["search", "owls", "one.txt", "--model", "nowhere/at/all"],
            "modernbert: 'nowhere/at/all' is n",
        ),
        (
            ["encode", "one.txt", "--output", "x.csv"],
            "modernbert: --output is x.csv, but its name must end in",
        ),
        (
            ["encode", "one.txt", "--output", "no/x.npz"],
            "modernbert: --output is no/x.npz, but there is no folder no",
        ),
        (
            ["encode", "none.txt", "--output", "x.npz"],
            "modernbert: [Errno 2] No such file or directory: 'none.txt'",
        ),
        (["info", "empty"], "modernbert: empty/config.json is missing"),
    ],
)
def test_an_error_is_one_line_and_status_2(modernbert, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "one.txt").write_text("one\n")
    status, out, err = modernbert(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(message.replace("{here}", str(tmp_path)))
    assert err.count("\n") == 1
    with pytest.raises((ValueError, OSError)):
        main(["--debug", *arguments])


def test_notes_before_the_error_say_why_there_is_nothing(modernbert, tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.txt").write_bytes(b"\0")
    status, _, err = modernbert("search", "owls", tmp_path)
    assert status == 2
    assert err.splitlines()[0].startswith(f"note: skipped a file: {tmp_path / '0.txt'}: a binary file")
    assert err.splitlines()[5] == "note: and 3 more like these"
    assert err.splitlines()[6].startswith("modernbert: there is no text to index")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("role", ["documents", "queries"])
def test_encoded_vectors_are_the_models(modernbert, model, tmp_path, suffix, role):
    """The file equals `encode_documents` or `encode_queries` bit for bit."""
    records = [{"_id": "ä1", "title": "Owls", "text": "hunt mice"}, {"text": "Glaciers, move!"}]
    source, output = tmp_path / "texts.jsonl", tmp_path / f"vectors{suffix}"
    source.write_text("\n".join(map(json.dumps, records)))
    output.write_text("an older file")
    flags = ["--queries"] if role == "queries" else []
    status, out, err = modernbert("encode", source, "--output", output, "--model", model, *flags)
    assert (status, out) == (0, "")
    colbert = ColBERT.from_pretrained(model)
    expected = getattr(colbert, f"encode_{role}")(["Owls hunt mice", "Glaciers, move!"])
    if suffix == ".npz":
        arrays = dict(np.load(output))
        ids = arrays["ids"].tolist()
    else:
        arrays = load_file(output)
        with safe_open(output, "numpy") as file:
            ids = json.loads(file.metadata()["ids"])
    assert ids == ["ä1", "2"]
    np.testing.assert_array_equal(arrays["values"], expected.values.numpy())
    np.testing.assert_array_equal(arrays["offsets"], expected.offsets.numpy())
    assert err == f"note: wrote 2 texts, {len(expected.values)} vectors of width 16, to {output}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl", output.name]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_failed_write_leaves_the_old_file_and_no_rest(modernbert, model, tmp_path, monkeypatch, suffix):
    source, output = tmp_path / "texts.txt", tmp_path / f"vectors{suffix}"
    source.write_text("owls\n")
    output.write_text("an older file")

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    status, _, err = modernbert("encode", source, "--output", output, "--model", model)
    assert (status, err) == (2, f"modernbert: [Errno 28] No space left on device: '{output}'\n")
    assert output.read_text() == "an older file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.txt", output.name]


def test_info_says_what_each_layer_uses(modernbert, model):
    status, out, _ = modernbert("info", model)
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    weights = load_file(Path(model) / "model.safetensors")
    assert status == 0
    assert ["parameters", f"{sum(array.size for array in weights.values()):,} in float32"] in rows
    assert ["layers", "4 of width 32, MLP 48"] in rows
    assert ["heads", "2 of width 16"] in rows
    assert rows[rows.index(["layer", "attention", "RoPE theta", "activation"]) + 1 :][:4] == [
        ["0", "global", "80,000", "silu"],
        ["1", "local, 32 each side", "12,345", "silu"],
        ["2", "local, 32 each side", "12,345", "silu"],
        ["3", "global", "80,000", "silu"],
    ]
    assert ["query", "prefix '[Q] ', at most 24 tokens"] in rows
    assert ["document", "prefix '[D] ', at most 99 tokens"] in rows
    assert ["skipped", ", !"] in rows
    assert ["head", "32 -> 16"] in rows


def test_info_of_a_preset_needs_no_weights(modernbert):
    """The size is that published for Ettin-17m, without its head."""
    status, out, _ = modernbert("info", "ettin-17m")
    assert status == 0
    assert re.search(r"parameters\s+16,\d{3},\d{3} in", out)
    assert len(re.findall(r"160,000", out)) == 7


def test_info_of_an_encoder_without_a_head(modernbert, tmp_path):
    config = EncoderConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    Encoder.from_config(config).save_pretrained(tmp_path / "encoder")
    status, out, _ = modernbert("info", tmp_path / "encoder")
    assert status == 0
    assert "160,000" in out
    assert "head " not in out


def test_a_narrow_terminal_without_colour(modernbert, model, notes, monkeypatch):
    """On a terminal of 40 columns no line is wider, and NO_COLOR is obeyed."""
    for name, value in {"COLUMNS": "40", "NO_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(notes)
    ours, theirs = pty.openpty()
    out = [b""]

    def read_to_the_mark() -> None:
        while not out[-1].endswith(b"\0"):
            out.append(os.read(ours, 4096))

    reader = threading.Thread(target=read_to_the_mark)
    reader.start()
    with open(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        status, _, err = modernbert("search", "owls hunt mice", "ice.txt", "night.md", "--model", model)
        terminal.write("\0")
        terminal.flush()
        reader.join()
    os.close(ours)
    assert (status, err) == (0, "")
    text = b"".join(out).decode().replace("\r", "").rstrip("\0")
    assert not re.search(r"\x1b\[[0-9;]*3\d", text)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(map(len, plain.splitlines())) <= 40
    assert "Owls hunt mice at midnight in barns." in " ".join(plain.split())


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_that_leaves_early_is_no_error(modernbert, model, notes, monkeypatch, flags):
    """`modernbert search ... | head -1` ends without a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    # The unwritten output is still in the buffer when the test closes its file.
    with contextlib.suppress(BrokenPipeError), open(writing, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        arguments = ["search", "owls", notes / "night.md", "--model", model]
        _, _, err = modernbert(*arguments, *flags)
        monkeypatch.undo()
    assert err == ""


def test_documents_cannot_drive_the_terminal_nor_break_its_encoding(modernbert, model, tmp_path, monkeypatch):
    """Escape sequences are removed, and characters that the encoding lacks become question marks."""
    (tmp_path / "trap.txt").write_text("owls \x1b[31mhunt\x07 mice\n猫\n")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    status, _, err = modernbert("search", "owls 猫", tmp_path / "trap.txt", "--model", model)
    assert (status, err) == (0, "")
    assert b"owls  [31mhunt  mice ?\n" in raw.getvalue()
    assert not set(raw.getvalue()) & {0x1B, 0x07}
