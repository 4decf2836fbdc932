"""Checkpoint folders: every byte vouched for, whole or not there, and nothing in them that could run."""

import errno
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import read_tensors
from safetensors.torch import save_file
from text import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import mpilm.checkpoint.format as format_module
from mpilm.checkpoint import format
from mpilm.checkpoint import tensors as tensors_module
from mpilm.checkpoint.format import MANIFEST, TEMPORARY, Digest, checkpoints, folder_name, read_manifest, step_of
from mpilm.checkpoint.load import load
from mpilm.checkpoint.pretrained import shape_of
from mpilm.checkpoint.save import State, prune, remove_leftovers, save
from mpilm.checkpoint.tensors import pack_header
from mpilm.checkpoint.verify import newest_valid, verify
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.threads import run_ranks
from mpilm.data.tokenizer import bytes_tokenizer
from mpilm.errors import ConfigError, DataError, FileError, UserError
from mpilm.model.families import build_model, initial_std, tied_parameters
from mpilm.model.init import initial_value
from mpilm.model.sequence_info import SequenceInfo
from mpilm.parallel.flat_layout import ParamSlice

FILES = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
    "optimizer.safetensors", "trainer.json", MANIFEST,
}  # fmt: skip
ONE = SelfComm()


def parts(tie=True, seed=0, vocab_size=257, **changes):
    """A model with initial values, and a state that one rank holds alone."""
    config = tiny_config("", "", model__tie_embeddings=tie, model__dropout=0.0, **changes).model
    model = build_model(config, vocab_size)
    if tie:
        model.head.weight = model.embed.weight
    own = {name: parameter for name, parameter in model.named_parameters() if name not in tied_parameters(config)}
    for name, parameter in own.items():
        parameter.requires_grad_(False).copy_(initial_value(seed, name, tuple(parameter.shape), initial_std(name, config)))
    generator = torch.Generator().manual_seed(seed)
    moments = {
        kind: {n: torch.rand(p.shape, generator=generator) for n, p in own.items()} for kind in ("exp_avg", "exp_avg_sq")
    }
    return model, State(
        config,
        bytes_tokenizer(),
        None,
        {},
        shapes_of(own),
        {kind: shapes_of(of) for kind, of in moments.items()},
        pieces(own),
        {kind: pieces(of) for kind, of in moments.items()},
        lambda name: [(0, own[name].numel(), [0])],
    )


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def pieces(values):
    """Each tensor as one piece that shares its memory."""
    return {ParamSlice(name, 0, value.numel()): value.view(-1) for name, value in values.items()}


def written(parent, step=7, loss=1.5, tie=True, seed=0):
    _, state = parts(tie, seed)
    return save(parent, step, replace(state, trainer={"step": step, "eval_loss": loss}), ONE)


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
    model, _ = parts(tie)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Skathé el minoré.\n")["input_ids"]
    assert ids == bytes_tokenizer().encode("Skathé el minoré.\n").tolist()
    assert tokenizer.eos_token_id == bytes_tokenizer().eos
    ids = ids[:16]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
        found = model(torch.tensor([ids]), SequenceInfo(torch.arange(len(ids))))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert shape_of(folder).tie_embeddings == tie


