"""The power goes while a checkpoint is written: whatever has reached the disk by then, an old or the new one is whole.

What saving asks of the file system is recorded, and played back up to every operation into a fresh folder. Of what has not been
synced by then, all may be there, or nothing, or any part of it.
"""

import builtins
import os
import random
import shutil
from pathlib import Path
from unittest import mock

import pytest
from checkpoints import draw_tensors, held_by_all, saved, small_files

from mpilm.checkpoint.format import folder_name
from mpilm.checkpoint.save import prune, remove_leftovers
from mpilm.checkpoint.verify import newest_valid
from mpilm.comm.base import SelfComm

SHAPES = {"embed.weight": (40, 16), "blocks.0.attn.q.weight": (16, 16), "norm.weight": (16,)}
OLD, NEW = folder_name(4), folder_name(8)


class Recorder:
    """`done`: the operations below `root`, in order, with paths relative to it."""

    def __init__(self, root: Path):
        self.root, self.done = root, []
        self._plain = {name: getattr(os, name) for name in ("open", "pwrite", "fsync", "rename", "mkdir")}

    def add(self, what, path, *more):
        path = Path(os.path.realpath(path))
        if self.root in path.parents:
            self.done.append((what, str(path.relative_to(self.root)), *more))

    def path_of(self, handle):
        return os.readlink(f"/proc/self/fd/{handle}")

    def open_handle(self, path, flags, *more, **named):
        if flags & os.O_CREAT:
            self.add("create", path)
        return self._plain["open"](path, flags, *more, **named)

    def open_file(self, path, mode="r", *more, **named):
        file = self._open(path, mode, *more, **named)
        if "x" in mode or "w" in mode:
            self.add("create", path)
        return file

    def pwrite(self, handle, data, offset):
        count = self._plain["pwrite"](handle, data, offset)
        self.add("write", self.path_of(handle), offset, bytes(data[:count]))
        return count

    def fsync(self, handle):
        path = Path(self.path_of(handle))
        if path.is_file() and not any(op[0] == "write" and self.root / op[1] == path for op in self.done):
            self.add("write", path, 0, path.read_bytes())
        self.add("sync", path / "x" if path.is_dir() else path)  # of a folder: whatever lies in it
        self._plain["fsync"](handle)

    def rename(self, old, new):
        self.add("rename", old, str(Path(os.path.realpath(new)).relative_to(self.root)))
        self._plain["rename"](old, new)

    def mkdir(self, path, *more, **named):
        self._plain["mkdir"](path, *more, **named)
        self.add("mkdir", path)

    def rmtree(self, path, *more, **named):
        if os.path.exists(path):
            self.add("rmtree", path)
        self._rmtree(path, *more, **named)

    def __enter__(self):
        self._open, self._rmtree = builtins.open, shutil.rmtree
        mine = {"open": self.open_handle, **{name: getattr(self, name) for name in ("pwrite", "fsync", "rename", "mkdir")}}
        self._patches = [mock.patch.object(os, name, mine[name]) for name in mine]
        self._patches += [mock.patch.object(builtins, "open", self.open_file), mock.patch.object(shutil, "rmtree", self.rmtree)]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self._patches:
            patch.stop()


def synced(operations, i):
    """Whether an operation must have reached the disk when the last one of these has."""
    what, path, *_ = operations[i]
    named = operations[i][2] if what == "rename" else path
    if what == "write":
        return ("sync", path) in operations[i:]
    return ("sync", str(Path(named).parent / "x")) in operations[i:]


def play(operations, root, reaches, draw):
    """The disk when the power goes after these operations."""
    for i, (what, path, *more) in enumerate(operations):
        if what == "sync" or not (synced(operations, i) or reaches()):
            continue
        target = root / path
        if what == "mkdir":
            target.mkdir(parents=True, exist_ok=True)
        elif what == "rmtree":
            shutil.rmtree(target, ignore_errors=True)
        elif what == "rename":
            if target.exists():  # or else the name it had before was lost already
                target.rename(root / more[0])
        elif what == "create" and target.parent.exists():
            target.touch()
        elif what == "write" and target.exists():  # data without a name is lost as well
            offset, data = more
            torn = data if synced(operations, i) else data[: draw.randrange(len(data) + 1)]
            with open(target, "r+b") as file:
                file.seek(offset)
                file.write(torn)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A disk with an old checkpoint, and what is done to write a new one and remove the old one."""
    before = tmp_path_factory.mktemp("before").resolve()
    work = tmp_path_factory.mktemp("work").resolve()
    with small_files(500, 1500):
        saved(before, draw_tensors(SHAPES), held_by_all(SHAPES, 1), SelfComm(), step=4)
        shutil.copytree(before, work, dirs_exist_ok=True)
        with Recorder(work) as recorder:
            saved(work, draw_tensors(SHAPES), held_by_all(SHAPES, 1), SelfComm(), step=8)
            prune(work, 1, False)
    return before, work, recorder.done


def test_the_recording_is_complete(recorded, tmp_path):
    before, work, operations = recorded
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)
    play(operations, tmp_path, lambda: True, random.Random(0))
    assert {what for what, *_ in operations} == {"create", "write", "sync", "rename", "mkdir", "rmtree"}
    names = sorted(str(path.relative_to(work)) for path in work.rglob("*"))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == names
    with small_files(500, 1500):
        assert newest_valid(tmp_path)[0] == tmp_path / NEW
    assert not (tmp_path / OLD).exists()


@pytest.mark.parametrize("seed", ["all", "nothing", *range(8)])
def test_whenever_the_power_goes_one_is_whole(recorded, tmp_path, seed):
    before, _, operations = recorded
    draw = random.Random(seed)
    reaches = {"all": lambda: True, "nothing": lambda: False}.get(seed, lambda: draw.random() < 0.5)
    chosen = set()
    with small_files(500, 1500):
        for count in range(len(operations) + 1):
            disk = tmp_path / str(count)
            shutil.copytree(before, disk)
            play(operations[:count], disk, reaches, draw)
            found, broken = newest_valid(disk)
            assert found in (disk / OLD, disk / NEW), (count, operations[count - 1][:2], broken)
            assert not broken or found == disk / NEW
            chosen.add(found.name)
            remove_leftovers(disk)
            assert newest_valid(disk)[0] == found
            shutil.rmtree(disk)
    assert chosen == {OLD, NEW}
