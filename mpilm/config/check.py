"""Checks of the settings before anything starts: limits that their types state, and rules across settings."""

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Annotated, Any, Literal, get_args, get_origin

from mpilm.config import schema
from mpilm.config.schema import GPT2_STYLE, LORA_TARGETS, MIXTURES, Config, DataConfig
from mpilm.config.settings import flag_of, flatten, flatten_types, override
from mpilm.errors import ConfigError
from mpilm.formatting import format_value

MAX_ACTIONS = 2**24  # of a pipeline in a step, which are planned one by one
MAX_BALANCED = 2**25  # layers^2 times stages, which the time to balance them grows with; about half a minute


def check_config(config: Any) -> None:
    """Raise ConfigError for the first setting, or combination of settings, that cannot work, with what to write instead."""
    values = flatten(config)
    for name, kind in flatten_types(config).items():
        for value in values[name] if isinstance(values[name], tuple) else (values[name],):
            if problem := find_limit_problem(value, kind):
                raise ConfigError(f"{flag_of(name)} {problem}")
    if isinstance(getattr(config, "data", None), DataConfig):
        config.data.corpora()  # raises
    if isinstance(config, Config):
        config = override(schema.resolve_config(config), model__lora_targets=config.model.lora_targets)  # as written
        texts = {name: " ".join(map(str, v)) if isinstance(v, tuple) else v for name, v in flatten(config).items()}
        flags = {name: f"{flag_of(name)} {text}" for name, text in texts.items()}
        for find_problems in (_find_data_problems, _find_model_problems, _find_train_problems, _find_parallel_problems):
            for problem in find_problems(config, flags):
                raise ConfigError(problem)


def find_limit_problem(value: Any, kind: Any) -> str:
    """Return why a setting of type `kind` cannot have this value, or hold it in its list; empty if it can."""
    kind, *limits = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    kind = get_args(kind)[0] if get_origin(kind) is tuple else kind
    if get_origin(kind) is Literal and value not in get_args(kind):
        return f"must be one of {', '.join(map(str, get_args(kind)))}, not {format_value(value)}"
    if isinstance(value, float) and not isfinite(value):
        return f"must be a finite number, not {value}"
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        return f"{value!a} is not valid UTF-8"  # and could not be written to config.toml
    wrong = [limit.text for limit in limits if isinstance(limit, schema.Range) and not limit.contains(value)]
    if not wrong and type(value) is int and abs(value) > schema.LARGEST_INT:
        wrong = [f"{'at most ' if value > 0 else 'at least -'}{schema.LARGEST_INT:,}"]
    return f"must be {wrong[0]}, not {format_value(value)}" if wrong else ""


def nearest_multiple(value: int, divisor: int) -> int:
    """Return the positive multiple of `divisor` that is nearest to `value`."""
    return max(divisor, round(value / divisor) * divisor)


def _find_data_problems(config: Config, flags: Mapping[str, str]) -> Iterator[str]:
    data, model = config.data, config.model
    if data.format == "chat":
        if len(data.path) != 1:
            yield "--data.format chat needs one --data.path, of JSON lines with prompt and response, or messages"
        if data.tokenizer.startswith(("bpe:", "qwen-bpe:")) or (data.tokenizer == "auto" and not model.init_from):
            use = "use an existing tokenizer: the folder of a model, a tokenizer.json, or bytes"
            yield f"--data.format chat with {flags['data.tokenizer']}: {use}"
        if model.arch == "bert":
            yield "--data.format chat: --model.arch bert cannot learn responses; use another architecture"


