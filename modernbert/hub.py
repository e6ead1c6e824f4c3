"""Download a checkpoint of the Hugging Face hub to the cache that all of Hugging Face's libraries share.

The client, `huggingface_hub`, follows redirects, resumes, locks and caches. This file adds what it leaves to its
callers: each file is compared with the hub's list, requests to a busy hub are repeated, and an incomplete download is
not accepted as a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import filter_repo_objects

from .files import replacing

T = TypeVar("T")

# The files of a repository that loading can need; a module of a retriever (1_Dense) has a folder of its own.
FILES = ("*.json", "artifact.metadata", "*.txt", "model*.safetensors", "[0-9]*_*/model*.safetensors")
OTHERS = ("onnx/*", "openvino/*", "checkpoint-*/*")
# Downloaded last, after everything else is verified: a folder without them is incomplete and is never loaded.
LAST = ("tokenizer.json", "config.json")

BUSY = (408, 429, 500, 502, 503, 504)
WAITS = (1, 2, 4)  # seconds before the second, third and fourth request to a busy hub
PATIENCE = 20  # seconds after which a request is not repeated: the client has already repeated some of them


def download(
    name: str,
    *,
    only: Sequence[str] | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
    subfolder: str = "",
) -> Path:
    """The folder of the cache that holds `name` at `revision`; see `checkpoint.locate` for arguments and errors."""
    where = repr(name) + (f" at revision {revision!r}" if revision else "")
    login = "log in with `hf auth login` or pass token=..."
    cache = None if cache_dir is None else Path(cache_dir)
    at = PurePosixPath(subfolder)
    last = (at / (only or LAST)[-1]).as_posix()
    cached = partial(_cached, name, only, revision, cache, at)
    try:
        offline = local_files_only or constants.HF_HUB_OFFLINE
        listed = cached() if offline else _patiently(partial(_listed, name, revision, token, cached))
        if isinstance(listed, Path):
            return listed
        commit, siblings = listed  # all files are of this commit, even if the branch moves on
        files = _chosen(siblings, only, at)
        fetch = partial(hf_hub_download, name, revision=commit, cache_dir=cache, token=token)
        paths = {file: try_to_load_from_cache(name, file, cache, commit) for file in files}
        # If the last file is missing, an earlier run broke off, perhaps before it verified what it had downloaded.
        whole = isinstance(paths[last], str)
        for file, sibling in files.items():
            if not whole or not isinstance(paths[file], str):
                paths[file] = _fetched(sibling, fetch)
        folder = Path(str(paths[last])).parent
        snapshot = [folder, *folder.parents][len(at.parts)]
        _name_commit(snapshot, revision or constants.DEFAULT_REVISION)
        return folder
    except errors.GatedRepoError as error:
        raise PermissionError(f"{where} is gated: accept its terms, then {login}: {_one_line(error)}") from error
    except (
        errors.HFValidationError,
        errors.LocalEntryNotFoundError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
    ) as error:
        raise FileNotFoundError(
            f"{where} is not a local folder, and was found neither on the hub nor in its cache "
            f"(check name and revision; if it is private, {login}): {_one_line(error)}"
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: {error}") from error
    except Exception as error:  # the client raises its HTTP library's exceptions, and has changed that library twice
        raise OSError(
            f"{where} is not a local folder, and the download failed; "
            f"try again, complete files are kept: {_one_line(error)}"
        ) from error


def _listed(
    name: str, revision: str | None, token: str | bool | None, cached: Callable[[], Path]
) -> tuple[str, list[RepoSibling]] | Path:
    """The commit and all its files; if the hub does not answer, the folder in the cache if that is complete."""
    timeout = constants.HF_HUB_ETAG_TIMEOUT  # without one, the client would wait for a silent hub forever
    try:
        info = HfApi(token=token).model_info(name, revision=revision, files_metadata=True, timeout=timeout)
        if not re.fullmatch("[0-9a-f]{40}", info.sha or ""):
            raise ValueError(f"the hub named {info.sha!r} as the commit")
    except errors.RevisionNotFoundError:
        raise
    except Exception:  # as in `download`: whatever failed, a complete copy in the cache is enough
        with contextlib.suppress(FileNotFoundError):
            return cached()
        raise
    return str(info.sha), info.siblings or []


def _cached(name: str, only: Sequence[str] | None, revision: str | None, cache: Path | None, at: PurePosixPath) -> Path:
    place = snapshot_download(
        name,
        revision=revision,
        cache_dir=cache,
        allow_patterns=_below(at, only or FILES),
        ignore_patterns=_below(at, OTHERS),
        local_files_only=True,
    )
    folder = Path(place) / at
    # Another program may have downloaded the config alone.
    if not all(any(folder.glob(pattern)) for pattern in (only[-1:] if only else ("config.json", "*model*.*"))):
        raise FileNotFoundError(
            "a download was interrupted, and its copy in the cache is incomplete: load it again with access to the "
            f"hub, and the download continues ({folder})"
        )
    return folder


def _chosen(siblings: Sequence[RepoSibling], only: Sequence[str] | None, at: PurePosixPath) -> dict[str, RepoSibling]:
    """The files to download, by name, in the order of their download."""
    listed = {sibling.rfilename: sibling for sibling in siblings}
    chosen = set(
        filter_repo_objects(listed, allow_patterns=_below(at, only or FILES), ignore_patterns=_below(at, OTHERS))
    )
    if only is None:
        done = {PurePosixPath(file).parent for file in chosen if file.endswith(".safetensors")}
        folders = {PurePosixPath(file).parent for file in chosen if PurePosixPath(file).name == "config.json"}
        pickles = [(folder / "pytorch_model*").as_posix() for folder in folders - done]
        chosen |= set(filter_repo_objects(listed, allow_patterns=pickles))
    if (last := (at / (only or LAST)[-1]).as_posix()) not in chosen:
        raise FileNotFoundError(
            f"the repository has no {last}, so it is not a checkpoint; it has {sorted(listed)[:20]}"
        )
    ranks = _below(at, LAST)
    rank = {file: ranks.index(file) if file in ranks else -1 for file in chosen}
    return {file: listed[file] for file in sorted(chosen, key=lambda file: (rank[file], file))}


def _below(at: PurePosixPath, patterns: Sequence[str]) -> list[str]:
    return [(at / pattern).as_posix() for pattern in patterns]


def _fetched(sibling: RepoSibling, fetch: Callable[..., str]) -> str:
    """Download one file and verify it. One that differs is downloaded again, and refused if it differs again."""
    path = ""
    for force in (False, True):
        get = partial(fetch, sibling.rfilename, force_download=force)
        try:
            path = _patiently(get)
        except errors.LocalEntryNotFoundError as error:
            raise (error.__cause__ or error) from None  # its text is about the cache; its cause is what went wrong
        except OSError as error:
            # A size other than announced is the one plain OSError without a number. It calls for a fresh download.
            if force or type(error) is not OSError or error.errno is not None:
                raise
            continue
        if _as_listed(Path(path), sibling):
            return path
    for wrong in (Path(path).resolve(), Path(path)):
        wrong.unlink(missing_ok=True)
    raise OSError(f"{sibling.rfilename} came twice with other content than the hub lists for it, and was deleted")


def _as_listed(path: Path, sibling: RepoSibling) -> bool:
    """Whether size and checksum equal those in the hub's list: SHA-256 for large files, git's SHA-1 for others."""
    size = path.stat().st_size
    if sibling.lfs:
        digest, wanted, wanted_size = hashlib.sha256(), sibling.lfs.sha256, sibling.lfs.size
    else:
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        wanted, wanted_size = sibling.blob_id, sibling.size
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    # Mirrors of the hub may omit both.
    return wanted_size in (None, size) and wanted in (None, digest.hexdigest())


def _patiently(ask: Callable[[], T]) -> T:
    """The result of `ask`, repeated up to three times while the hub is busy, after `WAITS` or as the hub requests."""
    start = time.monotonic()
    for wait in WAITS:
        try:
            return ask()
        except Exception as error:  # of any HTTP library; only the response of a busy hub is handled here
            responses = [getattr(e, "response", None) for e in (error, error.__cause__)]
            response = next((r for r in responses if r is not None), None)
            if response is None or response.status_code not in BUSY:
                raise
            later = response.headers.get("Retry-After", "")
            seconds = max(wait, int(later)) if later.isdecimal() else wait
            if time.monotonic() + seconds - start > PATIENCE:
                busy = f"the hub is busy (HTTP {response.status_code})"
                raise TimeoutError(f"{busy}: ask again in {seconds} s or more") from error
        time.sleep(seconds)
    return ask()


def _name_commit(folder: Path, revision: str) -> None:
    """Note the commit of a branch or tag in the cache, in the cache's own layout, so that offline loads find it."""
    ref = folder.parents[1] / "refs" / revision
    if revision == folder.name or (ref.is_file() and ref.read_text() == folder.name):
        return
    with contextlib.suppress(OSError):  # a read-only cache works as well
        ref.parent.mkdir(parents=True, exist_ok=True)
        with replacing(ref) as beside:
            beside.write_text(folder.name)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
