"""Requests to stop a run."""

from mpilm.launch.stop_request import BY_FILE, StopRequest


def test_folder_named_stop_is_no_request(tmp_path):
    """The run could not remove it, and would stop at each of its starts."""
    (tmp_path / "stop").mkdir()
    assert StopRequest(tmp_path / "stop", 0.0).stop_reason(0.0) == 0
    (tmp_path / "file").touch()
    assert StopRequest(tmp_path / "file", 0.0).stop_reason(0.0) == BY_FILE
