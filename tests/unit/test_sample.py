"""Sampling: what is drawn, and from what; tests/ranks/test_write.py has whole texts."""

import math
from collections import Counter

import pytest
import torch

from mpilm.config import Generate
from mpilm.model.sample import choose

LOGITS = torch.tensor([0.0, math.log(6), math.log(2), math.log(1)])  # 0.1, 0.6, 0.2, 0.1


def drawn(settings, count=2000):
    generator = torch.Generator().manual_seed(1)
    counts = Counter(choose(LOGITS, settings, generator) for _ in range(count))
    return {token: counts[token] / count for token in counts}


def test_frequencies_follow_the_probabilities():
    assert drawn(Generate(temperature=1.0)) == pytest.approx({0: 0.1, 1: 0.6, 2: 0.2, 3: 0.1}, abs=0.05)


def test_temperature():
    hot = drawn(Generate(temperature=2.0))
    weights = {token: math.exp(float(LOGITS[token]) / 2) for token in range(4)}
    assert hot == pytest.approx({token: w / sum(weights.values()) for token, w in weights.items()}, abs=0.05)
    assert set(drawn(Generate(temperature=0.0), 10)) == {1}
    assert set(drawn(Generate(temperature=0.05), 100)) == {1}


@pytest.mark.parametrize(("k", "left"), [(1, {1}), (2, {1, 2}), (3, {0, 1, 2}), (0, {0, 1, 2, 3}), (99, {0, 1, 2, 3})])
def test_top_k(k, left):
    assert set(drawn(Generate(temperature=1.0, top_k=k))) == left


@pytest.mark.parametrize(("p", "left"), [(0.01, {1}), (0.59, {1}), (0.7, {1, 2}), (0.85, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_top_p(p, left):
    assert set(drawn(Generate(temperature=1.0, top_p=p))) == left
