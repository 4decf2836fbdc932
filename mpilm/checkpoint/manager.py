"""The checkpoints of a run: saved one at a time while training goes on, and removed when newer ones replace them."""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path

from mpilm.checkpoint.format import TEMPORARY, checkpoint_name, checkpoint_step, list_checkpoints
from mpilm.checkpoint.save import CheckpointState, PendingCheckpoint, WriteBuffers
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.flight_recorder import FlightRecorder
from mpilm.config.schema import CheckpointConfig
from mpilm.data.files import read_json
from mpilm.errors import FileError, UserError


@dataclass(eq=False)
class CheckpointManager:
    """Saves the checkpoints of a run. All methods but `abandon` are collective over `comm`. If a checkpoint cannot be written,
    they raise CollectiveError, or call `on_failed` where checkpoint.on-error is "warn"."""

    folder: Path
    config: CheckpointConfig
    comm: Comm
    recorder: FlightRecorder
    make_state: Callable[[int, float | None], CheckpointState]  # from step and evaluation loss
    on_saved: Callable[[Path, int, float, float], None]  # folder, step, seconds to copy and write, seconds that training waited
    on_failed: Callable[[str], None]  # message
    _pending: PendingCheckpoint | None = field(default=None, init=False)
    _waited_s: float = field(default=0.0, init=False)
    _buffers: WriteBuffers = field(default_factory=WriteBuffers, init=False)
    _pruning: threading.Thread | None = field(default=None, init=False)  # on rank 0: to remove large files takes a while

    def reserve_memory(self, step: int, last_step: int) -> None:
        """Allocate the memory for copies of the state, if the run will make any between these steps."""
        if self.config.asynchronous and self.config.every and step + self.config.every < last_step:
            self._buffers.reserve(self.make_state(step, None), self.comm)

    @property
    def is_writing(self) -> bool:
        """True while this rank is writing."""
        return self._pending is not None and not self._pending.work.done()

    def has_saved(self, step: int) -> bool:
        """Return whether the state after `step` steps is on disk."""
        return bool(self.comm.broadcast_json((self.folder / checkpoint_name(step)).exists()))

    def save(self, step: int, eval_loss: float | None) -> None:
        """Finish the previous checkpoint, then copy the state after `step` steps and start to write it."""
        self.finish()
        self._waited_s = 0.0
        with self._stalling(step - 1):
            state = self.make_state(step, eval_loss)
            self._join_pruning()  # which frees the space that this one needs
            buffers = self._buffers if self.config.asynchronous else None
            self._pending = PendingCheckpoint(self.folder, step, state, self.comm, buffers)
        if not self.config.asynchronous:
            self.finish()

    def poll(self, any_writing: bool) -> bool:
        """Between steps, advance the commit once no rank is writing. Return whether training had to wait."""
        if self._pending is None or any_writing:
            return False
        self._advance(self._pending, self._pending.poll)
        return True

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, commit it, and start to remove old ones."""
        if self._pending is not None:
            self._advance(self._pending, self._pending.finalize)

    def close(self) -> None:
        """Finish saving and removing."""
        self.finish()
        self._join_pruning()

    def abandon(self) -> None:
        """Wait until this rank has stopped writing; used when the ranks can no longer agree."""
        if self._pending is not None:
            self._pending.work.exception()

    def _advance(self, save: PendingCheckpoint, action: Callable[[], object]) -> None:
        complete = None
        with self._stalling(self.recorder.step):
            complete = action()
        if complete:
            self._pending = None
            self.on_saved(save.final, save.step, save.took_s, self._waited_s)
            if self.comm.rank == 0:
                self._start_pruning()

    def _start_pruning(self) -> None:
        arguments = self.folder, self.config.keep, self.config.keep_best
        self._pruning = threading.Thread(target=prune_checkpoints, args=arguments, name="prune", daemon=True)
        self._pruning.start()

    def _join_pruning(self) -> None:
        if self._pruning is not None:
            self._pruning.join()

    @contextlib.contextmanager
    def _stalling(self, step: int) -> Iterator[None]:
        """Record that training waits for a checkpoint. If that fails, report it, or raise the error."""
        began_s = time.monotonic()
        self.recorder.enter("checkpoint", step)
        try:
            with self.recorder.span("checkpoint"):
                yield
        except CollectiveError as error:
            self._pending = None
            if not isinstance(error.error, FileError) or self.config.on_error == "stop":
                raise
            self.on_failed(str(error))
        self._waited_s += time.monotonic() - began_s


def prune_checkpoints(parent: Path, keep: int, keep_best: bool) -> None:
    """Remove all but the `keep` newest checkpoints, the newest whose state was checked (older ones were not), the newest from
    before the last good recheck of the computation and, with `keep_best`, the one with the lowest evaluation loss."""
    folders = list_checkpoints(parent)
    retained = set(folders[-keep:] if keep else folders)
    losses: dict[Path, float] = {}
    checked: list[Path] = []
    good = 0  # steps completed at the last good recheck
    for folder in folders:
        with contextlib.suppress(UserError):
            trainer = read_json(folder / "trainer.json")
            checked += [folder] * bool(trainer.get("checked"))
            good = int(trainer.get("rechecked", good))
            loss = trainer.get("eval_loss")
            if keep_best and loss is not None and not isnan(loss):
                losses[folder] = loss
    rechecked = [folder for folder in folders if (checkpoint_step(folder) or 0) <= good]
    retained |= {*sorted(losses, key=losses.__getitem__)[:1], *checked[-1:], *rechecked[-1:]}
    for folder in folders:
        if folder not in retained:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; rename it first, so that a half-removed one does not look complete."""
    doomed = folder.parent / f"{TEMPORARY}removing-{folder.name}"
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):  # one checkpoint too many is no reason to stop
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Remove what a killed job has left half-written or half-removed."""
    for folder in parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(folders: Iterable[Path], reason: str = "broken") -> list[Path]:
    """Rename checkpoints that must not be used, so that the run can save their steps again. Return the new names."""
    aside: list[Path] = []
    for folder in folders:
        names = (folder.with_name(f"{reason}-{n}-{folder.name}") for n in range(1, 10**6))
        aside.append(folder.rename(next(name for name in names if not name.exists())))
    return aside
