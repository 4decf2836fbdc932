"""The settings of a run as frozen dataclasses. The comment behind or above a field is its help text; its type holds its limits.

No setting depends on the number of ranks. Zero or "auto" means "derived": `resolve_config` fills it in, so that the config.toml
of a run folder holds the values that were used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from mpilm.config.settings import flatten
from mpilm.errors import ConfigError

QWEN_STYLE = ("qwen", "qwen-moe")
MIXTURES = ("mixtral", "qwen-moe")  # mixtures of experts
GPT2_STYLE = ("gpt2", "bert")  # learned positions, no grouped-query attention, feed-forward layer of 4 d-model
LORA_TARGETS = {  # matrices of a block that can have an adapter; not those of experts, which other programs store as one
    "llama": ("q", "k", "v", "o", "gate", "up", "down"),
    "qwen": ("q", "k", "v", "o", "gate", "up", "down"),
    "mixtral": ("q", "k", "v", "o"),
    "qwen-moe": ("q", "k", "v", "o"),
    "gpt2": ("qkv", "o", "up", "down"),
    "bert": ("q", "k", "v", "o", "up", "down"),
}


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have, as metadata of its type; `text` completes the sentence "it must be ..."."""

    text: str
    contains: Callable[[float], bool]


def _at_most(limit: int) -> Range:
    return Range(f"at most {limit:,}", lambda value: value <= limit)


LARGEST_INT = 2**63 - 1  # of any setting; those that memory or loops grow with have lower limits
_POSITIVE = Range("above zero", lambda value: value > 0)
_NON_NEGATIVE = Range("zero or more", lambda value: value >= 0)
PositiveInt = Annotated[int, _POSITIVE]
PositiveFloat = Annotated[float, _POSITIVE]
NonNegativeInt = Annotated[int, _NON_NEGATIVE]
NonNegativeFloat = Annotated[float, _NON_NEGATIVE]
Layers = Annotated[PositiveInt, _at_most(1024)]
PositiveCount = Annotated[PositiveInt, _at_most(4096)]  # of heads, experts, stages and the like
Count = Annotated[NonNegativeInt, _at_most(4096)]
PositiveWidth = Annotated[PositiveInt, _at_most(2**24)]  # of a dimension of a tensor
Width = Annotated[NonNegativeInt, _at_most(2**24)]
DeviceTransport = Literal["auto", "mpi", "gpu-aware-mpi", "torch"]
RankCounts = Annotated[tuple[int, ...], _POSITIVE, _at_most(1_000_000)]
BatchSize = Annotated[PositiveInt, _at_most(2**20)]
Fraction = Annotated[float, Range("at least 0 and below 1", lambda value: 0 <= value < 1)]
MaskFraction = Annotated[float, Range("above 0 and below 1", lambda value: 0 < value < 1)]
TopP = Annotated[float, Range("above 0 and at most 1", lambda value: 0 < value <= 1)]
Threads = Annotated[int, Range("from 0 to 1024", lambda value: 0 <= value <= 1024)]  # many more end a process