@pytest.mark.parametrize("size", [1, 3])
def test_what_was_saved_comes_back_on_every_rank(stored, size):
    _, expected = parts()

    def body(comm):
        _, other = parts(seed=5)
        load(stored, other.parameters, other.moments, other.shapes, other.moment_shapes, other.model, comm)
        for piece, values in expected.parameters.items():
            assert torch.equal(other.parameters[piece], values)
            assert all(torch.equal(other.moments[kind][piece], of[piece]) for kind, of in expected.moments.items())

    run_ranks(size, body)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__d_model": 64}, "this model needs"),
        ({"model__n_layers": 3}, "has no tensor model.layers.2"),
        ({"vocab_size": 99}, r"embed_tokens.weight has shape \(257, 32\), this model needs \(99, 32\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_on_every_rank(stored, changes, message):
    _, state = parts(**changes)

    def body(comm):
        with pytest.raises(CollectiveError, match=message) as caught:
            load(stored, {}, {}, state.shapes, {}, state.model, comm)
        assert isinstance(caught.value.error, ConfigError)

    run_ranks(2, body)


# Tensors from anywhere.


def test_other_dtypes_are_converted(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors_module, "STAGED_ELEMENTS", 5)
    values = torch.linspace(-2, 2, 12).view(3, 4)
    dtypes = {"half": torch.float16, "brain": torch.bfloat16, "single": torch.float32, "double": torch.float64}
    there = {name: values.to(dtype) for name, dtype in dtypes.items()}
    save_file(there | {"none": torch.zeros(0, 2), "one": torch.tensor(5.0)}, tmp_path / "x.safetensors")
    for dtype in dtypes.values():
        wanted = {name: torch.zeros(3, 4, dtype=dtype) for name in dtypes} | {"none": torch.ones(0, 2), "one": torch.zeros(())}
        read_tensors(tmp_path / "x.safetensors", wanted)
        assert all(torch.equal(wanted[name], there[name].to(dtype)) for name in dtypes)
        assert wanted["one"] == 5.0


def test_integers_are_refused(tmp_path):
    save_file({"x": torch.arange(3)}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="x is of dtype I64; F64, F32, F16, BF16 can be read"):
        read_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(3)})


