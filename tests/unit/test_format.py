"""Checkpoint folders: complete or absent, every byte covered by a digest, and nothing in them that can run code."""

import errno
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import make_state, read_tensors, replicate, small_files
from safetensors.torch import save_file
from text import tiny_config
from transformers import AutoTokenizer

from mpilm.checkpoint import load as load_module
from mpilm.checkpoint.format import (
    MANIFEST,
    PARAMETER,
    TEMPORARY,
    checkpoint_name,
    checkpoint_step,
    dump_json,
    hash_blocks,
    hash_manifest,
    list_checkpoints,
    manifest_entry,
    pack_header,
    read_manifest,
    read_trainer,
)
from mpilm.checkpoint.manager import prune_checkpoints, remove_leftovers
from mpilm.checkpoint.pretrained import read_pretrained_config
from mpilm.checkpoint.save import PendingCheckpoint
from mpilm.checkpoint.verify import find_newest_valid, verify_checkpoint
from mpilm.comm.base import SelfComm
from mpilm.data.tokenizer import bytes_tokenizer
from mpilm.errors import ConfigError, DataError, FileError, UserError
from mpilm.model.families import build_model, tied_parameters

FILES = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
    "optimizer.safetensors", "trainer.json", MANIFEST,
}  # fmt: skip


@pytest.mark.parametrize("content", [{}, {"config": {}, "content": []}, {"config": {}, "content": {}, "conditions": None}])
def test_trainer_without_the_facts_of_a_run_is_refused(tmp_path, content):
    (tmp_path / "trainer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"trainer\.json has no object"):
        read_trainer(tmp_path)


def write_checkpoint(parent, tie=True):
    config = tiny_config("", "", model__tie_embeddings=tie, model__dropout=0.0).model
    shapes = {name: x.shape for name, x in build_model(config, 257).named_parameters() if name not in tied_parameters(config)}
    own = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    sharding = replicate({name: tuple(x.shape) for name, x in own.items()}, 1)
    state = make_state(dict.fromkeys((PARAMETER, "exp_avg", "exp_avg_sq"), own), sharding, 0)
    state = replace(state, model=config, trainer={"step": 7, "eval_loss": 1.5})
    return PendingCheckpoint(parent, 7, state, SelfComm()).finalize()


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def checkpoint(stored, tmp_path):
    return shutil.copytree(stored, tmp_path / stored.name)


def make_entry(data):
    return manifest_entry(len(data), hash_blocks(data))


# Names, digests and files.


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
def test_checkpoint_step_is_the_inverse_of_checkpoint_name(name, step):
    assert checkpoint_step(Path("x") / name) == step
    if step is not None:
        assert checkpoint_name(step) == name


def test_manifest_entry_depends_on_every_byte_and_their_order():
    data = random.Random(0).randbytes(1000)
    with small_files(64):
        assert make_entry(data)["bytes"] == 1000
        others = [data, data[:-1], data[:640], b"", data[:64], data[64:128] + data[:64] + data[128:]]
        assert len({make_entry(other)["sha256_of_blocks"] for other in others}) == len(others)


def test_checkpoint_holds_json_and_safetensors_only(checkpoint):
    assert {path.name for path in checkpoint.iterdir()} == FILES
    assert set(read_manifest(checkpoint)) == FILES - {MANIFEST}
    verify_checkpoint(checkpoint)
    for path in checkpoint.iterdir():  # safetensors: a length, JSON, and numbers
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            content = content[8 : 8 + int.from_bytes(content[:8], "little")]
        json.loads(content)


@pytest.mark.parametrize("tie", [True, False])
def test_checkpoint_is_read_by_transformers_and_by_us(tmp_path, tie):
    """Logits are compared in tests/ranks/test_checkpoint.py."""
    folder = write_checkpoint(tmp_path, tie)
    tokenizer, ours = AutoTokenizer.from_pretrained(folder), bytes_tokenizer()
    assert tokenizer("Skathé el minoré.\n")["input_ids"] == ours.encode("Skathé el minoré.\n").tolist()
    assert tokenizer.eos_token_id == ours.eos
    assert read_pretrained_config(folder).tie_embeddings == tie


# Safetensors files of any origin.


def test_read_converts_dtypes(tmp_path, monkeypatch):
    monkeypatch.setattr(load_module, "STAGED_ELEMENTS", 5)
    values = torch.linspace(-2, 2, 12).view(3, 4)
    dtypes = {"half": torch.float16, "brain": torch.bfloat16, "single": torch.float32, "double": torch.float64}
    stored = {name: values.to(dtype) for name, dtype in dtypes.items()}
    save_file(stored | {"none": torch.zeros(0, 2), "one": torch.tensor(5.0)}, tmp_path / "x.safetensors")
    for dtype in dtypes.values():
        wanted = {name: torch.zeros(3, 4, dtype=dtype) for name in dtypes} | {"none": torch.ones(0, 2), "one": torch.zeros(())}
        read_tensors(tmp_path / "x.safetensors", wanted)
        assert all(torch.equal(wanted[name], stored[name].to(dtype)) for name in dtypes)
        assert wanted["one"] == 5.0


def test_read_of_integers_raises(tmp_path):
    save_file({"x": torch.arange(3)}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="x is of dtype I64; F64, F32, F16, BF16 can be read"):
        read_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(3)})


