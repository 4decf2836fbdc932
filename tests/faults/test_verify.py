"""What shows a layout before it is queued, what proves it, and what refuses one that cannot work; each as a whole command."""

import re
import shutil
from xml.etree import ElementTree

import pytest
import torch
from helpers import mpirun
from runs import small_config

from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import override
from mpilm.engine.hardware import Hardware
from mpilm.parallel.flat_layout import ParamSlice
from mpilm.verification import layouts as prove

CONFIG, DISAGREE = 78, 88
SMALL = (
    "--model.n-layers", 4, "--model.d-model", 16, "--model.n-heads", 2, "--model.n-kv-heads", 1, "--model.context-length", 8,
    "--train.steps", 2, "--train.global-batch", 4, "--train.threads", 1, "--train.device", "cpu",
)  # fmt: skip
ON_TWO = [  # data, pipeline, schedule, ZeRO
    *(("2", "1", "-", zero) for zero in "0123"),
    *(("1", "2", schedule, "0") for schedule in ("1f1b", "gpipe", "interleaved", "zero-bubble")),
]
LIMIT_S = 40.0
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++, which is not here")


def verify(ranks, *flags, limit_s=LIMIT_S):
    """Run the command; its end, and the verdict on each layout by (data, pipeline, schedule, ZeRO)."""
    done = mpirun(ranks, "-m", "mpilm.verify", *SMALL, *flags, limit_s=limit_s)
    text = f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in text, text
    row = r"^ +(\d+) +(\d+)  (\S+) +(\d)  (?: *[-+.e\d]+  ){0,3}(.+)$"
    return done, {tuple(place): verdict for *place, verdict in re.findall(row, done.stdout, re.MULTILINE)}


def test_two_ranks_prove_each_of_their_layouts():
    done, verdicts = verify(2)
    assert verdicts == dict.fromkeys(ON_TWO, "equal bits"), done.stdout
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "8 layouts of 2 ranks, 2 steps each: promised and found equal bits"


@COMPILER
def test_compiled_blocks_have_the_same_bits_in_every_layout():
    done, verdicts = verify(2, "--train.compile", "true", "--model.dropout", 0, limit_s=110)
    refused = verdicts.pop(("1", "2", "zero-bubble", "0"))
    assert refused.startswith(
        "not run: --parallel.schedule zero-bubble runs parts of a block separately, which cannot be compiled"
    )
    assert verdicts == dict.fromkeys((place for place in ON_TWO if place[2] != "zero-bubble"), "equal bits"), done.stdout
    assert (done.returncode, done.stderr) == (0, "")


@COMPILER
@pytest.mark.parametrize(
    "arch", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("mixtral", marks=pytest.mark.slow)]
)
def test_compiled_steps_are_those_that_are_not(arch):
    plain = small_config(model__arch=arch, model__dropout=0.0)
    compiled = override(plain, train__compile=True)
    cpu = Hardware(torch.device("cpu"), 1, False)
    row = prove._compare(*(prove.run_layout(config, SelfComm(), cpu, False) for config in (compiled, plain)), SelfComm())
    assert max(row.loss, row.gradient, row.weight) < prove.CUDA_TOLERANCE  # as where other kernels add in another order
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_without_a_compiler_it_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    done, verdicts = verify(0, "--train.compile", "true", "--model.dropout", 0)
    assert (done.returncode, verdicts) == (CONFIG, {})
    assert "--train.compile true: torch needs a C++ compiler for it, and no-such-compiler is not found" in done.stderr


def test_one_changed_bit_is_noticed_on_every_layout():
    done, verdicts = verify(2, "--self-test")
    assert verdicts == dict.fromkeys(ON_TWO, "BROKEN"), done.stdout
    assert done.returncode == DISAGREE
    message = "mpilm: error: the bit that was changed has been noticed on 8 of 8 layouts, as it must be"
    assert [line for line in done.stderr.splitlines() if "mpilm" in line] == [message]
    assert "found equal bits" not in done.stdout


