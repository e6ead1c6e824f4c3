"""A checkpoint of the Hugging Face hub, in the cache that all of Hugging Face's libraries share.

The client, `huggingface_hub`, follows redirects, resumes, locks and caches. Here is what it leaves to its callers:
each file is compared with the hub's list, a busy hub is asked again, and what is incomplete is no checkpoint.
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
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import filter_repo_objects

from .files import replacing

T = TypeVar("T")

# What a load can need of a repository; a module of a retriever (1_Dense) has a folder of its own.
FILES = ("*.json", "artifact.metadata", "*.txt", "model*.safetensors", "[0-9]*_*/model*.safetensors")
OTHERS = ("onnx/*", "openvino/*", "checkpoint-*/*")
# These come when the rest is there and compared. No folder is read without them, so none is read half.
LAST = ("tokenizer.json", "config.json")

BUSY = (408, 429, 500, 502, 503, 504)
WAITS = (1, 2, 4)  # seconds before a busy hub is asked for the second, third and fourth time
PATIENCE = 20  # seconds after which it is not asked again: some requests the client has repeated by itself


def download(
    name: str,
    *,
    only: Sequence[str] | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike[str] | None,
    local_files_only: bool,
) -> Path:
    """The folder of the cache that holds `name` at `revision`; arguments and errors as of `checkpoint.locate`."""
    where = repr(name) + (f" at revision {revision!r}" if revision else "")
    login = "log in with `hf auth login` or pass token=..."
    place: dict[str, Any] = {"repo_id": name, "cache_dir": cache_dir}
    cached = partial(_cached, only, revision=revision, **place)
    try:
        offline = local_files_only or constants.HF_HUB_OFFLINE
        listed = cached() if offline else _patiently(partial(_listed, name, revision, token, cached))
        if isinstance(listed, Path):
            return listed
        place["revision"], siblings = listed  # a commit: one for all files, whatever the branch is by now
        files = _chosen(siblings, only)
        paths = {file: try_to_load_from_cache(filename=file, **place) for file in files}
        # Without the last file a run has broken off, perhaps before it compared what it had downloaded.
        whole = isinstance(paths[[*files][-1]], str)
        for file, sibling in files.items():
            if not whole or not isinstance(paths[file], str):
                paths[file] = _fetched(sibling, token=token, **place)
        folder = Path(str(paths[[*files][-1]])).parent
        _name_commit(folder, revision or constants.DEFAULT_REVISION)
        return folder
    except errors.GatedRepoError as error:
        raise PermissionError(f"{where} is gated: accept its terms, then {login}: {_said(error)}") from error
    except (
        errors.HFValidationError,
        errors.LocalEntryNotFoundError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
    ) as error:
        raise FileNotFoundError(
            f"{where} is no folder here, and neither the hub nor its cache gave it "
            f"(check name and revision; if it is private, {login}): {_said(error)}"
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: {error}") from error
    except Exception as error:  # the client lets through what its HTTP library raises, by now the third
        raise OSError(
            f"{where} is no folder here, and was not downloaded; try again, complete files are kept: {_said(error)}"
        ) from error


def _listed(
    name: str, revision: str | None, token: str | bool | None, cached: Callable[[], Path]
) -> tuple[str, list[RepoSibling]] | Path:
    """The commit and all its files; where the hub does not say, the folder in the cache if that is complete."""
    # Without a timeout the client would wait for a silent hub for ever.
    options: dict[str, Any] = {"files_metadata": True, "timeout": constants.HF_HUB_ETAG_TIMEOUT}
    try:
        info = HfApi(token=token).model_info(name, revision=revision, **options)
        if not re.fullmatch("[0-9a-f]{40}", info.sha or ""):
            raise ValueError(f"the hub named {info.sha!r} as the commit")
    except errors.RevisionNotFoundError:
        raise
    except Exception:
        with contextlib.suppress(FileNotFoundError):
            return cached()
        raise
    return str(info.sha), info.siblings or []


def _cached(only: Sequence[str] | None, **place: Any) -> Path:
    patterns: dict[str, Any] = {"allow_patterns": list(only or FILES), "ignore_patterns": list(OTHERS)}
    folder = Path(snapshot_download(**place, **patterns, local_files_only=True))
    # A program that wants no more than the config may have fetched that alone.
    if not all(any(folder.glob(pattern)) for pattern in (only[-1:] if only else ("config.json", "*model*.*"))):
        raise FileNotFoundError(
            "a download was broken off, and its copy in the cache is incomplete: load it again with the hub in reach, "
            f"which goes on from there ({folder})"
        )
    return folder


def _chosen(siblings: Sequence[RepoSibling], only: Sequence[str] | None) -> dict[str, RepoSibling]:
    """The files to have, by name, in the order in which they are fetched."""
    listed = {sibling.rfilename: sibling for sibling in siblings}
    chosen = set(filter_repo_objects(listed, allow_patterns=list(only or FILES), ignore_patterns=list(OTHERS)))
    if only is None:
        done = {PurePosixPath(file).parent for file in chosen if file.endswith(".safetensors")}
        folders = {PurePosixPath(file).parent for file in chosen if PurePosixPath(file).name == "config.json"}
        pickles = [(folder / "pytorch_model*").as_posix() for folder in folders - done]
        chosen |= set(filter_repo_objects(listed, allow_patterns=pickles))
    if (last := (only or LAST)[-1]) not in chosen:
        raise FileNotFoundError(f"the repository has no {last}, so it is no checkpoint; it has {sorted(listed)[:20]}")
    rank = {file: LAST.index(file) if file in LAST else -1 for file in chosen}
    return {file: listed[file] for file in sorted(chosen, key=lambda file: (rank[file], file))}


def _fetched(sibling: RepoSibling, **place: Any) -> str:
    """One file, as the hub lists it: one that differs is downloaded once more, and refused when it differs again."""
    path = ""
    for force in (False, True):
        get = partial(hf_hub_download, filename=sibling.rfilename, force_download=force, **place)
        try:
            path = _patiently(get)
        except errors.LocalEntryNotFoundError as error:
            raise (error.__cause__ or error) from None  # it speaks of the cache; its cause, of what went wrong
        except OSError as error:
            # Of another size than announced: the one plain OSError without a number, which asks for a fresh start.
            if force or type(error) is not OSError or error.errno is not None:
                raise
            continue
        if _as_listed(Path(path), sibling):
            return path
    for wrong in (Path(path).resolve(), Path(path)):
        wrong.unlink(missing_ok=True)
    raise OSError(f"{sibling.rfilename} came twice with other content than the hub lists for it, and was deleted")


def _as_listed(path: Path, sibling: RepoSibling) -> bool:
    """Whether size and checksum are those of the list: SHA-256 for large files, git's SHA-1 for others."""
    size = path.stat().st_size
    if sibling.lfs:
        digest, wanted, wanted_size = hashlib.sha256(), sibling.lfs.sha256, sibling.lfs.size
    else:
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        wanted, wanted_size = sibling.blob_id, sibling.size
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    # Mirrors of the hub may leave both out.
    return wanted_size in (None, size) and wanted in (None, digest.hexdigest())


def _patiently(ask: Callable[[], T]) -> T:
    """What `ask` gives. A busy hub is asked up to three times more, after 1, 2 and 4 seconds or when it wants."""
    start = time.monotonic()
    for wait in WAITS:
        try:
            return ask()
        except Exception as error:
            responses = [getattr(e, "response", None) for e in (error, error.__cause__)]
            response: Any = next((r for r in responses if r is not None), None)
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


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
