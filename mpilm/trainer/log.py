"""What a run says of itself: header, rows of metrics, summary. Rank 0 speaks; what all ranks must tell is gathered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from shlex import quote
from typing import Any

import torch

import mpilm
from mpilm.comm.together import on_root
from mpilm.config import LORA_TARGETS, microbatches
from mpilm.data.corpus import unigram_loss
from mpilm.errors import FileError
from mpilm.guard.launch import announced_ranks
from mpilm.mesh.shape import AXES
from mpilm.optim.reduce import BlockSum
from mpilm.parallel.feasible import replica_microbatches
from mpilm.parallel.pipeline.actions import COMPUTE
from mpilm.parallel.pipeline.execute import Timed
from mpilm.parallel.pipeline.schedules import even_bubble
from mpilm.parallel.tree import balance
from mpilm.telemetry.display import Display, duration, mebibytes
from mpilm.telemetry.metrics import Metrics, TensorBoard
from mpilm.trainer.build import Training
from mpilm.trainer.machine import processor, versions
from mpilm.trainer.memory import listed, predicted_memory
from mpilm.trainer.step import StepResult
from mpilm.trainer.write import write

WRITTEN_A_SECOND = 50e6  # bytes, of a checkpoint: a guess until one has been written


class RunLog:
    """Writes metrics.jsonl and TensorBoard, and prints. Made and called on every rank, in the same order."""

    def __init__(self, run: Training):
        self.run, self.speaks = run, run.mesh.rank == 0
        self.display = Display(self.speaks, run.folder.logged, run.config.train.steps, announced_ranks() is not None)
        everyone = run.mesh.world.all_gather_json(predicted_memory(run))
        self.predicted = max(everyone, key=lambda parts: sum(parts.values()))
        self.on_rank = run.mesh.world.all_gather_json(run.model.held_numel)
        self.eval_loss: float | None = None
        self._header()
        self.sinks: list[Metrics | TensorBoard] = []
        on_root(run.mesh.world, self._open_sinks)
        self.started = self.last = time.perf_counter()
        self.last_done, self.busy_s = run.folder.logged, 0.0
        self.step_s, self.save_s = 0.0, sum(run.model.held_bytes().values()) / WRITTEN_A_SECOND

    def _open_sinks(self) -> None:
        folder = self.run.folder
        try:
            metrics = Metrics(folder.path / "metrics.jsonl", folder.logged)
            metrics.write(self._start_row())
            self.sinks = [metrics, TensorBoard(folder.path / "tensorboard", folder.logged)]
        except OSError as error:
            raise FileError(f"{error.filename or folder.path} cannot be written: {error.strerror}") from None

    def step(self, done: int, result: StepResult) -> None:
        """One step is done; every log-every-th, the first and the last are written down."""
        self.busy_s += busy_s(result.times)
        if not result.updated:
            return  # `left_out` has said why
        step_s = self.step_s = (time.perf_counter() - self.last) / (done - self.last_done)
        row, logged = self._row(done, result), self._is_logged(done)
        row |= {"step_s": step_s, "tokens_per_s": self.run.batches.step_tokens / step_s}
        if logged:
            row["rank_busy_s"] = self._busy_of_ranks(done - self.last_done)
        self.display.step(done, row, logged)
        if logged:
            self._write(row)
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

    def failed(self, why: str) -> None:
        """A checkpoint could not be written, and the run goes on."""
        self.display.line(f"not saved: {why}")
        self._write({"event": "not saved", "step": self.run.mesh.activity.step + 1, "time": time.time(), "why": why})

    def saved(self, folder: Path, took_s: float) -> None:
        self.save_s = took_s
        self.display.line(f"saved {folder}")

    def finish(self) -> None:
        """The summary: time, memory, losses, a sample, and where everything lies. Collective."""
        took = time.perf_counter() - self.started
        unigram = self._unigram() if self.speaks else ""  # reads the whole corpus: before the others are asked for something
        peaks = self.run.mesh.world.all_gather_json(self.run.memory.peak_bytes(self.run.model.shared_bytes))
        text = self._sample() if self.run.config.generate.max_tokens and self.run.config.model.arch != "bert" else ""
        self.display.close()
        self._write({"event": "end", "step": self.run.config.train.steps, "time": time.time()})
        for sink in self.sinks:
            sink.close()
        if self.speaks:
            self._summary(took, max(peaks), unigram, text)

    def _write(self, row: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(row)

    def skip_time(self, done: int) -> None:
        """Evaluations and checkpoints are not part of a step's time."""
        self.last, self.last_done, self.busy_s = time.perf_counter(), done, 0.0

    def _busy_of_ranks(self, steps: int) -> list[float]:
        """Seconds a step that each rank computed since the last row: who is slow, whatever the others wait for. Collective."""
        everyone = torch.empty(self.run.mesh.world.size, dtype=torch.float64)
        self.run.mesh.world.all_gather(torch.tensor([self.busy_s / steps], dtype=torch.float64), everyone)
        return everyone.tolist()

    def _start_row(self) -> dict[str, Any]:
        run, world = self.run, self.run.mesh.world
        return {
            "event": "start",
            "step": run.folder.step,
            "time": time.time(),
            "ranks": world.size,
            "layout": layout_row(run),
            "parameters": self._parameters(),
            "parameters_trained": self._trained(),
            "parameters_on_rank": self.on_rank,
            "predicted_memory_bytes": sum(self.predicted.values()),
            "threads": run.machine.threads,
            "device": str(run.machine.device.type),
            "versions": versions(world),
        }

    def _trained(self) -> int:
        return sum(map(prod, self.run.model.shapes.values()))

    def _parameters(self) -> int:
        return self._trained() + sum(map(prod, self.run.model.frozen_shapes.values()))

    def _header(self) -> None:
        run, config, world = self.run, self.run.config, self.run.mesh.world
        train, model = config.train, config.model
        say = self.display.line
        device = torch.cuda.get_device_name() if run.machine.device.type == "cuda" else processor()
        everyone = run.mesh.world.all_gather_json(run.machine.threads)
        threads = f"{everyone[0]} thread{'s' * (everyone[0] > 1)} each"
        if len(set(everyone)) > 1:
            threads = f"{', '.join(map(str, everyone))} threads (unequal: the last bits depend on who computes what)"
        crowd = ", more ranks than cores" if run.machine.crowded else ", on cores of their own" if run.machine.bound else ""
        say(f"mpilm {mpilm.__version__}: {world.size} rank{'s' * (world.size > 1)}, {threads}{crowd}, {device}, {train.dtype}")
        say(f"  with     torch {torch.__version__}, {world.mpi_library}")
        self._warn_threads()
        self._say_layout()
        parameters = self._parameters()
        tied = ", embeddings tied" if model.tie_embeddings else ""
        say(f"  model    {model.arch}, {model.n_layers} blocks of width {model.d_model}, {parameters:,} parameters{tied}")
        if model.lora_rank:
            where = ", ".join(model.lora_targets or LORA_TARGETS[model.arch])
            say(f"           {self._trained():,} of them, in adapters of rank {model.lora_rank} on {where}, are trained")
        for number, line in enumerate(run.material.said):
            say(f"  data     {line}" if number % 2 == 0 else f"           {line}")
        m = microbatches(config)
        tokens = train.global_batch * model.context_length
        say(f"  a step   {train.global_batch} sequences of {model.context_length} = {tokens:,} tokens, in {m} microbatches")
        self._warn_uneven(m)
        most = "a rank" if world.size == 1 else "on the rank that needs most"
        of = " of the GPU" if run.machine.device.type == "cuda" else ""
        say(f"  memory   {mebibytes(sum(self.predicted.values()))}{of} predicted {most}: {listed(self.predicted)}")
        say(f"  run      {run.folder.path}" + (f", from step {run.folder.step}" if run.folder.step else ""))
        for note in run.folder.notes:
            say(f"  note     {note}")
        say()

    def _warn_threads(self) -> None:
        machine = self.run.machine
        cores = float(machine.cores)
        if machine.threads > max(1.0, cores):
            self.display.line(
                f"  mind     {machine.threads} threads a rank, which has {cores:.2g} core{'s' * (cores > 1)}: they take turns, "
                "which is many times slower; leave --train.threads and OMP_NUM_THREADS out"
            )

    def _say_layout(self) -> None:
        run, say = self.run, self.display.line
        sizes = zip(AXES, run.mesh.shape.sizes)
        parallel = run.config.parallel
        zero = f", ZeRO-{parallel.zero}" if parallel.zero else ""
        say("  layout   " + " x ".join(f"{axis} {size}" for axis, size in sizes if size > 1 or axis == "data") + zero)
        self._say_sums()
        if run.chosen:
            say(f"           {run.chosen}")
        if len(run.model.cut) > 1:
            count = replica_microbatches(run.config, run.mesh.shape)
            idle = even_bubble(parallel.schedule, parallel.pipeline, parallel.chunks, count)
            waiting = f"; {idle:.0%} of a step idle if they are even" if idle is not None else ""
            say(f"           schedule {parallel.schedule}, layers of each stage {','.join(map(str, run.model.cut))}{waiting}")

    def _say_sums(self) -> None:
        """How gradients are added, where there is anything to say of it."""
        run, parallel = self.run, self.run.config.parallel
        if run.mesh.shape.data == 1 or not run.config.train.reproducible:
            return
        if parallel.sync_every:
            self.display.line(
                f"           replicas train by themselves and meet every {parallel.sync_every} steps; loss and norm are of all"
            )
        elif parallel.compress:
            self.display.line(f"           gradients of matrices are compressed to rank {parallel.compress}")
        else:
            found = [of for of in run.model.gradients.values() if isinstance(of, BlockSum)]
            ways = ["in memory that the ranks of a node share" if of.shared else "by messages" for of in found[:1]]
            tried = ", ".join(f"{way} {1000 * seconds:.1f} ms" for way, seconds in run.model.tried.items())
            ways += [f"({tried})"] if tried else []
            if ways:
                self.display.line(f"           gradients are added {' '.join(ways)}")
            if parallel.wire_dtype == "bfloat16":
                self.display.line("           what is sent of them travels as bfloat16: the last bits depend on the layout")

    def _warn_uneven(self, total: int) -> None:
        ranks = self.run.mesh.shape.data
        if total % ranks == 0:
            return
        sizes = [total // ranks + (rank < total % ranks) for rank in range(ranks)]
        lost = 1 - balance(ranks, total)
        near = max(1, round(total / ranks)) * ranks * self.run.config.train.micro_batch
        who = "replicas" if self.run.mesh.shape.pipeline > 1 else "ranks"
        self.display.line(
            f"           uneven: {who} have {', '.join(map(str, sizes))} of them and "
            f"{lost:.0%} of their time is lost; --train.global-batch {near} would divide"
        )

    def _summary(self, took: float, peak: int, unigram: str, text: str) -> None:
        run, config = self.run, self.run.config
        say = self.display.line
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
        say(f"run folder   {run.folder.path}  (metrics.jsonl, config.toml, tensorboard)")
        last = run.folder.checkpoints / f"step-{config.train.steps:08d}"
        say(f"checkpoint   {last}  ({'a PEFT adapter' if config.model.lora_rank else 'a Hugging Face folder'})")
        if config.model.arch == "bert":
            say(f"score more   python -m mpilm.evaluate --model.init-from {quote(str(last))} --data.path TEXT")
        else:
            say(f"write more   python -m mpilm.generate --model.init-from {quote(str(last))}")

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


def busy_s(times: Sequence[Timed]) -> float:
    """Seconds of forward and backward."""
    return sum(end_s - start_s for action, start_s, end_s in times if action.kind in COMPUTE)


def layout_row(run: Training) -> dict[str, Any]:
    """The layout, for metrics.jsonl."""
    parallel = run.config.parallel
    sizes = dict(zip(AXES, run.mesh.shape.sizes))
    return {**sizes, "zero": parallel.zero, "schedule": parallel.schedule, "cut": list(run.model.cut)}
