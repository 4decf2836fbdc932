"""Checkpoint folders: every byte vouched for, whole or not there, and nothing in them that could run."""

import errno
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from text import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import mpilm.checkpoint.format as format_module
from mpilm.checkpoint.format import (
    MANIFEST,
    TEMPORARY,
    Digest,
    Writer,
    checkpoints,
    folder_name,
    read_manifest,
    step_of,
    verify,
)
from mpilm.checkpoint.load import load, newest_valid, read_tensors
from mpilm.checkpoint.save import State, prune, remove_leftovers, save
from mpilm.comm.base import SelfComm
from mpilm.comm.threads import run_ranks
from mpilm.comm.together import AgreedError
from mpilm.data.tokenizer import bytes_tokenizer
from mpilm.errors import ConfigError, DataError, FileError, UserError
from mpilm.optim.adamw import AdamW
from mpilm.trainer.build import build_model, initialise
from mpilm.trainer.write import read_model

FILES = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
    "optimizer.safetensors", "trainer.json", MANIFEST,
}  # fmt: skip
ONE = SelfComm()


def parts(tie=True, seed=0, **changes):
    config = tiny("", "", model__tie_embeddings=tie, model__dropout=0.0, train__seed=seed, **changes)
    model, flat = build_model(config.model, bytes_tokenizer().vocab_size, torch.device("cpu"))
    initialise(flat, config)
    optimizer = AdamW(flat, config.train)
    for moment in optimizer.flat_moments.values():
        moment.uniform_(generator=torch.Generator().manual_seed(seed))
    return config, model, flat, optimizer


def written(parent, step=7, loss=1.5, tie=True, seed=0):
    config, _, flat, optimizer = parts(tie, seed)
    state = State(config.model, bytes_tokenizer(), flat.by_name, optimizer.moments, {"step": step, "eval_loss": loss})
    return save(parent, step, state, ONE)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return written(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def checkpoint(stored, tmp_path):
    return shutil.copytree(stored, tmp_path / stored.name)


# Names and digests.


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000007", 7),
        ("step-123456789", 123456789),
        ("step-7", None),
        (".writing-step-00000007", None),
        ("step-0000000a", None),
    ],
)
def test_names(name, step):
    assert step_of(Path("x") / name) == step
    if step is not None:
        assert folder_name(step) == name


def test_a_digest_does_not_depend_on_how_the_bytes_come(monkeypatch):
    monkeypatch.setattr(format_module, "BLOCK_BYTES", 64)
    data = random.Random(0).randbytes(1000)
    entries = []
    for size in (1, 7, 64, 65, 1000):
        digest = Digest()
        for at in range(0, 1000, size):
            digest.update(data[at : at + size])
        entries.append(digest.entry())
    assert all(entry == entries[0] for entry in entries)
    assert entries[0]["bytes"] == 1000
    others = [data[:-1], data[:640], b"", data[:64], data[64:128] + data[:64] + data[128:]]
    digests = {entries[0]["sha256_of_blocks"]}
    for other in others:
        digest = Digest()
        digest.update(other)
        digests.add(digest.entry()["sha256_of_blocks"])
    assert len(digests) == 1 + len(others)


def test_tensors_are_what_safetensors_reads(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(5, dtype=np.int64), "none": np.zeros((0, 2))}
    Writer(tmp_path).tensors("x.safetensors", arrays)
    wanted = {name: torch.full(array.shape, -1.0).to(torch.from_numpy(array).dtype) for name, array in arrays.items()}
    read_tensors(tmp_path / "x.safetensors", wanted)
    assert {name: tensor.tolist() for name, tensor in wanted.items()} == {n: array.tolist() for n, array in arrays.items()}


# A whole checkpoint.


def test_what_is_in_a_folder(checkpoint):
    assert {path.name for path in checkpoint.iterdir()} == FILES
    assert set(read_manifest(checkpoint)) == FILES - {MANIFEST}
    verify(checkpoint)
    for path in checkpoint.iterdir():  # JSON, or safetensors: a length, JSON, and numbers
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            content = content[8 : 8 + int.from_bytes(content[:8], "little")]
        json.loads(content)


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_loads_it_and_computes_the_same(tmp_path, tie):
    folder = written(tmp_path, tie=tie)
    _, model, _, _ = parts(tie)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Skathé el minoré.\n")["input_ids"]
    assert ids == bytes_tokenizer().encode("Skathé el minoré.\n").tolist()
    assert tokenizer.eos_token_id == bytes_tokenizer().eos
    ids = ids[:16]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
        found = model(torch.tensor([ids]), torch.arange(len(ids)))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    ours, shape, _ = read_model(folder)
    with torch.no_grad():
        assert torch.equal(ours(torch.tensor([ids]), torch.arange(len(ids))), found)
    assert shape.tie_embeddings == tie


