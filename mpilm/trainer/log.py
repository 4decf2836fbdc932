"""Run logging: metrics rows, console lines, the final summary. Rank 0 writes; per-rank statistics are gathered first."""

import shlex
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mpilm.comm.collective_errors import run_on_all_ranks
from mpilm.comm.flight_recorder import Span
from mpilm.config.settings import flatten
from mpilm.engine.step import StepResult
from mpilm.formatting import command_text, format_duration, format_mebibytes
from mpilm.launch.run import launcher_world_size
from mpilm.telemetry.live import Display, LiveView
from mpilm.telemetry.metrics import MetricsWriter
from mpilm.telemetry.trace import CATEGORIES, break_down
from mpilm.telemetry.trackers import Tracker, open_trackers
from mpilm.trainer.run import Run
from mpilm.trainer.run_folder import writing

RUN_FILES = ("metrics.jsonl", "log.txt", "config.toml", "tensorboard")
ASSUMED_WRITE_RATE = 50e6  # bytes a second of a checkpoint, until one has been written


class RunLog:
    """Writes metrics.jsonl and trackers, and prints. Exists on every rank, and is called in the same order on all of them."""

    def __init__(self, run: Run, start_row: dict[str, Any], header: Sequence[str]):
        """Open the log on all ranks, print the header, and write the start row. Collective."""
        self.run, self.start_row, self.is_root, folder = run, start_row, run.mesh.rank == 0, run.folder
        self.live = LiveView(str(folder.path), run.config.train.steps, run.config.checkpoint.every)
        self.sinks: list[MetricsWriter | Tracker] = []
        self.eval_loss: float | None = None
        self.step_s, self.eval_s, self.save_s = 0.0, 0.0, sum(run.model.memory_bytes().values()) / ASSUMED_WRITE_RATE

        def open_files() -> Display:
            with writing(folder.path):
                display = Display(self.is_root, self.live, folder.path / "log.txt", launcher_world_size() is not None)
                if self.is_root:
                    self.sinks = [MetricsWriter(folder.path / "metrics.jsonl", folder.logged)]
                    self._write(start_row)  # not into trackers: its numbers make no curves
                    self.sinks += open_trackers(run.config.run.trackers, folder.path, folder.logged, flatten(run.config))
                return display

        self.display = run_on_all_ranks(run.mesh.world, open_files)
        for line in header:
            self.display.print(line)
        self.display.start(folder.logged)
        self.restart_clock(folder.logged)
        self.started = self.last

    def log_step(self, done: int, result: StepResult, spans: list[Span]) -> None:
        """Log a step that consisted of `spans` on this rank; write every log-every-th, the first and the last. Collective."""
        for part, seconds in break_down(spans, self.run.mesh.shape.pipeline > 1).items():
            self.spent_s[part] += seconds
        if not result.updated:
            return  # step_skipped has reported it
        step_s = self.step_s = (time.perf_counter() - self.last) / (done - self.last_done)
        row, is_logged = self._step_row(done, result), self._is_logged(done)
        row |= {"step_s": step_s, "tokens_per_s": self.run.batches.step_tokens / step_s}
        if peak_flops := self.start_row["peak_flops"]:
            row["mfu"] = row["tokens_per_s"] * self.start_row["flops_per_token"] / peak_flops
        if is_logged:
            row |= self._measure_expert_load() | self._gather_rank_stats(done - self.last_done)
            self._write(row)
        self.display.show_step(done, row, is_logged)
        if is_logged:
            self.restart_clock(done)

    def log_recovered_step(self, done: int, result: StepResult) -> None:
        """Log a step done before ranks were lost, which may not have been written."""
        if result.updated and self._is_logged(done):
            self._write(self._step_row(done, result))
        self.restart_clock(done)

    def _is_logged(self, done: int) -> bool:
        every = self.run.config.run.log_every
        return every > 0 and (done % every == 0 or done in (self.run.folder.logged + 1, self.run.config.train.steps))

    def _step_row(self, done: int, result: StepResult) -> dict[str, Any]:
        row = {"step": done, "time": time.time(), "tokens": done * self.run.batches.step_tokens}
        return row | {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr}

    def step_skipped(self, done: int, cause: str, since: int) -> None:
        """Log a step that changed nothing, together with the rewound steps from `since` on."""
        self.display.log_line(f"{cause}; " + (f"steps {since} to {done} are skipped" if since < done else "skipped"))
        self._write_event("skipped", done, why=cause, since=since)
        self.restart_clock(done)

    def next_step_s(self) -> float:
        """Return the seconds that another step, an evaluation and a save will take, with a margin."""
        return 2 * self.step_s + 1.5 * (self.eval_s + self.save_s)

    def log_evaluation(self, done: int, loss: float, took_s: float) -> None:
        self.display.log_line(f"step {done}: evaluation loss {loss:.4f}")
        self._write({"step": done, "time": time.time(), "eval_loss": loss})
        self.eval_loss, self.eval_s = loss, took_s
        self.restart_clock(done)

    def log_line(self, text: str) -> None:
        if text:
            self.display.log_line(text)

    def log_event(self, event: str, done: int, why: str) -> None:
        """Log an event that changes the course of a run but not its result."""
        self.display.log_line(f"step {done}: {why}")
        self._write_event(event, done, why=why)

    def log_stop(self, reason: str) -> None:
        """Log the end of a run before its last step, on which all ranks agree."""
        self.display.log_only(reason)
        self._write_event("stopped", self.run.recorder.step + 1, why=reason.split("\n", 1)[0])
        self.close()

    def log_save_failure(self, reason: str) -> None:
        """Log a checkpoint that could not be written in a run that continues."""
        self.display.log_line(f"not saved: {reason}")
        self._write_event("not saved", self.run.recorder.step + 1, why=reason)

    def log_save(self, folder: Path, step: int, took_s: float, waited_s: float) -> None:
        """Log a checkpoint that took `took_s` seconds to write, `waited_s` of which training waited."""
        self.save_s = took_s
        self.display.log_line(f"saved {folder}")
        self._write_event("saved", step, took_s=took_s, waited_s=waited_s)

    def log_end(self, took_s: float, peaks: list[int], unigram_loss: str, sample: str) -> None:
        """Log the end of a complete run and print the summary. `peaks`: memory of each rank."""
        self.display.close()
        self._write_event("end", self.run.config.train.steps, peak_memory_on_rank_bytes=peaks)
        self.close()
        if self.is_root:
            self._print_summary(took_s, max(peaks), unigram_loss, sample)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
        self.sinks = []

    def _write_event(self, event: str, step: int, **fields: Any) -> None:
        self._write({"event": event, "step": step, "time": time.time(), **fields})

    def _write(self, row: dict[str, Any]) -> None:
        if self.is_root:
            self.live.update(row)
        for sink in self.sinks:
            sink.write(row)

    def restart_clock(self, done: int) -> None:
        """Exclude what has happened since the step from the time of the next one."""
        self.last, self.last_done = time.perf_counter(), done
        self.spent_s = dict.fromkeys(CATEGORIES, 0.0)

    def _measure_expert_load(self) -> dict[str, Any]:
        """Return the shares of the tokens since the last row that each expert has had, and each rank of the expert axis, over
        all blocks. Collective."""
        model = self.run.model
        if model.expert_load is None:
            return {}
        shares, each = model.expert_load.take_shares(self.run.mesh.world), model.experts.each
        by_rank = [sum(shares[at : at + each]) for at in range(0, len(shares), each)]
        shown = {"expert_share": shares} | ({"expert_rank_share": by_rank} if len(by_rank) > 1 else {})
        return {name: [round(share, 6) for share in values] for name, values in shown.items()}

    def _gather_rank_stats(self, steps: int) -> dict[str, Any]:
        """Return every rank's peak memory and its time per category and step since the last row. Collective."""
        world, own_s = self.run.mesh.world, [round(self.spent_s[part] / steps, 6) for part in CATEGORIES]
        own = torch.tensor([self.run.peak_bytes, *own_s], dtype=torch.float64, device="cpu")
        rows = own.new_empty(world.size, own.numel())
        world.all_gather(own, rows.view(-1))
        memory, *seconds = rows.T.tolist()
        return {"memory_bytes": [*map(int, memory)], "rank_s": dict(zip(CATEGORIES, seconds))}  # last: readers may skip them

    def _print_summary(self, took_s: float, peak: int, unigram_loss: str, sample: str) -> None:
        run, config, say = self.run, self.run.config, self.display.print
        done = config.train.steps - run.folder.step
        if done:
            predicted = format_mebibytes(self.start_row["predicted_memory_bytes"])
            say(f"\n{done} steps in {format_duration(took_s)}; peak memory {format_mebibytes(peak)}, {predicted} predicted")
        else:
            say(f"this run is complete; a larger --train.steps continues it from step {run.folder.step}")
        if self.eval_loss is not None:
            say(f"evaluation loss {self.eval_loss:.4f}{unigram_loss}")
        if sample:
            say(f"\nA sample (temperature {config.generate.temperature}):\n{sample}\n")
        found = [name for name in RUN_FILES if (run.folder.path / name).exists()]
        say(f"run folder   {run.folder.path}  ({', '.join(['report.html'] * bool(find_spec('plotly')) + found)})")
        last = run.folder.checkpoints / f"step-{config.train.steps:08d}"
        say(f"checkpoint   {last}  ({'a PEFT adapter' if config.model.lora_rank else 'a Hugging Face folder'})")
        if config.model.arch == "bert":
            say(f"score more   {command_text('evaluate')} --model.init-from {shlex.quote(str(last))} --data.path TEXT")
        else:
            say(f"write more   {command_text('generate')} --model.init-from {shlex.quote(str(last))}")