def make_header_entry(start, stop, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def pack_raw(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


A, B = make_header_entry(0, 8), make_header_entry(8, 16)
HOSTILE = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "a header longer than the file": (100).to_bytes(8, "little") + b"{}",
    "a header of 2**64 - 1 bytes": b"\xff" * 8 + b"{}",
    "not UTF-8": pack_raw(b'{"\xff": 1}'),
    "UTF-16": pack_raw(json.dumps({"x": A}).encode("utf-16"), bytes(8)),
    "not JSON": pack_raw(b"{'x': 1}"),
    "a list": pack_raw([A]),
    "too deep": pack_raw(b"[" * 200_000),
    "a number of ten thousand digits": pack_raw(b'{"x": ' + b"9" * 10_000 + b"}"),
    "one name twice": pack_raw(b'{"x": %s, "x": %s}' % ((json.dumps(A).encode(),) * 2), bytes(8)),
    "one key twice": pack_raw(b'{"x": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
    "an entry that is a number": pack_raw({"x": 3}),
    "no dtype": pack_raw({"x": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "no offsets": pack_raw({"x": {"dtype": "F32", "shape": [0]}}),
    "three offsets": pack_raw({"x": A | {"data_offsets": [0, 8, 8]}}, bytes(8)),
    "offsets that are no integers": pack_raw({"x": A | {"data_offsets": [0.0, 8.0]}}, bytes(8)),
    "offsets that are truth values": pack_raw({"x": A | {"data_offsets": [False, True]}}, bytes(1)),
    "a shape of strings": pack_raw({"x": A | {"shape": ["2"]}}, bytes(8)),
    "overlap": pack_raw({"x": A, "y": make_header_entry(4, 12)}, bytes(12)),
    "the same bytes twice": pack_raw({"x": A, "y": A}, bytes(8)),
    "a hole": pack_raw({"x": A, "y": make_header_entry(12, 20)}, bytes(20)),
    "before the data": pack_raw({"x": make_header_entry(-8, 0), "y": A}, bytes(8)),
    "backwards": pack_raw({"x": A, "y": make_header_entry(8, 4), "z": make_header_entry(4, 8)}, bytes(8)),
    "more than there is": pack_raw({"x": A, "y": B}, bytes(15)),
    "less than there is": pack_raw({"x": A, "y": B}, bytes(17)),
    "a shape that needs fewer bytes": pack_raw({"x": A | {"shape": [2], "data_offsets": [0, 12]}}, bytes(12)),
    "a shape that needs more bytes": pack_raw({"x": A | {"shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
    "a dtype of other width": pack_raw({"x": A | {"dtype": "F64"}}, bytes(8)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_open_of_a_hostile_header_raises_naming_the_file(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(DataError, match=rf"^{path}"):
        read_tensors(path, {"x": torch.zeros(2)})


def test_open_of_a_huge_sparse_file_takes_no_memory(tmp_path):
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write((10**11).to_bytes(8, "little"))
        os.truncate(file.fileno(), 10**12)
    with pytest.raises(DataError, match=r"x\.safetensors is not a readable safetensors file: .*header too large"):
        read_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2)})


def test_open_of_a_folder_in_the_place_of_a_file_raises(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(FileError, match=r"model\.safetensors cannot be read: "):
        read_tensors(tmp_path, {"x": torch.zeros(2)})


def test_read_with_any_bit_of_the_header_flipped_raises_a_user_error_or_succeeds(tmp_path):
    """A folder from elsewhere has no manifest that would reveal the flip."""
    path = tmp_path / "x.safetensors"
    content = pack_header({"x": (2,), "y": (3, 1)}) + bytes(20)
    wanted = {"x": torch.zeros(2), "y": torch.zeros(3, 1)}
    for bit in range(8 * (len(content) - 20)):
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        message = str(path)
        try:
            read_tensors(path, wanted)
        except (DataError, ConfigError) as error:
            message = str(error)
        assert str(path) in message


def write_two_files(folder, **changes):
    """Write a folder of two files and their index, and return tensors to read from it."""
    save_file({"a": torch.tensor([1.0])}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.tensor([2.0])}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"} | changes
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weight_map}))
    return {"a": torch.zeros(1), "b": torch.zeros(1)}


def test_read_of_a_folder_with_several_files(tmp_path):
    wanted = write_two_files(tmp_path)
    read_tensors(tmp_path, wanted)
    assert (wanted["a"], wanted["b"]) == (1.0, 2.0)
    with pytest.raises(ConfigError, match="has no tensor c"):
        read_tensors(tmp_path, {"c": torch.zeros(1)})
    save_file({"a": torch.tensor([3.0])}, tmp_path / "model.safetensors")  # one file comes first, as in transformers
    read_tensors(tmp_path, {"a": wanted["a"]})
    assert wanted["a"] == 3.0


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b", "..", ".", "", 3, None, ["a"]])
def test_open_of_an_index_that_leads_elsewhere_raises(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.tensor([9.0])}, tmp_path / "secret.safetensors")
    wanted = write_two_files(folder, a=name)
    with pytest.raises(DataError, match="index of tensors in files of its own folder"):
        read_tensors(folder, wanted)
    assert not wanted["a"]


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', "nonsense"])
def test_open_of_a_file_that_is_no_index_raises(tmp_path, index):
    wanted = write_two_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DataError, match=r"model\.safetensors\.index\.json"):
        read_tensors(tmp_path, wanted)


def test_open_of_a_folder_that_lacks_tensors_or_files_raises(tmp_path):
    wanted = write_two_files(tmp_path, a="model-00002-of-00002.safetensors")
    with pytest.raises(DataError, match=r"model-00002-of-00002.safetensors has no tensor a"):
        read_tensors(tmp_path, wanted)
    write_two_files(tmp_path, a="model-00003-of-00003.safetensors")
    with pytest.raises(FileError, match=r"model-00003-of-00003.safetensors cannot be read: No such file"):
        read_tensors(tmp_path, wanted)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileError, match=r"model\.safetensors cannot be read: No such file"):
        read_tensors(tmp_path, wanted)


# Damage.


def damage(folder, number):
    """Flip a bit of one file or cut it, at a place drawn by number, and return the file."""
    draw = random.Random(number)
    path = sorted(folder.iterdir())[number % len(FILES)]
    content = bytearray(path.read_bytes())
    if draw.random() < 0.25:
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return path


def test_verify_names_the_file_with_a_flipped_bit_or_a_cut(checkpoint):
    for number in range(64):
        content = {path: path.read_bytes() for path in checkpoint.iterdir()}
        path = damage(checkpoint, number)
        with pytest.raises((DataError, FileError)) as caught:
            verify_checkpoint(checkpoint)
        assert str(path) in str(caught.value)
        path.write_bytes(content[path])


@pytest.mark.parametrize("version", ["old", "new"])
def test_verify_finds_every_flipped_bit_and_every_cut_of_the_manifest(checkpoint, version):
    """An old manifest, without a digest of its own, may let another file seem wrong."""
    small = {"trainer.json": read_manifest(checkpoint)["trainer.json"]}  # the file is read again for each bit
    manifest = {"format": 1, "files": small}
    content = dump_json(manifest if version == "old" else manifest | {"sha256": hash_manifest(manifest)}).encode()
    (checkpoint / MANIFEST).write_bytes(content)
    verify_checkpoint(checkpoint)
    flipped = (content[:i] + bytes([content[i] ^ 1 << bit]) + content[i + 1 :] for i in range(len(content)) for bit in range(8))
    for altered in (*flipped, *(content[:end] for end in range(len(content)))):
        (checkpoint / MANIFEST).write_bytes(altered)
        with pytest.raises(UserError) as caught:
            verify_checkpoint(checkpoint)
        assert version == "old" or str(caught.value).startswith(str(checkpoint / MANIFEST))


@pytest.mark.parametrize("name", sorted(FILES))
def test_verify_names_a_missing_file(checkpoint, name):
    (checkpoint / name).unlink()
    kind, problem = (FileError, "cannot be read: No such file") if name == MANIFEST else (DataError, "is missing")
    with pytest.raises(kind, match=f"{name} {problem}"):
        verify_checkpoint(checkpoint)


def test_find_newest_valid_does_not_take_an_unreadable_file_for_damage(checkpoint, monkeypatch):
    """A file system with a passing fault must not cost a good checkpoint."""
    real = open

    def stuttering(path, *args, **kwargs):
        if Path(path).name == "model.safetensors":
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", stuttering)
    with pytest.raises(FileError, match=r"model\.safetensors cannot be read: Stale file handle"):
        find_newest_valid(checkpoint.parent)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ""])
