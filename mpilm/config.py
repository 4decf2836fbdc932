"""The settings of a run: frozen dataclasses, read from presets, TOML files and flags, validated before anything starts.

No setting depends on the number of ranks. Zero or "auto" stands for "work it out"; `resolve` writes the outcome down,
so that the config.toml of a run folder holds what was really used.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

from mpilm.errors import ConfigError

T = TypeVar("T")


LORA_TARGETS = {
    "llama": ("q", "k", "v", "o", "gate", "up", "down"),
    "qwen": ("q", "k", "v", "o", "gate", "up", "down"),
    "mixtral": ("q", "k", "v", "o"),
    "gpt2": ("qkv", "o", "up", "down"),
    "bert": ("q", "k", "v", "o", "up", "down"),
}
"""The matrices of a block that may have an adapter: all but those of experts, which other programs keep in one."""


@dataclass(frozen=True)
class Model:
    """The shape of the network."""

    arch: Literal["llama", "gpt2", "qwen", "bert", "mixtral"] = "llama"
    """Architecture. bert sees both sides and learns to predict masked tokens; the others predict the next one."""
    init_from: str = ""
    """A Hugging Face folder or a checkpoint whose shape, weights and tokenizer a run starts with; empty: random weights."""
    base: str = ""
    """The model that the adapter in init-from belongs to, where it does not lie where the adapter says."""
    vocab_size: int = 0
    """Rows of the embedding; 0: as many as the tokenizer has tokens."""
    n_layers: int = 4
    """Number of blocks."""
    n_heads: int = 4
    """Attention heads a block; divides d-model."""
    n_kv_heads: int = 0
    """Key and value heads, shared by groups of query heads; 0: as many as n-heads, as gpt2 and bert always have."""
    d_model: int = 192
    """Width of the residual stream."""
    head_width: int = 0
    """Width of an attention head; 0: d-model over n-heads."""
    d_ff: int = 0
    """Width of the feed-forward layer; 0: 4 d-model for gpt2 and bert, else 8/3 of it, rounded up to a multiple of 32."""
    context_length: int = 256
    """Tokens in one sequence."""
    dropout: float = 0.0
    """Probability with which embeddings, attention weights and residual branches are dropped."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output matrix too."""
    rope_theta: float = 10000.0
    """Base wavelength of the rotary positions."""
    rope_scaling: tuple[float, ...] = ()
    """Llama 3.1's stretched rotary positions: factor, low and high frequency factor, original context length; empty: none."""
    qk_norm: bool = False
    """qwen: normalise queries and keys, as Qwen 3 does; false: give them and the values biases, as Qwen 2 does."""
    n_experts: int = 8
    """mixtral: feed-forward layers of a block."""
    experts_per_token: int = 2
    """mixtral: how many of them a token uses."""
    router_loss: float = 0.02
    """mixtral: weight of the loss that spreads the tokens evenly over the experts."""
    norm_eps: float = 1e-5
    """Added to the mean square inside norms."""
    lora_rank: int = 0
    """Train low-rank adapters of this rank (LoRA) and leave the model of init-from as it is; 0: train the model."""
    lora_alpha: float = 16.0
    """Adapters are multiplied by lora-alpha over lora-rank."""
    lora_targets: tuple[str, ...] = ()
    """Matrices that have an adapter, of q k v o gate up down (gpt2: qkv o up down); empty: all, of mixtral q k v o."""