def _find_model_problems(config: Config, flags: Mapping[str, str]) -> Iterator[str]:
    model, gpt2_style = config.model, config.model.arch in GPT2_STYLE
    has_custom_width = model.head_width != model.d_model // model.n_heads
    if model.d_model % model.n_heads and not has_custom_width:
        nearest = f"--model.d-model {nearest_multiple(model.d_model, 2 * model.n_heads)}"
        yield f"{flags['model.d_model']} is not divisible by {flags['model.n_heads']}; the nearest value that works: {nearest}"
    if gpt2_style and has_custom_width:
        yield f"{flags['model.head_width']}: {flags['model.arch']} uses d-model / n-heads; leave the setting out"
    if model.arch == "bert" and not model.tie_embeddings:
        yield "--model.tie-embeddings false: --model.arch bert predicts with its embedding matrix; leave the setting out"
    if not gpt2_style and model.head_width % 2:
        width = f"{flags['model.head_width']} (by default {flags['model.d_model']} over {flags['model.n_heads']})"
        yield f"{width} is odd; rotary positions need an even width"
    if model.n_heads % model.n_kv_heads:
        near = max(n for n in range(1, model.n_kv_heads + 1) if model.n_heads % n == 0)
        yield f"{flags['model.n_heads']} is not divisible by {flags['model.n_kv_heads']}; write --model.n-kv-heads {near}"
    parts, sizes = schema.tensor_part_count(config), schema.divided_sizes(model)
    for name in [name for name, size in sizes.items() if size % parts]:
        near = max(n for n in range(1, parts + 1) if not any(size % n for size in sizes.values()))
        flag = flags["model.tensor_parts"] if model.tensor_parts else flags["parallel.tensor"]
        yield f"{flag} does not divide {flags[f'model.{name}']}; the next smaller value that divides all sizes: {near}"
    if model.arch in MIXTURES and model.experts_per_token > model.n_experts:
        yield f"{flags['model.experts_per_token']} exceeds {flags['model.n_experts']}"
    if (expert := config.parallel.expert) > 1 and model.arch not in MIXTURES:
        yield f"{flags['parallel.expert']}: {model.arch} has no experts ({' and '.join(MIXTURES)} have); leave the setting out"
    elif model.n_experts % expert:
        divisors = ", ".join(str(n) for n in range(1, model.n_experts + 1) if model.n_experts % n == 0)
        yield f"{flags['parallel.expert']} does not divide {flags['model.n_experts']}; values that do: {divisors}"
    if model.rope_scaling and (len(model.rope_scaling) != 4 or not 0 < model.rope_scaling[1] < model.rope_scaling[2]):
        numbers = "factor, low and high frequency factor, original context length"
        yield f"{flags['model.rope_scaling']}: write four numbers: {numbers}; Llama 3.1 uses 8 1 4 8192"
    if model.lora_rank > model.d_model:
        yield f"{flags['model.lora_rank']} exceeds {flags['model.d_model']}: LoRA would train no fewer parameters"
    if not model.lora_rank and (model.lora_targets or model.lora_alpha != type(model).lora_alpha):
        yield "--model.lora-targets and --model.lora-alpha need --model.lora-rank"
    allowed = LORA_TARGETS[model.arch]
    for name in model.lora_targets:
        if name not in allowed:
            yield f"--model.lora-targets {name}: the matrices of {model.arch} that can have an adapter are {' '.join(allowed)}"


def _find_train_problems(config: Config, flags: Mapping[str, str]) -> Iterator[str]:
    train = config.train
    if train.global_batch % train.micro_batch:
        near = f"--train.global-batch {nearest_multiple(train.global_batch, train.micro_batch)}"
        yield f"{flags['train.global_batch']} is not divisible by {flags['train.micro_batch']}; the nearest that works: {near}"
    if train.min_lr > train.lr and train.lr_schedule != "constant":
        yield f"{flags['train.min_lr']} exceeds {flags['train.lr']}; write a smaller value, such as {train.lr / 10:g}"
    for name, uncompilable, alternatives in (
        ("parallel.schedule", config.parallel.schedule == "zero-bubble", "1f1b or interleaved"),
        ("train.recompute", train.recompute == "attention", "block or none"),
        ("model.dropout", config.model.dropout > 0, "0"),
        ("model.sequence_parts", config.model.sequence_parts > 1, "1"),
        ("parallel.context", schema.sequence_part_count(config) > 1, "1"),
        ("parallel.expert", config.parallel.expert > 1, "1"),
    ):
        if train.compile and uncompilable:
            reasons = {"model.dropout": "draws a mask per sample", "parallel.expert": "exchanges tokens within a block"}
            why = reasons.get(name, "runs parts of a block separately")
            yield f"{flags[name]} {why}, which cannot be compiled; write {alternatives}, or --train.compile false"
    if train.compile and train.kernels == "fused":
        yield "--train.kernels fused cannot be compiled by torch; write auto, or --train.compile false"
    if train.dtype == "float16" and (config.parallel.powersgd_rank or config.parallel.wire_dtype != "float32"):
        yield "--train.dtype float16 scales the loss, and with it the errors that compressed messages carry over: send float32"
    if train.offload != "none":
        for name, is_set in (("parallel.sync_every", config.parallel.sync_every > 0), ("fault.elastic", config.fault.elastic)):
            if is_set:
                yield f"{flag_of(name)} keeps copies of the state in memory: leave it out, or write --train.offload none"
    if train.offload == "parameters" and config.parallel.reduce == "shared-memory":
        yield f"{flags['parallel.reduce']} needs gradients in memory: write messages, or --train.offload optimizer"
    try:
        traced = schema.trace_step_range(config)
    except ValueError:
        yield f"{flags['run.trace_steps']}: write the first and the last step, counted from 1, as in 10:12"
    else:
        if traced and traced[0] > train.steps:
            yield f"{flags['run.trace_steps']}: training ends with step {train.steps:,}"
    comparable = {*schema.result_settings(config), "data.path", "data.tokenizer", "model.init_from"}
    for name in config.checkpoint.allow_change:
        if name.replace("-", "_") not in comparable:
            yield f"--checkpoint.allow-change {name}: no such setting, or one that may always change"


