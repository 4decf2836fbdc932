"""When checkpoints of a run are written: one at a time, beside the steps that follow."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mpilm.checkpoint.assemble import Buffers
from mpilm.checkpoint.format import folder_name
from mpilm.checkpoint.save import Saving, State, prune, reserve
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import to_dict
from mpilm.engine.hardware import numerics_environment
from mpilm.errors import FileError, NonFiniteError
from mpilm.mesh.shape import AXES
from mpilm.trainer.log import RunLog
from mpilm.trainer.run import Run


class Saver:
    """Every method but `busy` is collective over the world, and raises CollectiveError where a checkpoint cannot be written, unless
    `checkpoint.on-error` says that the run goes on."""

    def __init__(self, run: Run, log: RunLog):
        self.run, self.log = run, log
        self._saving: Saving | None = None
        self._waited_s = 0.0  # what training has waited for it
        self._buffers = Buffers()
        self._pruning: threading.Thread | None = None  # on rank 0: to remove large files takes a while

    def reserve(self) -> None:
        """Have the memory of the copies, where there will be some before the end."""
        settings, step = self.run.config.checkpoint, self.run.folder.step
        if settings.asynchronous and settings.every and step + settings.every < self.run.config.train.steps:
            reserve(self._buffers, state_of(self.run, step, None), self.run.mesh.world)

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._saving is not None and self._saving.busy

    def begin(self, done: int, eval_loss: float | None) -> None:
        """Copy the state after `done` steps and begin to write it; the one before is finished first."""
        self.finish()
        self._waited_s = 0.0
        with self._waiting(done - 1):
            self._start(done, eval_loss)
        if not self.run.config.checkpoint.asynchronous:
            self.finish()
        self.log.restart_clock(done)

    def _start(self, done: int, eval_loss: float | None) -> None:
        run = self.run
        _refuse_not_finite(run, done)
        self._pruned()  # before one looks for room
        try:
            self._saving = Saving(
                run.folder.checkpoints, done, state_of(run, done, eval_loss), run.mesh.world, lambda point: None,
                run.config.checkpoint.asynchronous, self._buffers,
            )  # fmt: skip
        except CollectiveError as error:
            self._failed(error)

    @contextlib.contextmanager
    def _waiting(self, step: int) -> Iterator[None]:
        """What is done meanwhile is for a checkpoint, and training stands still."""
        progress, began_s = self.run.progress, time.monotonic()
        progress.enter("checkpoint", step)
        with progress.span("checkpoint"):
            yield
        self._waited_s += time.monotonic() - began_s

    def exists(self, done: int) -> bool:
        """Whether the state after `done` steps has been saved."""
        path = self.run.folder.checkpoints / folder_name(done)
        return bool(self.run.mesh.world.broadcast_json(path.exists()))

    def poll(self, done: int, any_busy: bool) -> None:
        """Between steps: publish what every rank has written."""
        if self._saving is not None and not any_busy:
            self._bring_on(self._saving.advance)
            self.log.restart_clock(done)

    def finish(self) -> None:
        """Publish what is under way, once it is written, and remove checkpoints no longer wanted."""
        if self._saving is not None:
            self._bring_on(self._saving.commit)

    def _bring_on(self, go: Callable[[], object]) -> None:
        saving, run, config = self._saving, self.run, self.run.config.checkpoint
        assert saving is not None
        try:
            with self._waiting(run.progress.step):
                there = go()
            if not there:
                return
        except CollectiveError as error:
            self._saving = None
            return self._failed(error)
        self._saving = None
        self.log.log_save(saving.final, saving.step, saving.took_s, self._waited_s)
        if run.mesh.rank == 0:
            wanted = run.folder.checkpoints, config.keep, config.keep_best
            self._pruning = threading.Thread(target=prune, args=wanted, name="prune", daemon=True)
            self._pruning.start()

    def close(self) -> None:
        """Publish what is under way, and be done with all of it."""
        self.finish()
        self._pruned()

    def _pruned(self) -> None:
        if self._pruning is not None:
            self._pruning.join()

    def abandon(self) -> None:
        """Leave what is under way as it is, once this rank writes no more: the ranks cannot agree on it."""
        if self._saving is not None:
            self._saving.abandon()

    def _failed(self, error: CollectiveError) -> None:
        if not isinstance(error.error, FileError) or self.run.config.checkpoint.on_error == "stop":
            raise error
        self.log.log_save_failure(str(error))


def _refuse_not_finite(run: Run, done: int) -> None:
    """A state that has gone bad in this step must not take the place of a good one. Collective."""
    kinds = {"": run.model.owned_slices(), **{f" ({kind})": of for kind, of in run.model.optimizer.state_slices().items()}}
    every = [(f"{piece.name}{kind}", x) for kind, of in kinds.items() for piece, x in of.items()]
    replicas = (
        run.model.data if not run.model.zero and not run.model.is_local_sgd else None
    )  # they hold the same, and look at a part each
    bad = (name for name, x in (every[replicas.rank :: replicas.size] if replicas else every) if not _is_finite(x))
    found = {rank: name for rank, name in enumerate(run.mesh.world.all_gather_json(next(bad, ""))) if name}
    if found:
        rank, name = next(iter(found.items()))
        raise CollectiveError(NonFiniteError(
            f"after step {done} {name} is not finite (on rank {rank}), although loss and gradient were; nothing is saved, and "
            "the newest checkpoint is from before. A processor or its memory may be failing, or --train.lr is too high"
        ))  # fmt: skip


def _is_finite(x: Tensor) -> bool:
    """The sum alone would say it of all but huge values, at a thirtieth of the time."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def state_of(run: Run, done: int, eval_loss: float | None) -> State:
    """What a checkpoint holds after `done` steps."""
    config, model, material = run.config, run.model, run.data
    trainer = {
        "step": done,
        "tokens": done * run.batches.step_tokens,
        "seed": config.train.seed,
        "eval_loss": eval_loss,
        **run.bad_steps.state_dict(),
        "content": dict(run.content),
        "layout": dict(zip(AXES, run.mesh.shape.sizes)),
        "conditions": numerics_environment(run.hardware, run.mesh.world, config.parallel),
        "config": to_dict(config),
    }
    return State(
        config.model, material.tokenizer, material.template, trainer, model.shapes, model.moment_shapes, model.owned_slices(),
        model.optimizer.state_slices(), model.shard_owners,
    )  # fmt: skip
