"""Codes of vectors against their definition in float64, and stores of codes: updates, kills, refusals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stores import corpus, small_colbert, small_shards, write_corpus
from torch import Tensor

from modernbert import ColBERT, maxsim
from modernbert.late_interaction import Ragged, pool_tokens
from modernbert.retrieval import Store, forget, index, units
from modernbert.retrieval.store import kept, ranking, writer
from modernbert.retrieval.store.codec import Codec
from modernbert.retrieval.store.ranking import score_codes
from modernbert.train.distributed import Ranks

BITS = pytest.mark.parametrize("bits", [4, 2])


def vectors(count: int, width: int = 16, *, seed: int = 0) -> Tensor:
    """Unit vectors around some directions, all near one, as those of trained models are."""
    generator = torch.Generator().manual_seed(seed)
    about = torch.randn(30, width, generator=torch.Generator().manual_seed(9))
    noise = 0.7 * torch.randn(count, width, generator=generator)
    return F.normalize(2.0 + about[torch.randint(30, (count,), generator=generator)] + noise, dim=1)


@pytest.fixture(scope="module", params=[(4, 16), (2, 16), (4, 48), (2, 128), (4, 2), (2, 4)])
def codec(request) -> Codec:
    bits, width = request.param
    return Codec.train(vectors(3000, width), bits)


def decoded(codec: Codec, stored: dict[str, Tensor]) -> np.ndarray:
    """The definition, bit by bit in float64."""
    codes, gains, levels = stored["codes"].numpy(), stored["gains"].double().numpy(), codec.levels.double().numpy()
    found = codec.centroids_KE.double().numpy()[stored["centroids"].numpy()]
    for row, e in np.ndindex(found.shape):
        first = e * codec.bits
        level = (int(codes[row, first // 8]) >> first % 8) & ((1 << codec.bits) - 1)
        found[row, e] += gains[row] * float(codec.scales_E[e]) * levels[level]
    return found


def test_decoding_is_its_definition(codec):
    x_NE = vectors(70, len(codec.scales_E), seed=1)
    stored = codec.encode(x_NE)
    types = {"codes": torch.uint8, "centroids": torch.uint8, "gains": torch.float16}
    assert {name: tensor.dtype for name, tensor in stored.items()} == types
    assert stored["codes"].shape == (70, x_NE.shape[1] * codec.bits // 8)
    np.testing.assert_allclose(codec.decode(stored).numpy(), decoded(codec, stored), atol=1e-6)


@pytest.mark.parametrize(("block", "threads"), [(1 << 19, 1), (5000, 3)])
def test_scores_of_codes_are_those_of_the_decoded_vectors(codec, block, threads, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK", block)
    monkeypatch.setattr(ranking, "callers", lambda device: threads)
    width = len(codec.scales_E)
    queries = Ragged.from_list([vectors(n, width, seed=n) for n in (1, 7, 40)])
    stored, offsets = codec.encode(vectors(90, width, seed=3)), torch.tensor([0, 5, 5, 30, 90])
    found = score_codes(queries, codec, stored, offsets)
    wanted = maxsim(
        Ragged(queries.values.double(), queries.offsets), Ragged(torch.from_numpy(decoded(codec, stored)), offsets)
    )
    assert found.isfinite().tolist() == [[True, False, True, True]] * 3
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def buckets(x_NE: np.ndarray, bits: int) -> np.ndarray:
    """A residual by ColBERTv2: for each dimension buckets of equally many residuals, and the middle of each by rank."""
    levels = 1 << bits
    found = np.empty_like(x_NE)
    for e in range(x_NE.shape[1]):
        cuts = np.quantile(x_NE[:, e], np.arange(1, levels) / levels)
        weights = np.quantile(x_NE[:, e], (np.arange(levels) + 0.5) / levels)
        found[:, e] = weights[np.searchsorted(cuts, x_NE[:, e])]
    return found


@BITS
def test_the_error_is_less_than_that_of_buckets(bits):
    x_NE = vectors(4000)
    codec = Codec.train(x_NE, bits)
    stored = codec.encode(x_NE)
    found = codec.decode(stored)
    centers = codec.centroids_KE[stored["centroids"].long()]
    theirs = (centers + torch.from_numpy(buckets((x_NE - centers).double().numpy(), bits))).double()
    assert ((found - x_NE) ** 2).sum(1).mean() < ((theirs - x_NE) ** 2).sum(1).mean()
    # Similarities of a vector with itself stay what they are.
    assert ((found * x_NE).sum(1) - 1).abs().mean() < (1e-3 if bits == 4 else 0.02)


def test_lengths_of_pooled_tokens_stay():
    x_NE = 0.6 * vectors(3000)
    found = Codec.train(x_NE, 4)
    assert (found.decode(found.encode(x_NE)).norm(dim=1) - 0.6).abs().mean() < 0.01


@BITS
def test_nothing_zeros_and_equal_vectors(bits):
    codec = Codec.train(vectors(3000), bits)
    assert codec.decode(codec.encode(torch.zeros(0, 16))).shape == (0, 16)
    assert codec.decode(codec.encode(torch.zeros(3, 16))).isfinite().all()
    same = Codec.train(vectors(1).expand(2000, 16), bits)
    assert (same.decode(same.encode(vectors(1))) - vectors(1)).abs().max() < 1e-3


def test_what_cannot_be_coded_is_refused():
    with pytest.raises(ValueError, match="2-bit codes of width 18 do not fill whole bytes"):
        Codec.train(vectors(3000, 18), 2)
    with pytest.raises(ValueError, match="from 1,000 tokens at least, and these have 999"):
        Codec.train(vectors(999), 4)


@pytest.fixture(scope="module")
def colbert(modernbert_tokenizer_file: Path) -> ColBERT:
    torch.manual_seed(0)
    return small_colbert(modernbert_tokenizer_file.parent)


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    small_shards(monkeypatch, 16)
    monkeypatch.setattr(writer, "SAMPLE", 5000)
    return write_corpus(tmp_path / "corpus.jsonl", corpus(90))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_report_and_what_is_written(colbert, source, tmp_path):
    notes: list[str] = []
    index([source], tmp_path / "store", colbert, dtype="4bit", note=notes.append)
    (note,) = notes
    assert note.startswith("4bit: ")
    assert "of the ten best passages for 64 texts of this corpus stay among them" in note
    manifest = json.loads((tmp_path / "store" / "store.json").read_text())
    assert (manifest["version"], manifest["dtype"]) == (2, "4bit")
    with Store(tmp_path / "store", colbert) as store:
        for shard in store._files.shards.values():
            assert {name: tensor.dtype for name, tensor in shard.tensors.items()} == {
                "codes": torch.uint8,
                "centroids": torch.uint8,
                "gains": torch.float16,
                "offsets": torch.int64,
                "spans": torch.int16,
            }
    # Stores of floats have the version that older programs read.
    index([source], tmp_path / "plain", colbert)
    manifest = json.loads((tmp_path / "plain" / "store.json").read_text())
    assert manifest["version"] == 1
    assert not {"codec", "pool", "prefilter"} & manifest.keys()


def test_updates_use_the_codec_that_the_store_has(colbert, source, tmp_path):
    """Added, removed and joined passages have the same vectors as in a store that was coded at once."""
    folder = tmp_path / "store"
    index([source], folder, colbert, dtype="4bit", note=[].append)
    codec = next((folder / "shards").glob("codec-*")).read_bytes()
    notes: list[str] = []
    write_corpus(source, corpus(120)[20:])
    summary = index([source], folder, colbert, note=notes.append)
    assert (summary.added, summary.removed, notes) == (30, 20, [])
    other = write_corpus(tmp_path / "other.jsonl", corpus(12, seed=5))
    index([other], folder, colbert)
    forget([other], folder)
    assert next((folder / "shards").glob("codec-*")).read_bytes() == codec
    with Store(folder, colbert) as store:
        assert len(store._files.shards) < 12
        found = {passage.id: x for _, passages, xs in store.batches() for passage, x in zip(passages, xs, strict=True)}
        store_codec = next(iter(store._files.shards.values())).codec
    assert store_codec is not None
    exact = colbert.encode_documents(
        [f"{r['title']} {r['text']}" for r in corpus(120) if int(str(r["_id"])[1:]) % 7 != 3]
    )
    names = [str(r["_id"]) for r in corpus(120) if int(str(r["_id"])[1:]) % 7 != 3]
    for name, x_NE in list(zip(names, exact, strict=True))[20:]:
        wanted = store_codec.decode(store_codec.encode(x_NE.half()))
        # Alone, a text may differ in the last bit, and a code by one level.
        assert (found[name] - wanted).abs().median() < 1e-6


@pytest.mark.parametrize("step", [8, *(pytest.param(step, marks=pytest.mark.sweep) for step in (1, 9, 12))])
def test_a_kill_while_codes_are_written(colbert, source, tmp_path, step):
    """At one of the steps that change files. The next run encodes nothing again, and ends in the same store."""
    folder, calm = tmp_path / "store", tmp_path / "calm"
    index([source], calm, colbert, dtype="4bit", note=[].append)
    child = os.fork()
    if child == 0:
        from modernbert.retrieval.store import format as store_format

        left, before = [step], store_format.write_part

        def write(*arguments):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return before(*arguments)

        writer.write_part = store_format.write_part = write
        index([source], folder, colbert, dtype="4bit", note=[].append)
        os._exit(0)
    os.waitpid(child, 0)
    if not (folder / "store.json").exists():
        with pytest.raises(FileNotFoundError, match=r"resume with: modernbert index .* --dtype 4bit"):
            Store(folder, colbert)
    index([source], folder, colbert, dtype="4bit", note=[].append)
    found, wanted = content(folder / "shards"), content(calm / "shards")
    assert found == wanted


def test_codes_that_keep_too_little_are_refused_and_nothing_is_encoded_again(colbert, source, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "FEWEST", 1.01)
    folder = tmp_path / "store"
    with pytest.raises(ValueError, match=r"2bit keeps too little of these vectors of width 16: .* must"):
        index([source], folder, colbert, dtype="2bit")
    monkeypatch.setattr(type(colbert), "forward", None)
    index([source], folder, colbert)
    with Store(folder, small_model := colbert) as store:
        assert (store.dtype, len(store)) == ("fp16", len(store.passages(range(1, len(store) + 1))))
    assert small_model is colbert


def test_options_that_do_not_fit_are_refused(colbert, source, tmp_path):
    folder = tmp_path / "store"
    with pytest.raises(ValueError, match="dtype is '1bit'; it can be fp16, fp32, int8, 4bit, 2bit"):
        index([source], folder, colbert, dtype="1bit")
    few = write_corpus(tmp_path / "few.jsonl", corpus(3))
    with pytest.raises(ValueError, match="1,000 tokens at least"):
        index([few], folder, colbert, dtype="4bit")
    index([source], folder, colbert, dtype="4bit", pool=2, note=[].append)
    with pytest.raises(ValueError, match="holds 4bit, not 2bit: leave out the dtype"):
        index([source], folder, colbert, dtype="2bit")
    with pytest.raises(ValueError, match="pools 2 tokens, not 3: leave out the pool"):
        index([source], folder, colbert, pool=3)
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="pool_factor must be at least 1"):
            index([source], tmp_path / "other", colbert, pool=wrong)  # pyright: ignore[reportArgumentType]


def test_a_damaged_codec_is_found(colbert, source, tmp_path):
    index([source], tmp_path / "store", colbert, dtype="4bit", note=[].append)
    (path,) = (tmp_path / "store" / "shards").glob("codec-*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"codec-.* is damaged: its checksum does not match"):
        Store(tmp_path / "store", colbert)


def test_pooled_tokens(colbert, tmp_path):
    """The rows of `pool_tokens`, which is compared with PyLate elsewhere, and characters of a token of each cluster."""
    records = [record for i, record in enumerate(corpus(20)) if i % 7 != 3]
    source, folder = write_corpus(tmp_path / "corpus.jsonl", records), tmp_path / "store"
    index([source], folder, colbert, dtype="fp32", pool=3)
    exact = colbert.encode_documents([f"{record['title']} {record['text']}" for record in records])
    with Store(folder, colbert) as store:
        ((_, _, found),) = store.batches()
        for x_NE, pooled_NE in zip(exact, found, strict=True):
            torch.testing.assert_close(pooled_NE, pool_tokens(x_NE, 3), rtol=0, atol=1e-5)
        for hit in store.search(["owl and hail"])[0]:
            matches = store.explain("owl and hail", hit)
            assert abs(sum(one.contribution for one in matches) - hit.score) < 1e-4
            assert any(one.document for one in matches)
            for one in matches:
                assert one.document is None or hit.passage.content[slice(*one.document)].strip()
    # A later run pools as the store does.
    index([write_corpus(source, [*records, {"_id": "new", "text": "an owl and hail and ice"}])], folder, colbert)
    (new,) = colbert.encode_documents(["an owl and hail and ice"])
    with Store(folder, colbert) as store:
        *_, (_, _, found) = store.batches()
        torch.testing.assert_close(list(found)[-1], pool_tokens(new, 3), rtol=0, atol=1e-5)


def test_units_of_several_ranks_become_codes(colbert, source, tmp_path, monkeypatch):
    """Their parts are in float16, and the first rank codes them: a new store, and an update of it."""
    colbert.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(units, "UNIT", 4000)
    monkeypatch.setattr(Ranks, "is_alone", property(lambda self: False))
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value])
    monkeypatch.setattr(Ranks, "on_first", lambda self, work: work())
    notes: list[str] = []
    for documents in (90, 100):
        write_corpus(source, corpus(documents))
        ranks = Ranks()
        summary = index([source], tmp_path / "store", tmp_path / "model", dtype="4bit", ranks=ranks, note=notes.append)
        assert summary.documents == documents
    assert [note[:6] for note in notes] == ["4bit: "]
    with Store(tmp_path / "store", tmp_path / "model") as store:
        assert all(shard.codec for shard in store._files.shards.values())
        assert store.search(["owl and hail"])[0]