@dataclass(frozen=True)
class ModelConfig:
    """Model architecture and size."""

    # Architecture. bert attends in both directions and learns to predict masked tokens; the others predict the next token.
    arch: Literal["llama", "gpt2", "qwen", "bert", "mixtral", "qwen-moe"] = "llama"
    # Hugging Face folder or checkpoint that provides the shape, the initial weights and the tokenizer; empty: random weights.
    init_from: str = ""
    base: str = ""  # Base model of the LoRA adapter in init-from; empty: the folder that the adapter names.
    vocab_size: Width = 0  # Rows of the token embedding; 0: the vocabulary size of the tokenizer.
    n_layers: Layers = 4  # Number of transformer blocks.
    n_heads: PositiveCount = 4  # Attention heads per block; must divide d-model.
    n_kv_heads: Count = 0  # Key and value heads; must divide n-heads. 0: n-heads, which gpt2 and bert always use.
    d_model: PositiveWidth = 192  # Hidden size: width of the residual stream.
    head_width: Width = 0  # Width of an attention head; 0: d-model / n-heads.
    # Width of the feed-forward layer; 0: 4 d-model for gpt2 and bert, else 8/3 d-model rounded up to a multiple of 32.
    d_ff: Width = 0
    context_length: PositiveWidth = 256  # Tokens in a sequence.
    dropout: Fraction = 0.0  # Dropout probability of embeddings, attention weights and residual branches.
    tie_embeddings: bool = True  # Use the token embedding as the output matrix, too.
    rope_theta: PositiveFloat = 10000.0  # Base of the rotary position frequencies.
    # Rotary scaling as in Llama 3.1: factor, low and high frequency factor, original context length; empty: none.
    rope_scaling: tuple[float, ...] = ()
    # qwen: normalize queries and keys (Qwen 3, and always qwen-moe); false: biases on queries, keys and values (Qwen 2).
    qk_norm: bool = False
    n_experts: PositiveCount = 8  # mixtral, qwen-moe: experts (feed-forward layers of width d-ff) per block.
    experts_per_token: PositiveCount = 2  # mixtral, qwen-moe: experts that process each token.
    # mixtral, qwen-moe: weight of the auxiliary loss that balances the load of the experts.
    router_loss: NonNegativeFloat = 0.02
    # Number of parts into which heads, feed-forward width, vocabulary and tokens are divided. 0: as in the checkpoint to resume
    # from, else parallel.tensor. Part of the result: with equal parts, any parallel.tensor that divides them gives equal bits.
    tensor_parts: Count = 0
    # Number of parts into which each sequence is divided. 0: as in the checkpoint to resume from, else twice parallel.context,
    # or 1 if that is 1. Part of the result, as tensor-parts is.
    sequence_parts: Count = 0
    norm_eps: PositiveFloat = 1e-5  # Epsilon of the normalization layers.
    lora_rank: Width = 0  # Train LoRA adapters of this rank and freeze the model in init-from; 0: train the model.
    lora_alpha: PositiveFloat = 16.0  # LoRA scale: adapters are multiplied by lora-alpha / lora-rank.
    # Matrices that get an adapter, of q k v o gate up down (gpt2: qkv o up down; with experts: q k v o); empty: all.
    lora_targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataConfig:
    """Text data, tokenizer and packing."""

    # Text file, folder, .jsonl(.gz/.zst) or .parquet file, or prefix of prepared tokens; empty: the embedded corpus, Python's
    # standard library. To mix several corpora, write each path and its share of the samples: a.txt 0.7 b.txt 0.3.
    path: tuple[str, ...] = ()
    # bytes, bpe:SIZE (trained on the corpus; qwen-bpe:SIZE splits it as Qwen does, which qwen models always do) or a
    # tokenizer.json; auto: the tokenizer of prepared tokens, else bpe:2048.
    tokenizer: str = "auto"
    eval_fraction: Fraction = 0.05  # Fraction of the corpus, taken from its end, that is held out for evaluation.
    format: Literal["text", "chat"] = "text"  # chat: JSON lines of prompt and response, or messages; trains on responses only.
    # documents: attention and positions restart at each document; concat: they do not (chat: one conversation per sequence).
    packing: Literal["concat", "documents"] = "concat"
    too_long: Literal["truncate", "drop"] = "truncate"  # chat: what to do with conversations longer than the context.
    mask_fraction: MaskFraction = 0.15  # bert: fraction of the tokens to predict.
    whole_words: bool = False  # bert: mask whole words instead of single tokens.
    max_document_mib: PositiveCount = 64  # Longest document in a .jsonl or .parquet file, which is in memory at once, in MiB.
    encoding_errors: Literal["stop", "replace"] = "stop"  # Invalid UTF-8: stop and report it, or replace it by U+FFFD.
    text_key: str = "text"  # Field of a .jsonl object, or column of a .parquet file, that holds the text.

    @property
    def source(self) -> str:
        """The only path; raises ConfigError if several are set."""
        if len(self.path) > 1:
            raise ConfigError(f"--data.path {' '.join(self.path)}: only training can mix several corpora; name one")
        return self.path[0] if self.path else ""

    def corpora(self) -> list[tuple[DataConfig, float]]:
        """Return the settings of each corpus and its share of the samples; the shares add up to 1. Raises ConfigError."""
        if len(self.path) <= 1:
            return [(self, 1.0)]
        try:
            shares = [float(share) for share in self.path[1::2]]
        except ValueError:
            shares = []
        if 2 * len(shares) != len(self.path) or not all(0 < share < float("inf") for share in shares):
            advice = "to mix corpora, write each path and its share: a.txt 0.7 b.txt 0.3"
            raise ConfigError(f"--data.path {' '.join(self.path)}: {advice}")
        return [(replace(self, path=(path,)), share / sum(shares)) for path, share in zip(self.path[::2], shares)]


