"""What a run says of itself: rows of metrics, lines, the summary. Rank 0 speaks; what all ranks must tell is gathered."""

from __future__ import annotations

import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mpilm.comm.activity import Span
from mpilm.comm.together import on_root
from mpilm.config import flatten, microbatches
from mpilm.data.corpus import unigram_loss
from mpilm.errors import FileError
from mpilm.guard.launch import announced_ranks
from mpilm.mesh.shape import AXES
from mpilm.model.size import flops_per_token
from mpilm.telemetry.breakdown import PARTS, breakdown
from mpilm.telemetry.display import Display
from mpilm.telemetry.live import Glance
from mpilm.telemetry.metrics import Metrics
from mpilm.telemetry.report import page
from mpilm.telemetry.trace import Trace
from mpilm.telemetry.trackers import Tracker, open_trackers
from mpilm.telemetry.words import duration, mebibytes
from mpilm.trainer.build import Training
from mpilm.trainer.header import header, parameters, trained
from mpilm.trainer.machine import peak_flops, versions
from mpilm.trainer.memory import predicted_memory
from mpilm.trainer.step import StepResult
from mpilm.trainer.write import write

WRITTEN_A_SECOND = 50e6  # bytes, of a checkpoint: a guess until one has been written


class RunLog:
    """Writes metrics.jsonl and for trackers, and prints. Made and called on every rank, in the same order."""

    def __init__(self, run: Training):
        self.run, self.speaks = run, run.mesh.rank == 0
        self.start = self._start_row()
        self.glance = Glance(str(run.folder.path), run.config.train.steps, run.config.checkpoint.every)
        self.display = on_root(run.mesh.world, self._open_display) or Display(False, self.glance, run.folder.path, True)
        threads = run.mesh.world.all_gather_json(run.machine.threads)
        for line in header(run, threads, self.predicted):
            self.display.say(line)
        self.sinks: list[Metrics | Tracker] = []
        on_root(run.mesh.world, self._open_sinks)
        self.display.begin(run.folder.logged)
        self.eval_loss: float | None = None
        self.started = self.last = time.perf_counter()
        self.last_done, self.spent_s = run.folder.logged, dict.fromkeys(PARTS, 0.0)
        self.step_s, self.save_s = 0.0, sum(run.model.held_bytes().values()) / WRITTEN_A_SECOND

    def _open_display(self) -> Display:
        log = self.run.folder.path / "log.txt"
        try:
            return Display(True, self.glance, log, announced_ranks() is not None)
        except OSError as error:
            raise FileError(f"{log} cannot be written: {error.strerror}") from None

    def _open_sinks(self) -> None:
        folder, run = self.run.folder, self.run.config.run
        try:
            trackers = open_trackers(run.trackers, folder.path, folder.logged, flatten(self.run.config))
            metrics = Metrics(folder.path / "metrics.jsonl", folder.logged)
            metrics.write(self.start)
            self.sinks = [metrics, *trackers]
            self.glance.see(self.start)
        except OSError as error:
            raise FileError(f"{error.filename or folder.path} cannot be written: {error.strerror}") from None

    def step(self, done: int, result: StepResult, spans: list[Span]) -> None:
        """One step is done, of which `spans` were this rank's; every log-every-th, the first and the last are written down."""
        for part, seconds in breakdown(spans, self.run.mesh.shape.pipeline > 1).items():
            self.spent_s[part] += seconds
        if not result.updated:
            return  # `left_out` has said why
        step_s = self.step_s = (time.perf_counter() - self.last) / (done - self.last_done)
        row, logged = self._row(done, result), self._is_logged(done)
        row |= {"step_s": step_s, "tokens_per_s": self.run.batches.step_tokens / step_s}
        if self.start["peak_flops"]:
            row["mfu"] = row["tokens_per_s"] * self.start["flops_per_token"] / self.start["peak_flops"]
        if logged:
            row |= self._of_ranks(done - self.last_done)
            self._write(row)
        self.display.step(done, row, logged)
        if logged:
            self.skip_time(done)

    def again(self, done: int, result: StepResult) -> None:
        """A step was done before ranks were lost, and may not have been written down."""
        if result.updated and self._is_logged(done):
            self._write(self._row(done, result))
        self.skip_time(done)

    def _is_logged(self, done: int) -> bool:
        every = self.run.config.run.log_every
        return every > 0 and (done % every == 0 or done in (self.run.folder.logged + 1, self.run.config.train.steps))

    def _row(self, done: int, result: StepResult) -> dict[str, Any]:
        tokens = done * self.run.batches.step_tokens
        return {
            "step": done, "time": time.time(), "tokens": tokens, "loss": result.loss, "grad_norm": result.grad_norm,
            "lr": result.lr,
        }  # fmt: skip

    def left_out(self, done: int, why: str, since: int) -> None:
        """A step changed nothing, and steps `since` another one were taken back."""
        self.display.line(f"{why}; " + (f"steps {since} to {done} are left out" if since < done else "left out"))
        self._write({"event": "skipped", "step": done, "time": time.time(), "why": why, "since": since})
        self.skip_time(done)

    def needed_s(self) -> float:
        """What another step and a save will take, with some room."""
        return 2 * self.step_s + 1.5 * self.save_s

    def evaluation(self, done: int, loss: float) -> None:
        self.display.line(f"step {done}: evaluation loss {loss:.4f}")
        self._write({"step": done, "time": time.time(), "eval_loss": loss})
        self.eval_loss = loss
        self.skip_time(done)

    def traced(self, trace: Trace) -> None:
        """Write what was traced, if there is anything; a run does not end for a trace. Collective."""
        said = trace.write(self.run.folder.path)
        if said:
            self.display.line(said)

    def stopped(self, why: str) -> None:
        """The run ends before its last step, as all ranks know."""
        self.display.note(why)
        self._write(
            {"event": "stopped", "step": self.run.mesh.activity.step + 1, "time": time.time(), "why": why.split("\n", 1)[0]}
        )
        self._close()

    def failed(self, why: str) -> None:
        """A checkpoint could not be written, and the run goes on."""
        self.display.line(f"not saved: {why}")
        self._write({"event": "not saved", "step": self.run.mesh.activity.step + 1, "time": time.time(), "why": why})

    def saved(self, folder: Path, step: int, took_s: float, waited_s: float) -> None:
        """A checkpoint is there, after so many seconds, of which training waited some."""
        self.save_s = took_s
        self.display.line(f"saved {folder}")
        self._write({"event": "saved", "step": step, "time": time.time(), "took_s": took_s, "waited_s": waited_s})

    def finish(self) -> None:
        """The summary: time, memory, losses, a sample, and where everything lies. Collective."""
        took = time.perf_counter() - self.started
        unigram = self._unigram() if self.speaks else ""  # reads the whole corpus: before the others are asked for something
        peaks = self.run.mesh.world.all_gather_json(self._peak_bytes())
        text = self._sample() if self.run.config.generate.max_tokens and self.run.config.model.arch != "bert" else ""
        self.display.close()
        end = {"event": "end", "step": self.run.config.train.steps, "time": time.time(), "peak_memory_on_rank_bytes": peaks}
        self._write(end)
        self._close()
        if self.speaks:
            self._summary(took, max(peaks), unigram, text)

    def _close(self) -> None:
        """No more rows; and the page of what became of the run, which does not fail for it."""
        for sink in self.sinks:
            sink.close()
        self.sinks = []
        if self.speaks:
            try:
                page.write([self.run.folder.path])
            except FileError as error:
                self.display.line(f"no report: {error}")

    def _write(self, row: dict[str, Any]) -> None:
        if self.speaks:
            self.glance.see(row)
        for sink in self.sinks:
            sink.write(row)

    def skip_time(self, done: int) -> None:
        """Evaluations and checkpoints are not part of a step's time."""
        self.last, self.last_done = time.perf_counter(), done
        self.spent_s = dict.fromkeys(PARTS, 0.0)

    def _of_ranks(self, steps: int) -> dict[str, Any]:
        """The most memory that every rank has had, and what a step's time went into since the last row. Collective."""
        world = self.run.mesh.world
        mine = torch.tensor([self._peak_bytes(), *(self.spent_s[part] / steps for part in PARTS)], dtype=torch.float64)
        everyone = torch.empty(world.size, mine.numel(), dtype=torch.float64)
        world.all_gather(mine, everyone)
        memory, *seconds = everyone.T.tolist()
        rank_s = {part: [round(x, 6) for x in of] for part, of in zip(PARTS, seconds)}
        return {"memory_bytes": [int(x) for x in memory], "rank_s": rank_s}  # last: a reader may do without them

    def _peak_bytes(self) -> int:
        return self.run.memory.peak_bytes(self.run.model.shared_bytes)

    def _start_row(self) -> dict[str, Any]:
        """Collective."""
        run, world, config = self.run, self.run.mesh.world, self.run.config
        everyone = world.all_gather_json(predicted_memory(run))
        self.predicted = max(everyone, key=lambda parts: sum(parts.values()))
        peak, source = peak_flops(run.machine.device, config.train.dtype)
        peaks = world.all_gather_json(peak)
        return {
            "event": "start",
            "step": run.folder.step,
            "time": time.time(),
            "ranks": world.size,
            "layout": layout_row(run),
            "microbatches": microbatches(config),
            "parameters": parameters(run),
            "parameters_trained": trained(run),
            "parameters_on_rank": world.all_gather_json(run.model.held_numel),
            "predicted_memory_bytes": sum(self.predicted.values()),
            "predicted_memory_on_rank_bytes": [sum(parts.values()) for parts in everyone],
            "flops_per_token": flops_per_token(config.model, run.model.vocab_size),
            "peak_flops": sum(peaks) if all(peaks) else None,
            "peak_source": source,
            "threads": run.machine.threads,
            "device": str(run.machine.device.type),
            "hosts": world.all_gather_json(socket.gethostname()),
            "command": _command(world.size),
            "versions": versions(world),
        }

    def _summary(self, took: float, peak: int, unigram: str, text: str) -> None:
        run, config = self.run, self.run.config
        say = self.display.say
        done = config.train.steps - run.folder.step
        if done:
            memory = f"memory {mebibytes(peak)} a rank at most, {mebibytes(sum(self.predicted.values()))} predicted"
            say(f"\n{done} steps in {duration(took)}; {memory}")
        else:
            say(f"this run is complete; a larger --train.steps goes on from step {run.folder.step}")
        if self.eval_loss is not None:
            say(f"evaluation loss {self.eval_loss:.4f}{unigram}")
        if text:
            say(f"\nA sample (temperature {config.generate.temperature}):\n{text}\n")
        say(f"run folder   {run.folder.path}  (report.html, metrics.jsonl, log.txt, config.toml, tensorboard)")
        last = run.folder.checkpoints / f"step-{config.train.steps:08d}"
        say(f"checkpoint   {last}  ({'a PEFT adapter' if config.model.lora_rank else 'a Hugging Face folder'})")
        if config.model.arch == "bert":
            say(f"score more   python -m mpilm.evaluate --model.init-from {shlex.quote(str(last))} --data.path TEXT")
        else:
            say(f"write more   python -m mpilm.generate --model.init-from {shlex.quote(str(last))}")

    def _unigram(self) -> str:
        corpora = [(samples.corpus, samples.boundary) for samples in self.run.material.corpora]
        known = self.eval_loss is not None and corpora
        return f"; a unigram model of this corpus scores {unigram_loss(corpora):.4f}" if known else ""

    def _sample(self) -> str:
        """What the model writes. Collective: it may lie on many ranks."""
        run, tokenizer = self.run, self.run.material.tokenizer
        prompt = self.run.config.generate.prompt
        start = tokenizer.encode(prompt).tolist() if prompt else [tokenizer.eos]
        return prompt + tokenizer.decode(write(run.model, {0: start}, run.config.generate, tokenizer.eos)[0])


def _command(ranks: int) -> str:
    """What was typed, as far as a rank can know."""
    return f"{f'mpirun -n {ranks} ' if ranks > 1 else ''}python -m mpilm.train {shlex.join(sys.argv[1:])}".rstrip()


def layout_row(run: Training) -> dict[str, Any]:
    """The layout, for metrics.jsonl."""
    parallel = run.config.parallel
    sizes = dict(zip(AXES, run.mesh.shape.sizes))
    return {**sizes, "zero": parallel.zero, "schedule": parallel.schedule, "cut": list(run.model.cut)}
