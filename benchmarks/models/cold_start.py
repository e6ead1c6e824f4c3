"""A process as a user starts it: import, load, encode one text of 32 tokens, print its first vector.

`python -m benchmarks.models.cold_start NAME FOLDER DTYPE DEVICE` is timed from its start to the vector.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.models.case import Case
    from benchmarks.models.comparison import Taken
    from benchmarks.models.measure import Team

OURS, TRANSFORMERS = "modernbert", "transformers, sdpa"


def ours(folder: str, dtype: str, device: str, ids: list[int]) -> Any:
    import torch

    from modernbert import Encoder, pack

    encoder = Encoder.from_pretrained(folder, dtype=getattr(torch, dtype), device=device).eval()
    with torch.inference_mode():
        return encoder(pack([ids]).to(device))[0]


def transformers(folder: str, dtype: str, device: str, ids: list[int]) -> Any:
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids], device=device)).last_hidden_state[0, 0]


FIRST = {OURS: ours, TRANSFORMERS: transformers}


def measure(team: Team, case: Case, *, rounds: int) -> tuple[list[Taken], dict[str, str]]:
    """Seconds of each, in turns, and why one has none. The vector is compared with the reference."""
    import torch

    from benchmarks.harness import WrongOutput, in_turns
    from benchmarks.models import texts
    from benchmarks.models.comparison import Taken
    from benchmarks.models.workers import Failed

    refused = team.start()
    try:
        exact, plain = (None if one is None else one[0] for one in team.expected(case))
    except Failed as reason:
        return [], refused | {"every implementation": f"cannot be judged: the reference {reason}"}
    ids = texts.ids(0, case.lengths[0]).tolist()
    place = team.place
    vectors: dict[str, torch.Tensor] = {}

    def start(name: str) -> float:
        command = [sys.executable, "-m", "benchmarks.models.cold_start", name, place.folder, place.dtype, place.device]
        began = time.perf_counter()
        done = subprocess.run(
            command, input=json.dumps(ids), cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise Failed(f"fails: {done.stderr.strip().splitlines()[-1:]}")
        answer = json.loads(done.stdout.splitlines()[-1])
        vectors[name] = torch.tensor(answer["vector"])
        return answer["until"] - began

    taken, failed = in_turns({name: lambda name=name: start(name) for name in FIRST}, rounds, until=team.here.until)
    done = []
    for name, seconds in taken.items():
        try:
            assert exact is not None
            judged = team.judged(vectors[name], exact, plain, case)
            done.append(Taken(name, "import, load, encode; in a new process", judged, costs=seconds))
        except WrongOutput as reason:
            failed[name] = str(reason)
    return done, refused | failed


def main(name: str, folder: str, dtype: str, device: str) -> None:
    vector = FIRST[name](folder, dtype, device, json.loads(sys.stdin.read())).float().tolist()
    # The clock that the parent reads, too: it counts from the start of the system.
    print(json.dumps({"until": time.perf_counter(), "vector": vector}))


if __name__ == "__main__":
    main(*sys.argv[1:])
