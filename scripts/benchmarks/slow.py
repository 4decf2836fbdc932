"""Methods that send less over a slow network between two emulated hosts: step time, bytes and loss of each."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import ROOT, mpirun, print_table

RANKS_PER_HOST, MBIT, DELAY_MS, STEPS = 2, 100, 2, 60
METHODS = {
    "every rank to every other (reduce)": ["--parallel.reduce", "messages"],
    "within a node, then across (reduce)": ["--parallel.reduce", "shared-memory"],
    "the same in bfloat16 (wire-dtype)": ["--parallel.reduce", "shared-memory", "--parallel.wire-dtype", "bfloat16"],
    "PowerSGD, rank 4": ["--parallel.powersgd-rank", "4"],
    "DiLoCo, every 10 steps (sync-every)": ["--parallel.sync-every", "10"],
}


def slow(args: argparse.Namespace) -> None:
    rows: list[tuple[str, ...]] = [("method", "s per step", "speedup", "MB per step", "last loss", "evaluation")]
    found = {}
    for method, words in METHODS.items():
        found[method] = result = run_training(words)
        first = found[next(iter(found))]["step_s"]
        speedup, megabytes = first / result["step_s"], result["bytes"] / 1e6 / STEPS
        losses = f"{result['loss']:.4f}", f"{result['eval_loss']:.4f}"
        rows.append((method, f"{result['step_s']:.3f}", f"{speedup:.2f}", f"{megabytes:.2f}", *losses))
        print("  ".join(rows[-1]), flush=True)
    ranks = 2 * RANKS_PER_HOST
    print_table(f"{ranks} ranks on 2 hosts, {MBIT} Mbit/s and {DELAY_MS} ms between them, tiny, {STEPS} steps", rows)
    print("JSON " + json.dumps({"what": "slow link", "mbit": MBIT, "found": found}))


def run_training(words: list[str]) -> dict[str, float]:
    """Train on two hosts; return the seconds of a step, the bytes sent between the hosts, and the losses."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = [sys.executable, str(ROOT / "scripts" / "hosts-here"), "--slots", str(RANKS_PER_HOST), "--mbit", str(MBIT)]
        settings = {
            "train.steps": STEPS, "run.dir": folder, "run.log-every": 1, "run.eval-every": STEPS, "checkpoint.every": 0,
            "generate.max-tokens": 0, "train.threads": 1,
        }  # fmt: skip
        train = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        command = [
            *hosts,
            "--delay-ms",
            str(DELAY_MS),
            *mpirun(2 * RANKS_PER_HOST),
            sys.executable,
            "-m",
            "mpilm.train",
            *train,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*command, *words], env=environment, check=False, capture_output=True, text=True)
        carried = re.search(r"hosts-here: [\d,]+ packets, ([\d,]+) bytes carried", done.stderr)
        if done.returncode or carried is None:
            raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout}\n{done.stderr}")
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row and "step_s" in row]
    return {
        "step_s": statistics.mean(row["step_s"] for row in steps[2:]),  # steps that synchronize included
        "bytes": float(carried.group(1).replace(",", "")),
        "loss": statistics.mean(row["loss"] for row in steps[-5:]),
        "eval_loss": next(row["eval_loss"] for row in reversed(rows) if "eval_loss" in row),
    }
