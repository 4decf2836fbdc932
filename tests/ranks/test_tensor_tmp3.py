import pytest
from runs import FAMILIES, layout, train_to_end, train_until_killed
from text import tiny_config, write_tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral"])
@pytest.mark.parametrize(
    "first,second",
    [
        ((4, layout(tensor=2, zero=1)), (2, layout(2))),
        ((2, layout(tensor=2)), (1, layout())),
        ((1, layout()), (4, layout(tensor=2, zero=3))),
        ((4, layout(2, tensor=2)), (3, layout(tensor=3))),
    ],
)
def test_resume(tmp_path, data, family, first, second):
    fam = dict(FAMILIES[family])
    if family != "gpt2" and family != "bert":
        fam["model__n_kv_heads"] = 0
    common = dict(
        train__steps=4,
        checkpoint__every=2,
        run__eval_every=2,
        model__n_heads=6,
        model__d_model=24,
        model__tensor_parts=6,
        model__context_length=24,
        checkpoint__asynchronous=False,
        **fam,
    )
    expected = train_to_end(tiny_config(data, tmp_path / "serial", **common), 1)
    (n1, l1), (n2, l2) = first, second
    train_until_killed(tiny_config(data, tmp_path / "run", **common, **l1), n1, 3)
    got = train_to_end(tiny_config(data, tmp_path / "run", **common, **l2), n2)
    assert got.keys() == expected.keys()
    for k in got:
        assert got[k] == expected[k], k
