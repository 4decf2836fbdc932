"""Counts by arithmetic against what torch really holds."""

import pytest
import torch
from runs import whole_model
from text import tiny

from mpilm.config import resolve
from mpilm.engine.pipelined import resolve_model_layouts
from mpilm.model.loss import loss_sum
from mpilm.model.rows import Rows
from mpilm.model.size import activation_bytes, flops_per_token, parameter_count
from mpilm.parallel.apply import make_autocast
from mpilm.parallel.layout import select_owned
from mpilm.presets import PRESETS, VOCABULARIES

V, CPU = 300, torch.device("cpu")


def kept_bytes(model, flat, batch, length, dtype):
    """What a forward keeps for backward: each storage once, parameters left out."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # and alive, so that no address is used twice
        return tensor

    x = torch.randint(0, V, (batch, length), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with make_autocast(dtype, CPU)():
            logits = model(x, Rows(torch.arange(length), list(range(batch))))
        loss = loss_sum(logits, x)
    assert loss.requires_grad
    kept.pop(flat.values.tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(("width", "length", "batch"), [(64, 32, 2), (128, 64, 4)])
def test_activations_are_what_autograd_keeps(dtype, dropout, kv_heads, width, length, batch):
    config = tiny(
        "", "", model__d_model=width, model__n_kv_heads=kv_heads, model__dropout=dropout, model__context_length=length,
        model__d_ff=3 * width,
    )  # fmt: skip
    model, flat = whole_model(config.model, V, CPU)
    predicted = activation_bytes(config.model, V, batch * length, dtype)
    expected = predicted["activations"] + predicted["logits"] // 2  # the other half is the gradient, not there yet
    assert kept_bytes(model, flat, batch, length, dtype) == pytest.approx(expected, rel=0.02)


FAMILIES = {
    "llama": {"model__head_width": 24},
    "gpt2": {"model__n_kv_heads": 4},
    "bert": {"model__n_kv_heads": 4},
    "qwen": {"model__n_kv_heads": 2},
    "qwen with norms": {"model__qk_norm": True, "model__n_kv_heads": 2},
    "mixtral": {"model__n_experts": 4, "model__experts_per_token": 2, "model__n_kv_heads": 4},
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def family_of(family, **changes):
    return tiny("", "", model__arch=family.split()[0], **FAMILIES[family], **changes)


@each_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_so_are_those_of_every_family(family, dtype, dropout):
    config = family_of(family, model__d_model=128, model__dropout=dropout, model__context_length=64, model__d_ff=384)
    model, flat = whole_model(config.model, V, CPU)
    predicted = activation_bytes(config.model, V, 256, dtype)
    expected = predicted["activations"] + predicted["logits"] // 2
    assert kept_bytes(model, flat, 4, 64, dtype) == pytest.approx(expected, rel=0.03)


@each_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [(), ("o",)])
def test_those_of_adapters_are_no_more(family, dtype, targets):
    """Inputs of matrices without an adapter need not be kept."""
    config = family_of(family, model__lora_rank=16, model__lora_targets=targets, model__context_length=64)
    model, flat = whole_model(config.model, V, CPU)
    predicted = activation_bytes(config.model, V, 256, dtype)
    expected = predicted["activations"] + predicted["logits"] // 2
    assert (0.5 if targets else 0.8) * expected < kept_bytes(model, flat, 4, 64, dtype) < 1.03 * expected


@each_family
def test_parameters_of_every_family(family):
    shape = family_of(family, model__n_layers=3).model
    assert parameter_count(shape, V) == sum(layout.numel for layout in select_owned(resolve_model_layouts(shape, V, (3,))))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("layers", [1, 3])
def test_parameters(tie, kv_heads, layers):
    shape = tiny("", "", model__tie_embeddings=tie, model__n_kv_heads=kv_heads, model__n_layers=layers).model
    assert parameter_count(shape, V) == sum(layout.numel for layout in select_owned(resolve_model_layouts(shape, V, (layers,))))


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama-1b", 1_100_048_384), ("llama-8b", 8_030_261_248), ("gpt2-124m", 124_439_808), ("gpt2-350m", 354_823_168),
        ("gpt2-1.5b", 1_557_611_200), ("qwen2-0.5b", 494_032_768), ("qwen3-0.6b", 596_049_920),
        ("mixtral-8x7b", 46_702_792_704), ("bert-base", 109_514_298), ("bert-large", 335_174_458),
    ],
)  # fmt: skip
def test_published_models_have_their_published_size(preset, count):
    assert parameter_count(resolve(PRESETS[preset]()).model, VOCABULARIES[preset]) == count


def test_operations_are_six_for_each_element_of_a_matrix_and_the_attention():
    shape = tiny("", "", model__tie_embeddings=True).model
    norms = (2 * shape.n_layers + 1) * shape.d_model
    matrices = parameter_count(shape, V) - norms  # tied: the embedding is counted once, as the head
    attention = 2 * 3 * 2 * shape.d_model * shape.context_length // 2  # q k and weights v, forward and twice back, half causal
    assert flops_per_token(shape, V) == 6 * matrices + shape.n_layers * attention
