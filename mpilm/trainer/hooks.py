"""Hooks: what happens around a training step. trainer/loop.py states their order."""

import time
from dataclasses import dataclass
from math import isfinite
from statistics import median

from mpilm.checkpoint.manager import CheckpointManager
from mpilm.comm.collective_errors import CollectiveError, run_on_root
from mpilm.comm.flight_recorder import Span
from mpilm.engine.hardware import describe_program
from mpilm.engine.state_check import check_state
from mpilm.engine.step import StepResult, validation_loss
from mpilm.errors import PreemptedError
from mpilm.launch.stop_request import STOP_REASONS
from mpilm.ops.tree import balance_blocks
from mpilm.telemetry.trace import Trace, break_down
from mpilm.trainer.certificate import CertificateWriter, certified_settings, digest_facts
from mpilm.trainer.log import RunLog
from mpilm.trainer.recovery.loss_scale import loss_scale
from mpilm.trainer.recovery.memory_checkpoint import InMemoryCheckpoint
from mpilm.trainer.recovery.skip import skip_step
from mpilm.trainer.run import Run
from mpilm.trainer.run_folder import writing

MEASURED_STEPS = 5  # before microbatches are assigned by speed
LEAST_GAIN = 0.05  # of the time of the slowest replica, for which they are assigned anew
OVERLAP_TRIAL_STEPS, LEAST_GAIN_OF_OVERLAP = 12, 0.01
HookParts = tuple[Run, RunLog, CheckpointManager, InMemoryCheckpoint | None]  # of every hook


@dataclass
class StepEvent:
    """A completed step, as hooks see it."""

    done: int  # steps completed
    result: StepResult
    spans: list[Span]  # of this rank, during the step
    rewound: bool = False  # set by BadStepRecovery: a checkpoint's state was restored
    recovered: bool = False  # the step was done before ranks were lost; some hooks may have run already
    eval_loss: float | None = None  # set by Evaluation


@dataclass
class Hook:
    """Called around each step, on all ranks in the same order, so hooks may be collective."""

    run: Run
    log: RunLog
    checkpoints: CheckpointManager
    in_memory: InMemoryCheckpoint | None  # None unless fault.elastic is set

    def before_step(self, step: int) -> None: ...

    def after_step(self, event: StepEvent) -> None: ...

    def finish(self) -> None: ...  # after the last step


def is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


@dataclass
class Tracing(Hook):
    """Records the spans of the steps to trace, and writes them after the last of these."""

    trace: Trace

    def __post_init__(self) -> None:
        if self.trace.steps and self.trace.steps[-1] <= self.run.folder.step:
            done = f"the steps {self.run.config.run.trace_steps} of --run.trace-steps are already completed"
            self.log.log_line(f"nothing to trace: {done}")

    def before_step(self, step: int) -> None:
        self.trace.add_after_step(step, self.run.recorder.drain_spans())
        if step in self.trace.steps and step + 1 not in self.trace.steps:
            self.write()
        self.trace.begin_step(step + 1)
        self.run.recorder.drain_spans()

    def after_step(self, event: StepEvent) -> None:
        self.trace.add_step(event.done, event.spans)

    def finish(self) -> None:
        self.trace.add_after_step(self.run.config.train.steps, self.run.recorder.drain_spans())
        self.write()

    def write(self) -> None:
        self.log.log_line(self.trace.write(self.run.folder.path))


class BadStepRecovery(Hook):
    """Skips a step whose update was rejected, for a value that is not finite or a loss spike, or restores a checkpoint. Sets
    the loss scale of each step, which such steps change."""

    def before_step(self, step: int) -> None:
        self.run.model.loss_scale = loss_scale(self.run.config.train.dtype, self.run.bad_steps.overflows, step)

    def after_step(self, event: StepEvent) -> None:
        if event.result.updated:
            return self.run.bad_steps.record(event.result.loss)
        self.run.recorder.enter("diagnosis", event.done - 1)
        if self.in_memory is not None:
            self.in_memory.snapshots = []  # the state is about to change other than by a training step
        event.rewound = skip_step(self.run, self.log, self.checkpoints, event.done, event.result)