@dataclass(frozen=True)
class Data:
    """What is read."""

    path: tuple[str, ...] = ()
    """A text file, a folder, a .jsonl(.gz/.zst), a .parquet or prepared tokens; empty: the embedded corpus, Python's own. Or
    several, each followed by the part that it has of the samples: a.txt 0.7 b.txt 0.3."""
    tokenizer: str = "auto"
    """bytes, bpe:SIZE (trained on the corpus) or a tokenizer.json; auto: what the tokens were made with, else bpe:2048."""
    eval_fraction: float = 0.05
    """Part of the corpus, at its end, that is held out for evaluation."""
    format: Literal["text", "chat"] = "text"
    """chat: JSON lines with "prompt" and "response", or with "messages"; only the answers are learnt."""
    packing: Literal["concat", "documents"] = "concat"
    """How documents share a context: as one text (of a chat: one in a row, the rest empty), or with attention kept inside each
    and positions that begin anew."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """chat: cut a conversation that is longer than the context, or leave it out; both are counted."""
    mask_fraction: float = 0.15
    """bert: part of the tokens that it is to predict."""
    whole_words: bool = False
    """bert: choose whole words to predict, not single tokens."""
    encoding_errors: Literal["stop", "replace"] = "stop"
    """Text that is not UTF-8: stop and say where, or put U+FFFD in its place."""
    text_key: str = "text"
    """The field of a .jsonl object or the column of a .parquet file that holds the text."""

    @property
    def source(self) -> str:
        """The one path; raises ConfigError where there are several."""
        if len(self.path) > 1:
            raise ConfigError(f"--data.path {' '.join(self.path)}: several corpora go into training only; name one")
        return self.path[0] if self.path else ""

    def corpora(self) -> list[tuple[Data, float]]:
        """Each corpus by itself, and its part of the samples; parts add up to 1."""
        if len(self.path) <= 1:
            return [(self, 1.0)]
        paths, parts = self.path[::2], self.path[1::2]
        try:
            numbers = [float(part) for part in parts]
            if len(paths) != len(parts) or not all(0 < number < float("inf") for number in numbers):
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"--data.path {' '.join(self.path)}: of several corpora, write each path and its part: a.txt 0.7 b.txt 0.3"
            ) from None
        return [(replace(self, path=(path,)), number / sum(numbers)) for path, number in zip(paths, numbers)]


@dataclass(frozen=True)
class Train:
    """The work, and how it is computed."""

    steps: int = 360
    """Optimizer steps in all."""
    global_batch: int = 16
    """Sequences a step, over all ranks."""
    micro_batch: int = 2
    """Sequences a rank computes at once; divides global-batch."""
    seed: int = 0
    """Decides initial weights, data order and dropout."""
    lr: float = 3e-3
    """Highest learning rate."""
    min_lr: float = 3e-4
    """Learning rate at the end of the schedule."""
    warmup_steps: int = 20
    """Steps over which the learning rate rises from zero."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    optimizer: Literal["adamw", "sgd", "adafactor", "muon"] = "adamw"
    """The update; muon is for the matrices of blocks, all else has adamw then."""
    weight_decay: float = 0.1
    """Weight decay, on matrices only; decoupled from the gradient except with sgd."""
    beta1: float = 0.9
    """adamw: decay of the first moment."""
    beta2: float = 0.95
    """adamw: decay of the second moment."""
    momentum: float = 0.95
    """sgd, muon: decay of the momentum."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    on_spike: Literal["ignore", "skip", "rewind"] = "ignore"
    """A loss that leaps: ignore it, skip the step, or rewind to the newest checkpoint and leave out all steps since, with what
    they would have read."""
    spike_factor: float = 10.0
    """How many standard deviations above the median of the last 64 losses a loss is a spike."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What forward and backward compute in; weights, sums and the optimizer stay float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: a GPU when torch sees one."""
    gpu_aware_mpi: bool = False
    """Hand GPU memory to MPI as it is: only where the site's MPI was built for it. Otherwise it goes through pinned memory."""
    threads: int = 0
    """CPU threads a rank; 0: the cores the rank really has, shared among the ranks of its node."""
    reproducible: bool = True
    """Sum gradients in one fixed order: the same bits on any number of ranks; false: the MPI library's own Allreduce."""
    recompute: Literal["none", "attention", "block"] = "none"
    """Compute the attention core, or whole blocks, once more in backward instead of keeping what it needs."""
    compile: bool = False
    """Let torch compile blocks and loss: faster on a GPU, after a minute or so at the start. Changes the last bits."""


