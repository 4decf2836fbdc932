import pytest
from runs import FAMILIES, differing, layout, serial_config, small_config, train_on_threads

CASES = [
    (2, layout(tensor=2), {}),
    (4, layout(tensor=2), {}),
    (4, layout(tensor=4), {}),
    (3, layout(tensor=3), {}),
    (4, layout(2, tensor=2), {}),
    (4, layout(tensor=2, zero=1), {}),
    (4, layout(tensor=2, zero=2), {}),
    (4, layout(tensor=2, zero=3), {}),
    (8, layout(2, "zero-bubble", 3, tensor=2), {}),
    (4, layout(2, "interleaved", tensor=2), {}),
    (2, layout(tensor=2), {"train__recompute": "block"}),
    (2, layout(tensor=2), {"train__recompute": "attention"}),
    (2, layout(tensor=2), {"train__dtype": "bfloat16"}),
    (2, layout(tensor=2), {"model__tie_embeddings": False}),
    (4, layout(tensor=2), {"train__micro_batch": 2}),
    (4, layout(tensor=2), {"train__optimizer": "muon"}),
    (4, layout(tensor=2, zero=1), {"train__optimizer": "muon"}),
    (4, layout(tensor=2, zero=3), {"train__optimizer": "adafactor"}),
    (6, layout(3, tensor=2), {"train__optimizer": "adafactor"}),
    (2, layout(tensor=2), {"train__optimizer": "sgd"}),
]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "qwen3", "bert", "mixtral"])
@pytest.mark.parametrize("i", range(len(CASES)))
def test_case(family, i):
    size, lay, more = CASES[i]
    fam = dict(FAMILIES[family])
    if family in ("llama", "qwen2", "qwen3", "mixtral"):
        fam["model__n_kv_heads"] = 4
    if family == "bert" and "model__tie_embeddings" in more:
        pytest.skip("tied")
    c = small_config(**lay, **fam, model__n_heads=4, model__tensor_parts=4, **more)
    n, t = train_on_threads(size, c)
    e, s = train_on_threads(1, serial_config(c))
    assert n == e
    assert differing(t, s) == []
