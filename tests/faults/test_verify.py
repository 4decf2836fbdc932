"""The verify command under real MPI, and the refusal of what cannot work; each as a command of its own."""

import re
import shutil
import sys
from xml.etree import ElementTree

import pytest
import torch
from helpers import HAS_OTHER_MPI, OTHER_PYTHON, messages, mpirun
from runs import small_config
from thread_ranks import run_ranks

from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.engine.hardware import Hardware
from mpilm.parallel.flat_layout import ParamSlice
from mpilm.verification import layouts

CONFIG_ERROR, RANKS_DISAGREE = 78, 88
SMALL = (
    "--model.n-layers", 4, "--model.d-model", 16, "--model.n-heads", 2, "--model.n-kv-heads", 2, "--model.context-length", 8,
    "--train.steps", 2, "--train.global-batch", 4, "--train.threads", 1, "--train.device", "cpu",
)  # fmt: skip
LAYOUTS_OF_TWO = [  # data, pipeline, context, tensor, schedule, ZeRO
    *(("2", "1", "1", "1", "-", zero) for zero in "0123"),
    *(("1", "2", "1", "1", schedule, "0") for schedule in ("1f1b", "gpipe", "interleaved", "zero-bubble")),
    ("1", "1", "1", "2", "-", "0"),
    *(("1", "1", "2", "1", "-", zero) for zero in "0123"),
]
LIMIT_S = 40.0
PYTHONS = [sys.executable, *[OTHER_PYTHON] * HAS_OTHER_MPI]
COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++, which is not here")


def verify(ranks, *flags, limit_s=LIMIT_S, python=sys.executable):
    """Run the command; return its end, and the verdict on each layout by (data, pipeline, context, tensor, schedule, ZeRO)."""
    done = mpirun(ranks, "-m", "mpilm.verify", *SMALL, *flags, limit_s=limit_s, python=python)
    assert "Traceback" not in done.stderr, done.stderr
    return done, verdicts_of(done)


def verdicts_of(done):
    row = r"^ +(\d+) +(\d+) +\d+ +(\d+) +(\d+) +\d+ x \d+  (\S+) +(\d)  (?: *[-+.e\d]+  ){0,3}(.+)$"
    return {tuple(layout): verdict for *layout, verdict in re.findall(row, done.stdout, re.MULTILINE)}


@pytest.mark.parametrize("python", PYTHONS)
def test_verify_finds_equal_bits_on_every_layout_of_two_ranks(python):
    done, verdicts = verify(2, python=python)
    assert verdicts == dict.fromkeys(LAYOUTS_OF_TWO, "equal bits"), done.stdout
    assert done.returncode == 0
    assert messages(done) == []
    assert done.stdout.splitlines()[-1] == "13 layouts of 2 ranks, 2 steps each: bitwise identical, as guaranteed"


def test_verify_self_test_finds_the_flipped_bit_on_every_layout():
    done, verdicts = verify(2, "--self-test")
    assert verdicts == dict.fromkeys(LAYOUTS_OF_TWO, "DIFFERENT"), done.stdout
    assert done.returncode == RANKS_DISAGREE
    assert messages(done) == ["mpilm: error: self-test: found the flipped bit on 13 of 13 layouts, as it must"]
    assert "bitwise identical" not in done.stdout


def test_verify_without_a_launcher_names_the_layouts_that_cannot_run():
    done, verdicts = verify(0, "--model.n-layers", 1)
    reason = verdicts.pop(("1", "1", "1", "1", "interleaved", "0"))
    assert re.match("not run: --parallel.pipeline 1 with 2 stages per rank makes 2 stages, and --model.n-layers is 1", reason)
    assert verdicts == {("1", "1", "1", "1", schedule, "0"): "equal bits" for schedule in ("1f1b", "gpipe", "zero-bubble")}, (
        done.stdout
    )
    assert (done.returncode, messages(done)) == (0, [])


def test_verify_layouts_that_all_cannot_run_verifies_nothing():
    lines = []
    config = small_config(model__n_layers=1, train__global_batch=1, model__context_length=7)
    with pytest.raises(CollectiveError, match="no layout of 2 ranks can run this model and batch: nothing is verified"):
        run_ranks(2, lambda comm: layouts.verify_layouts(config, comm, False, lines.append if comm.rank == 0 else str))
    assert len(lines) == 1 + len(LAYOUTS_OF_TWO)
    assert all("not run: " in line for line in lines[1:])


