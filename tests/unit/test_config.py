"""Settings: merged from files, refused with what to write instead, and sorted into mathematics and convenience."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm import config as c
from mpilm import validation
from mpilm.config import Config, flatten, mathematics, replaced, resolve, to_dict
from mpilm.errors import ConfigError, FileError
from mpilm.presets import PRESETS
from mpilm.settings import merge, read_toml
from mpilm.validation import validate


def refused(**changes: Any) -> str:
    """The message with which the default with these changes is refused."""
    with pytest.raises(ConfigError) as caught:
        validate(replaced(Config(), **changes))
    return str(caught.value)


# Merging.


def test_values_replace_and_the_rest_stays() -> None:
    merged = merge(Config(), {"model": {"n-layers": 7}, "train": {"lr": 1, "clip_norm": 0.5}}, "a.toml")
    assert merged == replaced(Config(), model__n_layers=7, train__lr=1.0, train__clip_norm=0.5)
    assert isinstance(merged.train.lr, float)
    assert Config() == Config()  # and the base is as it was


def test_a_config_survives_its_own_dictionary() -> None:
    config = replaced(
        Config(), checkpoint__allow_change=("train.lr",), data__path=("x.txt",), train__reproducible=False, parallel__cut=(1, 3)
    )
    assert merge(Config(), to_dict(config), "config.toml") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"n-layer": 3}}, "a.toml: unknown key model.n-layer; did you mean model.n_layers?"),
        ({"modle": {}}, "a.toml: unknown key modle; did you mean model?"),
        (
            {"run": {"zzz": 1}},
            "a.toml: unknown key run.zzz; known here are dir, eval_batches, eval_every, log_every, time_limit, trace_steps, "
            "trackers",
        ),
        ({"model": 3}, "a.toml: model is a section; write [model] and its keys below it"),
        ({"train": {"steps": "ten"}}, "a.toml: train.steps must be a whole number, not 'ten'"),
        ({"train": {"steps": True}}, "a.toml: train.steps must be a whole number, not True"),
        ({"train": {"steps": 2.0}}, "a.toml: train.steps must be a whole number, not 2.0"),
        ({"train": {"lr": "3e-4"}}, "a.toml: train.lr must be a number, not '3e-4'"),
        ({"train": {"lr": True}}, "a.toml: train.lr must be a number, not True"),
        ({"train": {"reproducible": 1}}, "a.toml: train.reproducible must be true or false, not 1"),
        ({"data": {"path": [{}]}}, "a.toml: data.path must be a list of strings, not [{}]"),
        (
            {"checkpoint": {"allow-change": "train.lr"}},
            "a.toml: checkpoint.allow-change must be a list of strings, not 'train.lr'",
        ),
        ({"checkpoint": {"allow-change": [1]}}, "a.toml: checkpoint.allow-change must be a list of strings, not [1]"),
        ({"parallel": {"cut": 4}}, "a.toml: parallel.cut must be a list of whole numbers, not 4"),
        ({"parallel": {"cut": ["4"]}}, "a.toml: parallel.cut must be a list of whole numbers, not ['4']"),
        ({"parallel": {"cut": [2.0, 2]}}, "a.toml: parallel.cut must be a list of whole numbers, not [2.0, 2]"),
        ({"parallel": {"cut": [True, 3]}}, "a.toml: parallel.cut must be a list of whole numbers, not [True, 3]"),
        ({"parallel": {"zero": "1"}}, "a.toml: parallel.zero must be a whole number, not '1'"),
    ],
)
def test_what_cannot_be_merged_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merge(Config(), values, "a.toml")
    assert str(caught.value) == message


def test_toml_files(tmp_path: Path) -> None:
    good, bad, binary = tmp_path / "good.toml", tmp_path / "bad.toml", tmp_path / "binary.toml"
    good.write_text("[train]\nglobal-batch = 8\n[parallel]\npipeline = 2\ncut = [1, 3]\nzero = 1\nschedule = 'gpipe'\n")
    bad.write_text("[train\n")
    binary.write_bytes(b"\xff\xfe")
    assert merge(Config(), read_toml(str(good)), str(good)) == replaced(
        Config(),
        train__global_batch=8,
        parallel__pipeline=2,
        parallel__cut=(1, 3),
        parallel__zero=1,
        parallel__schedule="gpipe",
    )
    for path in (bad, binary):
        with pytest.raises(ConfigError, match=re.escape(f"--config {path}: is not TOML: ")):
            read_toml(path, f"--config {path}")
    with pytest.raises(FileError, match=r"^/.*none\.toml: cannot be read: No such file or directory"):
        read_toml(tmp_path / "none.toml")


# Validation.


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_leave_nothing_open(name: str) -> None:
    config = PRESETS[name]()
    validate(config)
    shape = resolve(config).model
    validate(resolve(config))
    assert resolve(resolve(config)) == resolve(config)
    assert min(shape.n_kv_heads, shape.head_width, shape.d_ff) > 0


@pytest.mark.parametrize(("d_model", "n_heads", "near"), [(190, 4, 192), (193, 4, 192), (3, 8, 16)])
def test_a_width_that_heads_do_not_divide(d_model: int, n_heads: int, near: int) -> None:
    message = f"--model.d-model {d_model} is not divisible by --model.n-heads {n_heads}; the nearest that is: {near}"
    assert refused(model__d_model=d_model, model__n_heads=n_heads) == message


def test_heads_of_odd_width() -> None:
    with pytest.raises(ConfigError, match=r"--model\.d-model 12 over --model\.n-heads 4 gives heads of odd width"):
        validate(replaced(Config(), model__d_model=12))


def test_key_heads_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"--model\.n-heads 4 is not divisible by --model.n-kv-heads 3"):
        validate(replaced(Config(), model__n_kv_heads=3))


@pytest.mark.parametrize(("global_batch", "micro_batch", "near"), [(30, 4, 32), (33, 4, 32), (1, 4, 4)])
def test_a_batch_that_microbatches_do_not_divide(global_batch: int, micro_batch: int, near: int) -> None:
    message = f"--train.global-batch {global_batch} is not divisible by --train.micro-batch {micro_batch}"
    said = refused(train__global_batch=global_batch, train__micro_batch=micro_batch)
    assert said == f"{message}; the nearest that is: {near}"


@given(st.integers(1, 300), st.integers(1, 40))
def test_the_suggested_batch_is_valid(global_batch: int, micro_batch: int) -> None:
    config = replaced(Config(), train__global_batch=global_batch, train__micro_batch=micro_batch)
    try:
        validate(config)
    except ConfigError as error:
        near = int(str(error).rpartition(" ")[2])
        validate(replaced(config, train__global_batch=near))
        assert abs(near - global_batch) <= micro_batch


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__steps": 0}, "--train.steps must be above zero, not 0"),
        ({"train__micro_batch": -1}, "--train.micro-batch must be above zero, not -1"),
        ({"parallel__pipeline": 0}, "--parallel.pipeline must be above zero, not 0"),
        ({"parallel__chunks": -1}, "--parallel.chunks must not be negative, but is -1"),
        ({"parallel__zero": 4}, "--parallel.zero must be one of 0, 1, 2, 3, not 4"),
        (
            {"parallel__schedule": "1F1B"},
            "--parallel.schedule must be one of 1f1b, gpipe, interleaved, zero-bubble, not '1F1B'",
        ),
        ({"parallel__balance": "even"}, "--parallel.balance must be one of cost, measured, not 'even'"),
        (
            {"train__compile": True, "train__recompute": "attention"},
            "--train.recompute attention takes apart what --train.compile true makes one piece of; write block or none, or "
            "--train.compile false",
        ),
        (
            {"train__compile": True, "parallel__schedule": "zero-bubble"},
            "--parallel.schedule zero-bubble takes apart what --train.compile true makes one piece of; write 1f1b or "
            "interleaved, or --train.compile false",
        ),
        (
            {"train__compile": True, "model__dropout": 0.1},
            "--model.dropout 0.1 draws a mask for each sample by itself, which cannot be compiled; write 0, or --train.compile "
            "false",
        ),
        ({"train__recompute": "all"}, "--train.recompute must be one of none, attention, block, not 'all'"),
        ({"train__lr": float("nan")}, "--train.lr must be a finite number, not nan"),
        ({"train__clip_norm": float("inf")}, "--train.clip-norm must be a finite number, not inf"),
        ({"checkpoint__every": -5}, "--checkpoint.every must not be negative, but is -5"),
        ({"model__dropout": 1.0}, "--model.dropout must be at least 0 and below 1, not 1.0"),
        ({"data__eval_fraction": -0.1}, "--data.eval-fraction must be at least 0 and below 1, not -0.1"),
        ({"train__dtype": "float16"}, "--train.dtype must be one of float32, bfloat16, not 'float16'"),
        ({"train__min_lr": 1.0}, "--train.min-lr 1.0 is above --train.lr 0.003, which falls to it; write less, such as 0.0003"),
        ({"generate__top_p": 0.0}, "--generate.top-p must be above 0 and at most 1, not 0.0"),
        ({"run__trace_steps": "3:1"}, "--run.trace-steps 3:1: write the first and the last, counted from 1, as in 10:12"),
        ({"run__trace_steps": "9:12", "train__steps": 8}, "--run.trace-steps 9:12: training ends with step 8"),
        (
            {"checkpoint__allow_change": ("train.steps",)},
            "--checkpoint.allow-change train.steps: no such setting, or one that may always change",
        ),
    ],
)
def test_what_is_refused_says_why(changes: dict[str, Any], message: str) -> None:
    assert refused(**changes) == message


def test_limits_themselves_are_allowed() -> None:
    validate(
        replaced(Config(), train__lr=0.0, train__min_lr=0.0, data__eval_fraction=0.0, generate__top_p=1.0, checkpoint__every=0)
    )
    validate(replaced(Config(), train__min_lr=1.0, train__lr_schedule="constant"))
    validate(replaced(Config(), checkpoint__allow_change=("train.lr", "data.eval-fraction", "data.path")))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_shards_are_summed_in_the_fixed_order_only(zero: int) -> None:
    assert refused(parallel__zero=zero, train__reproducible=False) == (
        f"--parallel.zero {zero} sums slices in the fixed order, which costs nothing; "
        "--train.reproducible false goes with --parallel.zero 0 only"
    )
    validate(replaced(Config(), parallel__zero=zero))
    validate(replaced(Config(), train__reproducible=False))


def test_every_rule_names_a_real_setting() -> None:
    rules = (validation.POSITIVE, validation.NOT_NEGATIVE, validation.BELOW_ONE, validation.CHOICES, c.FREE_TO_CHANGE)
    named = {name for names in rules for name in names}
    assert named <= set(flatten(Config()))
    assert {section for section, _ in c._items(Config())} >= c.FREE_SECTIONS


# What the numbers depend on.


def test_mathematics_leaves_out_what_may_change() -> None:
    free = replaced(
        Config(), train__steps=9, train__threads=3, train__device="cpu", data__path=("moved",), run__dir="elsewhere",
        checkpoint__every=1, run__log_every=1, generate__seed=5, parallel__pipeline=2, parallel__zero=3,
        parallel__schedule="gpipe", parallel__chunks=1, parallel__cut=(1, 3), parallel__balance="measured",
        train__recompute="block",
    )  # fmt: skip
    assert mathematics(free) == mathematics(Config())


@pytest.mark.parametrize(
    "change",
    [{"train__lr": 1.0}, {"train__seed": 1}, {"train__micro_batch": 8}, {"model__n_layers": 5}, {"data__eval_fraction": 0.1}],
)
def test_mathematics_holds_what_matters(change: dict[str, Any]) -> None:
    assert mathematics(replaced(Config(), **change)) != mathematics(Config())


# What is left open.


def test_resolve_works_out_the_shape() -> None:
    resolved = resolve(replaced(Config(), model__d_model=768, model__n_heads=12))
    assert (resolved.model.n_kv_heads, resolved.model.d_ff) == (12, 2048)
    assert resolve(resolved) == resolved


def test_resolve_keeps_what_is_stated() -> None:
    stated = replaced(
        Config(),
        model__n_kv_heads=2,
        model__head_width=20,
        model__d_ff=100,
        parallel__schedule="interleaved",
        parallel__chunks=3,
    )
    assert resolve(stated) == stated


def test_resolve_works_out_the_stages_of_a_rank() -> None:
    assert resolve(Config()).parallel.chunks == 1
    assert resolve(replaced(Config(), parallel__schedule="interleaved")).parallel.chunks == 2


@given(st.integers(1, 5000))
def test_the_width_worked_out_is_a_multiple_of_32_and_just_large_enough(d_model: int) -> None:
    d_ff = resolve(replaced(Config(), model__d_model=d_model)).model.d_ff
    assert d_ff % 32 == 0
    assert d_ff - 32 < 8 * d_model // 3 <= d_ff


def test_microbatches_are_over_all_ranks() -> None:
    assert c.microbatches(Config()) == 8
