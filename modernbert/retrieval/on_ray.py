"""Units on a Ray cluster: Ray Data moves them from actors that read and tokenise to actors that encode, to writers.

Each row is one unit. When a node is lost, Ray restarts its actors elsewhere and repeats the units that were in flight.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .units import Unit
from .worker import Job, Report, encode_share, read_share, write_share

LOCAL = "local"
"""The address for a cluster that is started on this machine, and ends with the process."""

Row = dict[str, Any]


class Reader:
    """An actor that reads units, cuts and tokenises them, on a CPU."""

    def __init__(self, job: Job, units: Any) -> None:
        import ray  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(1)
        self._job, self._target = job, job.target()
        self._units: Sequence[Unit] = ray.get(units[0])  # In a list, because Ray would fetch it for each task.
        self._colbert = job.colbert()

    def __call__(self, row: Row) -> Row:
        share = read_share(self._units[row["id"]], self._job, self._target, self._colbert)
        return {"id": row["id"], "share": pickle.dumps(share)}


class Encoder:
    """An actor that encodes the passages of units, on its GPU if the cluster has some."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(1)
        self._session = job.session()

    def __call__(self, row: Row) -> Row:
        vectors = encode_share(pickle.loads(row["share"]), self._session)
        return {**row, "vectors": pickle.dumps(vectors)}


class Writer:
    """An actor that writes units to the store or the engine."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(1)
        self._target = job.target()

    def __call__(self, row: Row) -> Row:
        share, vectors = pickle.loads(row["share"]), pickle.loads(row["vectors"])
        return {"report": pickle.dumps(write_share(row["id"], share, vectors, self._target))}


def do_on_ray(units: Sequence[Unit], job: Job, address: str) -> Iterator[Report]:
    """Do units on a cluster. The reports come in any order.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
        OSError, ValueError: as a worker has raised it.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        from ray.data import ActorPoolStrategy, DataContext  # pyright: ignore[reportMissingImports]
        from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"--ray needs {error.name}: pip install 'modernbert[ray]'") from error
    if not units:
        return
    try:
        ray.init(
            None if address == LOCAL else address,
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        raise ConnectionError(f"no Ray cluster at {address}: {error}") from error
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    # Reading takes a fraction of the time of encoding on a CPU; a GPU needs several readers.
    encoders = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": 0.5}
    light = {"num_cpus": 1 if gpus else 0.2}
    units_ref = ray.put(list(units))
    rows = ray.data.range(len(units), override_num_blocks=len(units))
    pool = ActorPoolStrategy(min_size=1, max_size=gpus or cpus)
    readers = ActorPoolStrategy(min_size=1, max_size=max(1, cpus - 2 * gpus))
    rows = rows.map(Reader, fn_constructor_args=(job, [units_ref]), compute=readers, **light)
    rows = rows.map(Encoder, fn_constructor_args=(job,), compute=pool, **encoders)
    rows = rows.map(Writer, fn_constructor_args=(job,), compute=pool, **light)
    try:
        for row in rows.iter_rows():
            yield pickle.loads(row["report"])
    except RayError as error:
        cause = _cause(error)
        if isinstance(cause, (OSError, ValueError)):
            raise cause from error
        raise ConnectionError(f"the Ray cluster at {address} has failed: {error}") from error
    finally:
        ray.shutdown()


def _cause(error: BaseException) -> BaseException:
    """The error of a worker, under those of Ray."""
    while not isinstance(error, (OSError, ValueError)):
        inner = getattr(error, "cause", None) or error.__cause__
        if inner is None:
            break
        error = inner
    return error