@dataclass(frozen=True)
class TrainConfig:
    """Training hyperparameters, precision and devices."""

    steps: PositiveInt = 360  # Total number of optimizer steps.
    global_batch: BatchSize = 16  # Sequences per optimizer step, over all ranks.
    micro_batch: BatchSize = 2  # Sequences per forward and backward pass; must divide global-batch.
    seed: NonNegativeInt = 0  # Random seed of the initial weights, the data order and dropout.
    lr: NonNegativeFloat = 3e-3  # Peak learning rate.
    min_lr: NonNegativeFloat = 3e-4  # Learning rate at the end of the schedule.
    warmup_steps: NonNegativeInt = 20  # Steps of linear warmup from zero.
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"  # Decay of the learning rate after the warmup.
    optimizer: Literal["adamw", "sgd", "adafactor", "muon"] = "adamw"  # muon: for matrices of blocks; the rest uses adamw.
    weight_decay: NonNegativeFloat = 0.1  # Weight decay of matrices; decoupled from the gradient, except with sgd.
    beta1: Fraction = 0.9  # adamw: decay rate of the first moment.
    beta2: Fraction = 0.95  # adamw: decay rate of the second moment.
    momentum: Fraction = 0.95  # sgd and muon: momentum.
    clip_norm: NonNegativeFloat = 1.0  # Maximum norm of the gradient; 0: no clipping.
    # Loss spikes: ignore them, skip the step, or rewind to the newest checkpoint and skip the samples read since.
    on_spike: Literal["ignore", "skip", "rewind"] = "ignore"
    spike_factor: PositiveFloat = 10.0  # A spike is this many standard deviations above the median of the last 64 losses.
    # Compute precision; weights, sums and optimizer state stay float32. float16, for GPUs without bfloat16, scales the loss.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"  # Type of device: cpu, cuda (NVIDIA, AMD) or xpu (Intel); auto: a GPU if torch finds one.
    # How GPU tensors travel between ranks: mpi through pinned memory, gpu-aware-mpi from the GPU by an MPI that can, torch by
    # torch.distributed (NCCL, RCCL or XCCL; on CPUs gloo). auto: the fastest at the start; on CPUs mpi.
    device_transport: DeviceTransport = "mpi"
    threads: Threads = 0  # CPU threads per rank; 0: the cores that the rank may use, divided among the ranks of its node.
    reproducible: bool = True  # Sum gradients in a fixed order: equal bits on any number of ranks; false: MPI's Allreduce.
    recompute: Literal["none", "attention", "block"] = "none"  # Activation checkpointing of the attention core or whole blocks.
    compile: bool = False  # Use torch.compile: faster on a GPU after about a minute. Changes the last bits of the result.
    # Operations between matrix products: torch's, or fused ones for CPUs, which numba compiles, with other last bits of the
    # result; auto: fused in bfloat16 on a CPU if numba is installed and compile is false.
    kernels: Literal["auto", "fused", "torch"] = "auto"
    # What lies in files on a local disk (from a GPU: in the host's memory) and not in memory: the moments of the optimizer, or
    # also weights and gradients. Same bits; checkpoints are then written at once.
    offload: Literal["none", "optimizer", "parameters"] = "none"
    offload_dir: str = ""  # Folder of those files, which are removed at the end; empty: the folder for temporary files.


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel layout. Only powersgd-rank and sync-every change the result; wire-dtype, tensor and context may change its last
    bits."""

    pipeline: PositiveCount = 1  # Pipeline stages that the layers are divided over; the remaining ranks are data parallel.
    tensor: PositiveCount = 1  # Tensor-parallel ranks: they divide the matrices of each layer, and the tokens between layers.
    context: PositiveCount = 1  # Context-parallel ranks: they divide each sequence, for long contexts.
    # How they attend: ring sends keys and values, ulysses exchanges tokens for heads, with the same result; auto: ulysses where
    # the number of ranks divides the key and value heads of a rank, else ring.
    context_method: Literal["auto", "ring", "ulysses"] = "auto"
    # Expert-parallel ranks, a factor of the data-parallel ones: they divide the experts of each block (mixtral, qwen-moe).
    expert: PositiveCount = 1
    schedule: Literal["1f1b", "gpipe", "interleaved", "zero-bubble"] = "1f1b"  # Pipeline schedule.
    chunks: Count = 0  # Model chunks (virtual stages) per rank; 0: 2 for the interleaved schedule, else 1.
    cut: tuple[int, ...] = ()  # Layers per stage, first to last; empty: balanced by cost.
    balance: Literal["cost", "measured"] = "cost"  # Balance stages by computed FLOPs, or by time measured at the start.
    deal: Literal["even", "measured"] = "even"  # Microbatches of each replica: as many, or by measured speed (ZeRO 0 and 1).
    zero: Literal[0, 1, 2, 3] = 0  # ZeRO stage: shard 1 optimizer state, 2 also gradients, 3 also parameters.
    auto: str = ""  # machine.json of doctor --calibrate: use the layout predicted fastest; layout settings given here stay.
    # Gradient all-reduce (ZeRO 0 and 1, CPU): in the shared memory of each node, or by messages; auto: measured at the start.
    reduce: Literal["auto", "shared-memory", "messages"] = "auto"
    wire_dtype: Literal["float32", "bfloat16"] = "float32"  # Type of sent gradients, with error feedback; sums stay float32.
    powersgd_rank: Width = 0  # For slow networks: compress gradients of matrices to this rank (PowerSGD); 0: off.
    # For slow networks: replicas train this many steps independently, then synchronize (DiLoCo); 0: off. Needs more steps.
    sync_every: NonNegativeInt = 0


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpointing and resuming."""

    every: NonNegativeInt = 100  # Steps between checkpoints; 0: only at the end.
    keep: NonNegativeInt = 2  # Number of newest checkpoints to keep; 0: all.
    keep_best: bool = True  # Also keep the checkpoint with the lowest evaluation loss.
    asynchronous: bool = True  # Copy the state and write it during the next steps; false: write at once, without a copy.
    on_error: Literal["stop", "warn"] = "stop"  # If a checkpoint cannot be written: exit with code 74, or warn and continue.
    # auto: resume from the newest valid checkpoint in run.dir; never: start from scratch; or the path of a checkpoint.
    resume: str = "auto"
    allow_change: tuple[str, ...] = ()  # Settings that may differ from the checkpoint's although the result depends on them.


