"""Rows for other programs, by their own libraries: what these then read back."""

import math

import pytest

from mpilm.errors import ConfigError
from mpilm.telemetry.trackers import numbers, open_trackers, refuse_missing

ROWS = [
    {"step": step, "time": 1000.0 + step, "loss": 1 / step, "rank_s": {"compute": [1.0]}, "memory_bytes": [5]}
    for step in (1, 2, 3)
]
SETTINGS = {"train.lr": 3e-3, "data.path": ("a", "b")}


def written(names, folder, step=0):
    trackers = open_trackers(names, folder, step, SETTINGS)
    for row in ROWS[step:]:
        for tracker in trackers:
            tracker.write(row)
    for tracker in trackers:
        tracker.close()


def test_numbers_are_what_a_curve_can_be_drawn_of():
    assert dict(numbers(ROWS[1])) == {"loss": 0.5}


def test_tensorboard_has_every_row(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    written((), tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value, event.wall_time) for event in events.Scalars("loss")]
    assert [(step, at) for step, _, at in found] == [(1, 1001.0), (2, 1002.0), (3, 1003.0)]
    assert all(math.isclose(value, 1 / step, rel_tol=1e-6) for step, value, _ in found)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_one_run_of_two_starts(tmp_path):
    tracking = pytest.importorskip("mlflow.tracking")
    written(("mlflow",), tmp_path)
    written(("mlflow",), tmp_path, step=2)
    client = tracking.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mpilm").experiment_id])
    assert run.data.params["train.lr"] == "0.003"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")][:3] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
    ]


def test_weights_and_biases_writes_beside_the_run(tmp_path):
    pytest.importorskip("wandb")
    written(("wandb",), tmp_path)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"train.lr" in file.read_bytes()


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_library_that_is_missing_is_named(name, monkeypatch):
    monkeypatch.setattr("mpilm.telemetry.trackers.find_spec", lambda module: None if module == name else module)
    with pytest.raises(ConfigError, match=rf"--run.trackers: {name} cannot be imported; pip install -e '.\[trackers\]'"):
        refuse_missing(("wandb", "mlflow"))