@pytest.mark.parametrize("size", [1, 3])
def test_what_was_saved_comes_back_on_every_rank(stored, size):
    _, _, flat, optimizer = parts()

    def body(comm):
        _, _, there, theirs = parts(seed=5)
        load(stored, there.by_name, theirs.moments, [there.values, *theirs.flat_moments.values()], comm)
        assert torch.equal(there.values, flat.values)
        assert all(torch.equal(theirs.flat_moments[kind], moment) for kind, moment in optimizer.flat_moments.items())

    run_ranks(size, body)


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(stored):
    for changes, message in (
        ({"model__d_model": 64}, "this model needs"),
        ({"model__n_layers": 3}, "has no tensor model.layers.2"),
    ):

        def body(comm, changes=changes, message=message):
            _, _, flat, _ = parts(**changes)
            with pytest.raises(AgreedError, match=message) as caught:
                load(stored, flat.by_name, {}, [flat.values], comm)
            assert isinstance(caught.value.error, ConfigError)

        run_ranks(2, body)


# Damage.


def damaged(folder, number):
    """One flipped bit or a cut, at a place drawn by number, in each file in turn; the file."""
    draw = random.Random(number)
    path = sorted(folder.iterdir())[number % len(FILES)]
    content = bytearray(path.read_bytes())
    if draw.random() < 0.25:
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("number", range(64))
def test_a_flipped_bit_or_a_cut_is_found_and_the_file_named(checkpoint, number):
    path = damaged(checkpoint, number)
    with pytest.raises(UserError) as caught:
        verify(checkpoint)
    assert isinstance(caught.value, (DataError, FileError))
    if path.name != MANIFEST:
        assert str(path) in str(caught.value)
    else:  # a manifest that is altered may speak of a file that is not there
        assert str(checkpoint) in str(caught.value)


def test_every_bit_of_the_manifest_counts(checkpoint):
    """Whatever one flip makes of it, it is refused with words and not with a traceback."""
    entries = read_manifest(checkpoint)
    small = {name: entries[name] for name in ("config.json", "trainer.json")}  # others would be read again for each bit
    content = json.dumps({"format": 1, "files": small}, indent=1).encode()
    (checkpoint / MANIFEST).write_bytes(content)
    verify(checkpoint)
    for bit in range(8 * len(content)):
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        (checkpoint / MANIFEST).write_bytes(altered)
        with pytest.raises(UserError):
            verify(checkpoint)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    expected = (FileError, "cannot be read: No such file") if name == MANIFEST else (DataError, "is missing")
    with pytest.raises(expected[0], match=f"{name} {expected[1]}"):
        verify(checkpoint)


def test_what_cannot_be_read_is_not_taken_for_damage(checkpoint, monkeypatch):
    """A file system that stutters must not cost a good checkpoint."""
    stale = OSError(errno.ESTALE, "Stale file handle")
    real = open

    def stuttering(path, *args, **kwargs):
        if Path(path).name == "model.safetensors":
            raise stale
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", stuttering)
    with pytest.raises(FileError, match=r"model\.safetensors cannot be read: Stale file handle"):
        newest_valid(checkpoint.parent)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ""])
def test_a_manifest_cannot_speak_of_files_elsewhere(checkpoint, name):
    (checkpoint.parent / "secret").write_text("x")
    digest = Digest()
    digest.update(b"x")
    (checkpoint / MANIFEST).write_text(json.dumps({"format": 1, "files": {name: digest.entry()}}))
    with pytest.raises(UserError):
        verify(checkpoint)


@pytest.mark.parametrize(
    "manifest",
    ["[]", "{}", '{"format": 1, "files": []}', '{"format": 1, "files": {"config.json": 3}}', "nonsense", "\xff",
     '{"format": 1, "files": {"config.json": {"bytes": 3}}}', '{"format": 2, "files": {}}', '{"files": {}}'],
)  # fmt: skip
def test_what_is_no_manifest(checkpoint, manifest):
    (checkpoint / MANIFEST).write_text(manifest, encoding="latin-1")
    with pytest.raises(DataError, match=MANIFEST):
        verify(checkpoint)