@dataclass(frozen=True)
class RunConfig:
    """Run folder, logging and evaluation."""

    dir: str = "auto"  # Run folder; auto: runs/NAME-KEY, where KEY is a hash of the settings that determine the result.
    log_every: NonNegativeInt = 10  # Steps between log entries; 0: none.
    eval_every: NonNegativeInt = 60  # Steps between evaluations, also done at each checkpoint; 0: none, nor a best checkpoint.
    eval_batches: NonNegativeInt = 8  # Global batches of held-out data per evaluation; 0: all of it.
    # First and last step to trace, as in 10:12. trace-10-12.json shows what each rank did when, in Perfetto. Empty: none.
    trace_steps: str = ""
    certify_every: NonNegativeInt = 100  # Steps between lines of certificate.jsonl, also written at checkpoints; 0: none.
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()  # Also log to these, offline. TensorBoard is used if it is installed.
    time_limit: NonNegativeFloat = 0.0  # Seconds until the run saves and exits with code 75; 0: the end of its batch job.


@dataclass(frozen=True)
class FaultConfig:
    """Fault detection and recovery."""

    max_bad_steps: NonNegativeInt = 10  # Steps with a non-finite loss or gradient, or a spike, to skip before exit code 87.
    check_every: NonNegativeInt = 50  # Steps between checks for equal calls and moments on all ranks; 0: only one.
    # Steps between rechecks of the computation (CPU): ranks repeat a microbatch and an update of others, and compare all bits.
    # A rank that was wrong ends the job with code 88, and bad-hosts.json has its host. 0: none.
    recheck_every: NonNegativeInt = 200
    elastic: bool = False  # Continue within a step on the ranks that survive a failure; needs Open MPI, --with-ft ulfm.
    spare_ranks: Count = 0  # Ranks that wait until others are lost, and then take their places; needs --fault.elastic true.
    # Seconds that a step may take, or a rank may do nothing elsewhere, before the job ends with code 86 and reports which rank
    # waits for which; 0: 55 for a rank that does not respond, 20 times the longest phase of its kind for one that does nothing.
    step_timeout: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class GenerateConfig:
    """Text generation (sampling)."""

    prompt: str = ""  # Beginning of the text; empty: the beginning of a document.
    # File with a prompt per line, empty lines included, or with "prompt" fields (.jsonl); -: standard input. Prints JSON lines.
    prompts: str = ""
    chat: bool = False  # Insert each prompt as a user message into the chat template of the tokenizer.
    max_tokens: NonNegativeInt = 160  # Maximum number of tokens to generate; 0: no text.
    temperature: NonNegativeFloat = 0.8  # Sampling temperature; 0: always the most likely token.
    top_k: NonNegativeInt = 0  # Sample from the k most likely tokens; 0: all.
    top_p: TopP = 1.0  # Sample from the most likely tokens that together have this probability.
    seed: NonNegativeInt = 0  # Random seed of the sampling.


