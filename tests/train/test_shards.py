import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from modernbert.tokenizer import Tokenizer
from modernbert.train import shards as writer
from modernbert.train.corpus import MANIFEST, Shards, ids_file, lengths_file, tokenizer_hash
from modernbert.train.shards import write_shards
from modernbert.train.vocabulary import train_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = [f"word{i}" for i in range(50)]
TEXTS = [" ".join(WORDS[i % 50] for i in range(start, start + 1 + start * 7 % 90)) for start in range(120)]


def write_texts(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), vocab_size=350)


@pytest.fixture
def corpus(tmp_path):
    return write_texts(tmp_path / "texts.jsonl")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != writer.LOCK}


def documents(shards):
    """The ids of each document, read through pieces of the longest length."""
    pieces = shards.pieces(10_000)
    assert len(pieces) == len(shards)
    batch = pieces.packed(np.arange(len(pieces)))
    return [ids.tolist() for ids in batch.input_ids.split(batch.lengths)]


def test_the_ids_are_those_of_the_tokenizer(tokenizer, corpus, tmp_path):
    shards = write_shards(corpus, tokenizer, tmp_path / "out", characters=5000)
    assert len(shards.about["shards"]) > 5
    wanted = [each.ids for each in tokenizer.encode_batch(TEXTS, offsets=False)]
    assert documents(shards) == wanted
    assert shards.num_tokens == sum(map(len, wanted)) - 2 * len(TEXTS)
    assert shards.lengths.tolist() == [len(ids) - 2 for ids in wanted]
    assert np.load(ids_file(tmp_path / "out", 0)).dtype == np.uint16
    assert documents(Shards(tmp_path / "out", tokenizer)) == wanted


