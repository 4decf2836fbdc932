"""Checkpoints have no layout: whoever holds what, the bytes are the same, and any other layout reads them."""

import errno
import json
import os
import tempfile
import threading
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path
from random import Random
from unittest import mock

import pytest
import torch
from checkpoints import (
    contents,
    draw_shapes,
    draw_sharding,
    draw_tensors,
    held_by_all,
    loads_the_same,
    pieces,
    read_tensors,
    saved,
    small_files,
    state_of,
    striped,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from text import tiny_config
from transformers import AutoModelForCausalLM

from mpilm.checkpoint import assemble, tensors
from mpilm.checkpoint import save as save_module
from mpilm.checkpoint import verify as verify_module
from mpilm.checkpoint.format import TEMPORARY, checkpoints, read_manifest
from mpilm.checkpoint.load import load
from mpilm.checkpoint.plan import StoredTensor, plan_blocks, tensor_files
from mpilm.checkpoint.save import Saving, reserve, save
from mpilm.checkpoint.verify import newest_valid, verify, with_help
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.instrumented import InstrumentedComm
from mpilm.comm.threads import run_ranks
from mpilm.config import Model
from mpilm.data.tokenizer import bytes_tokenizer
from mpilm.errors import ConfigError, DataError, FileError
from mpilm.model.families import build_model, tied_parameters
from mpilm.model.hf.names import hf_name
from mpilm.model.sequence_info import SequenceInfo
from mpilm.telemetry.memory import shared_bytes

ONE = SelfComm()
BLOCKS = st.sampled_from([8, 60, 64, 100, 1 << 10, 1 << 24])  # 60 and 100: some elements lie in two blocks
SHARDS = st.sampled_from([1, 50, 500, 5_000_000_000])
SHAPES = {"embed.weight": (40, 16), "blocks.0.attn.q.weight": (16, 16), "blocks.0.mlp_norm.weight": (16,), "norm.weight": (16,)}

each_sharding = given(random=st.randoms(use_true_random=False), size=st.integers(1, 8), block=BLOCKS, shard=SHARDS)


# The bytes.


@settings(max_examples=60, deadline=None)
@each_sharding
def test_the_bytes_are_those_of_one_rank_that_holds_everything(random, size, block, shard):
    shapes = draw_shapes(random)
    values, sharding = draw_tensors(shapes), draw_sharding(random, shapes, size)
    with tempfile.TemporaryDirectory() as own, small_files(block, shard):
        alone = saved(Path(own) / "alone", values, held_by_all(shapes, 1), ONE)
        shared = run_ranks(size, lambda comm: saved(Path(own) / "shared", values, sharding, comm))
        assert set(shared) == {Path(own) / "shared" / alone.name}
        assert contents(shared[0]) == contents(alone)
        verify(shared[0])


@settings(max_examples=60, deadline=None)
@each_sharding
def test_another_layout_reads_it(random, size, block, shard):
    shapes = draw_shapes(random)
    values = draw_tensors(shapes)
    first, then = draw_sharding(random, shapes, size), draw_sharding(random, shapes, 4)
    with tempfile.TemporaryDirectory() as own, small_files(block, shard):
        folder = run_ranks(size, lambda comm: saved(Path(own), values, first, comm))[0]
        run_ranks(4, lambda comm: loads_the_same(folder, values, then, comm))
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118
        whole = {hf_name(name, "llama"): torch.zeros(shape) for name, shape in shapes.items()}
        read_tensors(folder, whole)
        assert all(torch.equal(whole[hf_name(name, "llama")], value) for name, value in values["parameter"].items())


def test_the_bytes_of_a_file(tmp_path):
    """Written out here, as every earlier version wrote them: last parameter first."""
    values = {
        "parameter": {"embed.weight": torch.tensor([[1.0, 2.0]]), "norm.weight": torch.tensor(3.0)},
        "exp_avg": {"embed.weight": torch.tensor([[4.0, 5.0]]), "norm.weight": torch.tensor(6.0)},
        "exp_avg_sq": {"embed.weight": torch.tensor([[7.0, 8.0]]), "norm.weight": torch.tensor(9.0)},
    }
    sharding = {"embed.weight": [(0, 1, [0]), (1, 2, [1])], "norm.weight": [(0, 1, [1])]}
    folder = run_ranks(2, lambda comm: saved(tmp_path, values, sharding, comm))[0]
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
def test_transformers_reads_it_in_one_file_or_in_several(tmp_path, tie, shard):
    config = tiny_config("", "", model__tie_embeddings=tie, model__dropout=0.0).model
    model = build_model(config, bytes_tokenizer().vocab_size)
    torch.manual_seed(0)
    own = {name: p.detach().normal_(std=0.1) for name, p in model.named_parameters() if name not in tied_parameters(config)}
    if tie:
        model.head.weight = model.embed.weight
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    values = dict.fromkeys(("parameter", "exp_avg", "exp_avg_sq"), own)
    sharding = draw_sharding(Random(1), shapes, 3)
    with small_files(1000, shard):
        folder = run_ranks(
            3, lambda comm: save(tmp_path, 7, replace(state_of(values, sharding, comm.rank), model=config), comm)
        )[0]
        verify(folder)
    several = shard < 10**6
    assert (folder / "model.safetensors").exists() != several
    assert (folder / "model.safetensors.index.json").exists() == several
    assert (folder / "optimizer.safetensors.index.json").exists() == several
    assert set(read_manifest(folder)) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(12)
    with torch.no_grad():
        expected = theirs(ids[None]).logits
        found = model(ids[None], SequenceInfo(ids))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_files_are_cut_by_the_model_alone():
    shapes = {"a": (10,), "b": (5,), "c": (100,), "d": (1,), "e": (0,)}
    stored = [StoredTensor(name, ("parameter", name), shape) for name, shape in shapes.items()]
    files = tensor_files("model", stored, 60)
    assert [file.name for file in files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert [[tensor.name for tensor in file.tensors] for file in files] == [["a", "b"], ["c"], ["d", "e"]]
    assert [file.name for file in tensor_files("model", stored, 500)] == ["model.safetensors"]
    assert [file.name for file in tensor_files("optimizer", [], 500)] == ["optimizer.safetensors"]


# Who writes.


def blocks_of(shapes, sharding, size, block_bytes):
    files = tensor_files("model", [StoredTensor(n, ("parameter", n), s) for n, s in shapes.items()], 10**9)
    return list(plan_blocks(files, sharding.__getitem__, size, block_bytes)), files[0]


@given(random=st.randoms(use_true_random=False), size=st.integers(1, 8), block_bytes=BLOCKS)
def test_every_byte_has_one_giver_that_holds_it(random, size, block_bytes):
    shapes = draw_shapes(random)
    blocks, file = blocks_of(shapes, draw_sharding(random, shapes, size), size, block_bytes)
    assert [block.number for block in blocks] == list(range(file.blocks(block_bytes)))
    seen = Counter()
    for block in blocks:
        assert block.offset == block.number * block_bytes
        for rank, ranges in block.parts.items():
            for r in ranges:
                assert rank in r.ranks
                assert block.offset <= r.at < r.at + r.nbytes <= block.offset + block.nbytes
                seen.update(range(r.at, r.at + r.nbytes))
        assert any(block.writer in r.ranks for ranges in block.parts.values() for r in ranges)
    assert sorted(seen.elements()) == list(range(file.nbytes))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_work_is_shared(size, sharded):
    shapes = {"a": (100, 96), "b": (4800,)}
    ends = {name: [prod(shape) * rank // size for rank in range(size + 1)] for name, shape in shapes.items()}
    sharding = held_by_all(shapes, size)
    if sharded:
        sharding = {name: [(at[r], at[r + 1], [r]) for r in range(size)] for name, at in ends.items()}
    blocks, _ = blocks_of(shapes, sharding, size, 400)
    count = Counter(block.writer for block in blocks)
    assert max(count.values()) - min(count[rank] for rank in range(size)) <= 2
    travelling = sum(
        r.nbytes for block in blocks for rank, ranges in block.parts.items() for r in ranges if rank != block.writer
    )
    assert travelling <= (2 * size * 400 if sharded else 0)


def test_what_one_rank_holds_is_written_there():
    """Two stages of unequal size: only the block on the border has two givers."""
    blocks, _ = blocks_of({"a": (1000,), "b": (300,)}, {"a": [(0, 1000, [0])], "b": [(0, 300, [1])]}, 2, 100)
    assert sum(len(block.parts) > 1 for block in blocks) <= 1
    assert {block.writer for block in blocks[2:40]} == {0}


@pytest.mark.parametrize(
    "ranges", [[], [(0, 9, [0])], [(0, 11, [0])], [(1, 10, [0])], [(0, 5, [0]), (6, 10, [0])], [(0, 6, [0]), (5, 10, [0])],
               [(0, 10, [])]],
)  # fmt: skip
def test_a_gap_or_an_overlap_is_refused(ranges):
    with pytest.raises(ValueError, match=r"a: .*held"):
        blocks_of({"a": (10,)}, {"a": ranges}, 1, 64)


def test_replicas_send_nothing(tmp_path):
    values = draw_tensors(SHAPES)

    def body(comm):
        traced = InstrumentedComm(comm, checks_calls=True)
        with small_files(200):
            saved(tmp_path, values, held_by_all(SHAPES, 3), traced)
        return traced.calls["send"]

    assert run_ranks(3, body) == [0, 0, 0]


def test_no_more_than_a_few_blocks_are_in_memory():
    blocks, file = blocks_of({"a": (1000,)}, {"a": [(0, 1000, [0])]}, 1, 64)
    held = assemble.Held({"parameter": pieces({"a": torch.zeros(1000)}, {"a": [(0, 1000, [0])]}, 0)}, [file])
    drawn = []
    assembled = assemble.assemble((drawn.append(block) or block for block in blocks), held, ONE)
    for count, (block, _) in enumerate(assembled):
        assert block.number == count
        assert len(drawn) <= count + assemble.IN_FLIGHT
    assert len(drawn) == len(blocks) > 50


def test_a_copy_is_no_memory_that_ranks_have_together():
    """Which would be taken for that of other ranks, and left out of what this one uses."""
    before = shared_bytes()
    copy = assemble.fresh(32 << 20).fill_(1)
    assert shared_bytes() - before < copy.nbytes // 8


@pytest.mark.parametrize("size", [1, 3])
def test_memory_that_was_reserved_is_the_memory_that_a_save_takes(tmp_path, size):
    values, sharding = draw_tensors(SHAPES), striped(SHAPES, size, 100)

    def body(comm):
        state, buffers = state_of(values, sharding, comm.rank), save_module.Buffers()
        reserve(buffers, state, comm)
        had = [memory.data_ptr() for memory in buffers._all]
        Saving(tmp_path, 7, state, comm, buffers=buffers).commit()
        return had, [memory.data_ptr() for memory in buffers._all]

    with small_files(200):
        for had, has in run_ranks(size, body):
            assert had == has != []


def test_a_rank_that_does_not_hold_what_holders_says(tmp_path):
    state = state_of(draw_tensors(SHAPES), held_by_all(SHAPES, 1), 0)
    lacking = replace(state, parameters=dict(list(state.parameters.items())[1:]))
    with pytest.raises(KeyError, match=r"parameter embed.weight are not held here"):
        save(tmp_path, 7, lacking, ONE)
    wrong = replace(state, parameters={piece: tensor.double() for piece, tensor in state.parameters.items()})
    with pytest.raises(ValueError, match=r"float64"):
        save(tmp_path, 7, wrong, ONE)


# What goes wrong.


def failing_pwrite(bad, after):
    """os.pwrite that fails on the threads in `bad`, each time after so many writes."""
    real, counts = os.pwrite, Counter()

    def pwrite(handle, data, at):
        counts[threading.get_ident()] += 1
        if threading.get_ident() in bad and counts[threading.get_ident()] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[: max(1, len(data) // 2)], at)  # a disk may also take less than it is given

    return pwrite


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_full_disk_on_one_rank_is_told_to_all(tmp_path, size, after):
    values = draw_tensors(SHAPES)
    sharding = striped(SHAPES, size, 20)
    bad = set()

    def body(comm):
        if comm.rank == size - 1:
            bad.add(threading.get_ident())
        with pytest.raises(CollectiveError) as caught:
            saved(tmp_path, values, sharding, comm, step=8)
        assert isinstance(caught.value.error, FileError)
        return str(caught.value)

    with small_files(256):
        older = run_ranks(size, lambda comm: saved(tmp_path, values, sharding, comm))[0]
        before = contents(older)
        with mock.patch("os.pwrite", failing_pwrite(bad, after)):
            said = set(run_ranks(size, body))
        where = f" (on rank {size - 1})" if size > 1 else ""
        message = f"step-00000008 could not be written: No space left on device; the older ones are as they were{where}"
        assert said == {f"checkpoint {tmp_path}/{message}"}
        assert checkpoints(tmp_path) == [older]
        assert contents(older) == before
        assert not list(tmp_path.glob(f"{TEMPORARY}*"))
        bad.clear()
        with mock.patch("os.pwrite", failing_pwrite(bad, 0)):
            verify(run_ranks(size, lambda comm: saved(tmp_path, values, sharding, comm, step=8))[0])


@pytest.mark.parametrize("call", ["fsync", "open", "mkdir", "rename"])
def test_an_error_of_any_call_is_told_to_all(tmp_path, monkeypatch, call):
    values = draw_tensors(SHAPES)
    real = getattr(os, call)

    def failing(path, *arguments, **keywords):
        if call == "fsync" or "step-00000008" in str(path):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return real(path, *arguments, **keywords)

    def body(comm):
        with pytest.raises(CollectiveError, match=r"step-00000008 could not be written: Disk quota exceeded") as caught:
            saved(tmp_path, values, held_by_all(SHAPES, 2), comm, step=8)
        assert isinstance(caught.value.error, FileError)

    older = run_ranks(2, lambda comm: saved(tmp_path, values, held_by_all(SHAPES, 2), comm))[0]
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        run_ranks(2, body)
    assert checkpoints(tmp_path) == [older]
    verify(older)


def test_a_folder_that_not_all_ranks_see(tmp_path):
    values = draw_tensors(SHAPES)

    def body(comm):
        parent = tmp_path / ("here" if comm.rank == 0 else "elsewhere")
        with pytest.raises(CollectiveError, match=r"not all ranks see its folder.*\(on rank 1\)"):
            saved(parent, values, held_by_all(SHAPES, 2), comm)

    with small_files(64):
        run_ranks(2, body)


def test_a_step_that_is_there_is_not_written_over(tmp_path):
    values = draw_tensors(SHAPES)
    folder = saved(tmp_path, values, held_by_all(SHAPES, 1), ONE)
    before = contents(folder)

    def body(comm):
        with pytest.raises(CollectiveError, match="is there already, written by another job"):
            saved(tmp_path, draw_tensors({"norm.weight": (3,)}), held_by_all({"norm.weight": (3,)}, 2), comm)

    run_ranks(2, body)
    assert contents(folder) == before


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_share_the_reading(tmp_path, size, monkeypatch):
    """Every block is read once; what one rank finds all know, and the newest one that is whole is found."""
    read = []
    plain = verify_module._digest
    monkeypatch.setattr(verify_module, "_digest", lambda path, block: read.append((path, block)) or plain(path, block))

    def newest(comm):
        return with_help(comm, lambda verify: newest_valid(tmp_path, verify))

    with small_files(100, 5_000_000_000):
        older, newer = (saved(tmp_path, draw_tensors(SHAPES), held_by_all(SHAPES, 1), ONE, step=step) for step in (1, 2))
        assert run_ranks(size, newest) == [(newer, {}), *[None] * (size - 1)]
        nbytes = {newer / name: entry["bytes"] for name, entry in read_manifest(newer).items()}
        assert sorted(read) == sorted((path, block) for path, n in nbytes.items() for block in range(-(-n // 100)))
        path = newer / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        altered = f"checkpoint file {path} has been altered: its digest is not the manifest's"
        assert run_ranks(size, newest)[0] == (older, {newer: altered})
        path.write_bytes(content[:-1])
        assert "bytes, the manifest says" in run_ranks(size, newest)[0][1][newer]
        with pytest.raises(CollectiveError, match=r"model\.safetensors has"):
            run_ranks(size, lambda comm: with_help(comm, lambda verify: verify(newer)))


def test_a_rank_that_cannot_read_its_share(tmp_path, monkeypatch):
    folder = saved(tmp_path, draw_tensors(SHAPES), held_by_all(SHAPES, 1), ONE)

    def unreadable(path, block):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(verify_module, "_digest", unreadable)
    with pytest.raises(CollectiveError, match="cannot be read: Input/output error") as caught:
        run_ranks(3, lambda comm: with_help(comm, lambda verify: newest_valid(tmp_path, verify)))
    assert isinstance(caught.value.error, FileError)
    assert folder.exists()


@pytest.mark.parametrize("shard", [1000, 5_000_000_000])
def test_a_flipped_bit_in_any_file_is_found(tmp_path, shard):
    with small_files(100, shard):
        folder = run_ranks(3, lambda comm: saved(tmp_path, draw_tensors(SHAPES), held_by_all(SHAPES, 3), comm))[0]
        verify(folder)
        random = Random(0)
        for name, content in contents(folder).items():
            if name == "manifest.json":
                continue
            for at in (0, len(content) - 1, *(random.randrange(len(content)) for _ in range(10))):
                altered = bytearray(content)
                altered[at] ^= 1 << random.randrange(8)
                (folder / name).write_bytes(altered)
                with pytest.raises(DataError, match=f"{name} has been altered"):
                    verify(folder)
            (folder / name).write_bytes(content)
        verify(folder)


# Reading.


def test_only_the_bytes_of_the_piece_are_read(tmp_path, monkeypatch):
    shapes = {"embed.weight": (1000, 100)}
    folder = saved(tmp_path, draw_tensors(shapes), held_by_all(shapes, 1), ONE)
    real, read = os.preadv, []

    def counted(handle, buffers, at):
        read.append(real(handle, buffers, at))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    sharding = {"embed.weight": [(0, 500, [1]), (500, 600, [0]), (600, 100_000, [1])]}
    loads_the_same(folder, draw_tensors(shapes), sharding, ONE)
    assert sorted(read)[-3:] == [400, 400, 400]
    assert sum(read) < 3 * 400 + 2000


def test_a_checkpoint_of_another_model_is_refused_in_the_same_words_on_every_rank(tmp_path):
    folder = saved(tmp_path, draw_tensors(SHAPES), held_by_all(SHAPES, 1), ONE)

    def body(comm, shapes):
        with pytest.raises(CollectiveError) as caught:
            load(folder, {}, {}, shapes, {}, Model(), comm)  # not even a rank that holds nothing lets it pass
        assert isinstance(caught.value.error, ConfigError)
        return str(caught.value)

    said = run_ranks(2, lambda comm: body(comm, SHAPES | {"blocks.3.attn.q.weight": (2, 2)}))
    assert said == [f"{folder} has no tensor model.layers.3.self_attn.q_proj.weight: it is a checkpoint of another model"] * 2
    said = run_ranks(2, lambda comm: body(comm, SHAPES | {"norm.weight": (17,)}))
    assert said == [f"{folder}/model.safetensors: model.norm.weight has shape (16,), this model needs (17,)"] * 2


def test_an_error_of_one_reader_is_told_to_all(tmp_path, monkeypatch):
    folder = saved(tmp_path, draw_tensors(SHAPES), held_by_all(SHAPES, 1), ONE)
    bad = set()
    real = os.preadv

    def stuttering(handle, buffers, at):
        if threading.get_ident() in bad:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(handle, [buffers[0][:100]], at)  # and a file system may give less than it is asked for

    monkeypatch.setattr(os, "preadv", stuttering)
    run_ranks(2, lambda comm: loads_the_same(folder, draw_tensors(SHAPES), held_by_all(SHAPES, 2), comm))

    def body(comm):
        if comm.rank == 1:
            bad.add(threading.get_ident())
        with pytest.raises(CollectiveError, match=r"cannot be read: Stale file handle \(on rank 1\)") as caught:
            loads_the_same(folder, draw_tensors(SHAPES), held_by_all(SHAPES, 2), comm)
        assert isinstance(caught.value.error, FileError)

    run_ranks(2, body)


@pytest.mark.parametrize("ahead", [True, False])
def test_whatever_stops_the_writing_is_heard_of(tmp_path, ahead):
    shapes = {"norm.weight": (3,)}
    state = state_of(draw_tensors(shapes), held_by_all(shapes, 1), 0)
    with mock.patch.object(save_module, "digest_of", side_effect=MemoryError("no more")), pytest.raises(MemoryError):
        save_module.Saving(tmp_path, 7, state, ONE, ahead=ahead).commit()
    assert checkpoints(tmp_path) == []


def test_half_precision_is_no_training_state(tmp_path):
    shapes = {"norm.weight": (4,)}
    folder = saved(tmp_path, draw_tensors(shapes), held_by_all(shapes, 1), ONE)
    data = tensors.pack_header({"model.norm.weight": (4,)}).replace(b'"F32"', b'"F16"').replace(b"[0, 16]", b"[0, 8]")
    length = len(data) - 8
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + data[8:] + bytes(8))
    with pytest.raises(CollectiveError, match=r"model.norm.weight is of dtype F16; F32 can be read"):
        load(folder, {}, {}, shapes, {}, Model(), ONE)


def test_the_manifest_says_json_what_it_says(tmp_path):
    """The digests that ranks made of blocks in memory are those of the bytes on disk; nothing else is in the manifest."""
    with small_files(64):
        folder = run_ranks(4, lambda comm: saved(tmp_path, draw_tensors(SHAPES), draw_sharding(Random(5), SHAPES, 4), comm))[0]
        verify(folder)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {name: entry["bytes"] for name, entry in files.items()} == {
        name: len(content) for name, content in contents(folder).items() if name != "manifest.json"
    }