class InMemoryCheckpointing(Hook):
    """Keeps the state recoverable: with ZeRO a copy on the next rank, without it a reference to that of the replica."""

    def after_step(self, event: StepEvent) -> None:
        if self.in_memory is not None:
            result = event.result
            values = [result.loss, result.grad_norm, result.lr, result.updated, list(result.losses)]
            trainer = self.run.bad_steps.state_dict() | {"result": values, "retained": dict(self.run.folder.retained)}
            self.in_memory.save(self.run.model, self.run.folder.path, event.done, trainer)


class ConsistencyCheck(Hook):
    """Compares calls of ranks, and replicas once in sync: in the first step and every fault.check-every steps."""

    pending = False  # replicas are still to be compared

    def before_step(self, step: int) -> None:
        is_checked = step == self.run.folder.step or is_due(step, self.run.config.fault.check_every)
        self.run.mesh.check_calls(is_checked)
        self.pending = self.pending or is_checked

    def after_step(self, event: StepEvent) -> None:
        self.run.mesh.check_calls(False)
        if self.pending and self.run.model.are_replicas_in_sync(event.done):
            check_state(self.run.model, event.done)
            self.pending = False


class Logging(Hook):
    def after_step(self, event: StepEvent) -> None:
        if event.recovered:
            self.log.log_recovered_step(event.done, event.result)
        else:
            self.log.log_step(event.done, event.result, event.spans)


class Evaluation(Hook):
    """Evaluates every eval-every steps, and before a checkpoint is saved."""

    def after_step(self, event: StepEvent) -> None:
        run, every = self.run, self.run.config.run.eval_every
        if stops_early(run, event):
            run.model.sync_replicas()
        if run.batches.eval_samples and (is_due(event.done, every) or (every and is_checkpoint_planned(run, event))):
            began_s = time.perf_counter()
            run.recorder.enter("evaluation", event.done - 1)
            with run.recorder.span("evaluation"):
                event.eval_loss = validation_loss(run.model, run.batches, run.config.run.eval_batches)
            self.log.log_evaluation(event.done, event.eval_loss, time.perf_counter() - began_s)


