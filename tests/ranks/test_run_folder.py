"""The run folder: what is gone on from, what is refused and with which words, and nothing written over."""

import shutil
from pathlib import Path

import pytest
from runs import layout
from text import TINY, tiny_config, write_tokens

from mpilm.checkpoint.format import folder_name
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.threads import run_ranks
from mpilm.config import replaced, resolve
from mpilm.data.corpus import open_corpus
from mpilm.errors import ConfigError, DataError, FileError
from mpilm.settings import merge, read_toml
from mpilm.trainer.loop import train
from mpilm.trainer.run_folder import open_run_folder

CONTENT = {"data.path": "a" * 64, "data.tokenizer": "b" * 64}
HERE = {"torch": "1", "threads": "1"}
ONE = SelfComm()


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
    return replaced(stored, run__dir=str(tmp_path / "run"))


def look(config, content, present, comm):
    """Open the run folder, and let others have it."""
    found = open_run_folder(config, content, present, comm)
    found.release()
    return found


def opened(config, content=None):
    """The run folder as train would open it: the corpus is that of the stored run unless said otherwise."""
    return look(config, content or content_of(config), HERE, ONE)


def content_of(config):
    corpus = open_corpus(config.data, ONE)
    return {"data.path": corpus.fingerprint, "data.tokenizer": corpus.tokenizer.digest}


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refused(config, kind=ConfigError, content=None):
    """The message with which `config` is refused, with nothing changed on disk."""
    before = snapshot(Path(config.run.dir).parent)
    with pytest.raises(CollectiveError) as caught:
        opened(config, content)
    assert type(caught.value.error) is kind
    assert snapshot(Path(config.run.dir).parent) == before
    return str(caught.value)


def test_a_new_folder_holds_the_resolved_settings(tmp_path):
    config = resolve(replaced(TINY, run__dir=str(tmp_path / "a" / "b")))
    found = look(config, CONTENT, HERE, ONE)
    assert (found.path, found.checkpoint, found.step, found.notes) == (tmp_path / "a" / "b", None, 0, ())
    written = tmp_path / "a" / "b" / "config.toml"
    assert merge(TINY, read_toml(str(written)), str(written)) == config
    assert config.model.d_ff > 0
    assert look(config, CONTENT, HERE, ONE) == found  # a run killed before its first checkpoint starts again


def test_goes_on_from_the_newest(run):
    found = opened(run)
    assert (found.step, found.checkpoint) == (4, Path(run.run.dir) / "checkpoints" / folder_name(4))


def test_every_rank_hears_the_same(run):
    found = run_ranks(3, lambda comm: look(run, content_of(run), HERE, comm))
    assert [f.step for f in found] == [4, 4, 4]
    changed = replaced(run, train__seed=5)

    def body(comm):
        with pytest.raises(CollectiveError, match=r"train\.seed: was 0, now 5"):
            look(changed, content_of(run), HERE, comm)

    run_ranks(3, body)


def test_every_changed_setting_is_named(run):
    said = refused(replaced(run, train__lr=0.5, train__global_batch=32, model__dropout=0.2, run__log_every=9))
    for row in ("train.lr: was 0.003, now 0.5", "train.global_batch: was 16, now 32", "model.dropout: was 0.1, now 0.2"):
        assert f"\n  {row}\n" in said
    assert folder_name(4) in said
    assert "log_every" not in said


def test_a_change_can_be_allowed(run):
    changed = replaced(run, train__lr=0.5, train__seed=3)
    assert "--checkpoint.allow-change train.seed train.lr" in refused(changed).replace(
        "train.lr train.seed", "train.seed train.lr"
    )
    assert "train.seed" in refused(replaced(changed, checkpoint__allow_change=("train.lr",)))
    assert opened(replaced(changed, checkpoint__allow_change=("train.lr", "train.seed"))).step == 4


def test_what_the_result_does_not_depend_on_may_change(run):
    changed = replaced(run, train__steps=9, train__threads=2, run__eval_every=1, checkpoint__keep=9, generate__seed=4)
    assert opened(changed).step == 4
    layout = layout(2, "zero-bubble", 3, cut=(1, 1), balance="measured")
    assert opened(replaced(run, **layout, train__recompute="block")).step == 4


@pytest.mark.parametrize("key", ["data.path", "data.tokenizer"])
def test_another_corpus_is_refused_by_content(run, key):
    other = {**content_of(run), key: "f" * 64}
    assert f"{key}: was content" in refused(run, content=other)
    assert "now content ffffffffffff" in refused(run, content=other)
    moved = replaced(run, data__path=("/somewhere/else",))
    assert opened(moved, content_of(run)).step == 4