def test_without_a_launcher_it_is_one_rank_and_says_why_a_layout_is_not_run():
    done, verdicts = verify(0, "--model.n-layers", 1)
    reason = verdicts.pop(("1", "1", "interleaved", "0"))
    assert re.match("not run: --parallel.pipeline 1 with 2 stages per rank makes 2 stages, and --model.n-layers is 1", reason)
    assert verdicts == {("1", "1", schedule, "0"): "equal bits" for schedule in ("1f1b", "gpipe", "zero-bubble")}, done.stdout
    assert (done.returncode, done.stderr) == (0, "")


def test_where_no_layout_can_be_run_nothing_is_proved():
    done, verdicts = verify(2, "--model.n-layers", 1, "--train.global-batch", 1)
    assert verdicts.keys() == set(ON_TWO)
    assert all(verdict.startswith("not run: ") for verdict in verdicts.values()), done.stdout
    assert done.returncode != 0
    assert "found equal bits" not in done.stdout


def test_nan_is_no_difference_that_a_gpu_may_have(monkeypatch):
    """A GPU is allowed small differences; nan is not small, though no comparison with it is true."""
    whole = {ParamSlice(name, 0, 2): torch.ones(2) for name in ("norm.weight", "embed.weight")}
    spoilt = {**whole, ParamSlice("embed.weight", 0, 2): torch.tensor([1.0, float("nan")])}
    outcomes = iter([whole, *[spoilt] * 4])  # the serial run comes first

    def run_layout(*_):
        return prove.LayoutOutcome([1.0], [1.0], [whole], next(outcomes))

    monkeypatch.setattr(prove, "run_layout", run_layout)
    monkeypatch.setattr(prove, "look", lambda train, world: Hardware(torch.device("cuda"), 1, False))
    with pytest.raises(CollectiveError, match="4 of 4 layouts differ"):
        prove.verify_layouts(small_config(), SelfComm(), False, lambda line: None)


@pytest.mark.parametrize(
    ("command", "flags", "says"),
    [
        ("train", ("--parallel.pipeline", 3), "--parallel.pipeline 3 does not divide 2 ranks; the nearest that does: 2"),
        ("train", ("--parallel.pipeline", 8), "makes 8 stages, and --model.n-layers is 4: each stage needs a layer"),
        (
            "verify",
            ("--model.d-model", 15),
            "--model.d-model 15 is not divisible by --model.n-heads 2; the nearest value that works: 16",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_once_and_nothing_is_begun(tmp_path, monkeypatch, command, flags, says):
    monkeypatch.setenv("MPILM_CACHE", str(tmp_path / "cache"))
    folder = ("--run.dir", tmp_path / "run") if command == "train" else ()
    done = mpirun(2, "-m", f"mpilm.{command}", *SMALL, *folder, *flags, limit_s=LIMIT_S)
    assert done.returncode == CONFIG, done.stderr
    (message,) = (line for line in done.stderr.splitlines() if "mpilm" in line)
    assert message.startswith("mpilm: error: ")
    assert says in message
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_schedule_is_printed_and_written_as_an_image(tmp_path):
    image = tmp_path / "plan.svg"
    layout = (
        "--parallel.pipeline",
        2,
        "--parallel.schedule",
        "zero-bubble",
        "--train.global-batch",
        6,
        "--train.micro-batch",
        2,
    )
    done = mpirun(0, "-m", "mpilm.plan", "--draw", *layout, "--width", 120, "--svg", image, limit_s=LIMIT_S)
    assert (done.returncode, done.stderr) == (0, "")
    everything = sorted(f"{kind}{microbatch}" for kind in "FIW" for microbatch in range(3))
    rows = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    assert [sorted(re.findall(r"[FIW]\d", row)) for row in rows] == [everything, everything]
    assert done.stdout.splitlines()[-1] == f"{image}: the drawing as an SVG image"
    titles = [title.text for title in ElementTree.parse(image).iter("{http://www.w3.org/2000/svg}title")]
    actions = {f"{stage}{action}" for stage in range(2) for action in everything}
    assert {title.partition(":")[0] for title in titles[1:]} == actions  # the first is the image's own
