"""config.json, there and back; the models themselves are in test_families.py."""

import pytest
from text import tiny
from transformers import LlamaConfig

from mpilm.errors import ConfigError
from mpilm.model.huggingface_config import published_config, read_config

V = 53


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 1},
        {"tie_embeddings": False},
        {"rope_theta": 5e5, "norm_eps": 1e-6},
        {"d_ff": 17, "context_length": 99},
        {"head_width": 20},
        {"rope_scaling": (8.0, 1.0, 4.0, 64.0)},
    ],
)
def test_a_config_comes_back(changes):
    shape = tiny("", "", model__dropout=0.0, **{f"model__{key}": value for key, value in changes.items()}).model
    published = published_config(shape, V, 7)
    assert read_config(published, "x") == (shape, V)
    rewritten = LlamaConfig(**published).to_dict()  # as transformers itself would save it
    assert read_config(rewritten, "x") == (shape, V)
    assert (rewritten["bos_token_id"], rewritten["eos_token_id"]) == (7, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks 'low_freq_factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling of type 'linear' of this model is not supported"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope scaling of type 'yarn' of this model is not supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' of this model is not supported"),
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias True, mlp_bias True of this model is not supported"),
    ],
)
def test_what_is_not_of_our_kind_is_refused(changes, message):
    published = published_config(tiny("", "").model, V, 0) | changes
    with pytest.raises(ConfigError) as caught:
        read_config(published, "some/config.json")
    assert str(caught.value).startswith(f"some/config.json: {message}")


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size"])
def test_what_is_missing_is_named(key):
    published = published_config(tiny("", "").model, V, 0)
    del published[key]
    with pytest.raises(ConfigError, match=f"lacks '{key}'"):
        read_config(published, "config.json")


def test_theta_is_read_where_newer_versions_keep_it():
    published = published_config(tiny("", "").model, V, 0)
    del published["rope_theta"]
    published["rope_parameters"] = {"rope_type": "default", "rope_theta": 12345.0}
    assert read_config(published, "x")[0].rope_theta == 12345.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads 0 is not a number above zero"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers '2' is not a number above zero"),
        ({"vocab_size": None}, "vocab_size None is not a number above zero"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings 1 is not true or false"),
        ({"rope_scaling": [1]}, r"rope scaling of type \[1\] of this model is not supported"),
    ],
)
def test_values_of_the_wrong_kind_are_named(changes, message):
    published = published_config(tiny("", "").model, V, 0) | changes
    with pytest.raises(ConfigError, match=rf"^some/config\.json: {message}"):
        read_config(published, "some/config.json")
