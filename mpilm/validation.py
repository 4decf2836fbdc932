"""What settings cannot work, alone or together: refused before anything is started, with what to write instead."""

from __future__ import annotations

from typing import Any

from mpilm.config import LORA_TARGETS, Config, Data, Model, flatten, mathematics, resolve, traced_steps
from mpilm.errors import ConfigError

POSITIVE = (
    "model.n_layers", "model.n_heads", "model.d_model", "model.context_length", "model.rope_theta", "model.norm_eps",
    "model.n_experts", "model.experts_per_token", "model.lora_alpha", "train.steps", "train.spike_factor",
    "train.global_batch", "train.micro_batch", "parallel.pipeline",
)  # fmt: skip
NOT_NEGATIVE = (
    "model.vocab_size", "model.n_kv_heads", "model.head_width", "model.d_ff", "model.router_loss", "model.lora_rank",
    "parallel.chunks", "parallel.compress",
    "parallel.sync_every", "train.seed", "train.lr", "train.min_lr", "train.warmup_steps", "train.weight_decay",
    "train.clip_norm", "train.threads", "checkpoint.every", "checkpoint.keep", "run.log_every", "run.eval_every",
    "run.eval_batches", "run.time_limit", "fault.max_bad_steps", "fault.step_timeout", "fault.check_every",
    "generate.max_tokens", "generate.temperature", "generate.top_k", "generate.seed",
)  # fmt: skip
MOST_THREADS = 1024  # of a rank: more than any node has cores, and many more end a process
TRACKERS = ("wandb", "mlflow")
BELOW_ONE = ("model.dropout", "data.eval_fraction", "train.beta1", "train.beta2", "train.momentum")


