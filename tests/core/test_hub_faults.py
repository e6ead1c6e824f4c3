"""Checkpoints from a hub on 127.0.0.1: what is asked, cached and refused, and all that can go wrong on the way."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hub_server import Fault, HubServer, Repository
from huggingface_hub import constants, errors, hf_hub_download, snapshot_download
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from modernbert import ColBERT, Tokenizer
from modernbert.checkpoint import locate

ROOT = Path(__file__).parents[2]
COMMIT, LATER = "a" * 40, "b" * 40


def run(code: str, *arguments: object, **environment: str) -> str:
    """Run Python in a process of its own; what it prints."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Without faults, in processes of their own


# Downloads what each item of a JSON list of arguments says; prints what came of it. As `locate`, but without torch.
DOWNLOAD = """
    import hashlib, json, sys
    from modernbert.hub import download

    usual = {"only": None, "revision": None, "token": None, "cache_dir": None, "local_files_only": False}
    for arguments in json.loads(sys.argv[1]):
        try:
            folder = download(**{**usual, **arguments})
        except Exception as error:
            print(json.dumps([type(error).__name__, str(error)]), flush=True)
        else:
            digests = {
                path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in folder.rglob("*")
                if path.is_file()
            }
            print(json.dumps([folder.name, digests]), flush=True)
"""


def download_elsewhere(home: Path, endpoint: str, calls: list[dict], **environment: str) -> list[tuple[str, object]]:
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}
    return [tuple(json.loads(line)) for line in run(DOWNLOAD, json.dumps(calls), **environment).splitlines()]


def digests(files: dict[str, bytes], *left_out: str) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name not in left_out}


WEIGHTS = safetensors.torch.save({"w": torch.arange(6.0)})
MAIN, OLD, PICKLED, GATED, BIG = (letter * 40 for letter in "abcde")
FILES = {
    "config.json": b'{"now": 1}',
    "modules.json": b"[]",
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "1_Dense/config.json": b'{"in_features": 3}',
    "1_Dense/model.safetensors": WEIGHTS + b" ",
    "README.md": b"# Card",
    "pytorch_model.bin": b"pickled",
    "onnx/config.json": b"{}",
    "onnx/model.onnx": b"graph",
    "consolidated.safetensors": b"once more",
}
NOT_NEEDED = (
    "README.md",
    "pytorch_model.bin",
    "onnx/config.json",
    "onnx/model.onnx",
    "consolidated.safetensors",
)
OLD_FILES = {"config.json": b'{"now": 0}', "model.safetensors": safetensors.torch.save({"w": torch.zeros(1)})}
GATED_FILES = {"config.json": b"{}", "model.safetensors": safetensors.torch.save({"w": torch.ones(1)})}
PICKLED_FILES = {"config.json": b"{}", "pytorch_model.bin": b"pickled", "training_args.bin": b"more"}
BIG_FILES = {"config.json": b"{}", "model.safetensors": safetensors.torch.save({"w": torch.zeros(6_000_000)})}


