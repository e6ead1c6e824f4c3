"""Units on a Ray cluster: each is a task, which a free core or GPU of any node does.

A process keeps its model from one task to the next. A task that is lost with its process or node is handed out again.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any

from ..heads.colbert import ColBERT
from ..inference.session import Session
from .engines import is_target
from .remote import is_remote
from .targets import Target
from .units import Unit
from .worker import Job, Report, encode_share, read_share, write_share

AHEAD = 2
"""Tasks that are handed out for each core of the cluster."""

TRIES = 4
"""Times that a unit is handed out. One that ends every process that takes it would never be done."""

PATIENCE = 10.0
"""Seconds that a cluster may take to answer."""

GREETING, SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5), b"\4"
"""How a client of HTTP/2, on which Ray communicates, begins, and the type of the first frame that a server sends."""


def do_on_ray(units: Sequence[Unit], job: Job, address: str) -> Iterator[Report]:
    """Do units on a cluster. The reports come in any order.

    Args:
        address: as of `ray.init`: HOST:PORT, "auto" for the cluster of which this machine is a node, or "local", which
            starts a cluster of this machine alone. One that uses TLS is reached by "auto".

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: there is no cluster at the address, or `TRIES` processes were lost while they did one unit.
        ValueError: the model has no name by which the nodes could load it.
        Any error of reading, encoding and writing.
    """
    if job.model == "":
        raise ValueError("the nodes of a cluster load the model: give its folder or its hub id, not a loaded one")
    ray = _connected(address)
    try:
        yield from _do(ray, units, job)
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    """The package `ray`, connected to a cluster."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # `ray.init` would try for 14 minutes
            _check_answer(host.strip("[]"), int(port))
        import ray  # pyright: ignore[reportMissingImports]

        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"--ray needs {error.name}: pip install 'modernbert[ray]'") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ConnectionError(f"no Ray cluster at {address}: {error}") from error
    return ray


def _check_answer(host: str, port: int) -> None:
    """Raise OSError if nothing listens there, or something that does not answer as Ray does."""
    with socket.create_connection((host, port), PATIENCE) as connection:
        connection.sendall(GREETING)
        if connection.recv(9)[3:4] != SETTINGS:
            raise OSError("what listens there is something else")


def _do(ray: Any, units: Sequence[Unit], job: Job) -> Iterator[Report]:
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 1.0), resources.get("GPU", 0.0)
    # All cores read and tokenise, also if there are fewer GPUs. `max_calls`: processes on GPUs would end with a task.
    # `max_retries`: a unit that is done again must know it.
    options = {"num_cpus": 1, "num_gpus": round(min(1.0, gpus / cpus), 4), "max_calls": 0, "max_retries": 0}
    do, shared = ray.remote(**options)(_do_unit), ray.put(_anywhere(job))
    rest, waiting, lost = iter(range(len(units))), {}, Counter[int]()

    def hand_out(number: int) -> None:
        waiting[do.remote(shared, number, units[number], again=number in lost)] = number

    while True:
        for number in islice(rest, max(0, round(AHEAD * cpus) - len(waiting))):
            hand_out(number)
        if not waiting:
            return
        (task,), _ = ray.wait(list(waiting))
        number = waiting.pop(task)
        try:
            report = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayError as error:
            lost[number] += 1
            if lost[number] == TRIES:
                what = f"{TRIES} processes of the Ray cluster were lost while they did {units[number][0].path}"
                raise ConnectionError(f"{what}: do their nodes have enough memory? The last error: {error}") from error
            hand_out(number)
        else:
            yield report


def _do_unit(job: Job, number: int, unit: Unit, *, again: bool) -> Report:
    target, session = _ready(job)
    share = read_share(unit, job, target, session.model)
    if again:
        target.clear(share)
    return write_share(number, share, encode_share(share, session), target)


@lru_cache(maxsize=1)
def _ready(job: Job) -> tuple[Target, Session[ColBERT]]:
    """What a process needs for all of its tasks."""
    return job.target(), job.session()


def _anywhere(job: Job) -> Job:
    """The job for processes with other working directories."""
    engine, address = job.output.split(":", 1) if is_target(job.output) else ("", job.output)
    address = address if is_remote(address) else os.path.abspath(address)
    return replace(job, output=f"{engine}:{address}" if engine else address)
