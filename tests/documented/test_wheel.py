"""The wheel, installed where its user may not write: from `mpilm init` to a first sample, outside the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest
from helpers import LAUNCHER, OPEN_MPI
from text import write_text

ROOT, NOBODY = Path(__file__).parents[2], 65534
SMALL = (
    "--data.tokenizer", "bytes", "--model.n-layers", 1, "--model.d-model", 16, "--model.n-heads", 2, "--train.threads", 1,
    "--model.context-length", 16, "--train.global-batch", 4, "--train.steps", 3, "--train.warmup-steps", 1,
    "--train.device", "cpu", "--run.eval-every", 0,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder():
    """A folder that everybody may enter, unlike those of pytest."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


@pytest.fixture(scope="module")
def wheel(folder):
    """Build the wheel from a copy of the repository's files, without a network."""
    source = folder / "source"
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "mpilm", "jobs", "docs"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name, **({"symlinks": True} if copy is shutil.copytree else {}))
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", build, folder], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("mpilm-*.whl"))


@pytest.fixture(scope="module")
def run(folder, wheel):
    """Install the wheel into a virtual environment that sees the packages of this one; return a function that runs a command
    there, as another user where this one is root."""
    environment = folder / "venv"
    venv.create(environment)
    place = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", vars=place))
    (packages / "others.pth").write_text("\n".join(dict.fromkeys(sysconfig.get_path(n) for n in ("purelib", "platlib"))))
    words = ["--python", environment / "bin" / "python", "install", "--quiet", "--no-deps", "--no-index", wheel]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # pip would find mpilm installed there
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *words], check=True, env=clean)
    for where, _, files in os.walk(packages / "mpilm"):
        for name in ("", *files):
            path = Path(where, name)
            path.chmod(path.stat().st_mode & 0o555)
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
    variables = {**os.environ, **OPEN_MPI, "OMP_NUM_THREADS": "1", "HOME": str(folder / "home")}
    variables |= {"PATH": f"{environment / 'bin'}{os.pathsep}{LAUNCHER.parent}{os.pathsep}{os.environ['PATH']}"}
    variables["LD_LIBRARY_PATH"] = str(Path(sys.prefix) / "lib")  # mpi4py looks for the MPI of its own environment alone
    for name in ("PYTHONPATH", "MPILM_CACHE", "XDG_CACHE_HOME"):
        variables.pop(name, None)
    (folder / "home").mkdir(mode=0o777)
    (folder / "home").chmod(0o777)

    def run(*words, at=folder / "home", code=0):
        done = subprocess.run(
            list(map(str, words)), cwd=at, env=variables, capture_output=True, text=True, timeout=60, check=False, **user
        )
        assert done.returncode == code, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    return run


def test_wheel_holds_jobs_and_pages(wheel):
    names = set(ZipFile(wheel).namelist())
    for part in ("jobs", "docs"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / part).rglob("*") if path.is_file()}
        missing = {name for name in files if f"mpilm/{name}" not in names and not name.startswith("docs/assets/")}
        assert not missing
    assert not [name for name in names if name.startswith(("jobs/", "docs/", "tests/"))]


@pytest.mark.slow
def test_installed_command_leads_from_init_to_a_sample(folder, run):
    if not LAUNCHER.exists():
        pytest.skip(f"no launcher {LAUNCHER}")
    assert "wrote" in run("mpilm", "init", "project")
    project = folder / "home" / "project"
    assert (project / "jobs" / "site.sh").read_text() == f"source {folder / 'venv' / 'bin' / 'activate'}\n"
    assert os.access(project / "jobs" / "chain", os.X_OK)
    refusal = run("mpilm", "init", "project", code=78)
    assert "project/train.toml exists" in refusal
    write_text(folder)
    words = ("mpirun", "-n", 2, "mpilm", "train", "--config", "train.toml", *SMALL, "--data.path", folder / "text.txt")
    output = run(*words, at=project)
    assert run("mpirun", "-n", 2, "mpilm", "trian", code=78).count("did you mean mpilm train?") == 1
    step = "runs/first/checkpoints/step-00000003"
    assert f"write more   mpilm generate --model.init-from {step}" in output
    sample = ("mpilm", "generate", "--model.init-from", step, "--generate.prompt", "ab", "--generate.max-tokens", 3)
    assert run(*sample, at=project).startswith("ab")
