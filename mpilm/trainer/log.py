"""What a run says of itself: header, rows of metrics, summary. Rank 0 speaks; what all ranks must tell is gathered."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

import mpilm
from mpilm.comm.together import on_root
from mpilm.config import microbatches
from mpilm.data.corpus import unigram_loss
from mpilm.errors import FileError
from mpilm.guard.launch import announced_ranks
from mpilm.mesh.shape import AXES
from mpilm.model.sample import sample
from mpilm.model.size import activation_bytes
from mpilm.parallel.layout import owned
from mpilm.parallel.tree import balance, block, buffers_of
from mpilm.telemetry.display import Display, duration, mebibytes
from mpilm.telemetry.memory import peak_resident_bytes
from mpilm.telemetry.metrics import Metrics, TensorBoard
from mpilm.trainer.build import Training
from mpilm.trainer.machine import processor, versions
from mpilm.trainer.step import StepResult

# glibc keeps freed blocks below 32 MiB, and those of one microbatch leave holes that the next one's do not fill: measured
# 1.3 to 1.6 times what is in use. CUDA's caching allocator rounds sizes and does better.
HOLES = {"cpu": 1.5, "cuda": 1.1}
RETURNED_BYTES = 32 << 20


def predicted_memory(run: Training) -> dict[str, int]:
    """Bytes a rank will use, part by part."""
    config, numel = run.config, run.flat.owned.numel
    tokens, vocab_size = config.train.micro_batch * config.model.context_length, run.corpus.tokenizer.vocab_size
    ranks = run.mesh.comm("data").size
    buffers = buffers_of(ranks, microbatches(config)) if config.train.reproducible else 1  # of the rank that has most
    holes = HOLES[run.machine.device.type]
    activations = activation_bytes(config.model, vocab_size, tokens, config.train.dtype)
    largest = {"activations": 4 * tokens * config.model.d_ff, "logits": 4 * tokens * vocab_size}
    held = {name: round(count * (holes if largest[name] < RETURNED_BYTES else 1)) for name, count in activations.items()}
    return {
        "program": run.baseline_bytes[1],
        "weights": 4 * numel,
        "moments": 8 * numel,
        "gradients": 4 * run.flat.gradients.numel * buffers,
        "exchange": run.gradients.workspace_bytes,
        **held,
    }


class RunLog:
    """Writes metrics.jsonl and TensorBoard, and prints. Made and called on every rank, in the same order."""

    def __init__(self, run: Training):
        self.run, self.speaks = run, run.mesh.rank == 0
        self.display = Display(self.speaks, run.folder.step, run.config.train.steps, announced_ranks() is not None)
        self.predicted = sum(predicted_memory(run).values())
        self.eval_loss: float | None = None
        self._header()
        self.sinks: list[Metrics | TensorBoard] = []
        on_root(run.mesh.world, self._open_sinks)
        self.started = self.last = time.perf_counter()
        self.last_done = run.folder.step

    def _open_sinks(self) -> None:
        folder = self.run.folder
        try:
            metrics = Metrics(folder.path / "metrics.jsonl", folder.step)
            metrics.write(self._start_row())
            self.sinks = [metrics, TensorBoard(folder.path / "tensorboard", folder.step)]
        except OSError as error:
            raise FileError(f"{error.filename or folder.path} cannot be written: {error.strerror}") from None

    def step(self, done: int, result: StepResult) -> None:
        """One step is done; every log-every-th, the first and the last are written down."""
        config = self.run.config
        every = config.run.log_every
        logged = every > 0 and (done % every == 0 or done in (self.run.folder.step + 1, config.train.steps))
        now = time.perf_counter()
        step_s = (now - self.last) / (done - self.last_done)
        row = {
            "step": done,
            "time": time.time(),
            "tokens": done * result.tokens,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "step_s": step_s,
            "tokens_per_s": result.tokens / step_s,
        }
        self.display.step(done, row, logged)
        if logged:
            self._write(row)
            self.last, self.last_done = time.perf_counter(), done

    def evaluation(self, done: int, loss: float) -> None:
        self.display.line(f"step {done}: evaluation loss {loss:.4f}")
        self._write({"step": done, "time": time.time(), "eval_loss": loss})
        self.eval_loss = loss
        self._skip_time(done)

    def saved(self, folder: Path) -> None:
        self.display.line(f"saved {folder}")
        self._skip_time(int(folder.name.split("-")[1]))

    def finish(self) -> None:
        """The summary: time, memory, losses, a sample, and where everything lies. Collective."""
        took = time.perf_counter() - self.started
        peaks = self.run.mesh.world.all_gather_json(self._peak_bytes())
        self.display.close()
        for sink in self.sinks:
            sink.close()
        if self.speaks:
            self._summary(took, max(peaks))

    def _write(self, row: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(row)

    def _skip_time(self, done: int) -> None:
        """Evaluations and checkpoints are not part of a step's time."""
        self.last, self.last_done = time.perf_counter(), done

    def _peak_bytes(self) -> int:
        """This rank's highest use so far, the program's shared pages divided as they were at the start."""
        resident, proportional = self.run.baseline_bytes
        return peak_resident_bytes() - resident + proportional

    def _start_row(self) -> dict[str, Any]:
        run, world = self.run, self.run.mesh.world
        return {
            "event": "start",
            "step": run.folder.step,
            "time": time.time(),
            "ranks": world.size,
            "layout": {
                **dict(zip(AXES, run.mesh.shape.sizes)),
                "zero": 0,
                "schedule": "1f1b",
            },
            "parameters": sum(layout.numel for layout in self._owned()),
            "parameters_on_rank": [sum(layout.numel for layout in self._owned())] * world.size,
            "predicted_memory_bytes": self.predicted,
            "threads": run.machine.threads,
            "device": str(run.machine.device.type),
            "versions": versions(world),
        }

    def _owned(self) -> list[Any]:
        return owned({name: layout for name, (_, layout) in self.run.flat.gradients.slots.items()})

    def _header(self) -> None:
        run, config, world = self.run, self.run.config, self.run.mesh.world
        train, model = config.train, config.model
        say = self.display.line
        device = torch.cuda.get_device_name() if run.machine.device.type == "cuda" else processor()
        everyone = run.mesh.world.all_gather_json(run.machine.threads)
        threads = f"{everyone[0]} thread{'s' * (everyone[0] > 1)} each"
        if len(set(everyone)) > 1:
            threads = f"{', '.join(map(str, everyone))} threads (unequal: the last bits depend on who computes what)"
        crowd = ", more ranks than cores" if run.machine.crowded else ""
        say(f"mpilm {mpilm.__version__}: {world.size} rank{'s' * (world.size > 1)}, {threads}{crowd}, {device}, {train.dtype}")
        say(f"  with     torch {torch.__version__}, {world.mpi_library}")
        sizes = zip(AXES, run.mesh.shape.sizes)
        say("  layout   " + " x ".join(f"{axis} {size}" for axis, size in sizes if size > 1 or axis == "data"))
        parameters = sum(layout.numel for layout in self._owned())
        tied = ", embeddings tied" if model.tie_embeddings else ""
        say(f"  model    {model.arch}, {model.n_layers} blocks of width {model.d_model}, {parameters:,} parameters{tied}")
        corpus, batches = run.corpus, run.batches
        source = config.data.path or "the Python standard library"
        say(f"  data     {source}: {len(corpus.tokens):,} tokens of {corpus.tokenizer.name}, {corpus.documents:,} documents,")
        say(f"           {batches.eval_samples:,} of {batches.eval_samples + batches.train_samples:,} sequences held out")
        m = microbatches(config)
        tokens = train.global_batch * model.context_length
        say(f"  a step   {train.global_batch} sequences of {model.context_length} = {tokens:,} tokens, in {m} microbatches")
        self._warn_uneven(m)
        parts = predicted_memory(run)
        listed = ", ".join(f"{name} {mebibytes(b)}" for name, b in parts.items() if b)
        say(f"  memory   {mebibytes(sum(parts.values()))} predicted a rank: {listed}")
        say(f"  run      {run.folder.path}" + (f", from step {run.folder.step}" if run.folder.step else ""))
        for note in run.folder.notes:
            say(f"  note     {note}")
        say()

    def _warn_uneven(self, total: int) -> None:
        ranks = self.run.mesh.comm("data").size
        if total % ranks == 0:
            return
        sizes = [stop - start for start, stop in (block(r, ranks, total) for r in range(ranks))]
        lost = 1 - balance(ranks, total)
        near = max(1, round(total / ranks)) * ranks * self.run.config.train.micro_batch
        self.display.line(
            f"           uneven: ranks have {', '.join(map(str, sizes))} of them and {lost:.0%} of their time is lost; "
            f"--train.global-batch {near} would divide"
        )

    def _summary(self, took: float, peak: int) -> None:
        run, config = self.run, self.run.config
        say = self.display.line
        done = config.train.steps - run.folder.step
        if done:
            memory = f"memory {mebibytes(peak)} a rank at most, {mebibytes(self.predicted)} predicted"
            say(f"\n{done} steps in {duration(took)}; {memory}")
        else:
            say(f"this run is complete; a larger --train.steps goes on from step {run.folder.step}")
        if self.eval_loss is not None:
            unigram = unigram_loss(run.corpus, run.batches.boundary)
            say(f"evaluation loss {self.eval_loss:.4f}; a unigram model of this corpus scores {unigram:.4f}")
        if config.generate.max_tokens:
            say(f"\nA sample (temperature {config.generate.temperature}):\n{self._sample()}\n")
        say(f"run folder   {run.folder.path}  (metrics.jsonl, config.toml, tensorboard)")
        last = run.folder.checkpoints / f"step-{config.train.steps:08d}"
        say(f"checkpoint   {last}  (a Hugging Face folder)")
        say(f"write more   python -m mpilm.generate --model.init-from {last}")

    def _sample(self) -> str:
        run, tokenizer = self.run, self.run.corpus.tokenizer
        prompt = self.run.config.generate.prompt
        start = tokenizer.encode(prompt).tolist() if prompt else [tokenizer.eos]
        written = sample(run.model, start, run.config.generate, run.config.model.context_length, tokenizer.eos)
        return prompt + tokenizer.decode(written)
