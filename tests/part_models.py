"""Values and small models for tests of tensor and sequence parts."""

import torch
from runs import FAMILIES, small_config

VOCAB = 131  # does not divide by the parts


def draw(*key_and_shape, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash(key_and_shape) % 2**31), dtype=torch.float64)


def dot(xs, ys):
    return sum(float((x * y).sum()) for x, y in zip(xs, ys, strict=True))


def family_config(family):
    heads = {} if family in ("gpt2", "bert") else {"model__n_kv_heads": 4}
    return small_config(**{**FAMILIES[family], "model__n_heads": 4, "model__n_layers": 2, "model__d_model": 32} | heads).model


def draw_batch(shape):
    return torch.randint(0, VOCAB, (2, 2, shape.context_length), generator=torch.Generator().manual_seed(1))
