"""Conversations: what is learnt of them, how they share rows, and what cannot be read."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.threads import run_ranks
from mpilm.config import Config, Data, replaced
from mpilm.data.chat import Conversations, conversation, read_conversations, refuse_nothing
from mpilm.data.sources import discover
from mpilm.data.template import Template, find_template
from mpilm.data.tokenizer import bytes_tokenizer
from mpilm.errors import ConfigError, DataError
from mpilm.model.loss import IGNORE_INDEX
from mpilm.model.sequence_info import NO_DOCUMENT
from mpilm.validation import validate

TOKENIZER = bytes_tokenizer()
EOS = TOKENIZER.eos
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def read(path, comm=None, template=None):
    return read_conversations(discover(str(path)), TOKENIZER, template, comm or SelfComm("world"))


def laid(lengths, context, answers=None, **more):
    """Conversations of so many tokens, of which all but the first two are answers unless said otherwise."""
    tokens = np.arange(sum(lengths), dtype=np.int64)
    ends = np.cumsum(lengths)
    answer = np.ones(len(tokens), dtype=bool)
    for end, length, asked in zip(ends, lengths, answers or [2] * len(lengths)):
        answer[end - length : end - length + asked] = False
    options = {"eval_fraction": 0.0, "eos": -7, "too_long": "truncate", "packing": "concat"} | more
    return Conversations(tokens, answer, ends, context, **options)


# What is learnt.


def test_of_a_prompt_and_a_response_the_response_is_learnt(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"prompt": "ab", "response": "cde"}, {"prompt": "", "response": "f"}))
    tokens, answer, ends = read(tmp_path / "a.jsonl")
    assert tokens.tolist() == [*b"abcde", EOS, *b"f", EOS]
    assert answer.tolist() == [False, False, True, True, True, True, True, True]
    assert ends.tolist() == [6, 8]


def test_of_messages_the_turns_of_the_assistant(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}, {"role": "user", "content": "left out"},
    ]  # fmt: skip
    parts = Template(CHATML, {}, "x").parts(messages, "a: line 1")
    assert [answer for _, answer in parts] == [False, True, False, True]
    assert parts[1][0] == "yes<|im_end|>\n"
    assert parts[3][0] == "so<|im_end|>\n"
    assert "".join(text for text, _ in parts) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nso<|im_end|>\n"
    )
    assert conversation(lines({"messages": messages}).encode(), "x", Template(CHATML, {}, "x")) == parts


def test_the_template_is_rendered_as_transformers_renders_it(tmp_path):
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "tokenizer.json").write_text(TOKENIZER.json)
    source = (
        "{{ bos_token }}\n{%- for m in messages %}\n  [{{ m['role'] | upper }}] {{ m['content'] | trim }}{{ eos_token }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n  [ASSISTANT]\n{%- endif %}"
    )
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    theirs.chat_template = source
    theirs.save_pretrained(tmp_path)
    found = find_template(tmp_path)
    assert found is not None
    messages = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}]
    for count, begin in ((1, True), (2, False)):
        expected = theirs.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=begin)
        assert found._render(messages[:count], "x", begin) == expected
    assert find_template(tmp_path / "tokenizer.json").source == found.source


def test_names_of_special_tokens_in_a_template_are_those_tokens(tmp_path):
    template = Template("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}", {}, "x")
    (tmp_path / "a.jsonl").write_text(lines({"prompt": "a", "response": "b"}))
    tokens, answer, _ = read(tmp_path / "a.jsonl", template=template)
    assert tokens.tolist() == [97, EOS, 98, EOS]
    assert answer.tolist() == [False, False, True, True]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_read_the_same(tmp_path, size):
    values = [{"prompt": "p" * (i % 5), "response": "r" * (i % 7)} for i in range(11)]
    (tmp_path / "a.jsonl").write_text(lines(*values[:6]) + "\n \n" + lines(*values[6:]))
    alone = read(tmp_path / "a.jsonl")
    for theirs in run_ranks(size, lambda comm: read(tmp_path / "a.jsonl", comm)):
        assert all(np.array_equal(one, other) for one, other in zip(theirs, alone, strict=True))
    assert len(alone[2]) == 11


def test_what_transformers_knows_in_a_template_is_known():
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}:"
        "{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    assert Template(source, {}, "x").parts(messages, "x") == [("user:u;assistant:", False), ("a;", True)]
    assert Template("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}", {}, "x").parts(messages, "x")


def test_tokens_over_a_border_are_no_answers(tmp_path):
    """A template's text is encoded in one: with a tokenizer that joins over the border, the token begins in the prompt."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    from mpilm.data.tokenizer import Tokenizer

    library = Library(models.BPE({"a": 0, "b": 1, "ab": 2, "c": 3, "</s>": 4}, [("a", "b")]))
    (tmp_path / "a.jsonl").write_text(lines({"prompt": "ca", "response": "bc"}))
    template = Template("{% for m in messages %}{{ m.content }}{% endfor %}", {}, "x")
    found = read_conversations(
        discover(str(tmp_path / "a.jsonl")), Tokenizer(library.to_str(), 4, "x"), template, SelfComm("w")
    )
    assert found[0].tolist() == [3, 2, 3]
    assert found[1].tolist() == [False, False, True]