@pytest.mark.parametrize("longest", [3, 4, 17, 64])
def test_a_long_document_is_continued_and_never_cut_off(tokenizer, corpus, tmp_path, longest):
    shards = write_shards(corpus, tokenizer, tmp_path / "out", characters=5000)
    pieces = shards.pieces(longest)
    batch = pieces.packed(np.arange(len(pieces)))
    assert list(batch.lengths) == pieces.lengths.tolist()
    assert max(batch.lengths) == longest
    found = []
    for ids in batch.input_ids.split(batch.lengths):
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
        found += ids[1:-1].tolist()
    assert found == [token for each in tokenizer.encode_batch(TEXTS, offsets=False) for token in each.ids[1:-1]]
    # A document takes as few pieces as it can.
    assert len(pieces) == sum(-(-int(length) // (longest - 2)) for length in shards.lengths)


def test_a_batch_is_that_of_the_tokenizer(tokenizer, corpus, tmp_path):
    pieces = write_shards(corpus, tokenizer, tmp_path / "out", characters=5000).pieces(1000)
    got, wanted = pieces.packed(np.array([7, 119, 7, 0])), tokenizer([TEXTS[i] for i in (7, 119, 7, 0)])
    for name in ("input_ids", "positions", "cu_seqlens"):
        assert getattr(got, name).tolist() == getattr(wanted, name).tolist()
        assert getattr(got, name).dtype == getattr(wanted, name).dtype
    assert (got.lengths, got.max_seqlen) == (wanted.lengths, wanted.max_seqlen)
    empty = pieces.packed(np.zeros(0, np.int64))
    assert (len(empty), empty.num_tokens, empty.max_seqlen) == (0, 0, 0)


def test_a_text_beyond_the_models_length_is_whole(corpus, tmp_path, modernbert_tokenizer_file):
    """`model_max_length` is 8,192; a document may be a book. Its ids need 16 bits."""
    tokenizer = Tokenizer.from_pretrained(modernbert_tokenizer_file.parent)
    write_texts(corpus, ["a b " * 9000])
    shards = write_shards(corpus, tokenizer, tmp_path / "out")
    assert shards.lengths.tolist() == [18_001]
    assert shards.pieces(8192).lengths.tolist() == [8192, 8192, 18_001 - 2 * 8190 + 2]


def test_no_room_for_a_piece_is_refused(tokenizer, corpus, tmp_path):
    with pytest.raises(ValueError, match="max_length is 2, but the 2 special tokens"):
        write_shards(corpus, tokenizer, tmp_path / "out").pieces(2)


def test_what_is_finished_is_not_written_again(tokenizer, corpus, tmp_path, monkeypatch):
    write_shards(corpus, tokenizer, tmp_path / "out", characters=3000)
    monkeypatch.delattr(writer, "_write_shard")
    write_shards(corpus, tokenizer, tmp_path / "out", characters=3000)
    # The files of a corpus may move.
    moved = corpus.rename(corpus.parent / "moved")
    (tmp_path / "elsewhere").mkdir()
    moved.rename(tmp_path / "elsewhere" / corpus.name)
    write_shards(tmp_path / "elsewhere", tokenizer, tmp_path / "out", characters=3000)


def test_a_run_that_failed_goes_on_where_it_was(tokenizer, corpus, tmp_path, monkeypatch):
    wanted = content(write_shards(corpus, tokenizer, tmp_path / "whole", characters=3000).folder)
    real, calls = writer._write_shard, []

    def breaks(folder, number, *rest):
        calls.append(number)
        if number == 3 and calls.count(3) == 1:
            raise OSError(28, "No space left on device")
        real(folder, number, *rest)

    monkeypatch.setattr(writer, "_write_shard", breaks)
    with pytest.raises(OSError, match="No space left"):
        write_shards(corpus, tokenizer, tmp_path / "out", characters=3000)
    with pytest.raises(ValueError, match="out is not finished: call write_shards again"):
        Shards(tmp_path / "out", tokenizer)
    write_shards(corpus, tokenizer, tmp_path / "out", characters=3000)
    assert calls[:5] == [0, 1, 2, 3, 3]
    assert content(tmp_path / "out") == wanted


def test_a_full_disk_leaves_no_half_of_a_file(tokenizer, corpus, tmp_path, monkeypatch):
    def full(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"No space left.*000000\.lengths\.npy"):
        write_shards(corpus, tokenizer, tmp_path / "out", characters=3000)
    assert content(tmp_path / "out").keys() == {MANIFEST}


SCRIPT = """
import sys
from modernbert.tokenizer import Tokenizer
from modernbert.train.shards import write_shards

if __name__ == "__main__":
    texts, tokenizer, folder = sys.argv[1:]
    write_shards(texts, Tokenizer.from_pretrained(tokenizer), folder, characters=30_000, processes=2)
"""


@pytest.mark.sweep
def test_what_killed_processes_left_is_finished_to_the_files_of_one_process(tokenizer, corpus, tmp_path):
    write_texts(corpus, TEXTS * 40)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", corpus, tmp_path / "tokenizer", tmp_path / "out"]
    path = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    run = subprocess.Popen(command, env=path, start_new_session=True)
    while run.poll() is None and not ids_file(tmp_path / "out", 5).exists():
        time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert ids_file(tmp_path / "out", 5).exists()
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["shards"] is None
    (tmp_path / "out" / ".000099.ids.npy.0123abcd").write_bytes(b"half")  # as a kill within a write leaves it
    write_shards(corpus, tokenizer, tmp_path / "out", characters=30_000)
    write_shards(corpus, tokenizer, tmp_path / "whole", characters=30_000)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_of_two_callers_one_writes_and_the_other_waits(tokenizer, corpus, tmp_path, monkeypatch):
    """As the ranks of a run start."""
    real, numbers = writer._write_shard, []

    def write(folder, number, *rest):
        numbers.append(number)
        time.sleep(0.01)
        real(folder, number, *rest)

    monkeypatch.setattr(writer, "_write_shard", write)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(write_shards, corpus, tokenizer, tmp_path / "out", characters=3000) for _ in range(2)]
        assert documents(calls[0].result()) == documents(calls[1].result())
    assert numbers == sorted(set(numbers))


def test_a_caller_that_looks_while_another_begins(tokenizer, corpus, tmp_path, monkeypatch):
    """What the other has written since is not of another program."""
    names = os.listdir

    def begun_since(folder):
        monkeypatch.setattr(os, "listdir", names)
        write_shards(corpus, tokenizer, folder, characters=3000)
        return names(folder)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "listdir", begun_since)
    write_shards(corpus, tokenizer, tmp_path / "out", characters=3000)


