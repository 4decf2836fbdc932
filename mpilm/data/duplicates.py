"""Documents over all ranks: where each one lies, and which repeat an earlier one exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpilm.comm.base import Comm
from mpilm.data.encode import Share
from mpilm.data.gather import gather_rows


@dataclass(frozen=True)
class Documents:
    """All documents of the corpus, in corpus order; the same on every rank."""

    number: NDArray[np.int64]
    """(S,) the document of each sequence of this rank's share."""
    lengths: NDArray[np.int64]
    """(D,) tokens."""
    source_bytes: NDArray[np.int64]
    """(D,) bytes of UTF-8."""
    repeated: NDArray[np.bool_]
    """(D,) whether an earlier document has the same text."""


def compare_documents(share: Share, comm: Comm) -> Documents:
    """Bring together what each rank knows of its documents: 32 bytes a document, on every rank. Collective.

    A document that lies on several ranks is the sum of its parts, in length and in key alike.
    """
    ended = comm.all_gather_json(int(share.last.sum()))
    first = sum(ended[: comm.rank])
    number = first + np.cumsum(share.last, dtype=np.int64) - share.last
    rows = np.column_stack([share.lengths, share.source_bytes, share.keys])
    total = np.zeros((sum(ended), rows.shape[1]), dtype=np.int64)
    begins = np.flatnonzero(np.diff(number, prepend=-1))  # one row a document before anything travels
    mine = np.column_stack([number[begins], np.add.reduceat(rows, begins)]) if len(rows) else np.zeros((0, 5), np.int64)
    for part in gather_rows(comm, mine):
        np.add.at(total, part[:, 0], part[:, 1:])
    return Documents(number, total[:, 0], total[:, 1], repeats(total[:, 2:]))


def repeats(keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(D,) whether the same key, (D, 2), stands further up."""
    repeated = np.ones(len(keys), dtype=bool)
    _, first = np.unique(keys, axis=0, return_index=True)
    repeated[first] = False
    return repeated
