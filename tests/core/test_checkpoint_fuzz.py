"""Broken checkpoint folders: a clear error or a right answer; no crash, no code that runs, no more memory than files.

Each folder is a good one with one to three changes, drawn by hypothesis from a fixed seed, and is loaded by a forked
process with limits on memory and time.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
import safetensors.torch
import tokenizers
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from modernbert import ColBERT, Encoder, Tokenizer, pack

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
TEXTS = ["How do I fold a tensor?", "the gradient of the norm; " * 3, ""]
EXAMPLES = 8  # of each change
MEMORY, WORK, CLOCK = 100 << 20, 5, 60  # bytes beyond the files', seconds of a processor, seconds

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")


# The process that loads


class Loader:
    """A forked process that loads folders one by one; when it dies, the next load has a new one."""

    def __init__(self, good: dict[str, Path]) -> None:
        self.good, self.child = good, 0

    def load(self, kind: str, folder: Path) -> dict[str, Any]:
        """What came of it: `died`, of which signal; or `error`; or `finite` and `difference` to the good vectors."""
        if not self.child:
            (asked, ask), (answer, answered) = os.pipe(), os.pipe()
            self.child = os.fork()
            if self.child == 0:
                os.close(ask)
                os.close(answer)
                with open(asked) as requests, open(answered, "w") as answers:
                    serve(self.good, requests, answers)
                os._exit(0)
            os.close(asked)
            os.close(answered)
            self.requests, self.answers = os.fdopen(ask, "w"), os.fdopen(answer)
        print(kind, folder, sep="\t", file=self.requests, flush=True)
        if line := self.answers.readline():
            return json.loads(line)
        code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        self.stop()
        return {"died": signal.Signals(-code).name if code < 0 else code}

    def stop(self) -> None:
        if self.child:
            self.requests.close()
            self.answers.close()
            self.child = 0


def status(field: str) -> int:
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) << 10 for row in rows if row.startswith(field))


def serve(good: dict[str, Path], requests: TextIO, answers: TextIO) -> None:
    right = {kind: encode(kind, folder) for kind, folder in good.items()}
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + (1 << 30),) * 2)
    for line in requests:
        kind, folder = line.rstrip("\n").split("\t")
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is used now
        before = status("VmHWM")
        signal.alarm(CLOCK)  # both signals end the process
        signal.setitimer(signal.ITIMER_PROF, WORK)
        result: dict[str, Any] = {}
        try:
            vectors = encode(kind, Path(folder))
            result["finite"] = all(bool(x.isfinite().all()) for x in vectors)
            pairs = list(zip(right[kind], vectors, strict=True))
            same_shape = all(x.shape == y.shape for x, y in pairs)
            result["difference"] = max(float((x - y).abs().max()) for x, y in pairs) if same_shape else None
        except BaseException as error:
            result["error"] = type(error).__name__
            result["words"], result["clear"] = str(error), isinstance(error, (ValueError, OSError))
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        result["memory"] = status("VmHWM") - before
        print(json.dumps(result), file=answers, flush=True)


@torch.inference_mode()
def encode(kind: str, folder: Path) -> list[torch.Tensor]:
    if kind.endswith("encoder"):
        return [Encoder.from_pretrained(folder)(pack([[1, 2, 3, 4], [5, 6]]))]
    colbert = ColBERT.from_pretrained(folder)
    return [colbert.encode_queries(TEXTS).values, colbert.encode_documents(TEXTS).values]


# Good folders


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A ColBERT and an encoder, their weights in one file, in shards, and pickled; ColBERTs in two other layouts."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("good")
    model = ColBERT.from_encoder(Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE), dim=24)
    model.save_pretrained(root / "colbert")
    model.encoder.save_pretrained(root / "encoder")
    for name in ("colbert", "encoder"):
        state = safetensors.torch.load_file(root / name / "model.safetensors")
        for way in ("pickled", "sharded"):
            shutil.copytree(root / name, root / f"{way} {name}")
            (root / f"{way} {name}" / "model.safetensors").unlink()
        torch.save(state, root / f"pickled {name}" / "pytorch_model.bin")
        shards = {f"model-{i}.safetensors": dict(list(state.items())[i::2]) for i in range(2)}
        for file, shard in shards.items():
            safetensors.torch.save_file(shard, root / f"sharded {name}" / file)
        index = {"weight_map": {key: file for file, shard in shards.items() for key in shard}}
        (root / f"sharded {name}" / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copytree(BACKBONE, root / "stanford")
    shutil.copytree(BACKBONE.parent / "cases" / "stanford", root / "stanford", dirs_exist_ok=True)
    for name in ("call.json", "golden.npz"):
        (root / "stanford" / name).unlink()
    native(root / "colbert", root / "native")
    return {path.name: path for path in root.iterdir()}


def native(pylate: Path, folder: Path) -> None:
    """The layout of sentence-transformers 6."""
    shutil.copytree(pylate, folder)
    (folder / "2_MultiVectorMask").mkdir()
    modules = [("", "Transformer"), ("1_Dense", "Dense"), ("2_MultiVectorMask", "MultiVectorMask")]
    expansion = {"strategy": "fixed", "attend": False, "token": None, "length": 16}
    content = {
        "modules.json": [{"path": path, "type": f"sentence_transformers.{kind}"} for path, kind in modules],
        "config_sentence_transformers.json": {
            "model_type": "MultiVectorEncoder",
            "prompts": {"document": "[D] ", "query": "[Q] "},
        },
        "sentence_bert_config.json": {"document_length": 40, "query_expansion": expansion},
        "2_MultiVectorMask/config.json": {"skiplist_words": ["!", "."], "skiplist_tasks": ["document"]},
    }
    for name, value in content.items():
        (folder / name).write_text(json.dumps(value))


@pytest.fixture(scope="module")
def loader(good: dict[str, Path]) -> Iterator[Loader]:
    loader = Loader(good)
    yield loader
    loader.stop()


# Changes: each is made to a folder with a function that draws, and may say what must come of it if it is the only one.

Draw = Callable[[st.SearchStrategy[Any]], Any]
SAME, REFUSED = "the same vectors", "a refusal"


def one(draw: Draw, choices: Any) -> Any:
    choices = list(choices)
    assume(choices)
    return draw(st.sampled_from(choices))


def pick(draw: Draw, folder: Path, ending: str = "") -> Path:
    """A file of the folder; not one that another change has made a link, or huge."""
    files = [path for path in sorted(folder.rglob(f"*{ending}")) if path.is_file() and not path.is_symlink()]
    return one(draw, [path for path in files if path.stat().st_size < 1 << 28])


def missing(draw: Draw, folder: Path) -> None:
    pick(draw, folder).unlink()


def empty(draw: Draw, folder: Path) -> None:
    pick(draw, folder).write_bytes(b"")


def truncated(draw: Draw, folder: Path) -> None:
    path = pick(draw, folder)
    os.truncate(path, draw(st.integers(0, max(path.stat().st_size - 1, 0))))


def longer(draw: Draw, folder: Path) -> None:
    """By a hole, of a size that a disk can take when another mutation copies it."""
    path = pick(draw, folder, ".safetensors")
    os.truncate(path, path.stat().st_size + one(draw, [1, 1 << 20, 1 << 27]))


def noise(draw: Draw, folder: Path) -> None:
    path = pick(draw, folder)
    path.write_bytes(draw(st.binary(min_size=8, max_size=64)) * (path.stat().st_size // 64 + 1))


def other_bytes(draw: Draw, folder: Path) -> None:
    path = pick(draw, folder)
    content = bytearray(path.read_bytes())
    assume(content)
    for _ in range(one(draw, [1, 1, 20])):
        content[draw(st.integers(0, len(content) - 1))] ^= one(draw, [1, 0x20, 0x80, 0xFF])
    path.write_bytes(content)


def exchanged(draw: Draw, folder: Path) -> None:
    first, second = pick(draw, folder), pick(draw, folder)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


# Links


def linked(draw: Draw, folder: Path) -> str:
    """Out of the folder, as everything is in the hub's cache."""
    path = one(draw, [pick(draw, folder), *(path for path in folder.iterdir() if path.is_dir())])
    there = folder.parent / f"{path.relative_to(folder)} of {folder.name}".replace("/", " ")
    assume(not there.exists() and not path.is_symlink())
    path.rename(there)
    path.symlink_to(there)
    return SAME