def _find_parallel_problems(config: Config, flags: Mapping[str, str]) -> Iterator[str]:
    parallel, sync_every = config.parallel, config.parallel.sync_every
    if not config.train.reproducible and parallel.zero:
        yield f"{flags['parallel.zero']} sums in the fixed order at no cost; --train.reproducible false needs --parallel.zero 0"
    if not config.train.reproducible and parallel.wire_dtype == "bfloat16":
        yield "--parallel.wire-dtype bfloat16 needs --train.reproducible true: the MPI library cannot sum bfloat16"
    if parallel.powersgd_rank and sync_every:
        both = f"{flags['parallel.powersgd_rank']} has no effect with {flags['parallel.sync_every']}"
        yield f"{both}: no gradients are exchanged between syncs; set only one"
    for axis, shared in (("context", "each sequence"), ("expert", "the experts")):
        for flag, is_set, why in (
            ("--train.reproducible false", not config.train.reproducible, "its gradients are summed in the fixed order"),
            (flags["parallel.powersgd_rank"], parallel.powersgd_rank, "its gradients are summed uncompressed"),
            (flags["parallel.sync_every"], sync_every, f"its ranks share {shared} and cannot train independently"),
        ):
            if getattr(parallel, axis) > 1 and is_set:
                yield f"{flag} does not work with {flags[f'parallel.{axis}']}: {why}"
    for flag, is_set, why in (
        (flags["parallel.zero"], parallel.zero >= 2, "each round of microbatches is reduced by all ranks"),
        (flags["parallel.context"], parallel.context > 1, "each round of microbatches is reduced by all ranks"),
        (flags["parallel.expert"], parallel.expert > 1, "each round of microbatches is computed by all ranks"),
        (flags["parallel.schedule"], parallel.schedule == "interleaved", "it needs a multiple of the stages on each replica"),
        (flags["parallel.powersgd_rank"], parallel.powersgd_rank, "its result depends on which rank computes what"),
        (flags["parallel.sync_every"], sync_every, "its result depends on which rank computes what"),
        ("--train.reproducible false", not config.train.reproducible, "its result depends on which rank computes what"),
    ):
        if parallel.deal == "measured" and is_set:
            yield f"--parallel.deal measured does not work with {flag}: {why}; write --parallel.deal even"
    stages = parallel.pipeline * parallel.chunks
    actions = schema.microbatch_count(config) * stages
    if actions > MAX_ACTIONS:
        names = ("train.global_batch", "train.micro_batch", "parallel.pipeline", "parallel.chunks")
        yield f"{', '.join(flags[name] for name in names)}: {actions:,} forward passes a step are too many to plan"
    if stages > 1 and not parallel.cut and config.model.n_layers**2 * stages > MAX_BALANCED:
        yield f"{flags['model.n_layers']} over {stages:,} stages are too many to balance by cost: set --parallel.cut"
    for name, is_set, zeros in (
        ("parallel.powersgd_rank", parallel.powersgd_rank, (0, 1)),
        ("parallel.sync_every", sync_every, (0,)),
    ):
        if is_set and parallel.zero not in zeros:
            yield f"{flags[name]} needs --parallel.zero {' or '.join(map(str, zeros))}, not {parallel.zero}"
        if is_set and parallel.wire_dtype != "float32":
            yield f"{flags[name]} sends float32: leave {flags['parallel.wire_dtype']} out"
    for name, steps in (("checkpoint.every", config.checkpoint.every), ("run.eval_every", config.run.eval_every)):
        if sync_every and steps % sync_every:
            near = f"the nearest multiple: {nearest_multiple(steps, sync_every)}"
            yield f"{flags[name]}: replicas are equal only after every {flags['parallel.sync_every']} steps; {near}"
    if config.fault.spare_ranks and not config.fault.elastic:
        yield "--fault.spare-ranks needs --fault.elastic true: only then do other ranks go on when some are lost"
    if sync_every and config.fault.elastic:
        yield "--fault.elastic true needs replicas that are equal after every step: leave --parallel.sync-every out"
