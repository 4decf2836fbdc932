"""Runs every command of README.md, CONTRIBUTING.md and docs/ as it is written, on small stand-ins for the files it names.

A command is changed only where it takes long: fewer steps, a smaller model, a few hundred tokens. Most run in a process forked
from one that has imported the package, with ranks as threads (tests/command_server.py). A shell and a real mpirun start those
in SHELL, and the training run that all others use. ELSEWHERE names the tests of commands that have one of their own, NOT_OURS
commands of other programs. A new command in the documentation is found and run without further work.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import LAUNCHER, OPEN_MPI
from machines import machine

from mpilm.engine.hardware import processor_name
from mpilm.planner.profile import write_profile

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = r"(mpirun|mpilm (?![0-9])|python|scripts/|sbatch|jobs/|pip|git|source|module|export|touch|pre-commit|[A-Z_]+=)"
SMALL = {
    "--train.steps": "2", "--train.global-batch": "8", "--train.micro-batch": "1", "--model.context-length": "32",
    "--generate.max-tokens": "3", "--run.eval-batches": "1", "--run.trace-steps": "1:2",
}  # fmt: skip
SHAPE = ["--model.n-layers", "4", "--model.d-model", "32", "--model.n-heads", "4", "--model.d-ff", "64"]
ELSEWHERE = {
    r"python -m pytest .*|mpirun -n 2 pytest|scripts/test": "scripts/test",
    r"scripts/soak .*": "scripts/soak",
    r"(MPILM_TORCH_INDEX=\S+ )?scripts/quickstart": "scripts/environment",
    r"sbatch .*|jobs/chain .*|scripts/slurm-here .*|export MPILM_SRUN_MPI.*": "tests/faults/test_slurm.py",
    r"jobs/submit .*|scripts/grid-engine-here .*": "tests/faults/test_schedulers.py",
    r"scripts/hosts-here .*": "tests/faults/test_network.py",
    r"mpirun -n 2 python -m mpilm.doctor --calibrate": "tests/ranks/test_doctor.py",
    r"mpirun -n 4 python -m mpilm.doctor": "tests/mpi/test_doctor.py",
    r"mpirun -n 2 python -m mpilm.verify": "tests/faults/test_verify.py",
    r"mpirun --with-ft ulfm .*": "tests/faults/test_elastic.py",
    r"mpirun -n 3 python scripts/own_model.py": "tests/mpi/test_data_parallel.py",
    r"mpirun .* --run.trackers wandb mlflow .*": "tests/unit/test_trackers.py",
    r"python scripts/bench.py .*": "scripts/bench.py",
    r"scripts/docs": "tests/documented/test_site.py",
    r"mpilm fetch .*": "tests/unit/test_hub.py",
    r"mpilm merge .*": "tests/ranks/test_adapters.py",
}
NOT_OURS = r"(git clone|module load|python -m venv|source|pip install|pre-commit install) .*"
SHELL = r"touch .*|.* > (texts.jsonl|mpilm.bash)"


def find_commands():
    """Return the page of each command, without its comment; a backslash continues a line."""
    found = {}
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        blocks = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.S | re.M)
        lines = [line.strip() for _, kind, block in blocks if kind in ("", "sh", "console") for line in block.splitlines()]
        lines += re.findall(r"\| `([^`]*)` \|", text)
        for line in lines:
            command = " ".join(re.split(r"\s#\s", line.removeprefix("$ "))[0].split())
            if re.match(COMMAND + r"\b", command) and not re.match(r"\w+\.py |(jobs|scripts)/ ", command):
                found.setdefault(command, page.name)
    return found


def find_test(command):
    """Return the test of a command that is not run here, or ""."""
    return next((where for pattern, where in ELSEWHERE.items() if re.fullmatch(pattern, command)), "")


COMMANDS = find_commands()
HERE = [command for command in COMMANDS if not find_test(command) and not re.fullmatch(NOT_OURS, command)]


def run_in_shell(command, folder, limit_s=100):
    """Run a command as a shell would start it, in `folder`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **OPEN_MPI, "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(
        ["bash", "-c", command], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output = job.communicate(timeout=limit_s)[0]
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        pytest.fail(f"{command} did not end within {limit_s} s; it printed\n{job.communicate()[0]}")
    return job.returncode, output