def test_a_run_without_checkpoints_is_compared_too(tmp_path):
    config = resolve(replaced(TINY, run__dir=str(tmp_path / "run")))
    look(config, CONTENT, HERE, ONE)
    assert "train.lr: was 0.003, now 0.004" in refused(replaced(config, train__lr=0.004), content=CONTENT)


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    config = resolve(replaced(TINY, run__dir=str(tmp_path / "mine")))
    assert "exists and is not a run folder" in refused(config, content=CONTENT)
    assert "exists and is not a run folder" in refused(
        replaced(config, run__dir=str(tmp_path / "mine" / "thesis.tex")), content=CONTENT
    )


def test_an_empty_folder_is_taken(tmp_path):
    config = resolve(replaced(TINY, run__dir=str(tmp_path)))
    assert look(config, CONTENT, HERE, ONE).step == 0


def test_never_does_not_touch_a_run(run):
    assert "holds a run, and --checkpoint.resume is never" in refused(replaced(run, checkpoint__resume="never"))


def test_automatic_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = resolve(TINY)
    first = look(config, CONTENT, HERE, ONE).path
    assert first.parent == Path("runs")
    assert look(config, CONTENT, HERE, ONE).path == first
    for same in ({"run__log_every": 7}, layout(2, "gpipe", 1)):
        assert look(replaced(config, **same), CONTENT, HERE, ONE).path == first
    assert look(replaced(config, train__seed=7), CONTENT, HERE, ONE).path != first
    fresh = replaced(config, checkpoint__resume="never")
    assert look(fresh, CONTENT, HERE, ONE).path == Path(f"{first}-2")
    assert look(fresh, CONTENT, HERE, ONE).path == Path(f"{first}-3")


def test_steps_below_the_checkpoint(run):
    assert "is at step 4, past --train.steps 3; ask for more steps" in refused(replaced(run, train__steps=3))


@pytest.mark.parametrize("name", ["checkpoints/step-00000009", "nothing", "config.toml", "checkpoints"])
def test_a_checkpoint_that_is_not_there(run, tmp_path, name):
    asked = Path(run.run.dir) / name
    config = replaced(run, run__dir=str(tmp_path / "new"), checkpoint__resume=str(asked))
    assert refused(config, FileError).startswith(f"--checkpoint.resume {asked} is not a checkpoint folder")


def test_a_checkpoint_asked_for_by_name(run, tmp_path):
    older, newest = (Path(run.run.dir) / "checkpoints" / folder_name(step) for step in (2, 4))
    assert opened(replaced(run, checkpoint__resume=str(newest))).step == 4
    assert "already holds step-00000004" in refused(replaced(run, checkpoint__resume=str(older)))
    assert opened(replaced(run, run__dir=str(tmp_path / "new"), checkpoint__resume=str(older))).step == 2


def test_without_a_whole_checkpoint_nothing_starts_anew(run):
    for folder in (Path(run.run.dir) / "checkpoints").iterdir():
        (folder / "config.json").unlink()
    said = refused(run, DataError)
    assert "no checkpoint in" in said
    assert folder_name(2) in said
    assert folder_name(4) in said


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    config = resolve(replaced(TINY, run__dir=str(tmp_path / "file" / "run")))
    assert "cannot be written" in refused(config, FileError, CONTENT)


def test_notes_on_what_may_change_the_last_bits(run):
    present = {"torch": "0.0", "threads": "1"}
    notes = look(run, content_of(run), present, ONE).notes
    assert len(notes) == 1
    assert "torch was" in notes[0]
    assert "is 0.0" in notes[0]
    assert "threads" not in notes[0]


@pytest.mark.parametrize("damage", ["altered weights", "no manifest"])
def test_a_broken_checkpoint_is_set_aside_and_written_again(run, damage):
    newest = Path(run.run.dir, "checkpoints", folder_name(4))
    whole = (newest / "model.safetensors").read_bytes()
    if damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    found = opened(run)
    assert found.step == 2
    aside = newest.with_name(f"broken-1-{newest.name}")
    assert any(str(aside) in note for note in found.notes)
    assert aside.is_dir()
    run_ranks(2, lambda comm: train(run, comm))
    assert (newest / "model.safetensors").read_bytes() == whole


def test_the_same_job_submitted_again_goes_on(run, tmp_path):
    """Started from a checkpoint of another run, with the same words each time."""
    began = Path(run.run.dir, "checkpoints", folder_name(2))
    branch = replaced(run, run__dir=str(tmp_path / "branch"), checkpoint__resume=str(began), train__steps=3)
    run_ranks(1, lambda comm: train(branch, comm))
    assert opened(branch).step == 3