@dataclass(frozen=True)
class Config:
    """All settings of a training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)


StatePart = Literal["weights", "gradients", "moments"]
OFFLOADED_PARTS: dict[str, tuple[StatePart, ...]] = {  # by train.offload
    "none": (), "optimizer": ("moments",), "parameters": ("weights", "gradients", "moments")
}  # fmt: skip
RESUME_MAY_CHANGE = {  # of the sections that determine the result, the settings that do not, or change its last bits only
    "model": ("init_from", "base"),
    "data": ("path", "tokenizer", "text_key", "max_document_mib"),  # the corpus and the tokenizer are compared by content
    "train": ("steps", "threads", "device", "device_transport", "recompute", "compile", "kernels", "offload", "offload_dir"),
}
RESUME_MUST_KEEP = ("parallel.powersgd_rank", "parallel.sync_every")  # of the other sections


def resolve_config(config: Config) -> Config:
    """Return the config with the derived parts of its shape and layout filled in."""
    model, gpt2_style = config.model, config.model.arch in GPT2_STYLE
    shape = replace(
        model,
        n_kv_heads=model.n_heads if gpt2_style else model.n_kv_heads or model.n_heads,
        head_width=model.head_width or model.d_model // model.n_heads,
        d_ff=model.d_ff or (4 * model.d_model if gpt2_style else -(-(8 * model.d_model // 3) // 32) * 32),
        qk_norm=model.qk_norm or model.arch == "qwen-moe",
        lora_targets=order_lora_targets(model),
    )
    chunks = config.parallel.chunks or (2 if config.parallel.schedule == "interleaved" else 1)
    # A copy of the state, from which a checkpoint is written later, would be in memory.
    checkpoint = replace(config.checkpoint, asynchronous=config.checkpoint.asynchronous and config.train.offload == "none")
    return replace(config, model=shape, parallel=replace(config.parallel, chunks=chunks), checkpoint=checkpoint)


def tensor_part_count(config: Config) -> int:
    """Return the number of tensor parts: as stated, else one for each rank of the tensor axis."""
    return config.model.tensor_parts or config.parallel.tensor


def sequence_part_count(config: Config) -> int:
    """Return the number of sequence parts: as stated, else two for each rank of the context axis."""
    return config.model.sequence_parts or (2 * config.parallel.context if config.parallel.context > 1 else 1)


PART_SETTINGS = ("tensor_parts", "sequence_parts")  # of the model; a resumed run keeps them


def state_parts(config: Config) -> Config:
    """Return the config with its numbers of parts stated."""
    tensor, sequence = tensor_part_count(config), sequence_part_count(config)
    return replace(config, model=replace(config.model, tensor_parts=tensor, sequence_parts=sequence))


def replica_size(parallel: ParallelConfig) -> int:
    """Return the number of ranks that hold one replica of the model, or share its sequences."""
    return parallel.pipeline * parallel.tensor * parallel.context


def divided_sizes(model: ModelConfig) -> dict[str, int]:
    """Return the sizes that the number of tensor parts must divide, by setting of the model."""
    return {name: getattr(model, name) for name in ("n_heads", "n_kv_heads", "d_ff")}


def order_lora_targets(model: ModelConfig) -> tuple[str, ...]:
    """Return the targets in the order of LORA_TARGETS, each once; empty if they are all of them."""
    targets = tuple(name for name in LORA_TARGETS[model.arch] if name in model.lora_targets)
    return () if targets == LORA_TARGETS[model.arch] else targets


def result_settings(config: Config) -> dict[str, Any]:
    """Return the settings that determine the numbers of a run, and that a resumed run must therefore keep."""
    flat = flatten(resolve_config(config))
    free = {f"{section}.{key}" for section, keys in RESUME_MAY_CHANGE.items() for key in keys}
    names = {name for name in flat if name.split(".")[0] in RESUME_MAY_CHANGE} - free | {*RESUME_MUST_KEEP}
    return {name: value for name, value in flat.items() if name in names}


def microbatch_count(config: Config) -> int:
    """Return the number of microbatches per optimizer step, over all ranks."""
    return config.train.global_batch // config.train.micro_batch


def trace_step_range(config: Config) -> range:
    """Return the steps to trace, counted from 1 as in the log; raises ValueError if run.trace_steps is malformed."""
    if not config.run.trace_steps:
        return range(0)
    first, last = (int(number) for number in config.run.trace_steps.split(":"))
    if not 1 <= first <= last:
        raise ValueError(config.run.trace_steps)
    return range(first, last + 1)