def test_shards_of_another_tokenizer_are_refused_with_both_names(tokenizer, corpus, tmp_path):
    other = train_tokenizer(iter(["another text"]), vocab_size=320)
    write_shards(corpus, tokenizer, tmp_path / "out")
    hashes = tokenizer_hash(tokenizer), tokenizer_hash(other)
    sizes = tokenizer.vocab_size, other.vocab_size
    words = rf"with {hashes[0]} \({sizes[0]} tokens\), but this tokenizer is {hashes[1]} \({sizes[1]} tokens"
    with pytest.raises(ValueError, match=words):
        Shards(tmp_path / "out", other)
    with pytest.raises(ValueError, match=f"other shards: tokenizer is '{hashes[0]}', now '{hashes[1]}'"):
        write_shards(corpus, other, tmp_path / "out")
    assert documents(Shards(tmp_path / "out", tokenizer))


def test_a_tokenizer_is_known_by_what_decides_about_ids(tokenizer, tmp_path, modernbert_tokenizer_file):
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(Tokenizer.from_pretrained(tmp_path)) == tokenizer_hash(tokenizer)
    cased = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"do_lower_case": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(cased))
    assert tokenizer_hash(Tokenizer.from_pretrained(tmp_path)) != tokenizer_hash(tokenizer)
    real = Tokenizer.from_pretrained(modernbert_tokenizer_file.parent)
    before = tokenizer_hash(real)
    real.add_tokens(["[NEW]"])
    assert tokenizer_hash(real) != before


@pytest.mark.parametrize("change", ["source", "characters", "names"])
def test_shards_of_another_request_are_refused(tokenizer, corpus, tmp_path, change):
    write_shards(corpus, tokenizer, tmp_path / "out", characters=3000)
    before = content(tmp_path / "out")
    if change == "source":
        write_texts(corpus, TEXTS[::-1])
    options = {"characters": 3000} | {"characters": {"characters": 4000}, "names": {"names": {"text": "body"}}}.get(
        change, {}
    )
    with pytest.raises(ValueError, match=f"out has other shards: {change} is"):
        write_shards(corpus, tokenizer, tmp_path / "out", **options)
    assert content(tmp_path / "out") == before


def test_files_that_are_not_shards_are_left_alone(tokenizer, corpus, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out holds thesis\.txt and no shards"):
        write_shards(corpus, tokenizer, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["thesis.txt"]


def test_a_bad_row_is_named_and_the_shards_before_it_stay(tokenizer, corpus, tmp_path):
    with corpus.open("a") as file:
        file.write('{"text": ""}\n')
    with pytest.raises(ValueError, match=r'texts\.jsonl:121: "text" is empty'):
        write_shards(corpus, tokenizer, tmp_path / "out", characters=3000)
    assert ids_file(tmp_path / "out", 3).exists()


def test_a_source_without_text_is_refused(tokenizer, corpus, tmp_path):
    corpus.write_text("")
    with pytest.raises(ValueError, match=r"the source of .*out has no text"):
        write_shards(corpus, tokenizer, tmp_path / "out")


def test_rows_of_a_data_set_become_shards(tokenizer, tmp_path):
    rows = [{"body": text} for text in TEXTS]
    shards = write_shards(rows, tokenizer, tmp_path / "out", names={"text": "body"}, characters=3000)
    assert documents(shards) == [each.ids for each in tokenizer.encode_batch(TEXTS, offsets=False)]


@pytest.mark.parametrize("which", [ids_file, lengths_file])
@pytest.mark.parametrize("damage", ["cut", "noise", "gone", "other"])
def test_damaged_shards_are_named(tokenizer, corpus, tmp_path, which, damage):
    write_shards(corpus, tokenizer, tmp_path / "out", characters=3000)
    file = which(tmp_path / "out", 1)
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        other = which(tmp_path / "out", 2).read_bytes()
        file.write_bytes({"cut": whole[:-10], "noise": b"\xff" * 99, "other": other}[damage])
    with pytest.raises(
        ValueError, match=rf"{re.escape(file.name)} (is missing or damaged|holds); |{re.escape(file.name)}"
    ):
        Shards(tmp_path / "out", tokenizer)


def test_no_shards_are_there(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        Shards(tmp_path, tokenizer)


def test_a_document_without_a_token_has_no_piece(tmp_path):
    """White space only separates in this vocabulary, and punctuation is not a token of it."""
    tokenizer = train_tokenizer(iter(TEXTS), vocab_size=350)
    shards = write_shards([{"text": "word1"}, {"text": "..."}, {"text": "word2"}], tokenizer, tmp_path / "out")
    assert shards.lengths[1] == 0
    assert len(shards.pieces(10)) == 2
