"""RUN/bad-hosts.json: the hosts that have computed wrongly, and checkpoints that may be wrong because of it."""

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    checkpoints.close()  # a checkpoint being written is one of them, and none may be removed meanwhile

    def record() -> list[Any]:
        path = run.folder.path / BAD_HOSTS
        found = {"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "ranks": list(ranks), "problem": problem}
        with writing(run.folder.path) if hosts else contextlib.nullcontext():
            rows = parse_json(path.read_bytes(), path) if path.exists() else {}
            for host in hosts:
                rows[host] = [*rows.get(host, []), found]
            if hosts:
                write_durably(path, json.dumps(rows, indent=2).encode() + b"\n")
        later = [x for x in list_checkpoints(run.folder.checkpoints) if (checkpoint_step(x) or 0) > last_good]
        aside = [folder.name for folder in set_aside(later, "suspect")]
        return [aside, [folder.name for folder in list_checkpoints(run.folder.checkpoints)]]

    aside, good = run.mesh.world.broadcast_json(run_on_root(run.mesh.world, record))
    suspect = f"; saved after the last good recheck (step {last_good}), so set aside: {', '.join(aside)}" if aside else ""
    resumes = f"resumes from {good[-1]}" if good else "begins anew: no checkpoint is from before the last good recheck"
    if not hosts:
        return f"No host is noted, since it may be any of them{suspect}. The same command {resumes}"
    return f"The host is noted in {run.folder.path / BAD_HOSTS}{suspect}. The same command, best without that host, {resumes}"


def read_bad_hosts(folder: Path) -> list[str]:
    """Return the hosts in a run's bad-hosts.json; none if there is no such file. Raises FileError or DataError."""
    path = folder / BAD_HOSTS
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder; name that of a run, such as runs/NAME")
    return list(parse_json(path.read_bytes(), path)) if path.exists() else []
