"""Checks of settings, derived settings, and the settings that the result of a run depends on."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.config.check import check_config
from mpilm.config.presets import PRESETS
from mpilm.config.schema import RESUME_MAY_CHANGE, RESUME_MUST_KEEP, Config, microbatch_count, resolve_config, result_settings
from mpilm.config.settings import flatten, override
from mpilm.errors import ConfigError


def error_of(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(override(Config(), **changes))
    return str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_check_config_accepts_presets_open_and_resolved(name: str) -> None:
    config = PRESETS[name]()
    resolved = resolve_config(config)
    check_config(config)
    check_config(resolved)
    assert resolve_config(resolved) == resolved
    assert min(resolved.model.n_kv_heads, resolved.model.head_width, resolved.model.d_ff) > 0


LIMITS = [
    ({"train__steps": 0}, "--train.steps must be above zero, not 0"),
    ({"parallel__pipeline": -1}, "--parallel.pipeline must be above zero, not -1"),
    ({"checkpoint__every": -5}, "--checkpoint.every must be zero or more, not -5"),
    ({"train__threads": 1025}, "--train.threads must be from 0 to 1024, not 1025"),
    ({"model__dropout": 1.0}, "--model.dropout must be at least 0 and below 1, not 1.0"),
    ({"data__eval_fraction": -0.1}, "--data.eval-fraction must be at least 0 and below 1, not -0.1"),
    ({"data__mask_fraction": 1.0}, "--data.mask-fraction must be above 0 and below 1, not 1.0"),
    ({"generate__top_p": 0.0}, "--generate.top-p must be above 0 and at most 1, not 0.0"),
    ({"train__lr": float("nan")}, "--train.lr must be a finite number, not nan"),
    ({"model__rope_scaling": (float("inf"),)}, "--model.rope-scaling must be a finite number, not inf"),
    ({"parallel__zero": 4}, "--parallel.zero must be one of 0, 1, 2, 3, not 4"),
    ({"parallel__schedule": "1F1B"}, "--parallel.schedule must be one of 1f1b, gpipe, interleaved, zero-bubble, not '1F1B'"),
    ({"parallel__chunks": 10**30}, "--parallel.chunks must be at most 4,096, not 1000000000000000000000000000000"),
    ({"model__head_width": 2**63}, "--model.head-width must be at most 16,777,216, not 9223372036854775808"),
    ({"model__d_ff": 10**30}, "--model.d-ff must be at most 16,777,216, not 1000000000000000000000000000000"),
    ({"train__seed": 2**63}, "--train.seed must be at most 9,223,372,036,854,775,807, not 9223372036854775808"),
    ({"train__steps": 1 << 99999}, "--train.steps must be at most 9,223,372,036,854,775,807, not a value too large to print"),
    ({"parallel__cut": (-(10**30),)}, "--parallel.cut must be at least -9,223,372,036,854,775,807, not -1"),
    ({"parallel__cut": (10**30,)}, "--parallel.cut must be at most 9,223,372,036,854,775,807"),
    ({"train__on_spike": "wait"}, "--train.on-spike must be one of ignore, skip, rewind, not 'wait'"),
    ({"run__trackers": ("wandb", "x")}, "--run.trackers must be one of wandb, mlflow, not 'x'"),
]
HEADS = {"model__d_model": 3, "model__n_heads": 8}
MODEL = [
    (HEADS, "--model.d-model 3 is not divisible by --model.n-heads 8; the nearest value that works: --model.d-model 16"),
    ({"model__d_model": 190}, "is not divisible by --model.n-heads 4; the nearest value that works: --model.d-model 192"),
    ({"model__d_model": 12}, "--model.head-width 3 (by default --model.d-model 12 over --model.n-heads 4) is odd; "),
    (
        {"parallel__tensor": 4, "model__n_kv_heads": 2},
        "--parallel.tensor 4 does not divide --model.n-kv-heads 2; the next smaller value that divides all sizes: 2",
    ),
    (
        {"model__tensor_parts": 8},
        "--model.tensor-parts 8 does not divide --model.n-heads 4; the next smaller value that divides all sizes: 4",
    ),
    ({"parallel__context": 2, "parallel__sync_every": 5}, "--parallel.sync-every 5 does not work with --parallel.context 2: "),
    (
        {"parallel__context": 2, "train__reproducible": False},
        "--train.reproducible false does not work with --parallel.context 2",
    ),
    ({"parallel__context": 2, "train__compile": True}, "--parallel.context 2 runs parts of a block separately, which cannot "),
    ({"model__n_kv_heads": 3}, "--model.n-heads 4 is not divisible by --model.n-kv-heads 3; write --model.n-kv-heads 2"),
    ({"model__arch": "gpt2", "model__head_width": 20}, "--model.head-width 20: --model.arch gpt2 uses d-model / n-heads; "),
    ({"model__arch": "bert", "model__tie_embeddings": False}, "--model.tie-embeddings false: --model.arch bert predicts with "),
    ({"model__arch": "mixtral", "model__n_experts": 1}, "--model.experts-per-token 2 exceeds --model.n-experts 1"),
    ({"parallel__expert": 2}, "--parallel.expert 2: llama has no experts (mixtral and qwen-moe have); leave the setting out"),
    (
        {"model__arch": "mixtral", "model__n_experts": 6, "parallel__expert": 4},
        "--parallel.expert 4 does not divide --model.n-experts 6; values that do: 1, 2, 3, 6",
    ),
    (
        {"model__arch": "mixtral", "parallel__expert": 16},
        "--parallel.expert 16 does not divide --model.n-experts 8; values that do: 1, 2, 4, 8",
    ),
    (
        {"model__arch": "mixtral", "parallel__expert": 2, "train__compile": True},
        "--parallel.expert 2 exchanges tokens within a block, which cannot be compiled; write 1, or --train.compile false",
    ),
    (
        {"model__arch": "mixtral", "parallel__expert": 2, "parallel__powersgd_rank": 2},
        "--parallel.powersgd-rank 2 does not work with --parallel.expert 2: its gradients are summed uncompressed",
    ),
    ({"model__rope_scaling": (8.0, 1.0)}, "--model.rope-scaling 8.0 1.0: write four numbers: factor, low and high frequency "),
    ({"model__lora_rank": 200}, "--model.lora-rank 200 exceeds --model.d-model 192: LoRA would train no fewer parameters"),
    ({"model__lora_alpha": 2.0}, "--model.lora-targets and --model.lora-alpha need --model.lora-rank"),
    (
        {"model__lora_rank": 2, "model__lora_targets": ("q", "qkv")},
        "--model.lora-targets qkv: the matrices of llama that can have an adapter are q k v o gate up down",
    ),
]
CHAT = {"data__format": "chat", "data__path": ("a.jsonl",), "data__tokenizer": "bytes"}
DATA = [
    ({"data__path": ("a", "b")}, "--data.path a b: to mix corpora, write each path and its share: a.txt 0.7 b.txt 0.3"),
    ({"data__path": ("a", "1", "b")}, "--data.path a 1 b: to mix corpora, write each path and its share"),
    ({"data__path": ("a", "1", "b", "0")}, "--data.path a 1 b 0: to mix corpora, write each path and its share"),
    (CHAT | {"data__path": (), "model__init_from": "x"}, "--data.format chat needs one --data.path, of JSON lines with "),
    (CHAT | {"data__path": ("a", "1", "b", "1")}, "--data.format chat needs one --data.path, of JSON lines with "),
    (CHAT | {"data__tokenizer": "auto"}, "--data.format chat with --data.tokenizer auto: use an existing tokenizer: "),
    (CHAT | {"data__tokenizer": "bpe:300"}, "--data.format chat with --data.tokenizer bpe:300: use an existing tokenizer: "),
    (CHAT | {"model__arch": "bert"}, "--data.format chat: --model.arch bert cannot learn responses; use another architecture"),
]
BATCH = {"train__global_batch": 30, "train__micro_batch": 4}
COMPILE = {"train__compile": True}
TRAIN = [
    (
        BATCH,
        "--train.global-batch 30 is not divisible by --train.micro-batch 4; the nearest that works: --train.global-batch 32",
    ),
    ({"train__min_lr": 1.0}, "--train.min-lr 1.0 exceeds --train.lr 0.003; write a smaller value, such as 0.0003"),
    (COMPILE | {"train__recompute": "attention"}, "cannot be compiled; write block or none, or --train.compile false"),
    (COMPILE | {"parallel__schedule": "zero-bubble"}, "--parallel.schedule zero-bubble runs parts of a block separately"),
    (COMPILE | {"model__dropout": 0.1}, "--model.dropout 0.1 draws a mask per sample, which cannot be compiled; write 0, or "),
    ({"run__trace_steps": "3:1"}, "--run.trace-steps 3:1: write the first and the last step, counted from 1, as in 10:12"),
    ({"run__trace_steps": "9:12", "train__steps": 8}, "--run.trace-steps 9:12: training ends with step 8"),
    ({"checkpoint__allow_change": ("train.steps",)}, "--checkpoint.allow-change train.steps: no such setting, or one that "),
]
SYNC, POWERSGD, BFLOAT16 = {"parallel__sync_every": 20}, {"parallel__powersgd_rank": 4}, {"parallel__wire_dtype": "bfloat16"}
OTHER_SUM = {"train__reproducible": False}
MANY = {"train__global_batch": 2**20, "train__micro_batch": 1, "parallel__pipeline": 64}
PARALLEL = [
    (
        {"model__n_layers": 1024, "parallel__pipeline": 340},
        "--model.n-layers 1024 over 340 stages are too many to balance by cost: set --parallel.cut",
    ),
    (MANY, "--parallel.pipeline 64, --parallel.chunks 1: 67,108,864 forward passes a step are too many to plan"),
    (
        OTHER_SUM | {"parallel__zero": 3},
        "--parallel.zero 3 sums in the fixed order at no cost; --train.reproducible false needs ",
    ),
    (OTHER_SUM | BFLOAT16, "--parallel.wire-dtype bfloat16 needs --train.reproducible true: the MPI library cannot sum "),
    (POWERSGD | {"parallel__zero": 2}, "--parallel.powersgd-rank 4 needs --parallel.zero 0 or 1, not 2"),
    (POWERSGD | BFLOAT16, "--parallel.powersgd-rank 4 sends float32: leave --parallel.wire-dtype bfloat16 out"),
    (POWERSGD | SYNC, "--parallel.powersgd-rank 4 has no effect with --parallel.sync-every 20: "),
    (SYNC | {"parallel__zero": 1}, "--parallel.sync-every 20 needs --parallel.zero 0, not 1"),
    (
        SYNC | {"run__eval_every": 70},
        "--run.eval-every 70: replicas are equal only after every --parallel.sync-every 20 steps; ",
    ),
    (SYNC | {"checkpoint__every": 95}, "--parallel.sync-every 20 steps; the nearest multiple: 100"),
    (SYNC | {"fault__elastic": True}, "--fault.elastic true needs replicas that are equal after every step: "),
]


@pytest.mark.parametrize(("changes", "message"), [*LIMITS, *MODEL, *DATA, *TRAIN, *PARALLEL])
def test_check_config_says_what_is_wrong_and_what_to_write(changes: dict[str, Any], message: str) -> None:
    assert message in error_of(**changes)


def test_check_config_accepts_limits_and_alternatives() -> None:
    for changes in (
        {"train__lr": 0.0, "train__min_lr": 0.0, "data__eval_fraction": 0.0, "generate__top_p": 1.0, "checkpoint__every": 0},
        {"train__min_lr": 1.0, "train__lr_schedule": "constant"},
        {"checkpoint__allow_change": ("train.lr", "data.eval-fraction", "data.path")},
        {"train__reproducible": False},
        {"parallel__sync_every": 20},
        CHAT,
        CHAT | {"data__tokenizer": "auto", "model__init_from": "x"},
        *({"parallel__zero": zero} for zero in (1, 2, 3)),
    ):
        check_config(override(Config(), **changes))


@given(st.integers(1, 300), st.integers(1, 40))
def test_check_config_suggests_a_batch_that_works(global_batch: int, micro_batch: int) -> None:
    config = override(Config(), train__global_batch=global_batch, train__micro_batch=micro_batch)
    try:
        check_config(config)
    except ConfigError as error:
        near = int(str(error).rpartition(" ")[2])
        check_config(override(config, train__global_batch=near))
        assert abs(near - global_batch) <= micro_batch


# What the result depends on.


def test_result_settings_leave_out_what_a_resumed_run_may_change() -> None:
    free = override(
        Config(), train__steps=9, train__threads=3, train__device="cpu", data__path=("moved",), run__dir="elsewhere",
        checkpoint__every=1, run__log_every=1, generate__seed=5, parallel__pipeline=2, parallel__zero=3,
        parallel__schedule="gpipe", parallel__chunks=1, parallel__cut=(1, 3), parallel__balance="measured",
        train__recompute="block", parallel__wire_dtype="bfloat16",
    )  # fmt: skip
    assert result_settings(free) == result_settings(Config())
    names = {f"{section}.{key}" for section, keys in RESUME_MAY_CHANGE.items() for key in keys}
    assert names | {*RESUME_MUST_KEEP} <= set(flatten(Config()))


@pytest.mark.parametrize(
    "change",
    [
        {"train__lr": 1.0}, {"train__seed": 1}, {"train__micro_batch": 8}, {"model__n_layers": 5}, {"data__eval_fraction": 0.1},
        {"parallel__powersgd_rank": 2}, {"parallel__sync_every": 20},
    ],
)  # fmt: skip
def test_result_settings_hold_what_changes_the_numbers(change: dict[str, Any]) -> None:
    assert result_settings(override(Config(), **change)) != result_settings(Config())


# What is derived.


def test_resolve_config_fills_in_what_is_open_and_keeps_the_rest() -> None:
    resolved = resolve_config(override(Config(), model__d_model=768, model__n_heads=12))
    assert (resolved.model.n_kv_heads, resolved.model.d_ff, resolved.parallel.chunks) == (12, 2048, 1)
    assert resolve_config(override(Config(), parallel__schedule="interleaved")).parallel.chunks == 2
    shape = {"model__n_kv_heads": 2, "model__head_width": 20, "model__d_ff": 100}
    closed = override(Config(), **shape, parallel__schedule="interleaved", parallel__chunks=3)
    assert resolve_config(closed) == closed


@given(st.integers(1, 5000))
def test_resolve_config_rounds_d_ff_up_to_a_multiple_of_32(d_model: int) -> None:
    d_ff = resolve_config(override(Config(), model__d_model=d_model)).model.d_ff
    assert d_ff % 32 == 0
    assert d_ff - 32 < 8 * d_model // 3 <= d_ff


def test_microbatch_count_is_over_all_ranks() -> None:
    assert microbatch_count(Config()) == 8
