"""The end of the batch job that this process runs in, as its scheduler states it."""

import contextlib
import math
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ID_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
QUERY_TIMEOUT_S = 20.0
UNLIMITED_S = 2**32 - 2  # Flux reports a larger number for a job without a limit

EndParser = Callable[[str], float]  # returns a time of time.time(); raises ValueError if the text contains no end


def find_job_end(query: bool) -> float:
    """Return when the scheduler will end this job, as a time of time.time(); infinity if unknown or without one. Without
    `query`, look only at the environment."""
    if (end := os.environ.get("SLURM_JOB_END_TIME", "")).isdigit():  # since SLURM 23.02
        return float(end)
    job = next((row for row in SCHEDULERS if os.environ.get(row.variable)), None)
    if query and job is not None:
        words = [word.format(job=os.environ[job.variable]) for word in job.command]
        with contextlib.suppress(OSError, ValueError, OverflowError, subprocess.SubprocessError):
            return job.parse(_run(words) if len(words) > 1 else Path(words[0]).read_text())
    return math.inf


def batch_job_id() -> str:
    """Return the number of the batch job, which stays the same when it is requeued; "" outside of one."""
    return next((os.environ[name] for name in ID_VARIABLES if os.environ.get(name)), "")


def _run(words: list[str]) -> str:
    return subprocess.check_output(words, stderr=subprocess.DEVNULL, text=True, timeout=QUERY_TIMEOUT_S)


def _find(pattern: str, text: str) -> str:
    if found := re.search(pattern, text, re.M):
        return found[1]
    raise ValueError(pattern)


def _timestamp(text: str, form: str) -> float:
    return time.mktime(time.strptime(text.strip(), form))


def _duration_s(text: str) -> float:
    """Return the seconds of [[days:]hours:]minutes:seconds."""
    parts = [float(part) for part in text.split(":")]
    return sum(part * unit for part, unit in zip(reversed(parts), (1, 60, 3600, 86400)))


def _slurm_end(text: str) -> float:
    return _timestamp(text, "%Y-%m-%dT%H:%M:%S")


def _pbs_end(text: str) -> float:
    start = _find(r"^ *(?:stime|start_time) = (.*)$", text)  # Torque's name is the second
    return _timestamp(start, "%a %b %d %H:%M:%S %Y") + _duration_s(_find(r"Resource_List\.walltime = ([\d:]+)", text))


def _lsf_end(text: str) -> float:
    left = _find(r"^([\d:]+) L", text)  # hours:minutes, or with seconds if the site wants it; L: at the run limit
    return time.time() + _duration_s(left if left.count(":") > 1 else left + ":00")


def _grid_engine_end(text: str) -> float:
    number, task = os.environ.get("JOB_ID", ""), os.environ.get("SGE_TASK_ID", "undefined")
    for block in text.split("<job_list")[1:]:
        is_task = task == "undefined" or f"<tasks>{task}</tasks>" in block
        if f"<JB_job_number>{number}</JB_job_number>" in block and is_task:
            start = _timestamp(_find(r"<JAT_start_time>([^<.]*)", block), "%Y-%m-%dT%H:%M:%S")
            return start + float(_find(r'"h_rt"[^>]*>([\d.]+)<', block))
    raise ValueError(f"job {number} is not listed")


def _flux_end(text: str) -> float:
    return time.time() + left if (left := float(text)) < UNLIMITED_S else math.inf


def _htcondor_end(text: str) -> float:
    start = float(_find(r"^JobCurrentStartDate = (\d+)", text))
    return start + float(_find(r"^AllowedJobDuration = (\d+)", text))


class Scheduler(NamedTuple):
    """A way to find the end of a job."""

    variable: str  # environment variable that the scheduler sets in its jobs; a command names its value {job}
    command: tuple[str, ...]  # command that prints the end, or a file that contains it
    parse: EndParser


SCHEDULERS = (
    Scheduler("SLURM_JOB_ID", ("squeue", "--noheader", "--jobs={job}", "--format=%e"), _slurm_end),
    Scheduler("PBS_JOBID", ("qstat", "-f", "{job}"), _pbs_end),
    Scheduler("LSB_JOBID", ("bjobs", "-noheader", "-o", "time_left", "{job}"), _lsf_end),
    Scheduler("_CONDOR_JOB_AD", ("{job}",), _htcondor_end),
    Scheduler("PE_HOSTFILE", ("qstat", "-r", "-xml"), _grid_engine_end),
    Scheduler("FLUX_URI", ("flux", "job", "timeleft"), _flux_end),
)