def test_nan_exceeds_the_tolerance_of_a_gpu(monkeypatch):
    """A GPU is allowed small differences; no comparison with nan is true."""
    full = {ParamSlice(name, 0, 2): torch.ones(2) for name in ("norm.weight", "embed.weight")}
    with_nan = {**full, ParamSlice("embed.weight", 0, 2): torch.tensor([1.0, float("nan")])}
    weights = iter([full, *[with_nan] * 4])  # the serial run comes first

    def run_layout(*_):
        return layouts.LayoutOutcome([1.0], [full], next(weights))

    monkeypatch.setattr(layouts, "run_layout", run_layout)
    monkeypatch.setattr(layouts, "detect_hardware", lambda train, world: Hardware(torch.device("cuda"), 1, False))
    with pytest.raises(CollectiveError, match="4 of 4 layouts differ"):
        layouts.verify_layouts(small_config(), SelfComm(), False, lambda line: None)


# torch.compile.

COMPILED = """
import sys

import torch

from mpilm.comm.base import SelfComm
from mpilm.config.schema import Config, ModelConfig, TrainConfig, resolve_config
from mpilm.config.settings import override
from mpilm.engine.hardware import Hardware
from mpilm.launch.run import run
from mpilm.verification.layouts import GPU_TOLERANCE, _compare, run_layout, verify_layouts


def verify(comm):
    verify_layouts(compiled, comm, False, lambda line: print(line, flush=True) if comm.rank == 0 else None)
    cpu = Hardware(torch.device("cpu"), 1, False)
    differences, _ = _compare(*(run_layout(config, SelfComm(), cpu) for config in (compiled, plain)), comm)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert max(differences) < GPU_TOLERANCE  # kernels add in another order
    print("compiled and plain steps are close", flush=True)


experts = {"n_experts": 2, "d_ff": 32} if sys.argv[1] == "mixtral" else {}
model = ModelConfig(sys.argv[1], n_layers=4, d_model=16, n_heads=2, context_length=8, dropout=0.0, **experts)
train = TrainConfig(steps=1, global_batch=4, micro_batch=1, threads=1, device="cpu")
plain = resolve_config(Config(model=model, train=train))
compiled = override(plain, train__compile=True)
run(lambda: verify)
"""


@COMPILER
@pytest.mark.parametrize(
    "arch", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("mixtral", marks=pytest.mark.slow)]
)
def test_compiled_blocks_have_equal_bits_on_every_layout_and_are_close_to_plain_ones(arch, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)  # many kernels: worker processes pay
    done = mpirun(2, "-c", COMPILED, arch, limit_s=110)
    verdicts = verdicts_of(done)
    for layout in LAYOUTS_OF_TWO:
        if layout[2] == "2" or layout[4] == "zero-bubble":
            setting = "--parallel.context 2" if layout[2] == "2" else "--parallel.schedule zero-bubble"
            problem = f"not run: {setting} runs parts of a block separately, which cannot be compiled"
            assert verdicts[layout].startswith(problem), done.stdout
        else:
            assert verdicts[layout] == "equal bits", f"{done.stdout}\n{done.stderr}"
    assert (done.returncode, messages(done)) == (0, []), done.stderr
    assert done.stdout.count("compiled and plain steps are close") == 2


# Commands that print or refuse.


def test_settings_that_cannot_work_are_refused_once_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("MPILM_CACHE", str(tmp_path / "cache"))
    flags = ("--run.dir", tmp_path / "run", "--parallel.pipeline", 3)
    done = mpirun(2, "-m", "mpilm.train", *SMALL, *flags, limit_s=LIMIT_S)
    assert done.returncode == CONFIG_ERROR, done.stderr
    (message,) = messages(done)
    assert message.startswith("mpilm: error: --parallel.pipeline 3 does not divide 2 ranks; the nearest that does: 2")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_plan_prints_a_schedule_and_writes_it_as_svg(tmp_path):
    image = tmp_path / "plan.svg"
    schedule = (
        "--parallel.pipeline",
        2,
        "--parallel.schedule",
        "zero-bubble",
        "--train.global-batch",
        6,
        "--train.micro-batch",
        2,
    )
    done = mpirun(0, "-m", "mpilm.plan", "--draw", *schedule, "--width", 120, "--svg", image, limit_s=LIMIT_S)
    assert (done.returncode, done.stderr) == (0, "")
    actions = sorted(f"{kind}{microbatch}" for kind in "FIW" for microbatch in range(3))
    rows = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    assert [sorted(re.findall(r"[FIW]\d", row)) for row in rows] == [actions, actions]
    titles = [title.text for title in ElementTree.parse(image).iter("{http://www.w3.org/2000/svg}title")]
    drawn = {title.partition(":")[0] for title in titles[1:]}  # the first is the image's own
    assert drawn == {f"{stage}{action}" for stage in range(2) for action in actions}