def validate(config: Any) -> None:
    """Refuse what cannot work, before anything is started; raises ConfigError naming the setting and a value that would do."""
    flat, defaults = flatten(config), flatten(type(config)())
    for name, value in flat.items():
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise ConfigError(f"{_flag(name)} must be a finite number, not {value}")
        if name in POSITIVE and not value > 0 and not value == defaults[name] == 0:  # a default of zero: to be worked out
            raise ConfigError(f"{_flag(name)} must be above zero, not {value}")
        if name in NOT_NEGATIVE and value < 0:
            raise ConfigError(f"{_flag(name)} must not be negative, but is {value}")
        if name == "train.threads" and value > MOST_THREADS:
            raise ConfigError(
                f"--train.threads {value}: threads of one rank; {MOST_THREADS} are the most, and its cores enough"
            )
        if name in BELOW_ONE and not 0 <= value < 1:
            raise ConfigError(f"{_flag(name)} must be at least 0 and below 1, not {value}")
        _validate_choice(config, name, value)
    if isinstance(getattr(config, "data", None), Data):
        config.data.corpora()  # raises
    if isinstance(config, Config):
        _validate_chat(config)
        _validate_lora(config.model)
        _validate_model(resolve(config).model)
        _validate_train(config)
        _validate_parallel(resolve(config))
        _validate_run(config)
    if "data.mask_fraction" in flat and not 0 < flat["data.mask_fraction"] < 1:
        raise ConfigError(f"--data.mask-fraction must be above 0 and below 1, not {flat['data.mask_fraction']}")
    if "generate.top_p" in flat and not 0 < flat["generate.top_p"] <= 1:
        raise ConfigError(f"--generate.top-p must be above 0 and at most 1, not {flat['generate.top_p']}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _validate_choice(config: Any, name: str, value: Any) -> None:
    """TOML values do not pass through tyro, so the choices are checked here."""
    choices = CHOICES.get(name)
    if choices and value not in choices:
        raise ConfigError(f"{_flag(name)} must be one of {', '.join(map(str, choices))}, not {value!r}")


CHOICES = {
    "model.arch": ("llama", "gpt2", "qwen", "bert", "mixtral"),
    "data.format": ("text", "chat"),
    "data.packing": ("concat", "documents"),
    "data.too_long": ("truncate", "drop"),
    "data.encoding_errors": ("stop", "replace"),
    "checkpoint.on_error": ("stop", "warn"),
    "train.optimizer": ("adamw", "sgd", "adafactor", "muon"),
    "train.lr_schedule": ("cosine", "linear", "constant"),
    "train.dtype": ("float32", "bfloat16"),
    "train.device": ("auto", "cpu", "cuda"),
    "train.recompute": ("none", "attention", "block"),
    "parallel.schedule": ("1f1b", "gpipe", "interleaved", "zero-bubble"),
    "parallel.balance": ("cost", "measured"),
    "parallel.zero": (0, 1, 2, 3),
    "parallel.reduce": ("auto", "shared", "sent"),
    "parallel.wire_dtype": ("float32", "bfloat16"),
}


def _validate_model(model: Model) -> None:
    _validate_heads(model)
    if model.experts_per_token > model.n_experts and model.arch == "mixtral":
        raise ConfigError(
            f"--model.experts-per-token {model.experts_per_token} is more than --model.n-experts {model.n_experts}"
        )
    if model.rope_scaling and (len(model.rope_scaling) != 4 or not 0 < model.rope_scaling[1] < model.rope_scaling[2]):
        raise ConfigError(
            f"--model.rope-scaling {' '.join(f'{value:g}' for value in model.rope_scaling)}: write four numbers: factor, low "
            "and high frequency factor, original context length; Llama 3.1 has 8 1 4 8192"
        )


def _validate_lora(model: Model) -> None:
    there = LORA_TARGETS[model.arch]
    if model.lora_rank > model.d_model:
        raise ConfigError(f"--model.lora-rank {model.lora_rank} is more than --model.d-model {model.d_model}: no less to train")
    for name in model.lora_targets:
        if name not in there:
            raise ConfigError(
                f"--model.lora-targets {name}: the matrices of {model.arch} that may have adapters are {' '.join(there)}"
            )


def _validate_heads(model: Model) -> None:
    stated = model.head_width != model.d_model // model.n_heads
    if model.d_model % model.n_heads and not stated:
        near = _nearest_multiple(model.d_model, 2 * model.n_heads)
        raise ConfigError(
            f"--model.d-model {model.d_model} is not divisible by --model.n-heads {model.n_heads}; the nearest that is: {near}"
        )
    if model.arch in ("gpt2", "bert"):
        if stated:
            raise ConfigError(f"--model.arch {model.arch} has heads of width d-model / n-heads: leave --model.head-width out")
        if model.arch == "bert" and not model.tie_embeddings:
            raise ConfigError("--model.arch bert predicts with its embedding matrix: --model.tie-embeddings false cannot be")
    elif model.head_width % 2:
        raise ConfigError(
            f"--model.d-model {model.d_model} over --model.n-heads {model.n_heads} gives heads of odd width, "
            "and rotary positions turn pairs; make it even"
        )
    if model.n_heads % model.n_kv_heads:
        fit = max(n for n in range(1, model.n_kv_heads + 1) if model.n_heads % n == 0) if model.n_kv_heads else 1
        raise ConfigError(
            f"--model.n-heads {model.n_heads} is not divisible by --model.n-kv-heads {model.n_kv_heads}; the next below: {fit}"
        )


def _validate_chat(config: Config) -> None:
    data = config.data
    if data.format == "text":
        return
    if not data.path or len(data.path) > 1:
        raise ConfigError("--data.format chat needs one --data.path, of JSON lines with prompt and response, or messages")
    given = data.tokenizer == "auto" and config.model.init_from
    if not given and (data.tokenizer == "auto" or data.tokenizer.startswith("bpe:")):
        raise ConfigError(
            f"--data.format chat with --data.tokenizer {data.tokenizer}: name one that is there, the folder of a model or a "
            "tokenizer.json, or bytes"
        )
    if config.model.arch == "bert":
        raise ConfigError("--model.arch bert has no answers to learn: --data.format chat goes with the other architectures")


def _nearest_multiple(value: int, of: int) -> int:
    return max(of, round(value / of) * of)


def _validate_train(config: Config) -> None:
    train = config.train
    if train.global_batch % train.micro_batch:
        near = _nearest_multiple(train.global_batch, train.micro_batch)
        raise ConfigError(
            f"--train.global-batch {train.global_batch} is not divisible by --train.micro-batch {train.micro_batch}; "
            f"the nearest that is: {near}"
        )
    if train.min_lr > train.lr and train.lr_schedule != "constant":
        raise ConfigError(
            f"--train.min-lr {train.min_lr} is above --train.lr {train.lr}, which falls to it; write less, such as "
            f"{train.lr / 10:g}"
        )
    if train.compile:
        _validate_compile(config)
    known = mathematics(config)
    for name in config.checkpoint.allow_change:
        if name.replace("-", "_") not in known | {"data.path": 0, "data.tokenizer": 0, "model.init_from": 0}:
            raise ConfigError(f"--checkpoint.allow-change {name}: no such setting, or one that may always change")


def _validate_compile(config: Config) -> None:
    """A compiled block is one piece, forward and backward."""
    for setting, given, refused, instead in (
        ("parallel.schedule", config.parallel.schedule, "zero-bubble", "1f1b or interleaved"),
        ("train.recompute", config.train.recompute, "attention", "block or none"),
    ):
        if given == refused:
            raise ConfigError(
                f"--{setting} {given} takes apart what --train.compile true makes one piece of; write {instead}, or "
                "--train.compile false"
            )
    if config.model.dropout:
        raise ConfigError(
            f"--model.dropout {config.model.dropout:g} draws a mask for each sample by itself, which cannot be compiled; write "
            "0, or --train.compile false"
        )


def _validate_parallel(config: Config) -> None:
    parallel = config.parallel
    if parallel.zero and not config.train.reproducible:
        raise ConfigError(
            f"--parallel.zero {parallel.zero} sums slices in the fixed order, which costs nothing; "
            "--train.reproducible false goes with --parallel.zero 0 only"
        )
    if parallel.wire_dtype == "bfloat16" and not config.train.reproducible:
        raise ConfigError(
            "--parallel.wire-dtype bfloat16 goes with sums made here; --train.reproducible false lets the MPI library sum, "
            "which cannot add it"
        )
    if parallel.compress:
        _go_with(f"--parallel.compress {parallel.compress}", config, zeros=(0, 1))
        if parallel.sync_every:
            raise ConfigError("--parallel.compress and --parallel.sync-every: between meetings no gradient travels; write one")
    if parallel.sync_every:
        _validate_apart(config)


def _validate_run(config: Config) -> None:
    try:
        steps = traced_steps(config)
    except ValueError:
        raise ConfigError(
            f"--run.trace-steps {config.run.trace_steps}: write the first and the last, counted from 1, as in 10:12"
        ) from None
    if steps and steps[0] > config.train.steps:
        raise ConfigError(f"--run.trace-steps {config.run.trace_steps}: training ends with step {config.train.steps:,}")
    for name in config.run.trackers:
        if name not in TRACKERS:
            raise ConfigError(f"--run.trackers {name}: there is none of that name; there are {', '.join(TRACKERS)}")


def _go_with(setting: str, config: Config, zeros: tuple[int, ...]) -> None:
    """Refuse what another way to sum gradients cannot be combined with."""
    if config.parallel.zero not in zeros:
        fit = " or ".join(map(str, zeros))
        raise ConfigError(f"{setting} goes with --parallel.zero {fit}, not {config.parallel.zero}")
    if config.parallel.wire_dtype != "float32":
        raise ConfigError(f"{setting} sends float32: leave --parallel.wire-dtype {config.parallel.wire_dtype} out")


def _validate_apart(config: Config) -> None:
    """Replicas that are apart cannot be saved or evaluated as one."""
    every = config.parallel.sync_every
    _go_with(f"--parallel.sync-every {every}", config, zeros=(0,))
    for name, steps in (("checkpoint.every", config.checkpoint.every), ("run.eval-every", config.run.eval_every)):
        if steps % every:
            near = _nearest_multiple(steps, every)
            raise ConfigError(
                f"--{name} {steps}: replicas are together after a multiple of --parallel.sync-every {every} steps only; the "
                f"nearest: {near}"
            )
    if config.fault.elastic:
        raise ConfigError("--fault.elastic goes on from a step that all replicas have made: leave --parallel.sync-every out")
