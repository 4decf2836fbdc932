"""The parallel plan: for each family, the pipeline stage of every module and the cut of every parameter. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate

from mpilm.ops.tree import block_of_rank

STAGES = {"embed": 0, "norm": -1, "head": -1}
"""Top-level module of any family -> its pipeline stage, from the end if negative; blocks are divided among the stages."""


@dataclass(frozen=True)
class Cut:
    """A division of one dim of a parameter into tensor parts."""

    dim: int
    fused: int = 1  # matrices stored side by side along dim, each divided by itself (GPT-2's q, k and v)

    def ranges(self, size: int, parts: int) -> list[range]:
        """Return the range of each part within each of the fused matrices, of `size` along `dim` together; the first are longer
        if it does not divide."""
        return [range(*block_of_rank(part, parts, size // self.fused)) for part in range(parts)]

    def part_shape(self, shape: Sequence[int], part: int, parts: int) -> tuple[int, ...]:
        """Return the shape of a part of a parameter of this shape."""
        length = self.fused * len(self.ranges(shape[self.dim], parts)[part])
        return (*shape[: self.dim], length, *shape[self.dim + 1 :])


COLUMN, ROW, VOCABULARY = Cut(0), Cut(1), Cut(0)  # of weights stored (out, in), as nn.Linear does
LLAMA = {
    "embed.weight": VOCABULARY,
    "head.weight": VOCABULARY,
    "blocks.*.attn.[qkv].weight": COLUMN,
    "blocks.*.attn.[qkv].bias": COLUMN,
    "blocks.*.attn.o.weight": ROW,
    "blocks.*.mlp.*gate.weight": COLUMN,
    "blocks.*.mlp.*up.weight": COLUMN,
    "blocks.*.mlp.*down.weight": ROW,
    "blocks.*.attn.[qkv].lora.b.weight": COLUMN,  # an adapter is cut where its host is: b with its output, a with its input
    "blocks.*.attn.o.lora.a.weight": ROW,
    "blocks.*.mlp.gate.lora.b.weight": COLUMN,
    "blocks.*.mlp.up.lora.b.weight": COLUMN,
    "blocks.*.mlp.down.lora.a.weight": ROW,
}
GPT2 = {  # Conv1D stores (in, out)
    "embed.tokens.weight": VOCABULARY,
    "head.weight": VOCABULARY,
    "blocks.*.attn.qkv.weight": Cut(1, fused=3),
    "blocks.*.attn.qkv.bias": Cut(0, fused=3),
    "blocks.*.attn.o.weight": Cut(0),
    "blocks.*.mlp.up.weight": Cut(1),
    "blocks.*.mlp.up.bias": Cut(0),
    "blocks.*.mlp.down.weight": Cut(0),
    "blocks.*.attn.qkv.lora.b.weight": Cut(0, fused=3),
    "blocks.*.attn.o.lora.a.weight": ROW,
    "blocks.*.mlp.up.lora.b.weight": COLUMN,
    "blocks.*.mlp.down.lora.a.weight": ROW,
}
BERT = LLAMA | {"embed.tokens.weight": VOCABULARY, "head.bias": VOCABULARY, "blocks.*.mlp.up.bias": COLUMN}
CUTS: Mapping[str, Mapping[str, Cut]] = dict.fromkeys(("llama", "qwen", "mixtral", "qwen-moe"), LLAMA) | {
    "gpt2": GPT2,
    "bert": BERT,
}
"""Family -> name pattern -> cut. Parameters that match no pattern are replicated."""


def stage_of(name: str, blocks_per_stage: Sequence[int]) -> int:
    """Return the pipeline stage of the parameter or module `name`."""
    module, number = re.match(r"(\w+)(?:\.(\d+))?", name).groups()  # type: ignore[union-attr]
    if module != "blocks":
        return STAGES[module] % len(blocks_per_stage)
    return next(stage for stage, stop in enumerate(accumulate(blocks_per_stage)) if int(number) < stop)


def cut_of(name: str, family: str) -> Cut | None:
    """Return the cut of a parameter; None if it is replicated."""
    return next((cut for pattern, cut in CUTS[family].items() if fnmatchcase(name, pattern)), None)


def region_of(name: str) -> str:
    """Return the module whose parameters are divided together: part of a block, the head, or the table of token embeddings."""
    steps = name.split(".")
    return ".".join(steps[:3]) if steps[0] == "blocks" else name.rpartition(".")[0]


def part_name(name: str, part: int) -> str:
    """Return the name of part `part` of a parameter (parallel/tensor.py)."""
    region = region_of(name)
    return f"{region}.parts.{part}{name.removeprefix(region)}"


def expert_of(name: str) -> int | None:
    """Return the number of the expert that a parameter belongs to; None for all other parameters."""
    found = re.search(r"\.experts\.(\d+)\.", name)
    return int(found[1]) if found else None


def copy_name(name: str, copy: int) -> str:
    """Return the name of the parameter in a copy of its expert (parallel/expert.py); copy 0 is the expert itself."""
    return name.replace(".experts.", f".copies.{copy}.") if copy else name


def fsdp_unit(name: str) -> str:
    """Return the module whose parameters are reduced, and under ZeRO-3 gathered, together: a block or a top-level module."""
    return re.match(r"\w+(\.\d+)?", name).group()  # type: ignore[union-attr]
