"""What a job of many ranks costs each of them besides its share: bytes kept, messages, files. On paper."""

from __future__ import annotations

import math

from mpilm.config import microbatches
from mpilm.model.flops import parameter_count
from mpilm.parallel.flat_layout import BUCKET
from mpilm.planner.cost import Setting

WORD = 8  # bytes of a number in a list
START_BYTES = 400  # that a rank says of itself at the start: settings' digest, versions, cores
LOGGED_BYTES = 24  # of a rank in each row of metrics.jsonl


def growth(setting: Setting) -> list[tuple[str, str, str]]:
    """Rows of (what, how it grows, how much it is here)."""
    ranks, data = setting.shape.size, setting.shape.data
    per_node = min(setting.ranks_per_node, ranks)
    numel = max(sum(map(setting.numel, theirs)) for theirs in setting.stages)
    buckets = math.ceil(numel / BUCKET)
    total = microbatches(setting.config)
    zero = setting.config.parallel.zero > 0
    state = 12 * parameter_count(setting.model, setting.vocab_size)
    return [
        ("what", "grows with", "here"),
        ("said at the start", "ranks", _bytes(START_BYTES * ranks)),
        ("losses of a step", "microbatches", _bytes(WORD * total)),
        ("tree of the sum", "microbatches and ranks", _bytes(WORD * (total + 4 * data))),
        ("counts of an exchange", "replicas", _bytes(4 * WORD * data)),
        ("messages of a sum", "replicas x buckets", f"{2 * buckets * (data - 1):,}"),
        ("heights of small sums", "log2 of ranks", f"{math.ceil(math.log2(max(2, ranks)))}"),
        ("places in a checkpoint", "replicas x buckets, with ZeRO", _bytes(4 * WORD * buckets * data * zero)),
        ("shared memory mapped", "ranks of a node", _bytes(4 * numel * min(per_node, data))),
        ("checkpoint written", "1 / ranks", _bytes(state / ranks)),
        ("row of the log", "ranks", _bytes(LOGGED_BYTES * ranks)),
    ]


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} bytes"