def entry(start, stop, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


def raw(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


A, B = entry(0, 8), entry(8, 16)
HOSTILE = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "a header longer than the file": (100).to_bytes(8, "little") + b"{}",
    "a header of 2**64 - 1 bytes": b"\xff" * 8 + b"{}",
    "not UTF-8": raw(b'{"\xff": 1}'),
    "UTF-16": raw(json.dumps({"x": A}).encode("utf-16"), bytes(8)),
    "not JSON": raw(b"{'x': 1}"),
    "a list": raw([A]),
    "too deep": raw(b"[" * 200_000),
    "a number of ten thousand digits": raw(b'{"x": ' + b"9" * 10_000 + b"}"),
    "one name twice": raw(b'{"x": %s, "x": %s}' % ((json.dumps(A).encode(),) * 2), bytes(8)),
    "one key twice": raw(b'{"x": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
    "an entry that is a number": raw({"x": 3}),
    "no dtype": raw({"x": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "no offsets": raw({"x": {"dtype": "F32", "shape": [0]}}),
    "three offsets": raw({"x": A | {"data_offsets": [0, 8, 8]}}, bytes(8)),
    "offsets that are no integers": raw({"x": A | {"data_offsets": [0.0, 8.0]}}, bytes(8)),
    "offsets that are truth values": raw({"x": A | {"data_offsets": [False, True]}}, bytes(1)),
    "a shape of strings": raw({"x": A | {"shape": ["2"]}}, bytes(8)),
    "overlap": raw({"x": A, "y": entry(4, 12)}, bytes(12)),
    "the same bytes twice": raw({"x": A, "y": A}, bytes(8)),
    "a hole": raw({"x": A, "y": entry(12, 20)}, bytes(20)),
    "before the data": raw({"x": entry(-8, 0), "y": A}, bytes(8)),
    "backwards": raw({"x": A, "y": entry(8, 4), "z": entry(4, 8)}, bytes(8)),
    "more than there is": raw({"x": A, "y": B}, bytes(15)),
    "less than there is": raw({"x": A, "y": B}, bytes(17)),
    "a shape that needs fewer bytes": raw({"x": A | {"shape": [2], "data_offsets": [0, 12]}}, bytes(12)),
    "a shape that needs more bytes": raw({"x": A | {"shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
    "a dtype of other width": raw({"x": A | {"dtype": "F64"}}, bytes(8)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_is_not_believed(tmp_path, name):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(DataError, match=rf"^{path}"):
        read_tensors(path, {"x": torch.zeros(2)})


def test_a_huge_hollow_file_takes_no_memory(tmp_path):
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write((10**11).to_bytes(8, "little"))
        os.truncate(file.fileno(), 10**12)
    with pytest.raises(DataError, match=r"a header of 100000000000 bytes"):
        read_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(2)})


def test_a_flipped_bit_of_a_header_is_refused_or_harmless(tmp_path):
    """With words, never a traceback: verify would have found it, but a stranger's folder has no manifest."""
    path = tmp_path / "x.safetensors"
    content = pack_header({"x": (2,), "y": (3, 1)}) + bytes(20)
    wanted = {"x": torch.zeros(2), "y": torch.zeros(3, 1)}
    for bit in range(8 * (len(content) - 20)):
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        said = str(path)
        try:
            read_tensors(path, wanted)
        except (DataError, ConfigError) as error:
            said = str(error)
        assert str(path) in said


def build_train_model(folder, **changes):
    """A folder of two files and their index."""
    save_file({"a": torch.tensor([1.0])}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.tensor([2.0])}, folder / "model-00002-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"} | changes
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": places}))
    return {"a": torch.zeros(1), "b": torch.zeros(1)}


def test_a_folder_of_several_files(tmp_path):
    wanted = build_train_model(tmp_path)
    read_tensors(tmp_path, wanted)
    assert (wanted["a"], wanted["b"]) == (1.0, 2.0)
    with pytest.raises(ConfigError, match="has no tensor c"):
        read_tensors(tmp_path, {"c": torch.zeros(1)})
    save_file({"a": torch.tensor([3.0])}, tmp_path / "model.safetensors")  # one file comes first, as in transformers
    read_tensors(tmp_path, {"a": wanted["a"]})
    assert wanted["a"] == 3.0


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b", "..", ".", "", 3, None, ["a"]])
def test_an_index_cannot_speak_of_files_elsewhere(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.tensor([9.0])}, tmp_path / "secret.safetensors")
    wanted = build_train_model(folder, a=name)
    with pytest.raises(DataError, match="index of tensors in files of its own folder"):
        read_tensors(folder, wanted)
    assert not wanted["a"]


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', "nonsense"])
def test_what_is_no_index(tmp_path, index):
    wanted = build_train_model(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DataError, match=r"model\.safetensors\.index\.json"):
        read_tensors(tmp_path, wanted)


def test_an_index_that_is_wrong(tmp_path):
    wanted = build_train_model(tmp_path, a="model-00002-of-00002.safetensors")
    with pytest.raises(DataError, match=r"model-00002-of-00002.safetensors has no tensor a"):
        read_tensors(tmp_path, wanted)
    build_train_model(tmp_path, a="model-00003-of-00003.safetensors")
    with pytest.raises(FileError, match=r"model-00003-of-00003.safetensors cannot be read: No such file"):
        read_tensors(tmp_path, wanted)


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(FileError, match=r"model\.safetensors cannot be read: No such file"):
        read_tensors(tmp_path, {"a": torch.zeros(1)})


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
    content = format.written({"format": 1, "files": small}).encode()
    (checkpoint / MANIFEST).write_bytes(content)
    verify(checkpoint)
    for bit in range(8 * len(content)):
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        (checkpoint / MANIFEST).write_bytes(altered)
        with pytest.raises(UserError):
            verify(checkpoint)
    for end in range(len(content)):
        (checkpoint / MANIFEST).write_bytes(content[:end])
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
        (folder / MANIFEST).write_text(format.written(files))
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


def test_half_a_folder_from_before_is_no_obstacle(tmp_path):
    (tmp_path / f"{TEMPORARY}step-00000007").mkdir()
    (tmp_path / f"{TEMPORARY}step-00000007" / "config.json").write_text("half")
    verify(written(tmp_path))
