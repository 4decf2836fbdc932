"""The training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mpilm.comm.activity import Activity, Span
from mpilm.comm.base import Comm
from mpilm.comm.together import AgreedError
from mpilm.comm.trace import Traced
from mpilm.config import Config, traced_steps
from mpilm.errors import PreemptedError
from mpilm.guard.fault import faults
from mpilm.guard.request import REASONS
from mpilm.guard.watchdog import LEAVING, Watchdog
from mpilm.telemetry.trace import Trace
from mpilm.trainer.build import Training, build
from mpilm.trainer.drift import refuse_drift
from mpilm.trainer.elastic import Carried, Forgetful, Kept
from mpilm.trainer.held_out import evaluate
from mpilm.trainer.left_out import leave_out
from mpilm.trainer.log import RunLog, layout_row
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
        stack.callback(log.display.close)
        saver = Saver(run, log)
        trace = Trace(traced_steps(config), run.mesh, layout_row(run))
        if trace.steps and trace.steps[-1] <= run.folder.step:
            log.display.line(f"nothing to trace: the steps {config.run.trace_steps} of --run.trace-steps were done before")
        try:
            _steps(run, log, saver, trace, kept or Forgetful(), carried)
        except AgreedError as error:
            saver.close()
            log.traced(trace)
            log.stopped(str(error))
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


def _steps(run: Training, log: RunLog, saver: Saver, trace: Trace, kept: Kept, carried: Carried | None) -> None:
    activity = run.mesh.activity
    saver.reserve()
    unchecked = False
    if carried is not None:  # what belongs to its step may not have been finished
        _after(run, log, saver, carried.done, carried.result(), [], again=True)
    for step in range(run.folder.step, run.config.train.steps):
        trace.ready(step + 1)
        compiling = run.config.train.compile and step == run.folder.step
        activity.enter("compilation" if compiling else "step", step)  # which takes as long as it takes
        checking = step == run.folder.step or due(step, run.config.fault.check_every)
        run.mesh.check(checking)
        said = Said(run.request.reason(log.needed_s()), saver.busy)
        trace.keep_after(step, activity.take())
        result = train_step(run.model, run.batches, step, said, run.history.limit(run.config.train))
        spans, done, rewound = activity.take(), step + 1, False
        trace.keep(done, spans)
        run.mesh.check(False)
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
        _after(run, log, saver, done, result, spans, rewound)
        if done in trace.steps and done + 1 not in trace.steps:
            trace.keep_after(done, activity.take())
            log.traced(trace)
    saver.close()
    trace.keep_after(run.config.train.steps, activity.take())
    log.traced(trace)
    _forget_stop(run)


def _after(
    run: Training, log: RunLog, saver: Saver, done: int, result: StepResult, spans: list[Span], rewound: bool = False,
    again: bool = False,
) -> None:  # fmt: skip
    """What belongs to a step besides the step: log, evaluate, save, stop. Collective. `again`: some may have been done."""
    settings, steps, activity, loss = run.config.run, run.config.train.steps, run.mesh.activity, None
    log.again(done, result) if again else log.step(done, result, spans)
    saver.look(done, result.heard.busy)
    stopping = result.heard.wish > 0 and done < steps
    if stopping:
        run.model.meet()
    saving = stopping or done == steps or rewound or (due(done, run.config.checkpoint.every) and result.updated)
    evaluating = due(done, settings.eval_every) or (settings.eval_every and saving and not stopping)
    if run.batches.eval_samples and evaluating:
        activity.enter("evaluation", done - 1)
        activity.at("eval")
        with activity.span("evaluation"):
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