def shorten(command):
    """Return the command with so little to do that it takes seconds."""
    command = re.sub(r"bpe:\d+", "bpe:300", command).replace("--generate.prompts", "--generate.max-tokens 3 --generate.prompts")
    command = re.sub(r"step-0+360", "step-00000002", command).replace("path/to/Qwen3-0.6B", "FOLDER")
    if re.search(r"mpilm.generate\b", command) and "max-tokens" not in command:
        command += " --generate.max-tokens 3"
    if not re.search(r"mpilm.train\b", command) or "--help" in command:
        return command
    words = command.split()
    for flag, value in SMALL.items():
        if flag in words:
            words[words.index(flag) + 1] = value
        elif flag != "--run.trace-steps":
            words += [flag, value]
    if "--model.init-from" not in words:
        words += SHAPE
    return " ".join(words + ([] if "--data.path" in words or "--config" in words else ["--data.path", "my_texts/"]))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Make a folder with the files that the documentation names."""
    if not LAUNCHER.exists():
        pytest.skip(f"no launcher {LAUNCHER}")
    folder = tmp_path_factory.mktemp("documented")
    texts = {f"{n}.txt": "".join(f"line {i} of text {n}: to be or not to be\n" for i in range(600)) for n in range(3)}
    for name in ("my_texts", "books", "texts"):
        (folder / name).mkdir()
        for file, text in texts.items():
            (folder / name / file).write_text(text)
    (folder / "book.txt").write_text(texts["0.txt"][:4000])
    write_rows(folder / "books.jsonl", [{"text": text[:2000]} for text in texts.values()])
    write_rows(folder / "code.jsonl", [{"text": text} for text in texts.values()])
    write_rows(folder / "chats.jsonl", [{"prompt": f"What is {i}?", "response": f"{i} is a number."} for i in range(300)])
    (folder / "prompts.txt").write_text("def main(\nclass A:\n")
    write_profile(folder / "machine.json", this_machine())
    (folder / "train.toml").write_text('[data]\npath = ["my_texts/"]\n')
    for name in ("scripts", "jobs"):
        (folder / name).symlink_to(ROOT / name)
    mine = "--data.path my_texts/ --data.tokenizer bpe:300 --run.dir runs/mine --run.trace-steps 1:2"
    code, output = run_in_shell(
        shorten(f"mpirun -n 2 python -m mpilm.train {mine}")
        + " && python -m mpilm.prepare --data.path my_texts/ --data.tokenizer bpe:300 --output my_tokens",
        folder,
    )
    assert code == 0, output
    for name in ("NAME", "other", "llama-9ab5fe"):
        shutil.copytree(folder / "runs/mine", folder / "runs" / name)
    checkpoint = folder / "runs/mine/checkpoints/step-00000002"
    (folder / "FOLDER").mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / file, folder / "FOLDER")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    (folder / "FOLDER" / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def run_in_server():
    """Start the process that runs commands, and return a function that sends it one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(ROOT / "tests" / "command_server.py")]
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(command, folder):
            output = folder / "output"
            server.stdin.write(json.dumps({"words": shlex.split(command), "folder": str(folder), "output": str(output)}) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline()), output.read_text(errors="replace")

        yield run
        server.stdin.close()


def this_machine():
    """A calibration, with made-up rates, that this machine would accept."""
    found = machine(torch=torch.__version__, processor=processor_name())
    return replace(found, compute=tuple(replace(found.compute[0], dtype=dtype) for dtype in ("float32", "bfloat16")))


def write_rows(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


@pytest.mark.timeout(200)
@pytest.mark.parametrize("command", HERE)
def test_documented_command_runs(command, stand_ins, run_in_server, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(stand_ins, folder, symlinks=True)
    if "--run.dir runs/mine" in command:
        shutil.rmtree(folder / "runs/mine")
    if "--output my_tokens" in command:
        for file in folder.glob("my_tokens*"):
            file.unlink()
    run = run_in_shell if re.fullmatch(SHELL, command) else run_in_server
    code, output = run(shorten(command), folder)
    assert code == 0, f"{shorten(command)}\nended with {code} and printed\n{output}"
    assert "Traceback" not in output


def test_commands_tested_elsewhere_have_a_test():
    for pattern, where in ELSEWHERE.items():
        assert (ROOT / where).exists(), where
        assert any(re.fullmatch(pattern, command) for command in COMMANDS), f"no command matches {pattern}"


def test_find_commands_reads_all_pages():
    assert len(COMMANDS) > 50
    assert "mpirun -n 8 python -m mpilm.train --parallel.zero 3" in COMMANDS
    assert set(COMMANDS.values()) >= {"README.md", "getting-started.md", "cluster.md", "models.md", "watch.md", "pipeline.md"}
