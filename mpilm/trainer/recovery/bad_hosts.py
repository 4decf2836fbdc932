"""RUN/bad-hosts.json: the hosts that have computed wrongly, and checkpoints that may be wrong because of it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from mpilm.checkpoint.format import checkpoint_step, list_checkpoints
from mpilm.checkpoint.manager import CheckpointManager, set_aside
from mpilm.comm.collective_errors import run_on_root
from mpilm.data.files import parse_json, write_durably
from mpilm.errors import FileError
from mpilm.trainer.run import Run
from mpilm.trainer.run_folder import writing

BAD_HOSTS = "bad-hosts.json"


def record_bad_hosts(
    run: Run, checkpoints: CheckpointManager, last_good: int, ranks: Sequence[int], hosts: Sequence[str], problem: str
) -> str:
    """Add hosts to bad-hosts.json, and set aside the checkpoints of steps after the last good recheck: an earlier wrong result
    may be in them. Return what the user may do. Collective."""
    checkpoints.finish()  # a checkpoint being written is one of them

    def record() -> str:
        path = run.folder.path / BAD_HOSTS
        found = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "ranks": list(ranks), "problem": problem}
        with writing(run.folder.path):
            rows = parse_json(path.read_bytes(), path) if path.exists() else {}
            for host in hosts:
                rows[host] = [*rows.get(host, []), found]
            write_durably(path, json.dumps(rows, indent=2).encode() + b"\n")
        later = [x for x in list_checkpoints(run.folder.checkpoints) if (checkpoint_step(x) or 0) > last_good]
        return ", ".join(folder.name for folder in set_aside(later, "suspect"))

    aside = run.mesh.world.broadcast_json(run_on_root(run.mesh.world, record))
    newest = f"; saved after the last good recheck (step {last_good}), so set aside: {aside}" if aside else ""
    advice = "The same command, best without that host, resumes from the newest checkpoint and computes the steps again"
    return f"The host is noted in {run.folder.path / BAD_HOSTS}{newest}. {advice}"


def read_bad_hosts(folder: Path) -> list[str]:
    """Return the hosts in a run's bad-hosts.json; none if there is no such file. Raises FileError or DataError."""
    path = folder / BAD_HOSTS
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder; name that of a run, such as runs/NAME")
    return list(parse_json(path.read_bytes(), path)) if path.exists() else []