@dataclass(frozen=True)
class Parallel:
    """How the work is shared out. The result depends on compress and sync-every alone, and its last bits on wire-dtype."""

    pipeline: int = 1
    """Pipeline stages that the layers are partitioned over; data parallel takes what is left of the ranks."""
    schedule: Literal["1f1b", "gpipe", "interleaved", "zero-bubble"] = "1f1b"
    """Order of forwards and backwards in the pipeline."""
    chunks: int = 0
    """Stages a rank has, spread over the layers (interleaved); 0: 2 for the interleaved schedule, else 1."""
    cut: tuple[int, ...] = ()
    """Layers of each stage, first to last; empty: balanced by cost."""
    balance: Literal["cost", "measured"] = "cost"
    """What balances the stages: the cost of layers by arithmetic, or as measured on these ranks at the start."""
    zero: Literal[0, 1, 2, 3] = 0
    """Shard over the data ranks: 1 optimizer state, 2 also gradients, 3 also parameters (ZeRO)."""
    auto: str = ""
    """A machine.json of doctor --calibrate: take the layout that the planner finds fastest on these ranks, besides what is
    stated; empty: as stated."""
    reduce: Literal["auto", "shared", "sent"] = "auto"
    """How gradients are added once a step (ZeRO 0 and 1, on a CPU): shared, in memory that the ranks of a node see, and once
    between nodes; sent, by messages between all ranks; auto: what is faster, as measured at the start."""
    wire_dtype: Literal["float32", "bfloat16"] = "float32"
    """What gradients travel as. bfloat16: half the bytes; sums stay float32, and what rounding leaves is sent later."""
    compress: int = 0
    """For slow networks: send the gradient of a matrix as two thin ones of this rank (PowerSGD), and what that leaves out with
    the next; 0: whole. Another result, nearly as good."""
    sync_every: int = 0
    """For slow networks: replicas train by themselves for so many steps and then meet (DiLoCo); 0: never apart. Another result;
    it wants more steps, or fewer replicas."""


@dataclass(frozen=True)
class Checkpoint:
    """Saving and coming back."""

    every: int = 100
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints to keep; 0: all."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest evaluation loss as well."""
    asynchronous: bool = True
    """Copy the state and write it beside the next steps; false: write it at once, which needs no memory for a copy."""
    on_error: Literal["stop", "warn"] = "stop"
    """Where a checkpoint cannot be written, a full disk for one: end with code 74, or say so and go on."""
    resume: str = "auto"
    """auto: go on from the newest valid checkpoint of run.dir; never: start anew; or the folder of one checkpoint."""
    allow_change: tuple[str, ...] = ()
    """Settings that may differ from the checkpoint's although the mathematics depends on them, for example train.lr."""


@dataclass(frozen=True)
class Run:
    """The run folder and what is written to it."""

    dir: str = "auto"
    """The run folder; auto: runs/NAME-KEY, where KEY stands for the settings that decide the result."""
    log_every: int = 10
    """Steps between logged rows; 0: none."""
    eval_every: int = 60
    """Steps between evaluations, which every checkpoint has as well; 0: none at all, and no best checkpoint."""
    eval_batches: int = 8
    """Global batches of held-out text an evaluation reads; 0: all of it."""
    trace_steps: str = ""
    """Steps to trace, the first and the last, as in 10:12: what each rank did when, in trace-10-12.json, for Perfetto and the
    report; empty: none."""
    trackers: tuple[str, ...] = ()
    """Where else rows go, offline and by their own libraries: wandb, mlflow. TensorBoard has them wherever it is installed."""
    time_limit: float = 0.0
    """Seconds after which the run saves and ends with code 75, to be started again; 0: the end of its SLURM job, if any."""


@dataclass(frozen=True)
class Fault:
    """What a run does when something goes wrong."""

    max_bad_steps: int = 10
    """Steps whose loss or gradient is not finite, and spikes, that a run leaves out before it ends with code 87."""
    check_every: int = 50
    """Steps between checks that replicas hold the same weights, and all ranks make the same calls; 0: none but the first."""
    elastic: bool = False
    """Go on with the ranks that are left when some are lost, within a step; needs Open MPI under mpirun --with-ft ulfm."""
    step_timeout: float = 0.0
    """Seconds that a step may last before the job ends with code 86 and says who waits for whom; 0: 20 times the longest so
    far, and a minute at least."""