def strange(draw: Draw, folder: Path) -> str:
    """No file: a link to itself, to nowhere, to what has no end; a pipe without a writer; a folder."""
    path = pick(draw, folder)
    path.unlink()
    kind = one(draw, [path.name, "nowhere", "/dev/zero", "/dev/full", ".", "pipe", "folder"])
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)
    return REFUSED


# JSON

DEEP, LONG = "DEEP", "LONG"  # to be replaced in the written text
VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    2**31,
    2**40,
    2**63,
    10**400,
    1.5,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
]
VALUES += ["", "x", "..", "../../etc/passwd", "/etc/passwd", "\0", "\ud800", "x" * 1_000_000, DEEP, LONG]
VALUES += [[], {}, [[]], [None], [1, 2], {"": None}, {"content": 3}]


def document(draw: Draw, folder: Path) -> tuple[Path, Any]:
    path = pick(draw, folder, one(draw, [".json", ".json", ".metadata"]))
    content = None
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(path.read_text())
    assume(content and isinstance(content, (dict, list)))
    return path, content


def place(draw: Draw, content: Any) -> tuple[Any, Any]:
    """Somewhere in it: a dict or list, and a key."""
    while True:
        key = one(draw, content if isinstance(content, dict) else range(len(content)))
        inner = content[key]
        if not inner or not isinstance(inner, (dict, list)) or draw(st.booleans()):
            return content, key
        content = inner


