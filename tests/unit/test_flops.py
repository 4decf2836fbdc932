"""Parameters, activations and FLOPs by arithmetic, against what torch really allocates and saves."""

import pytest
import torch
from runs import full_model
from text import tiny_config

from mpilm.config.presets import PRESETS, VOCABULARIES
from mpilm.config.schema import resolve_config
from mpilm.engine.pipelined import resolve_model_layouts
from mpilm.kernels.base import loss_sum
from mpilm.model.flops import activation_bytes, flops_per_token, parameter_count
from mpilm.model.sequence_info import SequenceInfo
from mpilm.parallel.apply import make_autocast
from mpilm.parallel.layout import select_owned

V, CPU = 300, torch.device("cpu")


FAMILIES = {
    "llama": {"model__head_width": 24},
    "llama with few keys": {"model__n_kv_heads": 1, "model__tie_embeddings": False},
    "gpt2": {"model__n_kv_heads": 4},
    "bert": {"model__n_kv_heads": 4},
    "qwen": {"model__n_kv_heads": 2},
    "qwen with norms": {"model__qk_norm": True, "model__n_kv_heads": 2},
    "qwen-moe": {"model__qk_norm": True, "model__n_kv_heads": 4},
    "mixtral": {"model__n_experts": 4, "model__experts_per_token": 2, "model__n_kv_heads": 4},
}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def settings_of(family, **changes):
    changes = {f"model__{key}": value for key, value in changes.items()}
    return tiny_config("", "", model__arch=family.split()[0], **FAMILIES[family] | changes).model


def saved_and_predicted_bytes(settings, dtype, batch=4):
    """The bytes that a forward saves for backward, each storage once, without parameters; and the prediction of them."""
    storages, length = {}, settings.context_length
    model, flat = full_model(settings, V, CPU)

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # and alive, so that no address is used twice
        return tensor

    x = torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with make_autocast(dtype, CPU)():
            logits = model(x, SequenceInfo(torch.arange(length), list(range(batch))))
        assert loss_sum(logits, x).requires_grad
    storages.pop(flat.values.tensor.untyped_storage().data_ptr(), None)
    predicted = activation_bytes(settings, V, batch * length, dtype)
    saved = sum(storage.nbytes() for storage in storages.values())
    return saved, predicted["activations"] + predicted["logits"] // 2  # the other half is the gradient, which comes later


@each_dtype
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("kv_heads", "width", "length", "batch"), [(1, 64, 32, 2), (4, 128, 64, 4)])
def test_activation_bytes_of_any_shape_are_what_autograd_saves(dtype, dropout, kv_heads, width, length, batch):
    shape = {"d_model": width, "head_width": 0, "d_ff": 3 * width, "n_kv_heads": kv_heads, "context_length": length}
    saved, predicted = saved_and_predicted_bytes(settings_of("llama", dropout=dropout, **shape), dtype, batch)
    assert saved == pytest.approx(predicted, rel=0.02)


@each_family
@each_dtype
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activation_bytes_of_every_family_are_what_autograd_saves(family, dtype, dropout):
    settings = settings_of(family, d_model=128, dropout=dropout, context_length=64, d_ff=384)
    saved, predicted = saved_and_predicted_bytes(settings, dtype)
    assert saved == pytest.approx(predicted, rel=0.03)


@each_family
@each_dtype
@pytest.mark.parametrize("targets", [(), ("o",)])
def test_activation_bytes_with_adapters_are_not_exceeded(family, dtype, targets):
    """Inputs of matrices without an adapter need not be saved."""
    settings = settings_of(family, lora_rank=16, lora_targets=targets, context_length=64)
    saved, predicted = saved_and_predicted_bytes(settings, dtype)
    assert (0.5 if targets else 0.8) * predicted < saved < 1.03 * predicted


@each_family
@pytest.mark.parametrize("layers", [1, 3])
def test_parameter_count_is_that_of_the_layouts(family, layers):
    settings = settings_of(family, n_layers=layers)
    assert parameter_count(settings, V) == sum(
        layout.numel for layout in select_owned(resolve_model_layouts(settings, V, (layers,)))
    )


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama-1b", 1_100_048_384), ("llama-8b", 8_030_261_248), ("gpt2-124m", 124_439_808), ("gpt2-350m", 354_823_168),
        ("gpt2-1.5b", 1_557_611_200), ("qwen2-0.5b", 494_032_768), ("qwen3-0.6b", 596_049_920),
        ("mixtral-8x7b", 46_702_792_704), ("bert-base", 109_514_298), ("bert-large", 335_174_458),
    ],
)  # fmt: skip
def test_parameter_count_of_a_published_model_is_the_published_one(preset, count):
    assert parameter_count(resolve_config(PRESETS[preset]()).model, VOCABULARIES[preset]) == count


def test_flops_per_token_are_six_per_matrix_element_and_the_attention():
    settings = tiny_config("", "", model__tie_embeddings=True).model
    norms = (2 * settings.n_layers + 1) * settings.d_model
    matrices = parameter_count(settings, V) - norms  # tied: the embedding is counted once, as the head
    attention = (
        2 * 3 * 2 * settings.d_model * settings.context_length // 2
    )  # q k and weights v, forward and twice back, half causal
    assert flops_per_token(settings, V) == 6 * matrices + settings.n_layers * attention
