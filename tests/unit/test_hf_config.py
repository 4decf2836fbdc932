"""Reading and writing config.json; tests/unit/test_families.py compares the models themselves."""

import pytest
from text import tiny_config
from transformers import LlamaConfig

from mpilm.errors import ConfigError
from mpilm.model.hf.config import add_hf_adapter, hf_config, read_hf_config

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
def test_hf_config_written_and_read_is_the_same(changes):
    settings = tiny_config("", "", model__dropout=0.0, **{f"model__{key}": value for key, value in changes.items()}).model
    config = hf_config(settings, V, 7)
    assert read_hf_config(config, "x") == (settings, V)
    rewritten = LlamaConfig(**config).to_dict()  # as transformers itself would save it
    assert read_hf_config(rewritten, "x") == (settings, V)
    assert (rewritten["bos_token_id"], rewritten["eos_token_id"]) == (7, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type 'mistral' is not supported"),
        ({"model_type": {"a": 1}}, "model_type {'a': 1} is not supported"),
        ({"tensor_parts": 7}, "tensor_parts 7 does not divide n_heads"),
        ({"tensor_parts": -1}, "tensor_parts -1 is not a number above zero"),
        ({"tensor_parts": "x"}, "tensor_parts"),
        ({"intermediate_size": 10**9}, "intermediate_size must be at most 16,777,216, not 1000000000"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers must be at most 1,024"),
        ({"vocab_size": -5}, "vocab_size -5 is not a number above zero"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be at most 9,223,372,036,854,775,807"),
        ({"rope_theta": float("inf")}, "rope_theta must be a finite number, not inf"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks 'low_freq_factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling of type 'linear' of this model is not supported"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope scaling of type 'yarn' of this model is not supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' of this model is not supported"),
        ({"attention_bias": True, "mlp_bias": True}, "attention_bias true, mlp_bias true of this model is not supported"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 is not a number above zero"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers '2' is not a number above zero"),
        ({"vocab_size": True}, "vocab_size true is not a number above zero"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings 1 is not true or false"),
        ({"rope_scaling": [1]}, "rope scaling of type [1] of this model is not supported"),
    ],
)
def test_hf_config_that_is_unsupported_or_wrong_is_refused(changes, message):
    config = hf_config(tiny_config("", "").model, V, 0) | changes
    with pytest.raises(ConfigError) as caught:
        read_hf_config(config, "some/config.json")
    assert str(caught.value).startswith(f"some/config.json: {message}")


@pytest.mark.parametrize("targets", ["(.*)*x", ".*.*.*.*.*.*.*q_proj", r".*\.((q|k)_proj)+"])
def test_adapter_targets_that_may_take_for_ever_are_refused(targets):
    config = {"r": 2, "lora_alpha": 4, "target_modules": targets}
    with pytest.raises(ConfigError, match=r"x: target_modules .* names no matrix of llama that may have an adapter"):
        add_hf_adapter(tiny_config("", "").model, config, "x")


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size"])
def test_hf_config_without_a_key_names_it(key):
    config = hf_config(tiny_config("", "").model, V, 0)
    del config[key]
    with pytest.raises(ConfigError, match=f"lacks '{key}'"):
        read_hf_config(config, "config.json")


def test_hf_config_of_newer_versions_has_theta_in_rope_parameters():
    config = hf_config(tiny_config("", "").model, V, 0)
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 12345.0}
    assert read_hf_config(config, "x")[0].rope_theta == 12345.0