@dataclass(frozen=True)
class Generate:
    """Sampling text from a model."""

    prompt: str = ""
    """What the text begins with; empty: the beginning of a document."""
    prompts: str = ""
    """A file with a prompt a line, or "prompt" fields where it ends in .jsonl; -: standard input. Texts come as JSON lines."""
    chat: bool = False
    """A prompt is what a user says: it is put into the chat template of the tokenizer, and the model answers."""
    max_tokens: int = 160
    """Tokens to write; 0: no sample."""
    temperature: float = 0.8
    """Below 1 makes likely tokens likelier; 0: always the likeliest."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Decides the choice."""


@dataclass(frozen=True)
class Config:
    """Everything that decides a training run."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    parallel: Parallel = field(default_factory=Parallel)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    run: Run = field(default_factory=Run)
    fault: Fault = field(default_factory=Fault)
    generate: Generate = field(default_factory=Generate)


# What the result of a run does not depend on, or in its last bits only. All else is compared when a run is resumed.
FREE_TO_CHANGE = frozenset(
    {
        "train.steps",
        "train.threads",
        "train.device",
        "train.gpu_aware_mpi",
        "train.recompute",
        "train.compile",
        "model.init_from",
        "model.base",
        "data.path",
        "data.tokenizer",
        "data.text_key",
    }
)  # the corpus and the tokenizer are compared by content, not by where they lie
FREE_SECTIONS = frozenset({"parallel", "checkpoint", "run", "fault", "generate"})
NOT_FREE = frozenset({"parallel.compress", "parallel.sync_every"})


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting as "section.key" -> value."""
    flat: dict[str, Any] = {}
    for item in fields(config):
        value, name = getattr(config, item.name), prefix + item.name
        flat.update(flatten(value, name + ".") if is_dataclass(value) else {name: value})
    return flat


def mathematics(config: Config) -> dict[str, Any]:
    """The settings that the numbers of a run depend on."""
    flat = flatten(resolve(config))
    free = FREE_TO_CHANGE | {k for k in flat if k.split(".")[0] in FREE_SECTIONS} - NOT_FREE
    return {k: v for k, v in flat.items() if k not in free}


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, as TOML and JSON hold them."""
    return {key: list(v) if isinstance(v, tuple) else to_dict(v) if is_dataclass(v) else v for key, v in _items(config)}


def _items(config: Any) -> list[tuple[str, Any]]:
    return [(item.name, getattr(config, item.name)) for item in fields(config)]


def resolve(config: Config) -> Config:
    """The config with the shape it leaves open worked out."""
    model = config.model
    n_kv_heads = model.n_heads if model.arch in ("gpt2", "bert") else model.n_kv_heads or model.n_heads
    head_width = model.head_width or model.d_model // model.n_heads
    d_ff = model.d_ff or (4 * model.d_model if model.arch in ("gpt2", "bert") else -(-(8 * model.d_model // 3) // 32) * 32)
    chunks = config.parallel.chunks or (2 if config.parallel.schedule == "interleaved" else 1)
    shape = replace(model, n_kv_heads=n_kv_heads, head_width=head_width, d_ff=d_ff, lora_targets=lora_targets(model))
    return replace(config, model=shape, parallel=replace(config.parallel, chunks=chunks))


def lora_targets(model: Model) -> tuple[str, ...]:
    """The matrices that have adapters, in one order and each once; none named: all of them."""
    there = LORA_TARGETS[model.arch]
    named = tuple(name for name in there if name in model.lora_targets)
    return () if named == there else named


def traced_steps(config: Config) -> range:
    """The steps to trace, counted from 1 as in the log; raises ValueError for what are none."""
    words = config.run.trace_steps
    if not words:
        return range(0)
    first, last = (int(word) for word in words.split(":"))
    if not 1 <= first <= last:
        raise ValueError(words)
    return range(first, last + 1)


def microbatches(config: Config) -> int:
    """Microbatches of one step, over all ranks."""
    return config.train.global_batch // config.train.micro_batch


def replaced(config: T, **changes: Any) -> T:
    """dataclasses.replace for a nested key written section__key."""
    for path, value in changes.items():
        section, _, key = path.partition("__")
        part = replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: part})  # type: ignore[type-var]
    return config