def write(path: Path, content: Any) -> None:
    text = json.dumps(content)
    path.write_text(text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).replace(f'"{LONG}"', "9" * 5000))


def other_value(draw: Draw, folder: Path) -> None:
    path, content = document(draw, folder)
    holder, key = place(draw, content)
    holder[key] = one(draw, VALUES)
    write(path, content)


def other_top(draw: Draw, folder: Path) -> None:
    """The value of a key of the outermost object, where most of what we read is."""
    path, content = document(draw, folder)
    content[one(draw, content if isinstance(content, dict) else range(len(content)))] = one(draw, VALUES)
    write(path, content)


def other_document(draw: Draw, folder: Path) -> None:
    path, _ = document(draw, folder)
    write(path, one(draw, VALUES))


def without_key(draw: Draw, folder: Path) -> None:
    path, content = document(draw, folder)
    holder, key = place(draw, content)
    del holder[key]
    write(path, content)


def key_twice(draw: Draw, folder: Path) -> None:
    path, content = document(draw, folder)
    assume(isinstance(content, dict))
    key = one(draw, content)
    path.write_text(f'{{"{key}": {json.dumps(one(draw, VALUES))}, ' + json.dumps(content).lstrip("{"))


def unclosed(draw: Draw, folder: Path) -> str:
    path, _ = document(draw, folder)
    path.write_text(one(draw, ["[", '{"a":', '"']) * 100_000)
    return REFUSED


def no_utf8(draw: Draw, folder: Path) -> None:
    path, _ = document(draw, folder)
    text = path.read_bytes()
    mark = b"\xef\xbb\xbf"
    path.write_bytes(one(draw, [mark + text, text.decode().encode("utf-16"), text.replace(b'"', b'"\xff', 3)]))


def rewritten(draw: Draw, folder: Path) -> str:
    path, content = document(draw, folder)
    path.write_text(json.dumps(content, indent=one(draw, [None, 7]), sort_keys=True))
    return SAME


ABSURD = {
    "config.json": "num_hidden_layers hidden_size intermediate_size num_attention_heads vocab_size local_attention "
    "max_position_embeddings global_attn_every_n_layers pad_token_id norm_eps",
    "1_Dense/config.json": "in_features out_features activation_function bias use_residual",
    "config_sentence_transformers.json": "query_length document_length query_prefix skiplist_words prompts "
    "default_prompt_name do_query_expansion attend_to_expansion_tokens model_type",
    "tokenizer_config.json": "model_max_length truncation_side do_lower_case cls_token",
    "sentence_bert_config.json": "do_lower_case query_length document_length query_expansion",
    "2_MultiVectorMask/config.json": "skiplist_words skiplist_tasks keep_only_token_ids",
    "artifact.metadata": "query_maxlen doc_maxlen query_token_id attend_to_mask_tokens",
}
SIZES = [0, -1, 7, 2**24, 10**9, 2**31, 2**40, 2**62, 10**30, -(2**63), 0.5]


def absurd(draw: Draw, folder: Path) -> None:
    file = one(draw, [file for file in ABSURD if (folder / file).is_file()])
    content = None
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads((folder / file).read_bytes())
    assume(isinstance(content, dict))
    for _ in range(one(draw, [1, 2, 3])):
        content[one(draw, ABSURD[file].split())] = one(draw, SIZES + VALUES)
    write(folder / file, content)