# Several checkpoints.


@pytest.fixture
def parent(stored, tmp_path):
    """Steps 1 to 5 with evaluation losses 5, 1, 3, None, 4; and what a killed job leaves behind."""
    for step, loss in enumerate([5.0, 1.0, 3.0, None, 4.0], start=1):
        folder = shutil.copytree(stored, tmp_path / "c" / folder_name(step))
        (folder / "trainer.json").write_text(json.dumps({"eval_loss": loss}))
        files = json.loads((folder / MANIFEST).read_text())
        digest = Digest()
        digest.update((folder / "trainer.json").read_bytes())
        files["files"]["trainer.json"] = digest.entry()
        (folder / MANIFEST).write_text(json.dumps(files))
    shutil.copytree(stored, tmp_path / "c" / f"{TEMPORARY}step-00000009")
    shutil.copytree(stored, tmp_path / "c" / folder_name(8))
    (tmp_path / "c" / folder_name(8) / MANIFEST).unlink()
    (tmp_path / "c" / "note.txt").write_text("mine")
    return tmp_path / "c"


def steps(parent):
    return [step_of(folder) for folder in checkpoints(parent)]


def test_only_complete_ones_are_seen(parent, tmp_path):
    assert steps(parent) == [1, 2, 3, 4, 5]
    assert checkpoints(tmp_path / "none") == []


def test_the_newest_valid_one(parent):
    assert newest_valid(parent) == (parent / folder_name(5), {})
    damaged(parent / folder_name(5), 5)
    (parent / folder_name(4) / "tokenizer.json").unlink()
    found, complaints = newest_valid(parent)
    assert found == parent / folder_name(3)
    assert [folder.name for folder in complaints] == [folder_name(5), folder_name(4)]
    assert all(str(folder) in complaint for folder, complaint in complaints.items())
    for step in (1, 2, 3):
        (parent / folder_name(step) / "model.safetensors").write_bytes(b"")
    assert newest_valid(parent)[0] is None
    assert len(newest_valid(parent)[1]) == 5


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, True, [2, 4, 5]),
        (2, False, [4, 5]),
        (1, True, [2, 5]),
        (4, True, [2, 3, 4, 5]),
        (0, True, [1, 2, 3, 4, 5]),
        (9, False, [1, 2, 3, 4, 5]),
    ],
)
def test_prune_keeps_the_newest_and_the_best(parent, keep, best, left):
    prune(parent, keep, best)
    assert steps(parent) == left
    assert (parent / "note.txt").read_text() == "mine"
    assert not list(parent.glob(f"{TEMPORARY}removing*"))


def test_leftovers_go_and_nothing_else(parent):
    remove_leftovers(parent)
    assert not list(parent.glob(f"{TEMPORARY}*"))
    assert steps(parent) == [1, 2, 3, 4, 5]
    assert (parent / "note.txt").exists()


def test_a_step_that_is_there_is_not_written_over(tmp_path):
    folder = written(tmp_path, seed=0)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(AgreedError, match="is there already, written by another job"):
        written(tmp_path, seed=1)
    assert (folder / "model.safetensors").read_bytes() == before


def test_half_a_folder_from_before_is_no_obstacle(tmp_path):
    (tmp_path / f"{TEMPORARY}step-00000007").mkdir()
    (tmp_path / f"{TEMPORARY}step-00000007" / "config.json").write_text("half")
    verify(written(tmp_path))


def test_a_disk_that_takes_no_more_leaves_the_older_ones(tmp_path, monkeypatch):
    written(tmp_path, step=3)

    def full(self, name, arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, "tensors", full)

    def body(comm):
        config, _, flat, optimizer = parts()
        state = State(config.model, bytes_tokenizer(), flat.by_name, optimizer.moments, {})
        with pytest.raises(AgreedError, match=r"step-00000007 could not be written: No space left on device") as caught:
            save(tmp_path, 7, state, comm)
        assert isinstance(caught.value.error, FileError)

    run_ranks(2, body)
    assert steps(tmp_path) == [3]


def test_a_vocabulary_of_another_size_is_refused(stored):
    config, _, _, _ = parts()
    _, flat = build_model(replace(config.model), 99, torch.device("cpu"))
    with pytest.raises(AgreedError, match=r"embed_tokens.weight has shape \(257, 32\), this model needs \(99, 32\)"):
        load(stored, flat.by_name, {}, [flat.values], ONE)
