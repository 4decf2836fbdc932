"""Ranks are lost, and the others continue or exit in good order, with the right numbers and without hanging.

Needs Open MPI 5, in this environment or the one that MPILM_TEST_OTHER_PYTHON names.
"""

import os
import re
import signal

import pytest
from helpers import find_open_mpi, read_metrics
from training_jobs import logged_step, read_outcome, run_serially, sleep_in_steps, slow_case, start_job, train_arguments

from mpilm.checkpoint.format import list_checkpoints

STEPS, SAVED, EVALUATED, LOST = 40, 16, 20, 22  # LOST: the step in which ranks are lost
LOST_RANK = 89
TENSOR = ("--parallel.tensor", "2")
EXPERT = ("--model.arch", "mixtral", "--model.n-experts", "4", "--parallel.expert", "2")
PIPELINE = ("--parallel.pipeline", "2", "--parallel.cut", "1,1")

PYTHON = find_open_mpi()
pytestmark = pytest.mark.skipif(not PYTHON, reason="no Open MPI; MPILM_TEST_OTHER_PYTHON may name a Python that has it")


def arguments(data, run, *more, elastic="true"):
    return train_arguments(
        data, run, "--train.steps", STEPS, "--checkpoint.every", SAVED, "--run.eval-every", EVALUATED, "--model.n-layers", 2,
        "--fault.elastic", elastic, "--fault.step-timeout", 20, *more,
    )  # fmt: skip


def run_with_faults(tmp_path, data, ranks, *faults, flags=()):
    """Return the exit code and the output of a job in which all these faults fire."""
    line = arguments(data, tmp_path / "run", *flags)
    ulfm = ["--with-ft", "ulfm"]
    with start_job(ranks, line, tmp_path, python=PYTHON, flags=ulfm, MPILM_FAULT=";".join(faults)) as job:
        code = job.wait(90)
    assert job.output.count("fault: ") == len(faults), job.output
    return code, job.output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run_serially(arguments(data, folder / "run", elastic="false"), folder)


def assert_equals(run, uninterrupted):
    """Check that the run has the same bits, and a row of the same numbers for every step."""
    assert read_outcome(run) == uninterrupted
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert rows[-1]["event"] == "end"


@pytest.mark.parametrize(
    ("ranks", "rank", "point", "flags"),
    [
        (4, 1, "p2p.send", PIPELINE),
        (4, 2, "backward", TENSOR),
        *(
            slow_case(3, i % 3, point, ("--parallel.zero", str(i % 4)))
            for i, point in enumerate(("data.next", "forward", "backward", "reduce.before", "reduce.after", "optimizer"))
        ),
        *(
            slow_case(3, rank, point, ())
            for rank, point in ((0, "checkpoint.open"), (1, "checkpoint.write"), (0, "checkpoint.manifest"), (0, "eval"))
        ),
        slow_case(4, 2, "optimizer", (*PIPELINE, "--parallel.zero", "3")),
        slow_case(4, 3, "reduce.after", ("--train.optimizer", "muon", "--parallel.zero", "1")),
        slow_case(4, 1, "backward", EXPERT),
        slow_case(4, 2, "optimizer", (*EXPERT, "--parallel.zero", "3")),
    ],
)
def test_run_continues_after_a_rank_is_lost(tmp_path, data, uninterrupted, ranks, rank, point, flags):
    step = "" if point.startswith("checkpoint") or point == "eval" else f" step={LOST}"
    code, output = run_with_faults(tmp_path, data, ranks, f"kind=kill rank={rank}{step} point={point}", flags=flags)
    assert code == 0, output
    working = 2 if flags[:2] in (PIPELINE[:2], TENSOR, EXPERT[:2]) else ranks - 1
    message = rf"rank {rank} \(\S+ process \d+\) lost; {ranks - 1} ranks continue after step \d+"
    assert re.search(message, output), output
    assert f"mpilm 0.1.0: {working} rank" in output
    others = {"--train.optimizer": flags[:2], "--parallel.tensor": ("--model.tensor-parts", "2"), "--model.arch": flags[:4]}
    if other := others.get("".join(flags[:1])):
        (tmp_path / "other").mkdir()
        line = arguments(data, tmp_path / "other" / "run", *other, elastic="false")
        uninterrupted = run_serially(line, tmp_path / "other")
    assert_equals(tmp_path / "run", uninterrupted)


