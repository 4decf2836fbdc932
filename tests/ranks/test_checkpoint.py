"""Checkpoints have no layout: whoever owns what, the bytes are the same, and any other layout reads them."""

import errno
import json
import os
import tempfile
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from unittest import mock

import pytest
import torch
from checkpoints import (
    assert_loads,
    draw_shapes,
    draw_sharding,
    draw_tensors,
    make_state,
    read_files,
    read_tensors,
    replicate,
    save_tensors,
    slice_tensors,
    small_files,
    stripe,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from text import tiny_config
from thread_ranks import run_ranks
from transformers import AutoModelForCausalLM

from mpilm.checkpoint import save as save_module
from mpilm.checkpoint.format import PARAMETER, TEMPORARY, list_checkpoints, pack_header, read_manifest
from mpilm.checkpoint.load import load_checkpoint
from mpilm.checkpoint.plan import StoredTensor, assign_files, plan_blocks
from mpilm.checkpoint.save import BLOCKS_IN_FLIGHT, LocalState, PendingCheckpoint, WriteBuffers, allocate_pages, assemble_blocks
from mpilm.checkpoint.verify import find_newest_valid, run_on_root_with_verify, verify_checkpoint
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.config.schema import ModelConfig
from mpilm.data import gather
from mpilm.data.tokenizer import bytes_tokenizer
from mpilm.errors import ConfigError, DataError, FileError
from mpilm.model.families import build_model, tied_parameters
from mpilm.model.hf.names import hf_name
from mpilm.model.sequence_info import SequenceInfo
from mpilm.telemetry.memory import shared_bytes

ONE = SelfComm()
BLOCKS = st.sampled_from([8, 60, 64, 100, 1 << 10, 1 << 24])  # with 60 and 100, some elements lie in two blocks
SHARDS = st.sampled_from([1, 50, 500, 5_000_000_000])
SHAPES = {"embed.weight": (40, 16), "blocks.0.attn.q.weight": (16, 16), "blocks.0.mlp_norm.weight": (16,), "norm.weight": (16,)}

each_sharding = given(random=st.randoms(use_true_random=False), size=st.integers(1, 8), block=BLOCKS, shard=SHARDS)


def save_shapes(parent, shapes=SHAPES, size=1, step=7):
    """Save a checkpoint of tensors that all of `size` ranks own."""
    return run_ranks(size, lambda comm: save_tensors(parent, draw_tensors(shapes), replicate(shapes, size), comm, step))[0]


# Bytes.


@settings(max_examples=60)
@each_sharding
def test_save_any_sharding_writes_the_bytes_of_one_rank_and_any_other_reads_them(random, size, block, shard):
    shapes = draw_shapes(random)
    values, first, second = draw_tensors(shapes), draw_sharding(random, shapes, size), draw_sharding(random, shapes, 4)
    with tempfile.TemporaryDirectory() as own, small_files(block, shard):
        alone = save_tensors(Path(own) / "alone", values, replicate(shapes, 1), ONE)
        folders = run_ranks(size, lambda comm: save_tensors(Path(own) / "together", values, first, comm))
        assert set(folders) == {Path(own) / "together" / alone.name}
        assert read_files(folders[0]) == read_files(alone)
        verify_checkpoint(alone)
        run_ranks(4, lambda comm: assert_loads(alone, values, second, comm))
        for path in alone.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118
        full = {hf_name(name, "llama"): torch.zeros(shape) for name, shape in shapes.items()}
        read_tensors(alone, full)
        assert all(torch.equal(full[hf_name(name, "llama")], value) for name, value in values[PARAMETER].items())


def test_save_writes_the_bytes_of_earlier_versions(tmp_path):
    """They are written out here: the last parameter comes first."""
    values = {
        PARAMETER: {"embed.weight": torch.tensor([[1.0, 2.0]]), "norm.weight": torch.tensor(3.0)},
        "exp_avg": {"embed.weight": torch.tensor([[4.0, 5.0]]), "norm.weight": torch.tensor(6.0)},
        "exp_avg_sq": {"embed.weight": torch.tensor([[7.0, 8.0]]), "norm.weight": torch.tensor(9.0)},
    }
    sharding = {"embed.weight": [(0, 1, [0]), (1, 2, [1])], "norm.weight": [(0, 1, [1])]}
    folder = run_ranks(2, lambda comm: save_tensors(tmp_path, values, sharding, comm))[0]
    header = (
        b'{"__metadata__": {"format": "pt"}, "model.norm.weight": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, '
        b'"model.embed_tokens.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [4, 12]}}'
    )
    header += b" " * (-len(header) % 8)
    data = torch.tensor([3.0, 1.0, 2.0]).numpy().tobytes()
    assert (folder / "model.safetensors").read_bytes() == len(header).to_bytes(8, "little") + header + data
    optimizer = (folder / "optimizer.safetensors").read_bytes()
    assert optimizer.endswith(torch.tensor([6.0, 4, 5, 9, 7, 8]).numpy().tobytes())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shard", [20_000, 5_000_000_000])
def test_save_in_one_file_or_several_is_read_by_transformers(tmp_path, tie, shard):
    config = tiny_config("", "", model__tie_embeddings=tie, model__dropout=0.0).model
    model = build_model(config, bytes_tokenizer().vocab_size)
    torch.manual_seed(0)
    own = {name: p.detach().normal_(std=0.1) for name, p in model.named_parameters() if name not in tied_parameters(config)}
    if tie:
        model.head.weight = model.embed.weight
    values = dict.fromkeys((PARAMETER, "exp_avg", "exp_avg_sq"), own)
    sharding = draw_sharding(Random(1), {name: tuple(value.shape) for name, value in own.items()}, 3)

    def body(comm):
        return PendingCheckpoint(tmp_path, 7, replace(make_state(values, sharding, comm.rank), model=config), comm).finalize()

    with small_files(1000, shard):
        folder = run_ranks(3, body)[0]
        verify_checkpoint(folder)
    several = shard < 10**6
    assert (folder / "model.safetensors").exists() != several
    assert (folder / "model.safetensors.index.json").exists() == several
    assert (folder / "optimizer.safetensors.index.json").exists() == several
    assert set(read_manifest(folder)) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(12)
    with torch.no_grad():
        expected = theirs(ids[None]).logits
        actual = model(ids[None], SequenceInfo(ids))
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


# Who writes.


def test_save_of_replicas_sends_no_message(tmp_path):
    def body(comm):
        traced = InstrumentedComm(comm, checks_calls=True)
        save_tensors(tmp_path, draw_tensors(SHAPES), replicate(SHAPES, 3), traced)
        return traced.calls["send"]

    with small_files(200):  # patched once for all threads
        assert run_ranks(3, body) == [0, 0, 0]


def test_assemble_blocks_keeps_only_a_few_in_memory():
    files = assign_files("x", [StoredTensor("a", (PARAMETER, "a"), (1000,))])
    local = LocalState(
        {PARAMETER: slice_tensors({"a": torch.zeros(1000)}, replicate({"a": (1000,)}, 1), 0)}, {files[0].name: files[0].header}
    )
    with small_files(64):
        blocks = list(plan_blocks(files, {"a": [(0, 1000, [0])]}, 1))
    started = []
    assembled = assemble_blocks((started.append(block) or block for block in blocks), local, ONE)
    for count, (block, _) in enumerate(assembled):
        assert block.number == count
        assert len(started) <= count + BLOCKS_IN_FLIGHT
    assert len(started) == len(blocks) > 50


def test_allocate_pages_is_not_counted_as_shared_memory():
    """It would be taken for that of other ranks, and left out of what this one uses."""
    before = shared_bytes()
    copy = allocate_pages(32 << 20).fill_(1)
    assert shared_bytes() - before < copy.nbytes // 8


@pytest.mark.parametrize("size", [1, 3])
def test_async_save_uses_the_reserved_buffers(tmp_path, size):
    values, sharding = draw_tensors(SHAPES), stripe(SHAPES, size, 100)

    def body(comm):
        state, buffers = make_state(values, sharding, comm.rank), WriteBuffers()
        buffers.reserve(state, comm)
        reserved = {number: buffer.data_ptr() for number, buffer in buffers.items()}
        PendingCheckpoint(tmp_path, 7, state, comm, buffers).finalize()
        return reserved, {number: buffer.data_ptr() for number, buffer in buffers.items()}

    with small_files(200):
        for reserved, used in run_ranks(size, body):
            assert reserved == used != {}


def test_save_of_slices_that_do_not_match_their_owners_raises(tmp_path):
    state = make_state(draw_tensors(SHAPES), replicate(SHAPES, 1), 0)
    parameters = state.slices[PARAMETER]
    lacking = replace(state, slices={**state.slices, PARAMETER: dict(list(parameters.items())[1:])})
    with pytest.raises(KeyError, match=r"parameter embed.weight: bytes from 0 on are not on this rank"):
        PendingCheckpoint(tmp_path, 7, lacking, ONE).finalize()
    wrong = replace(state, slices={**state.slices, PARAMETER: {piece: x.double() for piece, x in parameters.items()}})
    with pytest.raises(ValueError, match=r"float64"):
        PendingCheckpoint(tmp_path, 7, wrong, ONE).finalize()


# Failures.


def make_failing_pwrite(bad, after):
    """Return an os.pwrite that fails on the threads in `bad` after so many writes."""
    real, counts = os.pwrite, Counter()

    def pwrite(handle, data, at):
        counts[threading.get_ident()] += 1
        if threading.get_ident() in bad and counts[threading.get_ident()] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[: max(1, len(data) // 2)], at)  # a disk may also take less than it is given

    return pwrite


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_save_on_a_full_disk_of_one_rank_raises_on_all_and_keeps_the_older_one(tmp_path, size, after):
    values, sharding = draw_tensors(SHAPES), stripe(SHAPES, size, 20)
    bad = set()

    def body(comm):
        if comm.rank == size - 1:
            bad.add(threading.get_ident())
        with pytest.raises(CollectiveError) as caught:
            save_tensors(tmp_path, values, sharding, comm, step=8)
        assert isinstance(caught.value.error, FileError)
        return str(caught.value)

    with small_files(256):
        older = run_ranks(size, lambda comm: save_tensors(tmp_path, values, sharding, comm))[0]
        before = read_files(older)
        with mock.patch("os.pwrite", make_failing_pwrite(bad, after)):
            messages = set(run_ranks(size, body))
        where = f" (on rank {size - 1})" if size > 1 else ""
        message = f"step-00000008 could not be written: No space left on device; older checkpoints are unchanged{where}"
        assert messages == {f"checkpoint {tmp_path}/{message}"}
        assert list_checkpoints(tmp_path) == [older]
        assert read_files(older) == before
        assert not list(tmp_path.glob(f"{TEMPORARY}*"))
        with mock.patch("os.pwrite", make_failing_pwrite(set(), 0)):
            verify_checkpoint(run_ranks(size, lambda comm: save_tensors(tmp_path, values, sharding, comm, step=8))[0])


@pytest.mark.parametrize("call", ["fsync", "open", "mkdir", "rename"])
def test_save_where_a_call_fails_raises_on_all(tmp_path, monkeypatch, call):
    real = getattr(os, call)

    def failing(path, *arguments, **keywords):
        if call == "fsync" or "step-00000008" in str(path):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return real(path, *arguments, **keywords)

    def body(comm):
        with pytest.raises(CollectiveError, match=r"step-00000008 could not be written: Disk quota exceeded") as caught:
            save_tensors(tmp_path, draw_tensors(SHAPES), replicate(SHAPES, 2), comm, step=8)
        assert isinstance(caught.value.error, FileError)

    older = save_shapes(tmp_path, size=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        run_ranks(2, body)
    assert list_checkpoints(tmp_path) == [older]
    verify_checkpoint(older)


def test_save_to_a_folder_that_some_ranks_do_not_see_raises(tmp_path):
    def body(comm):
        parent = tmp_path / ("here" if comm.rank == 0 else "elsewhere")
        with pytest.raises(CollectiveError, match=r"not all ranks see its folder.*\(on rank 1\)"):
            save_tensors(parent, draw_tensors(SHAPES), replicate(SHAPES, 2), comm)

    with small_files(64):
        run_ranks(2, body)


def test_save_of_an_existing_step_raises_and_leaves_it(tmp_path):
    folder = save_shapes(tmp_path)
    before = read_files(folder)
    with pytest.raises(CollectiveError, match="already exists, written by another job"):
        save_shapes(tmp_path, {"norm.weight": (3,)}, size=2)
    assert read_files(folder) == before


@pytest.mark.parametrize("buffers", [None, WriteBuffers()])
def test_save_with_an_error_of_another_kind_raises_it(tmp_path, buffers):
    shapes = {"norm.weight": (3,)}
    state = make_state(draw_tensors(shapes), replicate(shapes, 1), 0)
    with (
        mock.patch.object(save_module, "sha256_tensor", side_effect=ArithmeticError("no more")),
        pytest.raises(ArithmeticError),
    ):
        PendingCheckpoint(tmp_path, 7, state, ONE, buffers).finalize()
    assert list_checkpoints(tmp_path) == []


# Verification.


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_verify_on_all_ranks_reads_every_block_once(tmp_path, size, monkeypatch):
    read = []
    plain = gather._digest_block
    monkeypatch.setattr(gather, "_digest_block", lambda path, at, digest: read.append((path, at)) or plain(path, at, digest))

    def find_newest(comm):
        return run_on_root_with_verify(comm, lambda verify: find_newest_valid(tmp_path, verify))

    with small_files(100):
        older, newer = (save_shapes(tmp_path, step=step) for step in (1, 2))
        assert run_ranks(size, find_newest) == [(newer, {}), *[None] * (size - 1)]
        nbytes = {newer / name: entry["bytes"] for name, entry in read_manifest(newer).items()}
        assert sorted(read) == sorted((path, at) for path, n in nbytes.items() for at in range(0, n, 100))
        path = newer / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        altered = f"checkpoint file {path} is damaged: its digest differs from the one in the manifest"
        assert run_ranks(size, find_newest)[0] == (older, {newer: altered})
        path.write_bytes(content[:-1])
        assert "bytes, but the manifest lists" in run_ranks(size, find_newest)[0][1][newer]
        with pytest.raises(CollectiveError, match=r"model\.safetensors has"):
            run_ranks(size, lambda comm: run_on_root_with_verify(comm, lambda verify: verify(newer)))


def test_verify_with_an_unreadable_share_raises_on_all(tmp_path, monkeypatch):
    folder = save_shapes(tmp_path)
    monkeypatch.setattr(gather, "open", mock.Mock(side_effect=OSError(5, "Input/output error")), raising=False)
    with pytest.raises(CollectiveError, match="cannot be read: Input/output error") as caught:
        run_ranks(3, lambda comm: run_on_root_with_verify(comm, lambda verify: find_newest_valid(tmp_path, verify)))
    assert isinstance(caught.value.error, FileError)
    assert folder.exists()


@pytest.mark.parametrize("shard", [1000, 5_000_000_000])
def test_verify_finds_a_flipped_bit_in_any_block(tmp_path, shard):
    with small_files(100, shard):
        folder = save_shapes(tmp_path, size=3)
        random = Random(0)
        for name, content in read_files(folder).items():
            if name == "manifest.json":
                continue
            for at in (0, len(content) - 1, *(random.randrange(len(content)) for _ in range(10))):
                altered = bytearray(content)
                altered[at] ^= 1 << random.randrange(8)
                (folder / name).write_bytes(altered)
                with pytest.raises(DataError, match=f"{name} is damaged"):
                    verify_checkpoint(folder)
            (folder / name).write_bytes(content)
        verify_checkpoint(folder)


def test_manifest_lists_exactly_the_files_with_their_sizes(tmp_path):
    with small_files(64):
        sharding = draw_sharding(Random(5), SHAPES, 4)
        folder = run_ranks(4, lambda comm: save_tensors(tmp_path, draw_tensors(SHAPES), sharding, comm))[0]
    files = json.loads((folder / "manifest.json").read_text())["files"]
    sizes = {name: len(content) for name, content in read_files(folder).items() if name != "manifest.json"}
    assert {name: entry["bytes"] for name, entry in files.items()} == sizes


# Loading.


def test_load_reads_only_the_bytes_of_the_slice(tmp_path, monkeypatch):
    shapes = {"embed.weight": (1000, 100)}
    folder = save_shapes(tmp_path, shapes)
    real, read = os.preadv, []

    def counting(handle, buffers, at):
        read.append(real(handle, buffers, at))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counting)
    sharding = {"embed.weight": [(0, 500, [1]), (500, 600, [0]), (600, 100_000, [1])]}
    assert_loads(folder, draw_tensors(shapes), sharding, ONE)
    assert sorted(read)[-3:] == [400, 400, 400]
    assert sum(read) < 3 * 400 + 2000


def test_load_of_another_model_raises_the_same_on_every_rank(tmp_path):
    folder = save_shapes(tmp_path)

    def body(comm, shapes):
        with pytest.raises(CollectiveError) as caught:
            load_checkpoint(
                folder, {}, {PARAMETER: shapes}, ModelConfig(), comm
            )  # a rank without slices compares the shapes too
        assert isinstance(caught.value.error, ConfigError)
        return str(caught.value)

    messages = run_ranks(2, lambda comm: body(comm, SHAPES | {"blocks.3.attn.q.weight": (2, 2)}))
    assert (
        messages == [f"{folder} has no tensor model.layers.3.self_attn.q_proj.weight: it is a checkpoint of another model"] * 2
    )
    messages = run_ranks(2, lambda comm: body(comm, SHAPES | {"norm.weight": (17,)}))
    assert messages == [f"{folder}/model.safetensors: model.norm.weight has shape (16,), this model needs (17,)"] * 2


def test_load_where_one_rank_cannot_read_raises_on_all(tmp_path, monkeypatch):
    folder = save_shapes(tmp_path)
    bad = set()
    real = os.preadv

    def stuttering(handle, buffers, at):
        if threading.get_ident() in bad:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(handle, [buffers[0][:100]], at)  # and a file system may give less than it is asked for

    monkeypatch.setattr(os, "preadv", stuttering)
    run_ranks(2, lambda comm: assert_loads(folder, draw_tensors(SHAPES), replicate(SHAPES, 2), comm))

    def body(comm):
        if comm.rank == 1:
            bad.add(threading.get_ident())
        with pytest.raises(CollectiveError, match=r"cannot be read: Stale file handle \(on \S+, rank 1\)") as caught:
            assert_loads(folder, draw_tensors(SHAPES), replicate(SHAPES, 2), comm)
        assert isinstance(caught.value.error, FileError)

    run_ranks(2, body)


def test_load_of_half_precision_state_raises(tmp_path):
    shapes = {"norm.weight": (4,)}
    folder = save_shapes(tmp_path, shapes)
    data = pack_header({"model.norm.weight": (4,)}).replace(b'"F32"', b'"F16"').replace(b"[0, 16]", b"[0, 8]")
    (folder / "model.safetensors").write_bytes((len(data) - 8).to_bytes(8, "little") + data[8:] + bytes(8))
    with pytest.raises(CollectiveError, match=r"model.norm.weight is of dtype F16; F32 can be read"):
        load_checkpoint(folder, {}, {PARAMETER: shapes}, ModelConfig(), ONE)
