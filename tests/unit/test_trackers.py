"""Experiment trackers: rows written through their own libraries can be read back."""

import math

import pytest

from mpilm.errors import ConfigError
from mpilm.telemetry.trackers import check_trackers_installed, open_trackers, select_scalars

ROWS = [
    {"step": step, "time": 1000.0 + step, "loss": 1 / step, "rank_s": {"compute": [1.0]}, "memory_bytes": [5]}
    for step in (1, 2, 3)
]
SETTINGS = {"train.lr": 3e-3, "data.path": ("a", "b")}


def write_rows(names, folder, step=0):
    trackers = open_trackers(names, folder, step, SETTINGS)
    for tracker in trackers:
        for row in ROWS[step:]:
            tracker.write(row)
        tracker.close()


def test_scalars_are_in_groups():
    speed = {"step_s": 2.0, "tokens_per_s": 8.0, "mfu": 0.5, "rank_s": {"compute": [1.0, 2.0], "bubble": [0.5, 0.0]}}
    row = {"step": 3, "time": 7.0, "loss": 0.5, "lr": 0.1, "expert_share": [1.0], "memory_bytes": [2**20, 3 * 2**20], **speed}
    assert select_scalars(row) == {
        "train/loss": 0.5, "train/lr": 0.1, "memory/largest_mib": 3.0, "speed/step_s": 2.0, "speed/tokens_per_s": 8.0,
        "speed/mfu": 0.5, "speed/compute_s": 1.5, "speed/bubble_s": 0.25,
    }  # fmt: skip
    assert select_scalars({"step": 3, "time": 7.0, "eval_loss": 0.25}) == {"eval/loss": 0.25}
    assert select_scalars({"step": 3, "time": 7.0, "event": "saved", "took_s": 1.0}) == {"checkpoint/took_s": 1.0}


def test_tensorboard_has_every_row(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_rows((), tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [(event.step, event.wall_time) for event in scalars] == [(1, 1001.0), (2, 1002.0), (3, 1003.0)]
    assert all(math.isclose(event.value, 1 / event.step, rel_tol=1e-6) for event in scalars)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_resumed_run_stays_one_run(tmp_path):
    tracking = pytest.importorskip("mlflow.tracking")
    write_rows(("mlflow",), tmp_path)
    write_rows(("mlflow",), tmp_path, step=2)
    client = tracking.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mpilm").experiment_id])
    assert run.data.params["train.lr"] == "0.003"
    metrics = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert metrics[:3] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_weights_and_biases_writes_into_the_run_folder(tmp_path):
    pytest.importorskip("wandb")
    write_rows(("wandb",), tmp_path)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"train.lr" in file.read_bytes()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_check_trackers_installed_missing_library_is_named(name, monkeypatch):
    monkeypatch.setattr("mpilm.telemetry.trackers.find_spec", lambda module: None if module == name else module)
    with pytest.raises(ConfigError, match=rf"--run.trackers: {name} cannot be imported; pip install -e '.\[trackers\]'"):
        check_trackers_installed(("wandb", "mlflow"))