def test_spare_ranks_take_the_places_of_lost_ranks(tmp_path, data, uninterrupted):
    """Of a pipeline of two stages and two spares: first a working rank is lost, then a spare, then another working rank."""
    faults = ["kind=kill rank=1 point=backward step=12", f"kind=kill rank=0 point=forward step={LOST}"]
    flags = (*PIPELINE, "--fault.spare-ranks", "3")
    line = [*arguments(data, tmp_path / "run", *flags)]
    variables = {"MPILM_FAULT": ";".join([*faults, sleep_in_steps(14, LOST - 1, 0.1, rank=2)])}
    with start_job(5, line, tmp_path, python=PYTHON, flags=["--with-ft", "ulfm"], **variables) as job:
        job.wait_until(lambda: logged_step(tmp_path / "run") >= 14)
        os.kill(job.rank_processes()[-1], signal.SIGKILL)  # the last one is a spare
        code = job.wait(90)
    assert code == 0, job.output
    assert "layout   pipeline 2 x data 1\n" in job.output
    assert "plus 3 spare ranks at the start\n" in job.output
    assert re.search(r"rank 1 \(\S+ process \d+\) lost; 4 ranks continue after step 12, 2 of them as spares\n", job.output)
    assert re.search(r"rank 0 .*rank 4 .* lost; 2 ranks continue after step \d+, none as a spare\n", job.output), job.output
    assert job.output.count("mpilm 0.1.0: 2 ranks") == 3
    assert_equals(tmp_path / "run", uninterrupted)


