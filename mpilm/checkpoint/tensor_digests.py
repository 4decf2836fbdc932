"""Digests of the tensors of a state: equal on every layout, because they cover the bytes that a checkpoint holds."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mpilm.checkpoint.plan import ShardOwners, TensorFile, plan_blocks
from mpilm.checkpoint.save import LocalState, assemble_blocks, sha256_tensor
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks
from mpilm.data.files import file_errors
from mpilm.errors import DataError
from mpilm.parallel.flat_layout import ParamSlice

DIGEST_BLOCK_BYTES = 1 << 22  # hashed at a time: a rank holds a few such blocks besides the state
HEX_DIGITS = 32  # of a tensor's digest: enough against coincidence, and short enough for a line with all tensors

Segment = tuple[str, int, int]  # tensor, and the bytes of it in one block: the first and the one after the last, in the file


def digest_tensors(
    files: Sequence[TensorFile], slices: Mapping[str, Mapping[ParamSlice, Tensor]], owners: ShardOwners, comm: Comm
) -> dict[str, str]:
    """Return the digest of each tensor, by its name in the files: the first HEX_DIGITS of the sha256 of the sha256s of its
    pieces in each block. `slices`: of this rank, by kind. The same on all ranks and layouts. Collective over `comm`."""
    blocks = [(at, segments) for file in files for at, segments in _split_file(file)]
    first = [0]
    for _, segments in blocks:
        first.append(first[-1] + len(segments))
    digests = torch.zeros(first[-1], 32, dtype=torch.uint8, device="cpu")
    local = LocalState(slices, {file.name: file.header for file in files})
    for block, data in assemble_blocks(plan_blocks(files, owners, comm.size, DIGEST_BLOCK_BYTES), local, comm):
        begin, segments = blocks[block.number]
        for place, (_, start, stop) in enumerate(segments, first[block.number]):
            digests[place] = sha256_tensor(data[start - begin : stop - begin])
    return _join_segments([segment for _, segments in blocks for segment in segments], digests, comm)


def digest_tensor_files(folder: Path, files: Sequence[TensorFile], comm: Comm) -> dict[str, str]:
    """Return the same digests of the tensors that `folder` holds. Collective; raises CollectiveError if a file is not there, or
    holds other tensors."""
    segments = [(file, segment) for file in files for _, segments in _split_file(file) for segment in segments]
    digests = torch.zeros(len(segments), 32, dtype=torch.uint8, device="cpu")

    def read() -> None:
        for file in files:
            path = folder / file.name
            with file_errors(path), open(path, "rb") as stream:
                if stream.read(len(file.header)) != file.header or path.stat().st_size != file.nbytes:
                    raise DataError(f"checkpoint file {path} does not hold the tensors of this run")
                for place, (other, (_, start, stop)) in enumerate(segments):
                    if other is file and place % comm.size == comm.rank:
                        stream.seek(start)
                        data = bytearray(stream.read(stop - start))
                        digests[place] = sha256_tensor(torch.frombuffer(data, dtype=torch.uint8))

    run_on_all_ranks(comm, read)
    return _join_segments([segment for _, segment in segments], digests, comm)


def _split_file(file: TensorFile) -> Iterator[tuple[int, Sequence[Segment]]]:
    """Yield the first byte of each block of a file, and the segments of tensors in it."""
    spans, at = list[Segment](), len(file.header)
    for tensor in file.tensors:
        spans.append((tensor.name, at, at + tensor.nbytes))
        at += tensor.nbytes
    for begin in range(0, at, DIGEST_BLOCK_BYTES):
        end = begin + DIGEST_BLOCK_BYTES
        yield begin, [(name, max(a, begin), min(b, end)) for name, a, b in spans if a < end and b > begin]


def _join_segments(segments: Sequence[Segment], digests: Tensor, comm: Comm) -> dict[str, str]:
    comm.all_reduce(digests.view(torch.int64))  # the row of a segment is zero on all ranks but one
    pieces = defaultdict[str, list[bytes]](list)
    for (name, _, _), row in zip(segments, digests):
        pieces[name].append(row.numpy().tobytes())
    return {name: hashlib.sha256(b"".join(rows)).hexdigest()[:HEX_DIGITS] for name, rows in pieces.items()}
