"""Digests of the tensors of a state: equal on every layout, because they cover the bytes that a checkpoint holds."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from mpilm.checkpoint.plan import TensorFile, plan_blocks, plan_files
from mpilm.checkpoint.save import CheckpointState, LocalState, assemble_blocks, sha256_tensor
from mpilm.comm.base import Comm

DIGEST_BLOCK_BYTES = 1 << 22  # hashed at a time: a rank holds a few such blocks besides the state
HEX_DIGITS = 32  # of a tensor's digest: enough against coincidence, and short enough for a line with all tensors

Segment = tuple[str, int, int]  # tensor, and the bytes of it in one block: the first and the one after the last, in the block


def digest_tensors(state: CheckpointState, comm: Comm) -> dict[str, str]:
    """Return the digest of each tensor of a state by its name in the files: the first HEX_DIGITS of the sha256 of the sha256 of
    its pieces in each block. The same on all ranks and layouts. Collective over `comm`."""
    files = plan_files(state.model, state.shapes, state.parts)
    segments = [block for file in files for block in _split_file(file)]
    first = [0]
    for block in segments:
        first.append(first[-1] + len(block))
    digests = torch.zeros(first[-1], 32, dtype=torch.uint8, device="cpu")
    local = LocalState(state.slices, {file.name: file.header for file in files})
    plan = plan_blocks(files, state.shard_owners, comm.size, DIGEST_BLOCK_BYTES)
    for block, data in assemble_blocks(plan, local, comm):
        for place, (_, start, stop) in enumerate(segments[block.number], first[block.number]):
            digests[place] = sha256_tensor(data[start:stop])
    comm.all_reduce(digests.view(torch.int64))  # the row of a segment is zero on all ranks but one
    pieces = defaultdict[str, list[bytes]](list)
    for (name, _, _), row in zip((segment for block in segments for segment in block), digests):
        pieces[name].append(row.numpy().tobytes())
    return {name: hashlib.sha256(b"".join(rows)).hexdigest()[:HEX_DIGITS] for name, rows in pieces.items()}


def _split_file(file: TensorFile) -> Iterator[Sequence[Segment]]:
    """Yield the segments of tensors in each block of a file."""
    spans, at = list[Segment](), len(file.header)
    for tensor in file.tensors:
        spans.append((tensor.name, at, at + tensor.nbytes))
        at += tensor.nbytes
    for begin in range(0, at, DIGEST_BLOCK_BYTES):
        end = begin + DIGEST_BLOCK_BYTES
        yield [(name, max(a, begin) - begin, min(b, end) - begin) for name, a, b in spans if a < end and b > begin]