@dataclass
class Certification(Hook):
    """Writes a line of the certificate each run.certify-every steps, and before a checkpoint is saved."""

    def __post_init__(self) -> None:
        run, world = self.run, self.run.mesh.world
        self.facts = {
            "settings": digest_facts(certified_settings(run.config)),
            "data": digest_facts(run.content),
            "program": describe_program(world),
        }

        def open_file() -> CertificateWriter:
            with writing(run.folder.path):
                return CertificateWriter(run.folder.path, run.folder.logged)

        self.writer = run_on_root(world, open_file) if run.config.run.certify_every else None

    def after_step(self, event: StepEvent) -> None:
        run, result, every = self.run, event.result, self.run.config.run.certify_every
        is_saved = stops_early(run, event) or is_checkpoint_planned(run, event)
        if not every or not (is_saved or is_due(event.done, every)) or not run.model.are_replicas_in_sync(event.done):
            return
        run.recorder.enter("certificate", event.done - 1)
        tensors = run.model.digest_state()
        if self.writer is not None:  # on rank 0
            loss, grad_norm = (x if isfinite(x) else None for x in (result.loss, result.grad_norm))
            losses = list(result.losses) if loss is not None else []
            samples = [n * run.config.train.global_batch for n in (self.writer.last_step, event.done)]
            facts = {"step": event.done, "loss": loss, "grad_norm": grad_norm, "losses": losses, "samples": samples}
            self.writer.write(facts | self.facts | {"tensors": tensors})
        self.log.restart_clock(event.done)

    def finish(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Checkpointing(Hook):
    """Commits a checkpoint once no rank is writing it any more, and starts to save the next one."""

    def after_step(self, event: StepEvent) -> None:
        has_waited = self.checkpoints.poll(event.result.flags.checkpoint_pending)
        is_wanted = stops_early(self.run, event) or is_checkpoint_planned(self.run, event)
        if is_wanted and not (event.recovered and self.checkpoints.has_saved(event.done)):
            self.checkpoints.save(event.done, event.eval_loss)
            has_waited = True
        if has_waited:
            self.log.restart_clock(event.done)

    def finish(self) -> None:
        self.checkpoints.close()


@dataclass
class OverlapTrial(Hook):
    """Tries, in some of the first steps, whether training is faster if sums of gradients travel while backward computes, and
    keeps to the faster way: on CPUs, where sums travel as messages. The bits are the same."""

    def __post_init__(self) -> None:
        model, first = self.run.model, self.run.folder.step + 1  # the very first step takes longer
        is_possible = all(self.run.mesh.world.all_gather_json(model.can_overlap and model.device.type == "cpu"))
        self.steps = range(first, first + OVERLAP_TRIAL_STEPS if is_possible else first)
        self.seconds, self.is_faster = {True: list[float](), False: list[float]()}, False

    def before_step(self, step: int) -> None:
        if self.steps:
            self.run.model.overlap_sums(step % 2 == 0 if step in self.steps else self.is_faster)
            self.began_s = time.perf_counter()

    def after_step(self, event: StepEvent) -> None:
        if (step := event.done - 1) not in self.steps:
            return
        self.seconds[step % 2 == 0].append(time.perf_counter() - self.began_s)
        if step < self.steps[-1]:
            return
        everyone = self.run.mesh.world.all_gather_json([median(self.seconds[overlap]) for overlap in (False, True)])
        apart_s, overlapped_s = map(max, zip(*everyone))
        self.is_faster = overlapped_s < (1 - LEAST_GAIN_OF_OVERLAP) * apart_s
        how = "while backward computes" if self.is_faster else "after backward"
        times = f"a step takes {overlapped_s:.3g} s with sums beside backward, {apart_s:.3g} s with sums after it"
        self.log.log_event("overlap", event.done, why=f"gradients are summed {how} from here on: {times}")


class Balancing(Hook):
    """Assigns microbatches to replicas by their speed (parallel.deal measured): after the first steps, and at checkpoints."""

    compute_s, steps = 0.0, 0  # since the last assignment

    def after_step(self, event: StepEvent) -> None:
        run, world, model = self.run, self.run.mesh.world, self.run.model
        if run.config.parallel.deal == "even" or event.recovered or event.done == run.folder.step + 1:
            return  # the first step takes longer
        self.compute_s += break_down(event.spans, run.mesh.shape.pipeline > 1)["compute"]
        self.steps += 1
        is_first = event.done == run.folder.step + 1 + MEASURED_STEPS
        if self.steps < MEASURED_STEPS or not (is_first or is_checkpoint_planned(run, event)):
            return
        own_s = self.compute_s / self.steps / len(model.microbatch_ids)
        everyone = world.all_gather_json([model.replicas.rank, own_s])
        seconds = [max(s for other, s in everyone if other == replica) for replica in range(model.replicas.size)]
        self.compute_s, self.steps, blocks = 0.0, 0, balance_blocks(seconds, model.microbatch_count)
        before_s, after_s = (max(s * (b - a) for s, (a, b) in zip(seconds, each)) for each in (model.blocks, blocks))
        if after_s < (1 - LEAST_GAIN) * before_s:
            model.assign_microbatches(blocks)
            counts = ", ".join(str(b - a) for a, b in blocks)
            self.log.log_event("balanced", event.done, why=f"{counts} microbatches on the replicas, by their speed")
        self.log.restart_clock(event.done)


class Stopping(Hook):
    """Ends the run early if the ranks have agreed to, once the checkpoint is written."""

    def after_step(self, event: StepEvent) -> None:
        if stops_early(self.run, event):
            self.checkpoints.close()
            self.finish()
            done = f"step {event.done} of {self.run.config.train.steps}"
            cause = STOP_REASONS[event.result.flags.stop_reason]
            raise CollectiveError(PreemptedError(f"stopped after {done}: {cause}; saved, and the same command resumes"))

    def finish(self) -> None:
        if self.run.mesh.rank == 0:
            self.run.stop_request.clear()


def stops_early(run: Run, event: StepEvent) -> bool:
    """Return whether the ranks have agreed to stop after a step that is not the last."""
    return event.result.flags.stop_reason > 0 and event.done < run.config.train.steps


def is_checkpoint_planned(run: Run, event: StepEvent) -> bool:
    """Return whether the run saves without being stopped: each checkpoint.every steps, at the end, after a rewind."""
    regular = is_due(event.done, run.config.checkpoint.every) and event.result.updated
    return event.done == run.config.train.steps or event.rewound or regular