def test_verify_with_a_manifest_that_leads_elsewhere_raises(checkpoint, name):
    (checkpoint.parent / "secret").write_text("x")
    (checkpoint / MANIFEST).write_text(dump_json({"format": 1, "files": {name: make_entry(b"x")}}))
    with pytest.raises(DataError, match="not a manifest of format 1 that lists files of its own folder"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "manifest",
    ["[]", "{}", '{"format": 1, "files": []}', '{"format": 1, "files": {"config.json": 3}}', "nonsense", "\xff",
     '{"format": 1, "files": {"config.json": {"bytes": 3}}}', '{"format": 2, "files": {}}', '{"files": {}}',
     '{"format": 1, "files": {"config.json": {"bytes": 3.5, "sha256_of_blocks": ""}}}'],
)  # fmt: skip
def test_verify_with_a_file_that_is_no_manifest_raises(checkpoint, manifest):
    (checkpoint / MANIFEST).write_text(manifest, encoding="latin-1")
    with pytest.raises(DataError, match=MANIFEST):
        verify_checkpoint(checkpoint)


# Several checkpoints.


@pytest.fixture
def parent(stored, tmp_path):
    """Steps 1 to 5 with evaluation losses 5, 1, 3, None, 4, and what a killed job leaves behind."""
    parent = tmp_path / "checkpoints"
    for step, loss in enumerate([5.0, 1.0, 3.0, None, 4.0], start=1):
        folder = shutil.copytree(stored, parent / checkpoint_name(step))
        (folder / "trainer.json").write_text(json.dumps({"eval_loss": loss}))
        files = read_manifest(folder) | {"trainer.json": make_entry((folder / "trainer.json").read_bytes())}
        (folder / MANIFEST).write_text(dump_json({"format": 1, "files": files}))
    shutil.copytree(stored, parent / f"{TEMPORARY}step-00000009")
    shutil.copytree(stored, parent / checkpoint_name(8))
    (parent / checkpoint_name(8) / MANIFEST).unlink()
    (parent / "note.txt").write_text("mine")
    return parent


