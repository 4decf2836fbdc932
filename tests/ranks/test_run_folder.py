"""The run folder: what a run resumes from, what is refused with which message, and nothing overwritten."""

import errno
import shutil
from pathlib import Path
from unittest import mock

import pytest
from runs import layout
from text import TINY, tiny_config, write_tokens
from thread_ranks import run_ranks

from mpilm.checkpoint.format import checkpoint_name
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.parse import merge_settings, read_toml
from mpilm.config.schema import resolve_config
from mpilm.config.settings import override
from mpilm.data.corpus import open_corpus
from mpilm.errors import ConfigError, DataError, FileError
from mpilm.trainer.loop import train
from mpilm.trainer.run_folder import open_run_folder

CONTENT = {"data.path": "a" * 64, "data.tokenizer": "b" * 64}
ENVIRONMENT = {"torch": "1", "threads": "1"}
SELF = SelfComm()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run of four steps with checkpoints at 2 and 4; read only."""
    folder = tmp_path_factory.mktemp("stored")
    config = tiny_config(write_tokens(folder), folder / "run", train__steps=4, checkpoint__every=2)
    run_ranks(1, lambda comm: train(config, comm))
    return config


@pytest.fixture
def run(stored, tmp_path):
    """A copy of that run, and its config."""
    shutil.copytree(stored.run.dir, tmp_path / "run")
    return override(stored, run__dir=str(tmp_path / "run"))


def open_and_release(config, content, environment, comm):
    """Return the opened run folder, after releasing its lock."""
    found = open_run_folder(config, content, environment, comm)
    found.release()
    return found


def open_as_train(config, content=None):
    """Return the run folder as train would open it; by default with the content of the stored run."""
    return open_and_release(config, content or corpus_content(config), ENVIRONMENT, SELF)


def corpus_content(config):
    corpus = open_corpus(config.data, SELF)
    return {"data.path": corpus.fingerprint, "data.tokenizer": corpus.tokenizer.digest}


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refusal_of(config, kind=ConfigError, content=None):
    """Return the message that refuses `config`; nothing may change on disk."""
    before = snapshot(Path(config.run.dir).parent)
    with pytest.raises(CollectiveError) as caught:
        open_as_train(config, content)
    assert type(caught.value.error) is kind
    assert snapshot(Path(config.run.dir).parent) == before
    return str(caught.value)


def test_new_run_folder_has_the_resolved_settings(tmp_path):
    config = resolve_config(override(TINY, run__dir=str(tmp_path / "a" / "b")))
    found = open_and_release(config, CONTENT, ENVIRONMENT, SELF)
    assert (found.path, found.checkpoint, found.step, found.notes) == (tmp_path / "a" / "b", None, 0, ())
    written = tmp_path / "a" / "b" / "config.toml"
    assert merge_settings(TINY, read_toml(str(written)), str(written)) == override(
        config, model__tensor_parts=1, model__sequence_parts=1
    )
    assert config.model.d_ff > 0
    assert (
        open_and_release(config, CONTENT, ENVIRONMENT, SELF) == found
    )  # a run killed before its first checkpoint starts again


def test_run_folder_that_a_full_disk_or_a_kill_left_half_made_is_taken_up_again(tmp_path):
    config = resolve_config(override(TINY, run__dir=str(tmp_path / "run")))
    full = mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with full, pytest.raises(CollectiveError, match="cannot be written: No space left on device"):
        open_and_release(config, CONTENT, ENVIRONMENT, SELF)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.toml.tmp").write_text("[mod")
    assert open_and_release(config, CONTENT, ENVIRONMENT, SELF).step == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "config.toml"]


def test_run_resumes_from_the_newest_checkpoint(run):
    found = open_as_train(run)
    assert (found.step, found.checkpoint) == (4, Path(run.run.dir) / "checkpoints" / checkpoint_name(4))


def test_all_ranks_get_the_same_answer_and_the_same_refusal(run):
    found = run_ranks(3, lambda comm: open_and_release(run, corpus_content(run), ENVIRONMENT, comm))
    assert [f.step for f in found] == [4, 4, 4]
    changed = override(run, train__seed=5)

    def body(comm):
        with pytest.raises(CollectiveError, match=r"train\.seed: was 0, now 5"):
            open_and_release(changed, corpus_content(run), ENVIRONMENT, comm)

    run_ranks(3, body)


def test_changed_settings_are_refused_and_named(run):
    message = refusal_of(override(run, train__lr=0.5, train__global_batch=32, model__dropout=0.2, run__log_every=9))
    for row in ("train.lr: was 0.003, now 0.5", "train.global_batch: was 16, now 32", "model.dropout: was 0.1, now 0.2"):
        assert f"\n  {row}\n" in message
    assert checkpoint_name(4) in message
    assert "log_every" not in message


def test_changed_setting_can_be_allowed(run):
    changed = override(run, train__lr=0.5, train__seed=3)
    assert "--checkpoint.allow-change train.seed train.lr" in refusal_of(changed).replace(
        "train.lr train.seed", "train.seed train.lr"
    )
    assert "train.seed" in refusal_of(override(changed, checkpoint__allow_change=("train.lr",)))
    assert open_as_train(override(changed, checkpoint__allow_change=("train.lr", "train.seed"))).step == 4


def test_settings_without_influence_on_the_result_may_change(run):
    changed = override(run, train__steps=9, train__threads=2, run__eval_every=1, checkpoint__keep=9, generate__seed=4)
    assert open_as_train(changed).step == 4
    other_layout = layout(2, "zero-bubble", 3, cut=(1, 1), balance="measured")
    assert open_as_train(override(run, **other_layout, train__recompute="block")).step == 4


@pytest.mark.parametrize("key", ["data.path", "data.tokenizer"])
def test_other_corpus_is_refused_by_content_not_by_path(run, key):
    other = {**corpus_content(run), key: "f" * 64}
    assert f"{key}: was text or folder with digest" in refusal_of(run, content=other)
    assert "now text or folder with digest ffffffffffff" in refusal_of(run, content=other)
    message = refusal_of(override(run, data__path=("/another/text",)), content=other)
    assert "another shape" not in message
    assert (f"now text or folder with digest {'f' * 12} (/another/text)" in message) == (key == "data.path")
    assert ("To go on with its tokenizer: --run.dir" in message) == (key == "data.tokenizer")
    moved = override(run, data__path=("/somewhere/else",))
    assert open_as_train(moved, corpus_content(run)).step == 4


def test_changed_setting_is_refused_before_the_first_checkpoint_too(tmp_path):
    config = resolve_config(override(TINY, run__dir=str(tmp_path / "run")))
    open_and_release(config, CONTENT, ENVIRONMENT, SELF)
    assert "train.lr: was 0.003, now 0.004" in refusal_of(override(config, train__lr=0.004), content=CONTENT)


def test_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    config = resolve_config(override(TINY, run__dir=str(tmp_path / "mine")))
    assert "exists and is not a run folder" in refusal_of(config, content=CONTENT)
    assert "exists and is not a run folder" in refusal_of(
        override(config, run__dir=str(tmp_path / "mine" / "thesis.tex")), content=CONTENT
    )


def test_empty_folder_is_used(tmp_path):
    config = resolve_config(override(TINY, run__dir=str(tmp_path)))
    assert open_and_release(config, CONTENT, ENVIRONMENT, SELF).step == 0


def test_resume_never_refuses_a_folder_with_a_run(run):
    assert "holds a run, and --checkpoint.resume is never" in refusal_of(override(run, checkpoint__resume="never"))


def test_automatic_folder_name_follows_the_result_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve_config(TINY)
    first = open_and_release(config, CONTENT, ENVIRONMENT, SELF).path
    assert first.parent == Path("runs")
    assert open_and_release(config, CONTENT, ENVIRONMENT, SELF).path == first
    for same in ({"run__log_every": 7}, layout(2, "gpipe", 1)):
        assert open_and_release(override(config, **same), CONTENT, ENVIRONMENT, SELF).path == first
    assert open_and_release(override(config, train__seed=7), CONTENT, ENVIRONMENT, SELF).path != first
    fresh = override(config, checkpoint__resume="never")
    assert open_and_release(fresh, CONTENT, ENVIRONMENT, SELF).path == Path(f"{first}-2")
    assert open_and_release(fresh, CONTENT, ENVIRONMENT, SELF).path == Path(f"{first}-3")


def test_fewer_steps_than_the_checkpoint_has_are_refused(run):
    assert "is at step 4, past --train.steps 3; ask for more steps" in refusal_of(override(run, train__steps=3))


@pytest.mark.parametrize("name", ["checkpoints/step-00000009", "nothing", "config.toml", "checkpoints"])
def test_resume_from_no_checkpoint_folder_is_refused(run, tmp_path, name):
    asked = Path(run.run.dir) / name
    config = override(run, run__dir=str(tmp_path / "new"), checkpoint__resume=str(asked))
    assert refusal_of(config, FileError).startswith(f"--checkpoint.resume {asked} is not a checkpoint folder")


def test_resume_from_a_named_checkpoint(run, tmp_path):
    older, newest = (Path(run.run.dir) / "checkpoints" / checkpoint_name(step) for step in (2, 4))
    assert open_as_train(override(run, checkpoint__resume=str(newest))).step == 4
    assert "already holds step-00000004" in refusal_of(override(run, checkpoint__resume=str(older)))
    assert open_as_train(override(run, run__dir=str(tmp_path / "new"), checkpoint__resume=str(older))).step == 2


def test_run_without_a_complete_checkpoint_is_refused(run):
    for folder in (Path(run.run.dir) / "checkpoints").iterdir():
        (folder / "config.json").unlink()
    message = refusal_of(run, DataError)
    assert "no checkpoint in" in message
    assert checkpoint_name(2) in message
    assert checkpoint_name(4) in message


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    config = resolve_config(override(TINY, run__dir=str(tmp_path / "file" / "run")))
    assert "cannot be written" in refusal_of(config, FileError, CONTENT)


def test_note_names_what_may_change_the_last_bits(run):
    environment = {"torch": "0.0", "threads": "1"}
    notes = open_and_release(run, corpus_content(run), environment, SELF).notes
    assert len(notes) == 1
    assert "then, 0.0 now" in notes[0]
    assert "0.0 now" in notes[0]
    assert "threads" not in notes[0]


@pytest.mark.parametrize("damage", ["altered weights", "no manifest"])
def test_broken_checkpoint_is_set_aside_and_written_again(run, damage):
    newest = Path(run.run.dir, "checkpoints", checkpoint_name(4))
    complete = (newest / "model.safetensors").read_bytes()
    if damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "model.safetensors").write_bytes(complete[:-1] + bytes([complete[-1] ^ 1]))
    found = open_as_train(run)
    assert found.step == 2
    aside = newest.with_name(f"broken-1-{newest.name}")
    assert any(str(aside) in note for note in found.notes)
    assert aside.is_dir()
    run_ranks(2, lambda comm: train(run, comm))
    assert (newest / "model.safetensors").read_bytes() == complete


def test_branch_submitted_again_resumes_itself(run, tmp_path):
    """It was started from a checkpoint of another run, with the same command each time."""
    start = Path(run.run.dir, "checkpoints", checkpoint_name(2))
    branch = override(run, run__dir=str(tmp_path / "branch"), checkpoint__resume=str(start), train__steps=3)
    run_ranks(1, lambda comm: train(branch, comm))
    assert open_as_train(branch).step == 3
