"""Experiment trackers: each writes the rows of metrics.jsonl through its own library into the run folder, without network."""

from __future__ import annotations

import contextlib
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mpilm.errors import ConfigError

GROUPS = {  # of the fields of a row that are not in train/
    **dict.fromkeys(("step_s", "tokens_per_s", "mfu", "rank_s"), "speed"),
    **dict.fromkeys(("took_s", "waited_s"), "checkpoint"),
    "memory_bytes": "memory",
}


def open_trackers(names: Sequence[str], folder: Path, step: int, settings: Mapping[str, Any]) -> list[Tracker]:
    """Open the trackers `names` and, where it is installed, TensorBoard, for a run that resumes from `step`."""
    trackers: list[Tracker] = []
    with contextlib.suppress(ImportError):
        trackers.append(TensorBoard(folder / "tensorboard", step))
    classes: dict[str, type[WeightsAndBiases | MLflow]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}
    return [*trackers, *(classes[name](folder, settings) for name in names)]


def check_trackers_installed(names: Sequence[str]) -> None:
    """Raise ConfigError if the library of a tracker is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--run.trackers: {' and '.join(missing)} cannot be imported; pip install -e '.[trackers]'")


def select_scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row that make a curve, in groups: "GROUP/NAME" -> value."""
    found = {}
    for key, value in row.items():
        group = GROUPS.get(key, "train")
        if key == "eval_loss":
            found["eval/loss"] = value
        elif key == "rank_s":
            found |= {f"{group}/{part}_s": sum(seconds) / len(seconds) for part, seconds in value.items()}
        elif key == "memory_bytes":
            found[f"{group}/largest_mib"] = max(value) / 2**20
        elif isinstance(value, (int, float)) and key not in ("step", "time"):
            found[f"{group}/{key}"] = value
    return found


class TensorBoard:
    """RUN/tensorboard. It purges rows after `step`, which an earlier start wrote."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, row: Mapping[str, Any]) -> None:
        for key, value in select_scalars(row).items():
            self._writer.add_scalar(key, value, row["step"], walltime=row.get("time"))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """RUN/wandb, offline: `wandb sync` uploads it when there is a network. A resumed run stays the same W&B run."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        import wandb

        quiet = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True, x_disable_meta=True)
        run = {"id": f"{folder.name}-{zlib.crc32(str(folder.absolute()).encode()):08x}", "name": folder.name, "resume": "allow"}
        self._run = wandb.init(**run, project="mpilm", mode="offline", dir=str(folder), config=dict(settings), settings=quiet)

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(select_scalars(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """RUN/mlruns, shown by `mlflow ui --backend-store-uri RUN/mlruns`. A resumed run stays the same MLflow run."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer releases want consent to files in place of a server
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient((folder / "mlruns").absolute().as_uri())
        known = self._client.get_experiment_by_name("mpilm")
        experiment = known.experiment_id if known else self._client.create_experiment("mpilm")
        runs = self._client.search_runs([experiment], max_results=1)
        self._id = (runs[0] if runs else self._client.create_run(experiment, run_name=folder.name)).info.run_id
        if not runs:
            self._client.log_batch(self._id, params=[Param(key, str(value)[:500]) for key, value in settings.items()])

    def write(self, row: Mapping[str, Any]) -> None:
        for key, value in select_scalars(row).items():
            self._client.log_metric(self._id, key, value, int(1000 * row["time"]), row["step"])

    def close(self) -> None:
        self._client.set_terminated(self._id)


Tracker = TensorBoard | WeightsAndBiases | MLflow
