"""The end of a batch job, from the environment and the commands of each scheduler."""

import math
import time
from unittest import mock

import pytest

from mpilm.launch.job_end import SCHEDULERS, find_job_end

START = "2026-11-29 16:00:00"
START_S = time.mktime(time.strptime(START, "%Y-%m-%d %H:%M:%S"))
DATE = time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(START_S))
PBS = "Job Id: 12.server\n    Resource_List.select = 2:ncpus=4\n    Resource_List.walltime = 01:30:05\n    {} = {}\n"
GRID_ENGINE = """<job_list state="running"><JB_job_number>{number}</JB_job_number>
<JAT_start_time>2026-11-29T16:00:00</JAT_start_time>{task}
<hard_request name="h_rt" resource_contribution="0.000000">{limit}</hard_request>
<hard_request name="s_rt" resource_contribution="0.000000">50</hard_request></job_list>"""
LISTED = "".join(
    GRID_ENGINE.format(number=number, task=f"<tasks>{task}</tasks>" if task else "", limit=limit)
    for number, task, limit in ((7, 0, 60), (8, 1, 60), (8, 2, 40))
)
CASES = {  # variables of a job, what its scheduler prints, and the end: seconds after START, or from now if it is a string
    "SLURM's variable": ({"SLURM_JOB_END_TIME": str(int(START_S))}, "", 0),
    "SLURM": ({"SLURM_JOB_ID": "3"}, "2026-11-29T16:00:09\n", 9),
    "PBS": ({"PBS_JOBID": "12.server"}, PBS.format("stime", DATE), 5405),
    "Torque": ({"PBS_JOBID": "12.server"}, PBS.format("start_time", DATE), 5405),
    "LSF": ({"LSB_JOBID": "3"}, "1:02 L\n", "3720"),
    "LSF, with seconds": ({"LSB_JOBID": "3"}, "1:02:30 L\n", "3750"),
    "LSF, without a limit": ({"LSB_JOBID": "3"}, "-\n", math.inf),
    "Grid Engine": ({"PE_HOSTFILE": "/x", "JOB_ID": "7", "SGE_TASK_ID": "undefined"}, LISTED, 60),
    "Grid Engine, a task of an array": ({"PE_HOSTFILE": "/x", "JOB_ID": "8", "SGE_TASK_ID": "2"}, LISTED, 40),
    "Grid Engine, another job": ({"PE_HOSTFILE": "/x", "JOB_ID": "9"}, LISTED, math.inf),
    "Flux": ({"FLUX_URI": "local:///x"}, "90\n", "90"),
    "Flux, without a limit": ({"FLUX_URI": "local:///x"}, "4294967295\n", math.inf),
    "no scheduler": ({}, "1", math.inf),
    "an error": ({"PBS_JOBID": "12.server"}, "qstat: Unknown Job Id 12.server\n", math.inf),
}


@pytest.fixture
def clean_environment(monkeypatch):
    for name in ("SLURM_JOB_END_TIME", "JOB_ID", "SGE_TASK_ID", *(row.variable for row in SCHEDULERS)):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("clean_environment")
@pytest.mark.parametrize("name", CASES)
def test_end_of_a_job(name, monkeypatch):
    variables, printed, end = CASES[name]
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with mock.patch("subprocess.check_output", return_value=printed) as command:
        found = find_job_end(query=True)
    expected = time.time() + float(end) if isinstance(end, str) else START_S + end
    assert found == expected or abs(found - expected) < 5
    assert command.called == (len(variables) > 0 and printed != "")


@pytest.mark.usefixtures("clean_environment")
def test_htcondor_states_the_end_in_a_file(monkeypatch, tmp_path):
    (tmp_path / "ad").write_text("AllowedJobDuration = 600\nJobCurrentStartDate = 1000\n")
    monkeypatch.setenv("_CONDOR_JOB_AD", str(tmp_path / "ad"))
    assert find_job_end(query=True) == 1600
    (tmp_path / "ad").write_text("JobCurrentStartDate = 1000\n")
    assert find_job_end(query=True) == math.inf


@pytest.mark.usefixtures("clean_environment")
def test_ranks_that_may_not_ask_do_not(monkeypatch):
    monkeypatch.setenv("PBS_JOBID", "1")
    with mock.patch("subprocess.check_output") as command:
        assert find_job_end(query=False) == math.inf
    assert not command.called
