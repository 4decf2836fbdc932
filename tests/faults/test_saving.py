"""Checkpoints under fire: killed while they are written, on full disks, flipped and cut; an old or the new one is whole."""

import json
import random
import shutil
import subprocess

import pytest
from training_jobs import read_outcome, run_serially, slow_case, start_job, train_arguments

from mpilm.checkpoint.format import list_checkpoints
from mpilm.checkpoint.verify import find_newest_valid, verify_checkpoint
from mpilm.errors import DataError, FileError

STEPS = 40
FLIPS = 1000


def words(data, run, *more):
    return train_arguments(data, run, "--train.steps", STEPS, "--checkpoint.every", 4, "--run.eval-every", 20, *more)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("whole")
    return run_serially(words(data, folder / "run"), folder)


def acknowledged(output):
    """The newest checkpoint that the run has said to be saved."""
    return max((line.rsplit("step-", 1)[1] for line in output.splitlines() if line.startswith("saved ")), default="")


AT_ONCE = ("--checkpoint.asynchronous", "false")


@pytest.mark.parametrize(
    ("point", "rank", "ways"),
    [
        ("write", 1, ()),
        ("rename", 0, ()),
        ("fsync", 1, AT_ONCE),
        *(slow_case(point, 0, ()) for point in ("open", "write", "fsync", "manifest", "cleanup")),
        slow_case("write", 1, AT_ONCE),
    ],
)
def test_killed_on_the_way(tmp_path, data, uninterrupted, point, rank, ways):
    """While the third checkpoint is under way; the next start goes on and ends with the same bits."""
    run = tmp_path / "run"
    fault = f"kind=kill rank={rank} point=checkpoint.{point} after=2"
    with start_job(2, words(data, run, *ways), tmp_path, MPILM_FAULT=fault) as job:
        assert job.wait(40) != 0
        assert f"fault: kill at checkpoint.{point}" in job.output
        said = acknowledged(job.output)
    found, broken = find_newest_valid(run / "checkpoints")
    assert not broken
    assert found is None or found.name >= f"step-{said}"
    assert found is not None or not said
    with start_job(3, words(data, run, *ways), tmp_path) as job:
        assert job.wait() == 0, job.output
    assert read_outcome(run)[1] == uninterrupted[1]
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_disk_that_is_full_on_one_rank(tmp_path, data, uninterrupted):
    """The run ends and keeps what it has; told to warn, it goes on, and the next one is written."""
    run = tmp_path / "run"
    fault = "kind=enospc rank=1 point=checkpoint.write after=2"
    with start_job(2, words(data, run), tmp_path, MPILM_FAULT=fault) as job:
        assert job.wait(40) == 74, job.output
    assert job.output.count("mpilm: error") == 1
    assert "could not be written: No space left on device; older checkpoints are unchanged (on rank 1)" in job.output
    assert list_checkpoints(run / "checkpoints")
    assert find_newest_valid(run / "checkpoints")[1] == {}
    with start_job(2, words(data, run), tmp_path) as job:
        assert job.wait() == 0, job.output
    assert read_outcome(run)[1] == uninterrupted[1]
    with start_job(2, words(data, tmp_path / "other", "--checkpoint.on-error", "warn"), tmp_path, MPILM_FAULT=fault) as job:
        assert job.wait() == 0, job.output
    assert "not saved: " in job.output
    assert read_outcome(tmp_path / "other")[1] == uninterrupted[1]


ERRORS = {
    "eio": "Input/output error", "edquot": "Disk quota exceeded", "eacces": "Permission denied",
    "erofs": "Read-only file system",
}  # fmt: skip


@pytest.mark.parametrize("error", ["eio", "edquot", slow_case("eacces"), slow_case("erofs")])
def test_a_disk_that_fails(tmp_path, data, error):
    run = tmp_path / "run"
    fault = f"kind={error} rank=0 point=checkpoint.write after=2"
    with start_job(2, words(data, run, *(AT_ONCE if error == "edquot" else ())), tmp_path, MPILM_FAULT=fault) as job:
        assert job.wait(40) == 74, job.output
    assert job.output.count("fault: ") == 1
    assert job.output.count("mpilm: error") == 1
    assert f"could not be written: {ERRORS[error]}; older checkpoints are unchanged" in job.output
    assert find_newest_valid(run / "checkpoints")[0] is not None


def test_a_folder_that_goes_away(tmp_path, data):
    """While one is written; whoever has moved it has the older checkpoints there."""
    run, fault = tmp_path / "run", "kind=sleep rank=0 point=checkpoint.manifest after=2 value=2"
    with start_job(2, words(data, run), tmp_path, MPILM_FAULT=fault) as job:
        job.wait_for(lambda: "fault: " in job.output)
        (run / "checkpoints").rename(tmp_path / "moved")
        assert job.wait(40) == 74, job.output
    assert job.output.count("mpilm: error") == 1
    assert "could not be written: not all ranks see its folder; older checkpoints are unchanged" in job.output
    assert find_newest_valid(tmp_path / "moved")[0] is not None


def test_a_disk_that_is_too_small(tmp_path, data):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with start_job(2, words(data, small / "run"), tmp_path) as job:
            assert job.wait(40) == 74, job.output
        assert "needs 0." in job.output
        assert "MiB are free there; older checkpoints are unchanged" in job.output
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("saved")
    with start_job(2, words(data, folder / "run", "--train.steps", 4), folder) as job:
        assert job.wait() == 0, job.output
    return list_checkpoints(folder / "run" / "checkpoints")[-1]


def test_every_flipped_bit_and_every_cut_is_found(tmp_path, saved):
    """All files, the manifest too; the file is named."""
    copy = shutil.copytree(saved, tmp_path / saved.name)
    draw, found = random.Random(1), 0
    for trial in range(FLIPS):
        path = draw.choice(sorted(copy.iterdir()))
        content = path.read_bytes()
        changed = bytearray(content)
        if trial % 10 == 0:
            del changed[draw.choice([0, 1, len(content) // 2, len(content) - 1]) :]
        else:
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises((DataError, FileError)) as caught:
            verify_checkpoint(copy)
        name = path.name
        assert name in str(caught.value) or (name == "manifest.json" and "checkpoint file" in str(caught.value))
        path.write_bytes(content)
        found += 1
    verify_checkpoint(copy)
    assert found == FLIPS


@pytest.mark.parametrize("change", ["missing", "of another step", "a folder"])
def test_parts_that_are_not_its_own(tmp_path, saved, change):
    copy = shutil.copytree(saved, tmp_path / saved.name)
    part = copy / "trainer.json"
    if change == "of another step":
        part.write_text(json.dumps(json.loads(part.read_text()) | {"step": 5}))
    else:
        part.unlink()
    if change == "a folder":
        part.mkdir()
    with pytest.raises((DataError, FileError), match=r"trainer\.json"):
        verify_checkpoint(copy)
