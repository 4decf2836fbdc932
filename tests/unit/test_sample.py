"""The distribution that a token is sampled from; tests/ranks/test_write.py has whole texts."""

import math
from collections import Counter

import pytest
import torch

from mpilm.config.schema import GenerateConfig
from mpilm.errors import NonFiniteError
from mpilm.inference.generate import sample_token

LOGITS = torch.tensor([0.0, math.log(6), math.log(2), math.log(1)])  # 0.1, 0.6, 0.2, 0.1


def frequencies(settings, count=2000):
    generator = torch.Generator().manual_seed(1)
    counts = Counter(sample_token(LOGITS, settings, generator) for _ in range(count))
    return {token: counts[token] / count for token in counts}


def test_sample_token_follows_the_probabilities():
    assert frequencies(GenerateConfig(temperature=1.0)) == pytest.approx({0: 0.1, 1: 0.6, 2: 0.2, 3: 0.1}, abs=0.05)


def test_sample_token_with_temperature_scales_the_logits():
    hot = frequencies(GenerateConfig(temperature=2.0))
    weights = {token: math.exp(float(LOGITS[token]) / 2) for token in range(4)}
    assert hot == pytest.approx({token: w / sum(weights.values()) for token, w in weights.items()}, abs=0.05)
    assert set(frequencies(GenerateConfig(temperature=0.0), 10)) == {1}
    assert set(frequencies(GenerateConfig(temperature=0.05), 100)) == {1}


@pytest.mark.parametrize(("k", "possible"), [(1, {1}), (2, {1, 2}), (3, {0, 1, 2}), (0, {0, 1, 2, 3}), (99, {0, 1, 2, 3})])
def test_sample_token_with_top_k_leaves_the_k_most_probable(k, possible):
    assert set(frequencies(GenerateConfig(temperature=1.0, top_k=k))) == possible


@pytest.mark.parametrize(("p", "possible"), [(0.01, {1}), (0.59, {1}), (0.7, {1, 2}), (0.85, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_sample_token_with_top_p_leaves_the_most_probable_mass(p, possible):
    assert set(frequencies(GenerateConfig(temperature=1.0, top_p=p))) == possible


@pytest.mark.parametrize("extreme", [{"temperature": 1e-300}, {"temperature": 1e-39}, {"temperature": 1.0, "top_p": 1e-300}])
def test_sample_token_at_the_bounds_of_the_settings_takes_the_most_likely(extreme):
    assert set(frequencies(GenerateConfig(**extreme))) == {1}


def test_sample_token_from_logits_that_are_not_finite_is_refused():
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        sample_token(torch.tensor([0.0, math.nan]), GenerateConfig(), torch.Generator())