# Rows.


def test_a_row_holds_what_is_read_and_what_is_right():
    examples = laid([5, 3], 6).train(np.array([0, 1]), 0)
    rows = {tuple(read): i for i, read in enumerate(examples.read.tolist())}
    first, second = rows[0, 1, 2, 3, -7, -7], rows[5, 6, -7, -7, -7, -7]
    assert examples.targets[first].tolist() == [IGNORE_INDEX, 2, 3, 4, IGNORE_INDEX, IGNORE_INDEX]
    assert examples.targets[second].tolist() == [IGNORE_INDEX, 7, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]
    assert examples.positions[first].tolist() == [0, 1, 2, 3, 0, 1]
    assert examples.documents[first].tolist() == [0, 0, 0, 0, NO_DOCUMENT, NO_DOCUMENT]


def test_several_share_a_row_and_none_sees_another():
    found = laid([4, 3, 3, 5], 7, packing="documents")
    assert [[stop - start for start, stop in row] for row in found.rows] == [[4, 3, 3], [5]]
    row = [row.tolist() for row in (part[0] for part in found._examples(np.array([0])))]
    assert row[0] == [0, 1, 2, 4, 5, 7, 8]
    assert row[1] == [IGNORE_INDEX, 2, 3, IGNORE_INDEX, 6, IGNORE_INDEX, 9]
    assert row[2] == [0, 1, 2, 0, 1, 0, 1]
    assert row[3] == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("too_long", "kept", "cut", "left_out"), [("truncate", [5, 5], 1, 1), ("drop", [5], 0, 2)])
def test_what_is_too_long_is_cut_or_left_out_and_counted(too_long, kept, cut, left_out):
    found = laid([5, 9, 9], 4, answers=[2, 2, 6], too_long=too_long)  # the last one is all prompt within the context
    assert [stop - start for row in found.rows for start, stop in row] == kept
    assert (found.counts.cut, found.counts.left_out, found.counts.conversations) == (cut, left_out, 3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(3, 12), min_size=1, max_size=12), st.integers(2, 9), st.sampled_from(["concat", "documents"]),
    st.sampled_from([0.0, 0.4]),
)  # fmt: skip
def test_every_answer_is_learnt_once_or_counted(lengths, context, packing, fraction):
    found = laid(lengths, context, packing=packing, eval_fraction=fraction)
    train = found.train(np.arange(found.train_samples), 0) if found.train_samples else None
    held_out = found.held_out(np.arange(found.eval_samples)) if found.eval_samples else None
    targets = [part.targets[part.targets != IGNORE_INDEX] for part in (train, held_out) if part is not None]
    learnt = sorted(np.concatenate(targets).tolist()) if targets else []
    starts = np.cumsum([0, *lengths[:-1]])
    expected = [t for s, n in zip(starts, lengths) if context > 1 for t in range(s + 2, min(s + n, s + context + 1))]
    assert learnt == expected
    assert found.counts.targets == len(learnt)
    for of, numbers in ((found.train_targets, found.train_samples), (found.held_out_targets, found.eval_samples)):
        if numbers:
            count = of(np.arange(numbers), 0) if of == found.train_targets else of(np.arange(numbers))
            part = train if of == found.train_targets else held_out
            assert count == part.target_tokens
    for row in found.rows:
        assert sum(stop - start - 1 for start, stop in row) <= context