def shard_outside(draw: Draw, folder: Path) -> str:
    return outside(draw, folder, "model.safetensors.index.json", "model-")


def module_outside(draw: Draw, folder: Path) -> str:
    return outside(draw, folder, "modules.json", "1_Dense")


def outside(draw: Draw, folder: Path, file: str, name: str) -> str:
    """What `file` names is moved to a place outside of the folder, and named there."""
    secret = folder.parent / f"secret {name} of {folder.name}"
    content = (folder / file).read_bytes() if (folder / file).is_file() else b""
    assume(name.encode() in content and not secret.exists())
    secret.mkdir()
    for path in [path for path in folder.iterdir() if path.name.startswith(name)]:
        path.rename(secret / path.name)
    prefix = one(draw, [f"../{secret.name}/", f"{secret}/", f"1_Dense/../../{secret.name}/", f"./../{secret.name}/"])
    (folder / file).write_bytes(content.replace(f'"{name}'.encode(), f'"{prefix}{name}'.encode()))
    return REFUSED


# safetensors

DTYPES = [
    "BOOL",
    "U8",
    "I8",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "F64",
    "I64",
    "U64",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "C64",
    "X",
]
SHAPES = [[], [0], [1], [2**32] * 3, [2**63], [2**64], [-1], [1.5], "x", None, [2**31, 2**31], [0, 2**62]]
OFFSETS = [[0, 0], [0, 4], [4, 0], [0, 2**63], [2**63, 2**64 - 1], [-4, 0], [0], "x", None]


def tensor_file(draw: Draw, folder: Path) -> tuple[Path, dict[str, Any], bytes]:
    path = pick(draw, folder, ".safetensors")
    content = path.read_bytes()
    header = None
    with contextlib.suppress(ValueError, RecursionError, struct.error):
        header = json.loads(content[8 : 8 + struct.unpack_from("<Q", content)[0]])
    assume(isinstance(header, dict) and all(isinstance(entry, dict) for entry in header.values()))
    return path, header, content[8 + struct.unpack_from("<Q", content)[0] :]


def write_tensors(path: Path, header: str, data: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header.encode()) if length is None else length) + header.encode() + data)


def header_entry(draw: Draw, folder: Path) -> None:
    path, header, data = tensor_file(draw, folder)
    entry = header[one(draw, set(header) - {"__metadata__"})]
    key, values = one(draw, [("dtype", DTYPES), ("shape", SHAPES), ("data_offsets", OFFSETS)])
    others = [other[key] for other in header.values() if key in other]
    turned = [entry["shape"][::-1], [*entry["shape"], 1], [entry["shape"], 1]] if key == "shape" else []
    entry[key] = one(draw, [*values, *turned, *others[:3]])
    write_tensors(path, json.dumps(header), data)


def header_length(draw: Draw, folder: Path) -> None:
    path, header, data = tensor_file(draw, folder)
    text = json.dumps(header)
    lengths = [0, 1, len(text) - 1, len(text) + 1, len(text + " ") + len(data), 2**31, 2**63, 2**64 - 1]
    write_tensors(path, text, data, one(draw, lengths))


def header_text(draw: Draw, folder: Path) -> None:
    path, header, data = tensor_file(draw, folder)
    name, text = one(draw, set(header) - {"__metadata__"}), json.dumps(header)
    twice = f'{{"{name}": {json.dumps(header[name])}, {text[1:]}'
    odd = [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        text[:-9],
        twice,
        text.replace(name, "\\ud800"),
        text.replace(":", ";", 9),
    ]
    write_tensors(path, one(draw, odd), data)


def huge_header(draw: Draw, folder: Path) -> None:
    path, header, data = tensor_file(draw, folder)
    header["__metadata__"] = {"format": "pt", "more": "x" * one(draw, [10_000_000, 30_000_000])}
    write_tensors(path, json.dumps(header), data)