def test_run_ends_as_without_spare_ranks_if_the_spare_is_lost(tmp_path, data, uninterrupted):
    """No step needs it, so its loss is noticed at the end."""
    line = arguments(data, tmp_path / "run", "--fault.spare-ranks", "1")
    variables = {"MPILM_FAULT": sleep_in_steps(10, 20, 0.1)}
    with start_job(3, line, tmp_path, python=PYTHON, flags=["--with-ft", "ulfm"], **variables) as job:
        job.wait_until(lambda: logged_step(tmp_path / "run") >= 10)
        os.kill(job.rank_processes()[-1], signal.SIGKILL)
        code = job.wait(90)
    assert code == 0, job.output
    assert job.output.count("mpilm 0.1.0: ") == 1
    assert_equals(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("is_lost", [False, True], ids=["all live", "the spare is lost"])
def test_run_with_a_spare_rank_stops_on_request(tmp_path, data, uninterrupted, is_lost):
    """SIGUSR1 goes to the launcher, which sends it to all ranks."""
    line = arguments(data, tmp_path / "run", "--fault.spare-ranks", "1")
    variables = {"MPILM_FAULT": sleep_in_steps(10, 30, 0.1)}
    with start_job(3, line, tmp_path, python=PYTHON, flags=["--with-ft", "ulfm"], **variables) as job:
        job.wait_until(lambda: logged_step(tmp_path / "run") >= 10)
        if is_lost:
            os.kill(job.rank_processes()[-1], signal.SIGKILL)
        job.process.send_signal(signal.SIGUSR1)
        code = job.wait(90)
    assert code == 75, job.output
    assert "received SIGUSR1; saved" in job.output
    assert job.output.count("mpilm: error") == 0
    with start_job(0, arguments(data, tmp_path / "run", elastic="false"), tmp_path) as job:
        assert job.wait() == 0, job.output
    assert read_outcome(tmp_path / "run")[:2] == uninterrupted[:2]


@pytest.mark.parametrize("rank", [0, 1])
def test_run_begins_again_if_a_rank_is_lost_before_a_step_is_complete(tmp_path, data, uninterrupted, rank):
    fault, flags = f"kind=kill rank={rank} point=build", ("--fault.spare-ranks", "1")
    code, output = run_with_faults(tmp_path, data, 3, fault, flags=flags)
    assert code == 0, output
    assert re.search(rf"rank {rank} .* lost before a step was complete; 2 ranks begin again\n", output), output
    assert_equals(tmp_path / "run", uninterrupted)


def test_run_that_has_too_few_ranks_besides_its_spares_is_refused(tmp_path, data):
    line = arguments(data, tmp_path / "run", *PIPELINE, "--fault.spare-ranks", "2")
    with start_job(3, line, tmp_path, python=PYTHON, flags=["--with-ft", "ulfm"]) as job:
        assert job.wait() == 78
    assert "--fault.spare-ranks 2 leaves 1 rank to train, of 3 in all: start at least 4\n" in job.output


def test_run_continues_after_ranks_are_lost_one_by_one(tmp_path, data, uninterrupted):
    """In a backward, an evaluation and a forward, down to one rank."""
    points = ((0, "backward step=12"), (3, "eval"), (1, "forward step=31"))
    faults = [f"kind=kill rank={rank} point={point}" for rank, point in points]
    code, output = run_with_faults(tmp_path, data, 4, *faults, flags=("--parallel.zero", "2"))
    assert code == 0, output
    assert [int(n) for n in re.findall(r"lost; (\d) ranks? continue", output)] == [3, 2, 1]
    assert_equals(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_run_continues_after_two_of_four_replicas_are_lost_at_once(tmp_path, data, uninterrupted):
    faults = [f"kind=kill rank={rank} step={LOST} point=reduce.before" for rank in (1, 2)]
    code, output = run_with_faults(tmp_path, data, 4, *faults)
    assert code == 0, output
    assert_equals(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("point", "flags"), [slow_case("agree", ()), slow_case("give after=3", ()), ("give after=20", ("--parallel.zero", "1"))]
)
def test_run_continues_after_another_rank_is_lost_during_recovery(tmp_path, data, uninterrupted, point, flags):
    faults = [f"kind=kill rank=1 step={LOST} point=forward", f"kind=kill rank=3 point=recover.{point}"]
    code, output = run_with_faults(tmp_path, data, 4, *faults, flags=flags)
    assert code == 0, output
    assert f"lost; 2 ranks continue after step {LOST}" in output
    assert_equals(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("ranks", "lost", "flags"),
    [slow_case(2, (1,), PIPELINE), (4, (1, 2), ("--parallel.zero", "1"))],
    ids=["a stage", "a shard and its copy"],
)
def test_run_that_lost_all_copies_of_its_state_exits_and_resumes(tmp_path, data, uninterrupted, ranks, lost, flags):
    faults = [f"kind=kill rank={rank} step={LOST} point=forward" for rank in lost]
    synchronous = ("--checkpoint.asynchronous", "false")  # or step LOST may come before the checkpoint is on disk
    code, output = run_with_faults(tmp_path, data, ranks, *faults, flags=(*flags, *synchronous))
    assert code == LOST_RANK, output
    assert output.count("mpilm: error") == 1
    assert "the same command resumes from the newest checkpoint" in output
    assert "end" not in [row.get("event") for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [f"step-{SAVED:08d}"]
    with start_job(0, arguments(data, tmp_path / "run", elastic="false"), tmp_path) as job:
        assert job.wait() == 0, job.output
    assert read_outcome(tmp_path / "run")[:2] == uninterrupted[:2]


def test_mpi_that_does_not_survive_lost_ranks_is_refused(tmp_path, data):
    with start_job(2, arguments(data, tmp_path / "run"), tmp_path) as job:
        assert job.wait() == 78
    assert "--fault.elastic needs an MPI that survives the loss of ranks: Open MPI 5 under mpirun --with-ft ulfm" in job.output