# What cannot be read.


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"prompt": "a"}', 'line 2 has neither "prompt" and "response"'),
        ('{"prompt": "a", "response": 3}', 'line 2 has neither "prompt" and "response"'),
        ('{"messages": []}', 'line 2 has neither "prompt" and "response"'),
        ('{"messages": [{"role": "user"}]}', 'line 2 has neither "prompt" and "response"'),
        ("[1]", 'line 2 has neither "prompt" and "response"'),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2 has messages, and the tokenizer no chat template"),
    ],
)
def test_a_line_that_is_none_is_named_on_all_ranks(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(lines({"prompt": "a", "response": "b"}) + line + "\n")
    with pytest.raises(CollectiveError) as caught:
        run_ranks(2, lambda comm: read(tmp_path / "a.jsonl", comm))
    assert f"{tmp_path / 'a.jsonl'}: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only one system message') }}", "x: line 1: the chat template of T refuses it: only one system"),
        ("{{ messages | length }}", "changes what came before when message 2 is added"),
        ("{{ messages[0].__class__.__mro__ }}", "refuses it"),
    ],
)
def test_a_template_that_cannot_be_used(source, message):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=message):
        Template(source, {}, "T").parts(messages, "x: line 1")


def test_a_template_that_is_none():
    with pytest.raises(DataError, match="T: its chat template cannot be read"):
        Template("{% if %}", {}, "T").parts([{"role": "assistant", "content": "a"}], "x")
    with pytest.raises(DataError, match='no message has the role "assistant"'):
        Template(CHATML, {}, "T").parts([{"role": "user", "content": "a"}], "x")


def test_nothing_to_learn_is_refused():
    data = Data(path=("a.jsonl",), eval_fraction=0.5)
    with pytest.raises(DataError, match=r"--data\.path a\.jsonl: none of 2 conversations has an answer within"):
        refuse_nothing(laid([9, 9], 4, answers=[8, 8]), data)
    with pytest.raises(ConfigError, match=r"--data\.eval-fraction 0\.5 of 1 rows leaves 1 to train on and 0 held out"):
        refuse_nothing(laid([5], 4, eval_fraction=0.5), data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__path": (), "model__init_from": "x"}, "--data.format chat needs one --data.path"),
        ({"data__path": ("a", "1", "b", "1")}, "--data.format chat needs one --data.path"),
        ({"data__tokenizer": "auto"}, "--data.format chat with --data.tokenizer auto: name one that is there"),
        ({"data__tokenizer": "bpe:300"}, "--data.format chat with --data.tokenizer bpe:300: name one that is there"),
        ({"model__arch": "bert"}, "--model.arch bert has no answers to learn"),
    ],
)
def test_settings_that_do_not_go_with_it(changes, message):
    base = {"data__format": "chat", "data__path": ("a.jsonl",), "data__tokenizer": "bytes"}
    validate(replaced(Config(), **base))
    validate(replaced(Config(), **(base | {"data__tokenizer": "auto", "model__init_from": "x"})))
    with pytest.raises(ConfigError) as caught:
        validate(replaced(Config(), **(base | changes)))
    assert str(caught.value).startswith(message)