def test_the_hub(tmp_path: Path) -> None:
    """Processes with one cache: the hub asked (it breaks off once), asked again, gone, offline by choice."""
    repositories = {
        "own/model": Repository({MAIN: FILES, OLD: OLD_FILES}, {"main": MAIN, "v1": OLD}),
        "own/pickled": Repository({PICKLED: PICKLED_FILES}, {"main": PICKLED}),
        "own/gated": Repository({GATED: GATED_FILES}, {"main": GATED}, token="hf_secret"),
        "own/big": Repository({BIG: BIG_FILES}, {"main": BIG}),
    }
    wanted, old, gated = (
        (MAIN, digests(FILES, *NOT_NEEDED)),
        (OLD, digests(OLD_FILES)),
        (GATED, digests(GATED_FILES)),
    )
    pickled, big = (PICKLED, digests(PICKLED_FILES, "training_args.bin")), (BIG, digests(BIG_FILES))
    with HubServer(repositories, [Fault("GET /store", cut=12_000_000)]) as hub:
        calls = [
            {"name": "own/big"},
            {"name": "own/model"},
            {"name": "own/model", "revision": "v1"},
            {"name": "own/model", "revision": OLD},
            {"name": "own/pickled"},
            {"name": "own/gated", "token": "hf_secret", "cache_dir": str(tmp_path / "other")},
            {"name": "own/model", "revision": "v2"},
            {"name": "own/absent"},
            {"name": "../own/model"},
            {"name": "own/gated", "local_files_only": True},
            {"name": "own/gated"},
            {"name": "own/gated", "token": "hf_wrong"},
        ]
        found = download_elsewhere(tmp_path, hub.url, calls)
        assert found[:6] == [big, wanted, old, old, pickled, gated]
        assert (tmp_path / "other" / "models--own--gated").is_dir()
        assert [kind for kind, _ in found[6:]] == ["FileNotFoundError"] * 4 + ["PermissionError"] * 2
        no_revision, no_repository, no_name, not_cached, no_token, wrong_token = (str(text) for _, text in found[6:])
        assert no_revision.startswith("'own/model' at revision 'v2' is not a local folder")
        assert "Revision Not Found" in no_revision
        assert no_repository.startswith("'own/absent' is not a local folder")
        assert "if it is private, log in" in no_repository
        assert no_name.startswith("'../own/model' is not a local folder")
        assert not_cached.startswith("'own/gated' is not a local folder")
        for message in (no_token, wrong_token):
            assert message.startswith("'own/gated' is gated: accept its terms, then log in")
        downloads = [request for request in hub.requests if request.startswith("GET /store/")]
        resumed = [request for request in downloads if " bytes=" in request]
        assert len(resumed) == 1
        assert 0 < int(resumed[0].split("=")[1].rstrip("-")) < len(BIG_FILES["model.safetensors"])
        assert len(downloads) == len(set(downloads)) == 1 + 6  # weights and one Dense, old, pickled, gated, big

        hub.requests.clear()
        calls = [
            {"name": "own/model"},
            {"name": "own/model", "revision": "v1", "local_files_only": True},
            {"name": "own/pickled", "local_files_only": True},
            {"name": "own/gated"},
        ]
        assert download_elsewhere(tmp_path, hub.url, calls, HF_TOKEN="hf_secret") == [
            wanted,
            old,
            pickled,
            gated,
        ]
        downloads = [request for request in hub.requests if request.startswith("GET /store/")]
        assert len(downloads) == 1  # of the gated one: the stored token opened it
        assert not any("own/pickled" in request for request in hub.requests)

    calls += [{"name": "own/absent"}]
    for environment, error in (({}, "OSError"), ({"HF_HUB_OFFLINE": "1"}, "FileNotFoundError")):
        found = download_elsewhere(tmp_path, hub.url, calls, **environment)
        assert found[:4] == [wanted, old, pickled, gated]
        assert found[4][0] == error


# With faults, in this process


NAMES = ("1_Dense/config.json", "1_Dense/model.safetensors", "config.json", "model.safetensors", "modules.json")
NAMES += ("tokenizer.json", "tokenizer_config.json")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def page(content: bytes) -> bytes:
    return b"<html>Please log in to this network</html>"