def list_steps(parent):
    return [checkpoint_step(folder) for folder in list_checkpoints(parent)]


def test_list_checkpoints_leaves_out_incomplete_ones(parent, tmp_path):
    assert list_steps(parent) == [1, 2, 3, 4, 5]
    assert list_checkpoints(tmp_path / "none") == []


def test_find_newest_valid_skips_damaged_ones_and_returns_their_errors(parent):
    assert find_newest_valid(parent) == (parent / checkpoint_name(5), {})
    damage(parent / checkpoint_name(5), 5)
    (parent / checkpoint_name(4) / "tokenizer.json").unlink()
    found, errors = find_newest_valid(parent)
    assert found == parent / checkpoint_name(3)
    assert [folder.name for folder in errors] == [checkpoint_name(5), checkpoint_name(4)]
    assert all(str(folder) in message for folder, message in errors.items())
    for step in (1, 2, 3):
        (parent / checkpoint_name(step) / "model.safetensors").write_bytes(b"")
    found, errors = find_newest_valid(parent)
    assert found is None
    assert len(errors) == 5


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
    prune_checkpoints(parent, keep, best)
    assert list_steps(parent) == left
    assert (parent / "note.txt").read_text() == "mine"
    assert not list(parent.glob(f"{TEMPORARY}removing*"))


def test_prune_keeps_the_newest_whose_state_was_checked(parent):
    for step in (1, 2):
        (parent / checkpoint_name(step) / "trainer.json").write_text(json.dumps({"checked": True}))
    prune_checkpoints(parent, 1, False)
    assert list_steps(parent) == [2, 5]


def test_remove_leftovers_removes_nothing_else(parent):
    remove_leftovers(parent)
    assert not list(parent.glob(f"{TEMPORARY}*"))
    assert list_steps(parent) == [1, 2, 3, 4, 5]
    assert (parent / "note.txt").exists()


def test_save_replaces_a_partial_folder_of_an_earlier_job(tmp_path):
    (tmp_path / f"{TEMPORARY}step-00000007").mkdir()
    (tmp_path / f"{TEMPORARY}step-00000007" / "config.json").write_text("half")
    verify_checkpoint(write_checkpoint(tmp_path))
