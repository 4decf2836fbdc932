"""The training loop."""

import contextlib
import time
from functools import partial

from mpilm.checkpoint.manager import CheckpointManager
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.instrumented import instrument
from mpilm.config.schema import Config, trace_step_range
from mpilm.data.corpus import unigram_loss
from mpilm.engine.step import StepFlags, train_step
from mpilm.errors import UserError, is_out_of_memory
from mpilm.inference.generate import generate
from mpilm.launch.hang_report import EXITING
from mpilm.report.page import write_report
from mpilm.telemetry.trace import Trace
from mpilm.trainer import hooks
from mpilm.trainer.build import build_run
from mpilm.trainer.describe import describe_run, out_of_memory_error
from mpilm.trainer.log import RunLog
from mpilm.trainer.recovery.bad_hosts import record_bad_hosts
from mpilm.trainer.recovery.memory_checkpoint import InMemoryCheckpoint, RecoveredState
from mpilm.trainer.run import Run, collect_state


def train(
    config: Config, world: Comm, in_memory: InMemoryCheckpoint | None = None, recovered: RecoveredState | None = None
) -> None:
    """Train, evaluate, save and log, to the last step or until the run is asked to stop. Collective. `in_memory`: receives the
    state of every step; `recovered`: the state to resume from (trainer/recovery/elastic.py)."""
    with contextlib.ExitStack() as stack:
        run = build_run(config, instrument(world), recovered)
        recorder = run.recorder
        stack.callback(run.folder.release)
        stack.enter_context(run.stop_request.catch_signals())
        stack.push(lambda _, error, __: exit_barrier(run, error))
        recorder.report_folder = run.folder.path / "watchdog"
        recorder.is_signalled = lambda: run.stop_request.signalled
        log = RunLog(run, *describe_run(run))
        stack.callback(log.display.close)
        make_state = partial(collect_state, run)
        checkpoints = CheckpointManager(
            run.folder.checkpoints, config.checkpoint, run.mesh.world, recorder, make_state, log.log_save, log.log_save_failure
        )
        run.recheck.on_failure = partial(record_bad_hosts, run, checkpoints)
        parts = run, log, checkpoints, in_memory
        tracing = hooks.Tracing(*parts, Trace(trace_step_range(config), run.mesh, log.start_row["layout"]))
        try:
            run_steps(parts, tracing, recovered)
        except CollectiveError as error:
            checkpoints.close()
            tracing.write()
            log.log_stop(str(error))
            _write_report(run, log)
            raise
        except Exception as error:
            if world.is_rank_failure(error):
                checkpoints.abandon()
            if is_out_of_memory(error):
                raise out_of_memory_error(run, error) from error
            raise
        recorder.enter("end")
        _finish(run, log)


def run_steps(parts: hooks.HookParts, tracing: hooks.Tracing, recovered: RecoveredState | None) -> None:
    """Run the remaining steps and their hooks. Collective."""
    run, log, checkpoints, _ = parts
    reporting: list[hooks.Hook] = [
        hooks.Logging(*parts),  # first: it measures the time since the previous step
        hooks.Evaluation(*parts),  # before saving: a checkpoint stores its evaluation loss
        hooks.Certification(*parts),  # before saving: a checkpoint has a line of the certificate
        hooks.Checkpointing(*parts),
        hooks.Balancing(*parts),
        hooks.Stopping(*parts),  # last: it raises
    ]
    all_hooks: list[hooks.Hook] = [
        hooks.OverlapTrial(*parts),  # closest to the step, which it times
        tracing,  # the step's own spans, before any hook adds others
        hooks.BadStepRecovery(*parts),  # before the state is copied, compared or saved
        hooks.InMemoryCheckpointing(*parts),  # before any collective that a failed rank could interrupt
        hooks.ConsistencyCheck(*parts),  # ends the comparison of calls; before the state is logged and saved
        *reporting,
    ]
    checkpoints.reserve_memory(run.folder.step, run.config.train.steps)
    if recovered is not None:  # ranks may have been lost before all hooks of its step had run
        event = hooks.StepEvent(recovered.done, recovered.result(), [], recovered=True)
        for hook in reporting:
            hook.after_step(event)
    for step in run.remaining_steps:
        compiles = run.config.train.compile and step == run.folder.step
        run.recorder.enter("compilation" if compiles else "step", step)
        for hook in all_hooks:
            hook.before_step(step)
        flags = StepFlags(run.stop_request.stop_reason(log.next_step_s()), checkpoints.is_writing)
        max_loss = run.bad_steps.spike_threshold(run.config.train)
        result = train_step(run.model, run.batches, step, flags, max_loss, run.recheck)
        event = hooks.StepEvent(step + 1, result, run.recorder.drain_spans())
        for hook in all_hooks:
            hook.after_step(event)
    for hook in reversed(all_hooks):
        hook.finish()


def exit_barrier(run: Run, error: BaseException | None) -> None:
    """Wait for all ranks before the folder is released, unless an error has ended this rank alone. Collective."""
    if error is None or isinstance(error, CollectiveError):
        run.recorder.enter(EXITING)
        run.mesh.world.barrier()


def _finish(run: Run, log: RunLog) -> None:
    """Log the end of a complete run, with a generated sample, and write the report. Collective."""
    took_s, unigram = time.perf_counter() - log.started, ""
    corpora = [(samples.corpus, samples.boundary) for samples in run.data.corpora]
    if log.is_root and log.eval_loss is not None and corpora:  # it reads the whole corpus, so before other ranks wait
        unigram = f"; a unigram model of this corpus scores {unigram_loss(corpora):.4f}"
    peaks = run.mesh.world.all_gather_json(run.peak_bytes)  # before the sample is generated
    log.log_end(took_s, peaks, unigram, _sample_text(run))
    _write_report(run, log)


def _sample_text(run: Run) -> str:
    """Return generated sample text. Collective: the model may be distributed over many ranks."""
    settings, tokenizer = run.config.generate, run.data.tokenizer
    if not settings.max_tokens or run.config.model.arch == "bert":
        return ""
    tokens = tokenizer.encode(settings.prompt).tolist() if settings.prompt else [tokenizer.eos]
    return settings.prompt + tokenizer.decode(generate(run.model, {0: tokens}, settings, tokenizer.eos)[0])


def _write_report(run: Run, log: RunLog) -> None:
    """Write report.html on rank 0. Errors here never fail the run."""
    if log.is_root:
        try:
            write_report([run.folder.path])
        except UserError as error:
            log.log_line(f"no report: {error}")
