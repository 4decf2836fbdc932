"""Wrong input: one message that names what is wrong, and the promised exit code."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import mpirun, refusal, refusal_in_process
from text import tiny_config, write_text, write_tokens

from mpilm.comm.base import SelfComm
from mpilm.data.tokenizer import bytes_tokenizer
from mpilm.trainer.loop import train

CONFIG, DATA, FILE = 78, 65, 74
SMALL = (
    "--data.tokenizer", "bytes", "--model.n-layers", 1, "--model.d-model", 16, "--model.n-heads", 2,
    "--model.context-length", 16, "--train.global-batch", 4, "--train.micro-batch", 2, "--train.steps", 2, "--train.threads", 1,
    "--train.device", "cpu", "--run.eval-every", 0, "--generate.max-tokens", 0,
)  # fmt: skip
LIMIT_S, ROOT = 30.0, Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MPILM_CACHE", str(tmp_path / "cache"))


def error_of(*flags, code=CONFIG):
    """Return the message of a small training run that must not start, on one rank in this process."""
    return refusal_in_process("train", *SMALL, *flags, code=code)


# Whole jobs: the message appears once, and no rank is left waiting.


def test_train_more_ranks_than_microbatches_is_error_of(tmp_path):
    flags = ("--data.path", write_text(tmp_path), "--run.dir", tmp_path / "run")
    message = refusal("train", *SMALL, *flags, ranks=3, limit_s=LIMIT_S)
    assert "3 ranks, but a step has only 2 microbatches" in message
    assert "start 2 ranks or fewer, or make the batch 6" in message
    assert not (tmp_path / "run").exists()


def test_train_unwritable_run_folder_on_two_ranks_is_error_of(tmp_path):
    (tmp_path / "file").write_text("root may write anywhere but below a file")
    folder = tmp_path / "file" / "run"
    flags = ("--data.path", write_text(tmp_path), "--run.dir", folder)
    message = refusal("train", *SMALL, *flags, ranks=2, code=FILE, limit_s=LIMIT_S)
    assert "--run.dir" in message
    assert str(folder) in message


def test_train_unknown_flag_ends_without_traceback():
    done = mpirun(0, "-m", "mpilm.train", "--train.stepps", 3, limit_s=LIMIT_S)
    assert done.returncode == CONFIG
    assert "--train.stepps" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_train_with_too_little_memory_to_start_is_one_message():
    command = f"ulimit -v 300000; exec {shlex.quote(sys.executable)} -m mpilm.train"  # not enough to map torch
    variables = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["bash", "-c", command], env={**os.environ, **variables}, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("mpilm: error")) == (71, "", 1), done.stderr
    assert "of which ulimit -v allows this process 292 MiB; raise the limit" in done.stderr
    assert "Traceback" not in done.stderr


# On one rank, in this process.


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [(">&-", 0, ""), (">/dev/full", 74, "the output cannot be used: No space left on device"), ("2>&-", 0, "")],
)
def test_output_that_is_closed_or_full_is_no_traceback(redirection, code, message):
    line = f"{sys.executable} -m mpilm.verify --help {redirection}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert message in done.stderr


def test_help_for_a_terminal_of_one_column_ends(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1")
    line = [sys.executable, "-m", "mpilm.verify", "--help"]
    assert subprocess.run(line, capture_output=True, timeout=LIMIT_S, cwd=ROOT, check=False).returncode == 0


def test_absurd_number_of_threads_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "99999999999")
    message = error_of("--data.path", write_text(tmp_path), "--run.dir", tmp_path / "run", "--train.threads", 0)
    assert "OMP_NUM_THREADS=99999999999 is not a number of threads" in message


def test_home_folder_of_nobody_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MPILM_CACHE", "~nobody-here/cache")
    message = refusal("train", *SMALL, "--data.path", write_text(tmp_path), "--run.dir", tmp_path / "run", code=FILE)
    assert "a path begins with ~ and a user who does not exist here" in message


def test_train_missing_corpus_is_error_of(tmp_path):
    missing = tmp_path / "none.txt"
    assert str(missing) in error_of("--data.path", missing, "--run.dir", tmp_path / "run", code=FILE)


def test_train_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    message = error_of("--data.path", tmp_path / "empty.txt", "--run.dir", tmp_path / "run", code=DATA)
    assert str(tmp_path / "empty.txt") in message


def test_train_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"x" * 1000 + b"caf\xe9 " + b"y" * 1000)
    message = error_of("--data.path", tmp_path / "latin.txt", "--run.dir", tmp_path / "run", code=DATA)
    assert str(tmp_path / "latin.txt") in message
    assert "1003" in message


def test_train_truncated_bin_is_refused(tmp_path):
    prefix = write_tokens(tmp_path)
    file = prefix.with_suffix(".bin")
    file.write_bytes(file.read_bytes()[:-101])
    assert str(file) in error_of("--data.path", prefix, "--run.dir", tmp_path / "run", code=DATA)


@pytest.mark.parametrize("change", ["one bit", "another file of this size"])
def test_train_altered_tokens_are_refused(tmp_path, change):
    prefix = write_tokens(tmp_path)
    file = prefix.with_suffix(".bin")
    content = bytearray(file.read_bytes())
    content = content[::-1] if change != "one bit" else content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    file.write_bytes(content)
    message = error_of("--data.path", prefix, "--run.dir", tmp_path / "run", code=DATA)
    assert f"{file} is damaged: its digest differs from the one in the .json beside it" in message


def test_train_token_beyond_the_vocabulary_is_refused(tmp_path):
    prefix = write_tokens(tmp_path)
    file = prefix.with_suffix(".bin")
    tokens = np.fromfile(file, dtype=np.uint16)
    tokens[:] = 300
    tokens.tofile(file)
    prefix.with_suffix(".json").unlink()  # tokens of another program
    message = error_of("--data.path", prefix, "--run.dir", tmp_path / "run", code=DATA)
    assert str(file) in message
    assert "300" in message


def test_train_unknown_key_in_a_file_is_error_of(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("[train]\nlearning-rate = 1\n")
    assert f"--config {file}: unknown setting --train.learning-rate" in error_of("--config", file)


def test_train_context_longer_than_the_corpus_is_refused(tmp_path):
    flags = ("--data.path", write_text(tmp_path), "--run.dir", tmp_path / "run", "--model.context-length", 100000)
    message = error_of(*flags)
    assert "--model.context-length 100000" in message
    largest = int(message.partition("the largest value that works is ")[2].split(",")[0])
    assert 100 < largest < 100000


@pytest.fixture
def made(tmp_path):
    """A run of two steps; the flags that resume it."""
    config = tiny_config(
        write_tokens(tmp_path), tmp_path / "run", model__n_layers=1, model__d_model=16, model__n_heads=2, model__n_kv_heads=0,
        model__dropout=0.0, train__steps=2, train__global_batch=4, train__warmup_steps=20, run__eval_every=0,
    )  # fmt: skip
    train(config, SelfComm())
    return "--data.path", tmp_path / "tokens", "--run.dir", tmp_path / "run"


def test_train_resume_with_other_settings_is_refused(made, tmp_path):
    message = error_of(*made, "--train.lr", 0.01)
    assert str(tmp_path / "run") in message
    assert "train.lr: was 0.003, now 0.01" in message
    assert "--checkpoint.allow-change train.lr" in message


def test_train_checkpoint_of_another_shape_is_refused(made, tmp_path):
    start = tmp_path / "run" / "checkpoints" / "step-00000002"
    flags = ("--model.d-model", 32, "--checkpoint.allow-change", "model.d-model", "model.d-ff", "model.head-width")
    message = error_of(*made[:3], tmp_path / "other", "--checkpoint.resume", start, *flags)
    assert str(start / "model.safetensors") in message
    assert "this model needs" in message


def test_train_damaged_checkpoint_is_refused(made, tmp_path):
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "trainer.json"
    file.write_text(json.dumps({"step": 2}))
    message = error_of(*made, code=DATA)
    assert f"no checkpoint in {tmp_path / 'run'} can be used" in message
    assert str(file) in message


def test_train_same_flags_work_when_nothing_is_wrong(made):
    """Each refusal above is therefore for the reason that it names."""
    done = mpirun(0, "-m", "mpilm.train", *SMALL, *made, "--train.steps", 3, limit_s=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert "from step 2" in done.stdout
    assert "mpilm: error" not in done.stderr


def test_header_says_what_was_passed_over_and_that_the_warmup_is_too_long(tmp_path, capsys):
    folder = tmp_path / "texts"
    write_text(folder)
    (folder / "table.json").write_text("{}")
    named = tmp_path / "tokenizer.json"
    named.write_text(bytes_tokenizer().json)
    for tokenizer in ("bytes", str(named)):  # the second finds the tokens of the first in the cache
        warmup = {"train__warmup_steps": 9, "train__steps": 2, "data__tokenizer": tokenizer}
        train(tiny_config(folder, tmp_path / f"run-{len(tokenizer)}", **warmup), SelfComm())
        header = capsys.readouterr().out
        assert f" tokens of {tokenizer}, 1 document," in header
        assert "1 file read (1 .txt), 1 file passed over (1 .json)" in header
        assert "warning  --train.warmup-steps 9 exceeds --train.steps 2: the learning rate ends at " in header
    checkpoint = tmp_path / f"run-{len(tokenizer)}" / "checkpoints" / "step-00000002"
    flags = ("--model.init-from", checkpoint, "--generate.prompts", tmp_path / "none")
    message = refusal_in_process("generate", *flags, code=FILE)
    assert message.startswith(f"--generate.prompts {tmp_path / 'none'} cannot be read: No such file")