@dataclass
class Client:
    """`locate` with a hub and a cache of its own, and a clock on which sleeping takes no time.

    `waits` are the seconds slept by the call before.
    """

    hub: HubServer
    waits: list[float] = field(default_factory=list)
    slept: float = 0.0

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.slept += seconds

    def add(self, name: str, faults: list[Fault]) -> dict[str, bytes]:
        """A repository with files like no other's, and faults; in these, {weights} stands for its file's address."""
        size = {"model.safetensors": 10_000}
        files = {file: f"{name} {file} ".encode() * size.get(file, 1) for file in NAMES}
        self.hub.repositories[name] = Repository({COMMIT: files}, {"main": COMMIT})
        for fault in faults:
            fault.at = fault.at.format(name=name, weights=f"/store/{sha256(files['model.safetensors'])}")
        self.hub.faults += faults
        return files

    def ask(self, name: str, **options: object) -> dict[str, bytes] | OSError | ValueError:
        """The files, or the error; one of another kind fails the test."""
        self.waits.clear()
        self.hub.requests.clear()
        try:
            folder = locate(name, **options)
        except (OSError, ValueError) as error:
            return error
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what is lost of a file when the line breaks
    disable_progress_bars()
    with HubServer({}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        address = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        client = Client(hub)
        real = time.monotonic
        monkeypatch.setattr(time, "sleep", client.sleep)
        monkeypatch.setattr(time, "monotonic", lambda: real() + client.slept)
        yield client
    enable_progress_bars()


LIST, WEIGHTS = "GET /api/models/{name}$", "GET {weights}"
METADATA, JSON = "HEAD /{name}/.*/modules.json", "GET .*/{name}/.*/modules.json"
SIZE = "HEAD /{name}/resolve/[^/]+/model.safetensors"

# What goes wrong and is overcome, and the seconds waited where that is our own doing.
OVERCOME: dict[str, tuple[list[Fault], list[int] | None]] = {
    "nothing": ([], []),
    "three cuts in the weights": ([Fault(WEIGHTS, 3, cut=50_000)], None),
    "a cut in a json": ([Fault(JSON, cut=3)], None),
    "a stall in the weights": ([Fault(WEIGHTS, pause=1.3, piece=200_000)], None),
    "a stall before a json": ([Fault(METADATA, pause=1.3)], None),
    "a json, two bytes at a time": ([Fault(JSON, pause=0.05, piece=2)], []),
    "a range ignored": ([Fault(WEIGHTS, cut=50_000), Fault(WEIGHTS + " bytes", ignore_range=True)], None),
    "list: 500 twice": ([Fault(LIST, 2, status=500)], [1, 2]),
    "list: 429 for 3 s": ([Fault(LIST, status=429, headers={"Retry-After": "3"})], [3]),
    "list: 503 until a date": ([Fault(LIST, status=503, headers={"Retry-After": "Wed, 21 Oct 2026"})], [1]),
    "metadata: 500 thrice": ([Fault(METADATA, 3, status=500)], None),
    "metadata: 429 for 2 s": ([Fault(METADATA, 2, status=429, headers={"Retry-After": "2"})], None),
    "weights: 500 twice": ([Fault(WEIGHTS, 2, status=500)], [1, 2]),
    "weights: 429 for 2 s": ([Fault(WEIGHTS, 2, status=429, headers={"Retry-After": "2"})], None),
    "another byte in the weights": ([Fault(WEIGHTS, body=flipped)], []),
    "another byte in a json": ([Fault(JSON, body=flipped)], []),
    "a page for a json": ([Fault(JSON, body=page)], []),
    "a wrong size": ([Fault(SIZE, headers={"X-Linked-Size": "77"})], []),
    "more promised than comes": ([Fault(WEIGHTS, headers={"Content-Length": "9000000"})], None),
}


def test_faults_that_are_overcome(client: Client) -> None:
    """The right bytes come; asked again, only the list is."""
    for name, (faults, waits) in OVERCOME.items():
        repository = f"own/{name.translate(str.maketrans(' ', '-', ':,'))}"
        files = client.add(repository, faults)
        assert client.ask(repository) == files, name
        assert waits is None or client.waits == waits, (name, client.waits)
        assert not any(fault.times for fault in faults), f"{name}: this did not happen"
        assert client.ask(repository) == files, name
        assert client.hub.requests == [f"GET /api/models/{repository}"], name


# What goes wrong for good, and its message.
REFUSED: dict[str, tuple[list[Fault], str]] = {
    "weights that never begin": ([Fault(WEIGHTS, inf, cut=0)], ""),
    "resets in the weights": ([Fault(WEIGHTS, inf, cut=50_000, reset=True)], ""),
    "a cut list": ([Fault(LIST, inf, cut=9)], ""),
    "a silent list": ([Fault(LIST, inf, pause=3)], "timed out"),
    "a page for the list": ([Fault(LIST, inf, body=page)], ""),
    "another list": ([Fault(LIST, inf, body=lambda _: b'[{"siblings": 3}]')], ""),
    "a path for the commit": ([Fault(LIST, inf, body=lambda b: b.replace(COMMIT.encode(), b"../x"))], r"'\.\./x'"),
    "a path out of the cache": (
        [Fault("models/{name}$", inf, body=lambda b: b.replace(b"modules.json", b"../../x.json"))],
        "",
    ),
    "list: 503": ([Fault(LIST, inf, status=503)], "503"),
    "list: 429 for 60 s": ([Fault(LIST, inf, status=429, headers={"Retry-After": "60"})], "again in 60 s"),
    "list: 418": ([Fault(LIST, inf, status=418)], "418"),
    "weights: 500": ([Fault(WEIGHTS, inf, status=500)], "500"),
    "weights: 404": ([Fault(WEIGHTS, inf, status=404)], "404"),
    "metadata: 503": ([Fault(METADATA, inf, status=503)], "503"),
    "metadata: 418": ([Fault(METADATA, inf, status=418)], "418"),
    "a redirect in a circle": ([Fault(METADATA, inf, status=307, headers={"Location": "modules.json"})], ""),
    "another byte in the weights": ([Fault(WEIGHTS, inf, body=flipped)], r"/?model\.safetensors came twice"),
    "another byte in a json": ([Fault(JSON, inf, body=flipped)], r"modules\.json came twice"),
    "a page for a json": ([Fault(JSON, inf, body=page)], ""),
    "less promised than comes": ([Fault(WEIGHTS, inf, headers={"Content-Length": "9000"})], ""),
    "a wrong size": ([Fault(SIZE, inf, headers={"X-Linked-Size": "77"})], "size 77"),
}


def test_faults_without_an_end(client: Client) -> None:
    """One error that says what failed and what to do; nothing that loads; and the next run goes on from there."""
    for name, (faults, words) in REFUSED.items():
        repository = f"own/{name.translate(str.maketrans(' ', '-', ':,'))}"
        files = client.add(repository, faults)
        error = client.ask(repository)
        assert type(error) is OSError, name
        assert "\n" not in str(error), name
        with pytest.raises(
            OSError, match=f"^'{repository}' is not a local folder, and the download failed; try again, .*{words}"
        ):
            raise error
        assert sum(client.waits) <= 30, name
        assert isinstance(client.ask(repository, local_files_only=True), FileNotFoundError), name
        cached = Path(constants.HF_HUB_CACHE).glob(f"*{repository.partition('/')[2]}/snapshots/*/**/*")
        kept = {path.name: path.read_bytes() for path in cached if path.is_file()}
        assert set(kept.values()) <= set(files.values()), name

        for fault in faults:
            fault.times = 0
        assert client.ask(repository) == files, name
        again = {request.rpartition("/")[2] for request in client.hub.requests if request.startswith("HEAD")}
        assert not again & {*kept} - {"model.safetensors", "config.json"}, name  # which are in two folders
        assert client.ask(repository, local_files_only=True) == files, name
        if faults[0].at.startswith(LIST.format(name=repository)):  # the cache is complete: it serves at once
            faults[0].times = inf
            assert client.ask(repository) == files, name
            assert client.waits == [], name
        client.hub.faults.clear()


@pytest.mark.parametrize("place", ["inner", "a/b", "checkpoint-500", "onnx"])
def test_a_model_in_a_subfolder(client: Client, place: str, tmp_path: Path) -> None:
    """Only its files are downloaded, also to another cache; offline, the branch is known."""
    files = client.add("own/nested", [])
    outer = {"config.json": b"{}", "model.safetensors": b"of another model", "tokenizer.json": b"{}"}
    content = outer | {f"{place}/{file}": text for file, text in files.items()}
    client.hub.repositories["own/nested"] = Repository({COMMIT: content}, {"main": COMMIT})
    for options in ({"subfolder": place}, {"subfolder": f"./{place}/", "cache_dir": tmp_path / "other"}):
        assert client.ask("own/nested", **options) == files
        asked = {request.partition(f"/{COMMIT}/")[2] for request in client.hub.requests if COMMIT in request}
        assert asked == {f"{place}/{file}" for file in files}
        assert client.ask("own/nested", **options, local_files_only=True) == files
    missing = client.ask("own/nested", subfolder="elsewhere")
    assert "the repository has no elsewhere/config.json" in str(missing)
    assert isinstance(client.ask("own/nested", subfolder="elsewhere", local_files_only=True), FileNotFoundError)
    assert isinstance(client.ask("own/nested", subfolder=".."), ValueError)


def test_a_branch_that_moves_during_the_download(client: Client) -> None:
    """All files are of the commit that was listed; the next run has all files of the other."""
    repository = Repository({COMMIT: client.add("own/moves", []), LATER: client.add("own/later", [])}, {"main": COMMIT})
    client.hub.repositories["own/moves"] = repository
    client.hub.faults.append(Fault("GET /api/models/own/moves$", then=lambda: repository.refs.update(main=LATER)))
    assert client.ask("own/moves") == repository.commits[COMMIT]
    assert client.ask("own/moves", local_files_only=True) == repository.commits[COMMIT]
    assert client.ask("own/moves") == repository.commits[LATER]
    assert client.ask("own/moves", local_files_only=True) == repository.commits[LATER]


def test_a_broken_off_update_leaves_the_older_commit(client: Client) -> None:
    """Offline, the branch is still the commit that is complete."""
    old, new = client.add("own/old", []), client.add("own/new", [])
    repository = Repository({COMMIT: old, LATER: new}, {"main": COMMIT})
    client.hub.repositories["own/updated"] = repository
    assert client.ask("own/updated") == old
    repository.refs["main"] = LATER
    client.hub.faults.append(Fault("HEAD /own/updated/.*/tokenizer.json", inf, status=404))
    assert isinstance(client.ask("own/updated"), OSError)
    assert client.ask("own/updated", local_files_only=True) == old
    assert isinstance(client.ask("own/updated", revision=LATER, local_files_only=True), FileNotFoundError)
    del repository.refs["main"]  # a hub that answers so is not out of reach
    assert "Revision Not Found" in str(client.ask("own/updated"))


@pytest.mark.skipif(not hasattr(errors, "IncompleteSnapshotError"), reason="the client keeps no list of files")
def test_what_another_program_left_incomplete(client: Client) -> None:
    files = client.add("own/left", [])
    folder = Path(snapshot_download("own/left"))
    assert client.ask("own/left", local_files_only=True) == files
    (folder / "tokenizer_config.json").unlink()
    assert "is incomplete" in str(client.ask("own/left", local_files_only=True))
    assert client.ask("own/left") == files


def test_models_of_the_hub(client: Client) -> None:
    """A tokenizer comes without weights, a ColBERT with all; what has come damaged or half never loads."""
    folder = ROOT / "modernbert" / "assets" / "default"
    content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    repository = client.hub.repositories["own/default"] = Repository({COMMIT: content}, {"main": COMMIT})
    hf_hub_download("own/default", "config.json")  # as AutoConfig of transformers does
    with pytest.raises(FileNotFoundError, match=r"'own/default': a download was interrupted.*load it again"):
        ColBERT.from_pretrained("own/default", local_files_only=True)

    texts, want = ["Where does a cell get its energy?", "[CLS] <|padding|> ß"], ColBERT.default()
    client.hub.requests.clear()
    tokenizer = Tokenizer.from_pretrained("own/default")
    assert tokenizer(texts).input_ids.tolist() == want.tokenizer(texts).input_ids.tolist()
    assert not any("safetensors" in request or "/store/" in request for request in client.hub.requests)
    with pytest.raises(FileNotFoundError, match="'own/default': a download was interrupted"):
        ColBERT.from_pretrained("own/default", local_files_only=True)

    for name in ("1_Dense/model.safetensors", "model.safetensors"):
        client.hub.faults.append(Fault(f"/store/{sha256(content[name])}", inf, body=flipped))
        with pytest.raises(OSError, match=f"{name} came twice with other content"):
            ColBERT.from_pretrained("own/default")
        client.hub.faults.clear()
        with pytest.raises(FileNotFoundError, match="'own/default': a download was interrupted"):
            ColBERT.from_pretrained("own/default", local_files_only=True)
    for offline in (False, True):
        got = ColBERT.from_pretrained("own/default", local_files_only=offline).encode_queries(texts)
        assert torch.equal(got.values, want.encode_queries(texts).values)

    del content["config.json"]
    repository.commits[LATER], repository.refs["main"] = content, LATER
    with pytest.raises(FileNotFoundError, match=r"the repository has no config\.json, so it is not a checkpoint"):
        ColBERT.from_pretrained("own/default")


# Crashes

# For each step: the files and the error's name that come of a download that ends at this operation on files or
# sockets, then of one without the hub, then of one with it. Until a download gets through.
CRASH = """
    import hashlib, json, os, sys
    from modernbert.hub import download

    def outcome(step, offline, end):
        read, write = os.pipe()
        if os.fork() == 0:
            def count(event, _):
                nonlocal end
                end -= event.split(".")[0] in ("open", "os", "shutil", "socket")
                if end == 0:
                    os._exit(9)

            sys.addaudithook(count)
            try:
                usual = {"only": None, "revision": None, "token": None, "cache_dir": None}
                folder = download(f"own/crash-{step}", local_files_only=offline, **usual)
                paths = [path for path in folder.rglob("*") if path.is_file()]
                result = {path.relative_to(folder).as_posix(): path.read_text() for path in paths}
            except Exception as error:
                result = type(error).__name__
            os.write(write, json.dumps(result).encode())
            os._exit(0)
        os.close(write)
        with open(read, "rb") as pipe:
            return json.loads(pipe.read() or "null")

    for step in range(*map(int, sys.argv[1:])):
        crashed = outcome(step, False, step)
        print(json.dumps([step, crashed, outcome(step, True, 0), outcome(step, False, 0)]))
        if crashed:
            break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_crash_during_the_download(tmp_path: Path) -> None:
    """Whenever it comes: offline, nothing incomplete loads; online, all is right after it, damaged weights too."""
    steps = range(5, 1000, 12)
    names = ["config.json", "model.safetensors", "modules.json", "tokenizer.json"]
    files = {step: {name: f"{step} {name} " * 50 for name in names} for step in steps}
    hub = HubServer({})
    for step, texts in files.items():
        content = {name: text.encode() for name, text in texts.items()}
        hub.repositories[f"own/crash-{step}"] = Repository({COMMIT: content}, {"main": COMMIT})
        hub.faults.append(Fault(f"GET /store/{sha256(content['model.safetensors'])}", body=flipped))
    with hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1,localhost"}
        lines = run(CRASH, steps.start, steps.stop, steps.step, HF_HUB_DISABLE_PROGRESS_BARS="1", **environment)
    results = [json.loads(line) for line in lines.splitlines()]
    assert len(results) > 10
    for step, crashed, offline, online in results:
        assert crashed in (None, files[step])
        assert offline in ("FileNotFoundError", files[step])
        assert online == files[step]
    assert results[-1][1] == files[results[-1][0]], "no download got through"
