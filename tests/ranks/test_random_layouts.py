"""Random shapes on random layouts of all axes: the bits of the serial run."""

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from runs import FAMILIES, assert_equals_serial, layout, small_config

from mpilm.config.schema import GPT2_STYLE, MIXTURES
from mpilm.errors import ConfigError
from mpilm.optim.optimizer import OPTIMIZERS
from mpilm.parallel.layout_check import resolve_mesh_shape
from mpilm.parallel.pipeline.schedules import SCHEDULES

MAX_RANKS = 8


@st.composite
def cases(draw):
    """Draw a config that can run, and the number of its ranks."""

    def size(limit):
        return draw(st.integers(1, max(1, limit)))

    shape = dict(FAMILIES[draw(st.sampled_from(list(FAMILIES)))])
    arch = shape.get("model__arch", "llama")
    tensor = size(4)
    context = draw(st.sampled_from([n for n in (1, 2, 3, 4) if n * tensor <= MAX_RANKS]))
    expert = size(min(4, MAX_RANKS // (tensor * context))) if arch in MIXTURES else 1
    pipeline = size(min(3, MAX_RANKS // (tensor * context * expert)))
    data = size(min(4, MAX_RANKS // (tensor * context * expert * pipeline)))
    replicas = data * expert
    tensor_parts, sequence_parts = tensor * size(2), context * draw(st.sampled_from([1, 2, 4]))
    kv_heads = tensor_parts * size(2)
    heads = kv_heads if arch in GPT2_STYLE else kv_heads * size(2)
    width = draw(st.sampled_from([4, 6, 8]))
    schedule = draw(st.sampled_from(list(SCHEDULES) if pipeline > 1 else ["1f1b"]))
    chunks = size(2) + 1 if schedule == "interleaved" else 1
    micro_batch = size(3)
    config = {
        **shape,
        "model__n_heads": heads, "model__n_kv_heads": kv_heads, "model__d_model": heads * width,
        "model__d_ff": 4 * heads * width if arch in GPT2_STYLE else tensor_parts * draw(st.sampled_from([3, 8, 11])),
        "model__n_layers": pipeline * chunks + size(2) - 1, "model__dropout": draw(st.sampled_from([0.0, 0.2])),
        "model__tie_embeddings": arch == "bert" or draw(st.booleans()), "model__n_experts": expert * (size(3) + (expert == 1)),
        "model__tensor_parts": tensor_parts, "model__sequence_parts": sequence_parts,
        "model__context_length": tensor_parts * sequence_parts * size(3),
        "train__micro_batch": micro_batch, "train__global_batch": micro_batch * (replicas * size(2) + draw(st.integers(0, 1))),
        "train__recompute": draw(st.sampled_from(["none", "attention", "block"])),
        "train__optimizer": draw(st.sampled_from(list(OPTIMIZERS))),
        "train__dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        **layout(
            pipeline, schedule, draw(st.integers(0, 3)), chunks=chunks, tensor=tensor, context=context, expert=expert,
            reduce=draw(st.sampled_from(["shared-memory", "messages"])),
        ),
    }  # fmt: skip
    ranks = data * expert * pipeline * tensor * context
    try:
        made = small_config(**config)
        resolve_mesh_shape(made, ranks)
    except ConfigError:
        assume(False)
    return made, ranks


def check(case):
    config, ranks = case
    assert_equals_serial(ranks, config)


CHECKS = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=8, derandomize=True, **CHECKS)
@given(cases())
def test_random_layout_has_the_bits_of_the_serial_run(case):
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@settings(max_examples=400, **CHECKS)
@given(cases())
def test_many_random_layouts_have_the_bits_of_the_serial_run(case):
    check(case)
