"""The numbers of a run for programs that show runs, each through its own library and into the run folder: no network."""

from __future__ import annotations

import contextlib
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mpilm.errors import ConfigError

Row = Mapping[str, Any]


class Tracker(Protocol):
    """Takes the rows of metrics.jsonl, one after the other."""

    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


def open_trackers(names: Sequence[str], folder: Path, step: int, settings: Mapping[str, Any]) -> list[Tracker]:
    """Those asked for, and TensorBoard where it is installed, for a run that goes on from `step`."""
    found: list[Tracker] = []
    with contextlib.suppress(ImportError):
        found.append(TensorBoard(folder / "tensorboard", step))
    makers: dict[str, type[WeightsAndBiases | MLflow]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}
    return [*found, *(makers[name](folder, settings) for name in names)]


def refuse_missing(names: Sequence[str]) -> None:
    """Raises ConfigError where the library of a tracker is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--run.trackers: {' and '.join(missing)} cannot be imported; pip install -e '.[trackers]'")


def numbers(row: Row) -> Iterator[tuple[str, float]]:
    """The numbers of a row that a curve can be drawn of."""
    for key, value in row.items():
        if isinstance(value, (int, float)) and key not in ("step", "time"):
            yield key, value


class TensorBoard:
    """RUN/tensorboard. Rows after `step`, of a run that did not get so far again, are taken away."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, row: Row) -> None:
        for key, value in numbers(row):
            self._writer.add_scalar(key, value, row["step"], walltime=row.get("time"))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """RUN/wandb, offline: `wandb sync` sends it when there is a network. A run that goes on is the same one there."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        import wandb

        quiet = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True, x_disable_meta=True)
        key = f"{folder.name}-{zlib.crc32(str(folder.absolute()).encode()):08x}"
        self._run = wandb.init(
            project="mpilm", name=folder.name, id=key, resume="allow", mode="offline", dir=str(folder), config=dict(settings),
            settings=quiet,
        )  # fmt: skip

    def write(self, row: Row) -> None:
        self._run.log(dict(numbers(row)), step=row["step"])

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """RUN/mlruns, which `mlflow ui --backend-store-uri RUN/mlruns` shows. A run that goes on is the same one there."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # files need no server; newer releases ask for a word
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

    def write(self, row: Row) -> None:
        for key, value in numbers(row):
            self._client.log_metric(self._id, key, value, int(1000 * row["time"]), row["step"])

    def close(self) -> None:
        self._client.set_terminated(self._id)