def tensors(draw: Draw, folder: Path) -> str | None:
    """One tensor changed; the file is whole."""
    path = pick(draw, folder, one(draw, [".safetensors", ".bin"]))
    state = None
    with contextlib.suppress(Exception):
        read = safetensors.torch.load_file if path.suffix == ".safetensors" else torch.load
        state = {name: tensor.contiguous() for name, tensor in read(path).items()}
    assume(state)
    name = one(draw, state)
    change, verdict = one(draw, TENSORS)
    state = change(state, name)
    (safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return verdict


def poke(value: float) -> Callable[[dict[str, torch.Tensor], str], dict[str, torch.Tensor]]:
    def change(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
        tensor = state[name].clone()
        tensor.view(-1)[tensor.numel() // 3 :][:1] = value
        return state | {name: tensor}

    return change


TENSORS: list[tuple[Callable[[dict[str, torch.Tensor], str], dict[str, torch.Tensor]], str | None]] = [
    (poke(float("nan")), REFUSED),
    (poke(float("inf")), REFUSED),
    (poke(-float("inf")), REFUSED),
    (poke(3e38), REFUSED),
    (poke(-3.0), None),
    *(
        (lambda state, name, dtype=dtype: state | {name: state[name].to(dtype)}, verdict)
        for dtype, verdict in {
            torch.float64: SAME,
            torch.float16: None,
            torch.bfloat16: None,
            torch.float8_e4m3fn: None,
            torch.int64: REFUSED,
            torch.bool: REFUSED,
            torch.uint8: REFUSED,
            torch.complex64: REFUSED,
        }.items()
    ),
    (lambda state, name: state | {name: state[name].flatten()[:-1].clone()}, REFUSED),
    (lambda state, name: state | {name: state[name][None].clone()}, REFUSED),
    (lambda state, name: state | {name: state[name][:0].clone()}, REFUSED),
    (lambda state, name: {key: state[key] for key in state if key != name}, REFUSED),
    (lambda state, name: {key + "x" * (key == name): state[key] for key in state}, REFUSED),
    (lambda state, name: state | {"more": torch.zeros(3)}, REFUSED),
    (lambda state, name: {f"model.{key}": state[key] for key in state}, None),
    (lambda state, name: dict(reversed(list(state.items()))), None),
]


# Pickles


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


class Swollen:
    """Half a gigabyte when it is unpickled, with nothing but what torch allows."""

    def __reduce__(self) -> tuple[object, ...]:
        return bytearray, (5 * 10**8,)


def bomb(draw: Draw, folder: Path) -> str:
    path = pick(draw, folder, ".bin")
    danger = one(draw, [Bomb(folder.parent / "ran"), Swollen()])
    if draw(st.booleans()):
        path.write_bytes(pickle.dumps(danger, protocol=2))
    else:
        torch.save({"w": danger}, path, _use_new_zipfile_serialization=draw(st.booleans()))
    return REFUSED


def odd_tensor(draw: Draw, folder: Path) -> str | None:
    """What a pickle can hold and a safetensors file cannot."""
    path = pick(draw, folder, ".bin")
    with contextlib.suppress(Exception):
        state = torch.load(path)
        name = one(draw, state)
        tensor = state[name].float()
        change = one(
            draw,
            [
                lambda: torch.zeros(1).expand(tensor.shape),
                lambda: torch.zeros(1).expand(2**20, 2**20),
                lambda: tensor.to_sparse(),
                lambda: tensor.to("meta"),
                lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
                lambda: torch.nn.Parameter(tensor),
                lambda: torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.int64), torch.ones(1), (2**31, 2**31)),
                lambda: [tensor],
                lambda: {"w": tensor},
                lambda: 3,
            ],
        )
        torch.save(state | {one(draw, [name, 5]): change()}, path, _use_new_zipfile_serialization=draw(st.booleans()))


def zipped(draw: Draw, folder: Path) -> None:
    """Deflated, which torch never does; or with two gigabytes of zeros that take two megabytes."""
    path = pick(draw, folder, ".bin")
    entries: dict[str, bytes] = {}
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    assume(entries)
    large = one(draw, [None, None, *[name for name in entries if name.endswith(("data.pkl", "data/0"))]])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, content in entries.items():
            with file.open(name, "w", force_zip64=True) as entry:
                entry.write(content)
                for _ in range(256 if name == large else 0):
                    entry.write(bytes(1 << 20))


FILES = [missing, empty, truncated, longer, noise, other_bytes, exchanged, linked, strange]
JSON = [
    other_value,
    other_top,
    other_document,
    without_key,
    key_twice,
    unclosed,
    no_utf8,
    rewritten,
    absurd,
    module_outside,
    shard_outside,
]
WEIGHTS = [header_entry, header_length, header_text, huge_header, tensors]
PICKLES = [bomb, odd_tensor, zipped]
CHANGES = [*FILES, *JSON, *WEIGHTS, *PICKLES]
NEEDS = dict.fromkeys(PICKLES, "pickled") | {shard_outside: "sharded", module_outside: "colbert"}  # in a kind's name


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_broken_folder(
    change: Callable[..., str | None], good: dict[str, Path], loader: Loader, tmp_path: Path
) -> None:
    count = iter(range(10**6))

    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        kind = data.draw(st.sampled_from([kind for kind in sorted(good) if NEEDS.get(change, "") in kind]))
        folder = tmp_path / str(next(count))
        shutil.copytree(good[kind], folder)
        changes = [change, *data.draw(st.lists(st.sampled_from(CHANGES), max_size=2))]
        verdicts = [each(data.draw, folder) for each in changes]
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        result = loader.load(kind, folder)
        story = f"{kind}, {[each.__name__ for each in changes]}: {result} in {folder}"
        assert "died" not in result, story
        assert not (tmp_path / "ran").exists(), story
        assert result["memory"] <= MEMORY + size, story
        if "error" in result:
            assert result["clear"], story
            assert result["words"], story
            assert verdicts != [SAME], story
        else:
            assert result["finite"], story
            assert verdicts != [REFUSED], story
            assert verdicts != [SAME] or result["difference"] == 0, story
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    check()


# What was found, by this and by looking: where, what is put there, and what is then said


CONFIG, DENSE, SETTINGS = "config.json", "1_Dense/config.json", "config_sentence_transformers.json"
TOKENS, TOKEN_CONFIG = "tokenizer.json", "tokenizer_config.json"
FOUND = [
    ("encoder", CONFIG, "num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, but"),
    ("encoder", CONFIG, "hidden_size", 2**40, "hidden_size is 1099511627776, but"),
    ("encoder", CONFIG, "global_attn_every_n_layers", 10**9, "global_attn_every_n_layers is 1000000000, but"),
    ("encoder", CONFIG, "global_rope_theta", 1e-300, "rope_theta is 1e-300, but"),
    ("encoder", CONFIG, "", DEEP, "config.json is not valid JSON: maximum recursion"),
    ("colbert", SETTINGS, "", [], "sentence_transformers.json holds list"),
    ("colbert", SETTINGS, "query_length", "32", "query_length is '32', but must be a whole number"),
    ("colbert", SETTINGS, "skiplist_words", 3, "skiplist_words is 3, but must be a list"),
    ("colbert", SETTINGS, "skiplist_words", ["\ud800"], r"skiplist_words is \['\\ud800'\], but must be a list"),
    ("colbert", SETTINGS, "prompts", ["[Q] "], "prompts is .*, but must be a JSON object"),
    (
        "native",
        SETTINGS,
        "prompts/query",
        "x" * 1_000_000,
        "query is 'xxx.*, but must be a text of at most|a short text",
    ),
    (
        "native",
        "sentence_bert_config.json",
        "query_expansion/length",
        100_000,
        "expanded to 100000 tokens, beyond max_pos",
    ),
    ("stanford", "artifact.metadata", "query_maxlen", 100_000, "expanded to 100000 tokens, beyond max_position_emb"),
    ("colbert", "modules.json", "1", "1_Dense", "modules.json: a module is '1_Dense', but must be a JSON object"),
    ("colbert", DENSE, "in_features", None, "1_Dense/config.json: in_features is None, but"),
    ("colbert", DENSE, "activation_function", "torch.nn.modules.transformer.Transformer", "is not one of .* Identity"),
    ("colbert", TOKENS, "normalizer", {"type": "Precompiled"}, "tokenizer.json is damaged, or too new"),
    ("colbert", TOKENS, "post_processor/single/2/SpecialToken/id", "[GONE]", "tokenizer.json is damaged, or too new"),
    (
        "colbert",
        TOKENS,
        "post_processor/special_tokens/[SEP]/ids",
        [9999],
        "has id 9999, but the encoder only 503 tokens",
    ),
    ("colbert", TOKENS, "model/vocab/a", 9999, "the tokenizer has id 9999, but the encoder only 503 tokens"),
    ("colbert", TOKENS, "model/continuing_subword_prefix", "BPE", "tokenizer.json is damaged, or too new"),
    ("colbert", TOKEN_CONFIG, "model_max_length", "512", "model_max_length is '512', but must be"),
    ("colbert", TOKEN_CONFIG, "cls_token", ["[CLS]"], r"cls_token is \['\[CLS\]'\], but must be"),
    (
        "sharded encoder",
        "model.safetensors.index.json",
        "weight_map/final_norm.weight",
        3,
        "points to 3, which is not a file",
    ),
]


@pytest.mark.parametrize(("kind", "file", "place", "value", "words"), FOUND, ids=range(len(FOUND)))
def test_a_mended_json(
    kind: str, file: str, place: str, value: Any, words: str, good: dict[str, Path], loader: Loader, tmp_path: Path
) -> None:
    folder = shutil.copytree(good[kind], tmp_path / "model")
    content = holder = json.loads((folder / file).read_text())
    *path, last = [int(key) if key.isdecimal() else key for key in place.split("/")]
    for key in path:
        holder = holder[key]
    holder[last] = value
    write(folder / file, content if place else value)
    result = loader.load(kind, folder)
    assert re.search(words, result.get("words", "")), result
    assert result["clear"], result
    assert result["memory"] < MEMORY, result


def deflated(folder: Path) -> None:
    """Mapped into memory as they are, compressed bytes would be taken for numbers."""
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(name, content)


def headless(folder: Path) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    del state["linear.weight"]
    safetensors.torch.save_file(state, folder / "model.safetensors")


def other_width(folder: Path) -> None:
    (folder / DENSE).write_text((folder / DENSE).read_text().replace("64", "32"))
    safetensors.torch.save_file({"linear.weight": torch.zeros(24, 32)}, folder / "1_Dense" / "model.safetensors")


def endless_pattern(folder: Path) -> None:
    """A hundred thousand layers, of which only the last differs: the search for a period would not end."""
    config = json.loads((folder / CONFIG).read_text()) | {"global_attn_every_n_layers": None}
    (folder / CONFIG).write_text(
        json.dumps(config | {"layer_types": ["full_attention"] * 99_999 + ["sliding_attention"]})
    )


def long_json(folder: Path) -> None:
    """36 MB of text, and 800 MB of lists."""
    (folder / SETTINGS).write_text('{"a": [' + "[]," * 12_000_000 + "[]]}")


def pickled(key: object, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "pytorch_model.bin"
        torch.save(torch.load(path) | {key: value}, path)

    return change


def dangling(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("nowhere")

    return change


def test_a_text_that_the_vocabulary_cannot_hold() -> None:
    """The tokenizers library raises a plain Exception for it."""
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[GONE]")))
    with pytest.raises(ValueError, match=r"tokenizer\.json contradicts itself, and cannot tokenise"):
        tokenizer("b")


NO_FILE = "is not a file, or is a broken link"
MENDED = {
    "an endless pattern": ("encoder", endless_pattern, "layer_types is .* but must be a list of 1 to 1,000"),
    "a long json": ("colbert", long_json, "36,000,011 bytes; JSON files of at most 33,554,432 bytes are read"),
    "compressed": ("pickled encoder", deflated, "it is compressed, so that it cannot be mapped"),
    "an array": ("pickled encoder", pickled("w", Swollen()), r"it calls \['__builtin__ bytearray'\]"),
    "a repeated view": ("pickled encoder", pickled("w", torch.zeros(1).expand(2**20, 2**20)), "is not a state dict"),
    "a number for a name": ("pickled encoder", pickled(5, torch.zeros(1)), "is not a state dict"),
    "a tensor without data": ("pickled encoder", pickled("w", torch.zeros(2, device="meta")), "it calls"),
    "another width": ("colbert", other_width, "a Dense takes 32 features, but is given 64"),
    "a head without a matrix": ("stanford", headless, "has no matrix linear.weight"),
    "settings that lead nowhere": ("colbert", dangling(SETTINGS), NO_FILE),
    "lower-casing that leads nowhere": ("colbert", dangling("sentence_bert_config.json"), NO_FILE),
    "metadata that lead nowhere": ("stanford", dangling("artifact.metadata"), NO_FILE),
    "weights that lead nowhere": ("encoder", dangling("model.safetensors"), NO_FILE),
}


@pytest.mark.parametrize("name", MENDED)
def test_a_mended_file(name: str, good: dict[str, Path], loader: Loader, tmp_path: Path) -> None:
    kind, change, words = MENDED[name]
    folder = shutil.copytree(good[kind], tmp_path / "model")
    change(folder)
    result = loader.load(kind, folder)
    assert re.search(words, result.get("words", "")), result
    assert result["clear"], result
    assert result["memory"] < MEMORY, result
