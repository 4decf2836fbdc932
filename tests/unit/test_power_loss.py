"""A power loss at any point of a save leaves an old or the new checkpoint complete on disk.

The file system calls of a save are recorded, and replayed up to every call into a fresh folder. Data not synced by then
may be on disk in full, in part or not at all.
"""

import builtins
import os
import pathlib
import random
import shutil
from pathlib import Path
from unittest import mock

import pytest
from checkpoints import draw_tensors, replicate, save_tensors, small_files

from mpilm.checkpoint.format import checkpoint_name
from mpilm.checkpoint.manager import prune_checkpoints, remove_leftovers
from mpilm.checkpoint.verify import find_newest_valid
from mpilm.comm.base import SelfComm

SHAPES = {"embed.weight": (40, 16), "blocks.0.attn.q.weight": (16, 16), "norm.weight": (16,)}
OLD, NEW = checkpoint_name(4), checkpoint_name(8)


class Recorder:
    """Records the file system calls below `root`, in order, with paths relative to it."""

    def __init__(self, root: Path):
        self.root, self.calls = root, []
        self._real = {name: getattr(os, name) for name in ("open", "pwrite", "fsync", "rename", "mkdir")}

    def add(self, kind, path, *more):
        path = Path(os.path.realpath(path))
        if self.root in path.parents:
            self.calls.append((kind, str(path.relative_to(self.root)), *more))

    def path_of(self, handle):
        return os.readlink(f"/proc/self/fd/{handle}")

    def open_handle(self, path, flags, *more, **named):
        if flags & os.O_CREAT:
            self.add("create", path)
        return self._real["open"](path, flags, *more, **named)

    def open_file(self, path, mode="r", *more, **named):
        file = self._open(path, mode, *more, **named)
        if "x" in mode or "w" in mode:
            self.add("create", path)
        return file

    def pwrite(self, handle, data, offset):
        count = self._real["pwrite"](handle, data, offset)
        self.add("write", self.path_of(handle), offset, bytes(data[:count]))
        return count

    def fsync(self, handle):
        path = Path(self.path_of(handle))
        if path.is_file() and not any(op[0] == "write" and self.root / op[1] == path for op in self.calls):
            self.add("write", path, 0, path.read_bytes())
        self.add("sync", path / "x" if path.is_dir() else path)  # of a folder: whatever lies in it
        self._real["fsync"](handle)

    def rename(self, old, new):
        self.add("rename", old, str(Path(os.path.realpath(new)).relative_to(self.root)))
        self._real["rename"](old, new)

    def mkdir(self, path, *more, **named):
        self._real["mkdir"](path, *more, **named)
        self.add("mkdir", path)

    def rmtree(self, path, *more, **named):
        if os.path.exists(path):
            self.add("rmtree", path)
        self._rmtree(path, *more, **named)

    def __enter__(self):
        self._open, self._rmtree = builtins.open, shutil.rmtree
        mine = {"open": self.open_handle, **{name: getattr(self, name) for name in ("pwrite", "fsync", "rename", "mkdir")}}
        self._patches = [mock.patch.object(os, name, mine[name]) for name in mine]
        if accessor := getattr(pathlib, "_NormalAccessor", None):  # Path of Python 3.10 holds references of its own
            self._patches += [mock.patch.object(accessor, name, mine[name]) for name in ("rename", "mkdir")]
        self._patches += [mock.patch.object(builtins, "open", self.open_file), mock.patch.object(shutil, "rmtree", self.rmtree)]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self._patches:
            patch.stop()


def is_synced(calls, i):
    """Return whether call i must have reached the disk after all of these calls."""
    kind, path, *_ = calls[i]
    if kind == "write":
        return ("sync", path) in calls[i:]
    named = calls[i][2] if kind == "rename" else path
    return ("sync", str(Path(named).parent / "x")) in calls[i:]


def replay(calls, root, reaches_disk, draw):
    """Bring a disk into a state that a power loss after these calls may leave."""
    for i, (kind, path, *more) in enumerate(calls):
        if kind == "sync" or not (is_synced(calls, i) or reaches_disk()):
            continue
        target = root / path
        if kind == "mkdir":
            target.mkdir(parents=True, exist_ok=True)
        elif kind == "rmtree":
            shutil.rmtree(target, ignore_errors=True)
        elif kind == "rename":
            if target.exists():  # its old name may have been lost
                target.rename(root / more[0])
        elif kind == "create" and target.parent.exists():
            target.touch()
        elif kind == "write" and target.exists():  # data without a name are lost as well
            offset, data = more
            torn = data if is_synced(calls, i) else data[: draw.randrange(len(data) + 1)]
            with open(target, "r+b") as file:
                file.seek(offset)
                file.write(torn)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A disk with an old checkpoint, and the calls that write a new one and remove the old one."""
    before = tmp_path_factory.mktemp("before").resolve()
    work = tmp_path_factory.mktemp("work").resolve()
    with small_files(500, 1500):
        save_tensors(before, draw_tensors(SHAPES), replicate(SHAPES, 1), SelfComm(), step=4)
        shutil.copytree(before, work, dirs_exist_ok=True)
        with Recorder(work) as recorder:
            save_tensors(work, draw_tensors(SHAPES), replicate(SHAPES, 1), SelfComm(), step=8)
            prune_checkpoints(work, 1, False)
    return before, work, recorder.calls


def test_replay_of_all_calls_makes_the_same_folder(recorded, tmp_path):
    before, work, calls = recorded
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    replay(calls, tmp_path, lambda: True, random.Random(0))
    assert {kind for kind, *_ in calls} == {"create", "write", "sync", "rename", "mkdir", "rmtree"}
    names = sorted(str(path.relative_to(work)) for path in work.rglob("*"))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == names
    with small_files(500, 1500):
        assert find_newest_valid(tmp_path)[0] == tmp_path / NEW
    assert not (tmp_path / OLD).exists()


@pytest.mark.parametrize("seed", ["all", "nothing", *range(8)])
def test_power_loss_after_any_call_leaves_a_complete_checkpoint(recorded, tmp_path, seed):
    before, _, calls = recorded
    draw = random.Random(seed)
    reaches_disk = {"all": lambda: True, "nothing": lambda: False}.get(seed, lambda: draw.random() < 0.5)
    chosen = set()
    with small_files(500, 1500):
        for count in range(len(calls) + 1):
            disk = tmp_path / str(count)
            shutil.copytree(before, disk)
            replay(calls[:count], disk, reaches_disk, draw)
            found, errors = find_newest_valid(disk)
            assert found in (disk / OLD, disk / NEW), (count, calls[count - 1][:2], errors)
            assert not errors or found == disk / NEW
            chosen.add(found.name)
            remove_leftovers(disk)
            assert find_newest_valid(disk)[0] == found
            shutil.rmtree(disk)
    assert chosen == {OLD, NEW}
