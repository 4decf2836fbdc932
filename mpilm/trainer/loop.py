"""The training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mpilm.comm.activity import Activity
from mpilm.comm.base import Comm
from mpilm.comm.together import AgreedError
from mpilm.comm.trace import Traced
from mpilm.config import Config
from mpilm.errors import PreemptedError
from mpilm.guard.fault import faults
from mpilm.guard.request import REASONS
from mpilm.guard.watchdog import LEAVING, Watchdog
from mpilm.trainer.build import Training, build
from mpilm.trainer.drift import refuse_drift
from mpilm.trainer.elastic import Carried, Forgetful, Kept
from mpilm.trainer.held_out import evaluate
from mpilm.trainer.left_out import leave_out
from mpilm.trainer.log import RunLog
from mpilm.trainer.memory import is_out_of_memory, out_of_memory
from mpilm.trainer.saver import Saver
from mpilm.trainer.step import Said, StepResult, train_step


def train(
    config: Config, world: Comm, kept: Kept | None = None, carried: Carried | None = None, activity: Activity | None = None
) -> None:
    """Train, evaluate, save and show, to the last step or until the run is asked to stop. Collective.

    `kept`: takes the state of every step; `carried`: the state to go on from (trainer/elastic.py).
    """
    activity = activity or Activity(faults(world.rank))
    with contextlib.ExitStack() as stack:
        watchdog = Watchdog(activity, world, config.fault.step_timeout)
        stack.callback(watchdog.close)
        run = build(config, world, carried, activity)
        stack.callback(run.folder.release)
        stack.enter_context(run.request.listening())
        stack.enter_context(_leaving_together(world, activity))
        watchdog.write_below(run.folder.path)
        watchdog.hurried = lambda: run.request.signalled
        log = RunLog(run)
        saver = Saver(run, log)
        try:
            _steps(run, log, saver, kept or Forgetful(), carried)
        except AgreedError:
            saver.close()
            raise
        except Exception as error:
            if world.lost(error):
                saver.abandon()
            if is_out_of_memory(error):
                raise out_of_memory(run, error) from error
            raise
        run.mesh.activity.enter("end", config.train.steps)
        log.finish()


@contextlib.contextmanager
def _leaving_together(world: Comm, activity: Activity) -> Iterator[None]:
    """Wait for each other before the watchdog is let go: nobody watches MPI_Finalize, and a rank that hangs when all is done
    would keep the others there. Collective, unless something else than an AgreedError is raised."""
    agreed: AgreedError | None = None
    try:
        yield
    except AgreedError as error:
        agreed = error
    activity.enter(LEAVING, activity.step)
    activity.at("leaving")
    Traced(world, activity=activity).barrier()
    if agreed is not None:
        raise agreed


def _steps(run: Training, log: RunLog, saver: Saver, kept: Kept, carried: Carried | None) -> None:
    activity = run.mesh.activity
    saver.reserve()
    unchecked = False
    if carried is not None:  # what belongs to its step may not have been finished
        _after(run, log, saver, carried.done, carried.result(), again=True)
    for step in range(run.folder.step, run.config.train.steps):
        compiling = run.config.train.compile and step == run.folder.step
        activity.enter("compilation" if compiling else "step", step)  # which takes as long as it takes
        checking = step == run.folder.step or due(step, run.config.fault.check_every)
        run.mesh.check(checking)
        said = Said(run.request.reason(log.needed_s()), saver.busy)
        result = train_step(run.model, run.batches, step, said, run.history.limit(run.config.train))
        run.mesh.check(False)
        done, rewound = step + 1, False
        if result.updated:
            run.history.note(result.loss)
        else:
            activity.enter("diagnosis", step)
            kept.forget()
            rewound = leave_out(run, log, saver, done, result)
        kept.keep(run, done, result)
        unchecked = unchecked or checking
        if unchecked and run.model.met(done):  # replicas that are apart are looked at when they meet
            refuse_drift(run.model, done)
            unchecked = False
        _after(run, log, saver, done, result, rewound)
    saver.close()
    _forget_stop(run)


def _after(
    run: Training, log: RunLog, saver: Saver, done: int, result: StepResult, rewound: bool = False, again: bool = False
) -> None:
    """What belongs to a step besides the step: log, evaluate, save, stop. Collective. `again`: some may have been done."""
    settings, steps, activity, loss = run.config.run, run.config.train.steps, run.mesh.activity, None
    (log.again if again else log.step)(done, result)
    saver.look(done, result.heard.busy)
    stopping = result.heard.wish > 0 and done < steps
    if stopping:
        run.model.meet()
    saving = stopping or done == steps or rewound or (due(done, run.config.checkpoint.every) and result.updated)
    evaluating = due(done, settings.eval_every) or (settings.eval_every and saving and not stopping)
    if run.batches.eval_samples and evaluating:
        activity.enter("evaluation", done - 1)
        activity.at("eval")
        loss = evaluate(run)
        log.evaluation(done, loss)
    if saving and not (again and saver.is_there(done)):
        saver.begin(done, loss)
    if stopping:
        saver.close()
        _stop(run, done, result.heard.wish)


def _forget_stop(run: Training) -> None:
    if run.mesh.rank == 0:
        run.request.done()


def due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _stop(run: Training, done: int, wish: int) -> None:
    _forget_stop(run)
    raise AgreedError(PreemptedError(
        f"stopped after step {done} of {run.config.train.steps}, as {REASONS[wish]} asked; saved, and the same command goes on"
    ))  # fmt: skip
