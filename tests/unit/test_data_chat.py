"""Conversations: what is learnt of them, how they share rows, and what cannot be read."""

import json
import resource

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import run_ranks

import mpilm.data.chat as chat
import mpilm.data.sources as sources
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import DataConfig
from mpilm.data.chat import ChatExamples, ChatTemplate, EncodedChats, find_chat_template, parse_conversation, read_chats
from mpilm.data.sources import find_sources
from mpilm.data.tokenizer import Tokenizer, bytes_tokenizer
from mpilm.errors import ConfigError, DataError
from mpilm.kernels.base import IGNORE_INDEX
from mpilm.model.sequence_info import NO_DOCUMENT

TOKENIZER = bytes_tokenizer()
EOS = TOKENIZER.eos
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTENTS = "{% for m in messages %}{{ m.content }}{% endfor %}"


def lines(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def read(path, comm=None, template=None, tokenizer=TOKENIZER):
    return read_chats(find_sources(str(path)), tokenizer, template, comm or SelfComm("world"))


def fill_rows(lengths, context, prompts=None, **settings):
    """Conversations of so many tokens, of which all but the prompt's, two unless stated, are answers."""
    ends = np.cumsum(lengths)
    is_answer = np.ones(sum(lengths), dtype=bool)
    for end, length, prompt in zip(ends, lengths, prompts or [2] * len(lengths)):
        is_answer[end - length : end - length + prompt] = False
    chats = EncodedChats(np.arange(sum(lengths), dtype=np.int64), is_answer, ends)
    return ChatExamples(chats, context, DataConfig(path=("a.jsonl",), **{"eval_fraction": 0.0} | settings), -7)


def span_lengths(examples):
    return [[stop - start for start, stop in row] for row in examples.rows]


# What is learnt.


def test_read_chats_learns_the_response_and_its_end(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"prompt": "ab", "response": "cde"}, {"prompt": "", "response": "f"}))
    chats = read(tmp_path / "a.jsonl")
    assert chats.tokens.tolist() == [*b"abcde", EOS, *b"f", EOS]
    assert chats.is_answer.tolist() == [False, False, True, True, True, True, True, True]
    assert chats.ends.tolist() == [6, 8]


def test_parse_conversation_learns_the_turns_of_the_assistant():
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    messages = [{"role": role, "content": c} for role, c in zip(roles, ["Be brief.", "hi", "yes", "why", "so", "cut"])]
    turns = parse_conversation(lines({"messages": messages}).encode(), "a: line 1", ChatTemplate(CHATML, {}, "x"))
    assert [is_answer for _, is_answer in turns] == [False, True, False, True]
    assert [turns[i][0] for i in (1, 3)] == ["yes<|im_end|>\n", "so<|im_end|>\n"]
    assert "".join(text for text, _ in turns) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
        "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nso<|im_end|>\n"
    )


def test_chat_template_renders_as_transformers(tmp_path):
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "tokenizer.json").write_text(TOKENIZER.json)
    source = (
        "{{ bos_token }}\n{%- for m in messages %}\n  [{{ m['role'] | upper }}] {{ m['content'] | trim }}{{ eos_token }}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n  [ASSISTANT]\n{%- endif %}"
    )
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    theirs.chat_template = source
    theirs.save_pretrained(tmp_path)
    template = find_chat_template(tmp_path)
    messages = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b"}]
    for count, begin in ((1, True), (2, False)):
        expected = theirs.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=begin)
        assert template.render(messages[:count], "x", begin) == expected
    assert find_chat_template(tmp_path / "tokenizer.json").source == template.source
    assert find_chat_template(tmp_path / "nowhere") is None


def test_find_chat_template_takes_the_default_of_several(tmp_path):
    several = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert find_chat_template(tmp_path).source == "b"


def test_read_chats_names_of_special_tokens_in_a_template_are_those_tokens(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"prompt": "a", "response": "b"}))
    template = ChatTemplate("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}", {}, "x")
    chats = read(tmp_path / "a.jsonl", template=template)
    assert chats.tokens.tolist() == [97, EOS, 98, EOS]
    assert chats.is_answer.tolist() == [False, False, True, True]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_read_chats_is_the_same_on_any_ranks(tmp_path, size, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 64)
    values = [{"prompt": "p" * (i % 5), "response": "r" * (i % 7)} for i in range(11)]
    (tmp_path / "a.jsonl").write_text(lines(*values[:6]) + "\n \n" + lines(*values[6:]))
    alone = read(tmp_path / "a.jsonl")
    for theirs in run_ranks(size, lambda comm: read(tmp_path / "a.jsonl", comm)):
        assert all(np.array_equal(one, other) for one, other in zip(theirs, alone, strict=True))
    assert len(alone.ends) == 11


def test_chat_template_knows_what_transformers_adds_to_jinja():
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}:"
        "{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    assert ChatTemplate(source, {}, "x").split_turns(messages, "x") == [("user:u;assistant:", False), ("a;", True)]
    assert ChatTemplate("{{ strftime_now('%Y') }}" + CONTENTS, {}, "x").split_turns(messages, "x")


def test_read_chats_token_across_turns_is_no_answer(tmp_path):
    """A template's text is encoded in one: a token that joins two turns begins in the prompt."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "c": 3, "</s>": 4}, [("a", "b")]))
    (tmp_path / "a.jsonl").write_text(lines({"prompt": "ca", "response": "bc"}))
    template, tokenizer = ChatTemplate(CONTENTS, {}, "x"), Tokenizer(library.to_str(), 4, "x")
    chats = read(tmp_path / "a.jsonl", template=template, tokenizer=tokenizer)
    assert chats.tokens.tolist() == [3, 2, 3]
    assert chats.is_answer.tolist() == [False, False, True]


# Rows.


def test_chat_examples_row_holds_inputs_and_targets():
    batch = fill_rows([5, 3], 6).make_batch(np.array([0, 1]), 0)
    rows = {tuple(tokens): i for i, tokens in enumerate(batch.tokens.tolist())}
    first, second = rows[0, 1, 2, 3, -7, -7], rows[5, 6, -7, -7, -7, -7]
    assert batch.targets[first].tolist() == [IGNORE_INDEX, 2, 3, 4, IGNORE_INDEX, IGNORE_INDEX]
    assert batch.targets[second].tolist() == [IGNORE_INDEX, 7, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]
    assert batch.positions[first].tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.documents[first].tolist() == [0, 0, 0, 0, NO_DOCUMENT, NO_DOCUMENT]


def test_chat_examples_documents_packing_keeps_conversations_apart():
    examples = fill_rows([4, 3, 3, 5], 7, packing="documents")
    assert span_lengths(examples) == [[4, 3, 3], [5]]
    batch = examples.make_batch(np.arange(2), 0)
    row = batch.tokens[:, 0].tolist().index(0)
    assert batch.tokens[row].tolist() == [0, 1, 2, 4, 5, 7, 8]
    assert batch.targets[row].tolist() == [IGNORE_INDEX, 2, 3, IGNORE_INDEX, 6, IGNORE_INDEX, 9]
    assert batch.positions[row].tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert batch.documents[row].tolist() == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("too_long", "lengths", "truncated", "left_out"), [("truncate", [5, 5], 1, 1), ("drop", [5], 0, 2)])
def test_chat_examples_too_long_is_cut_or_left_out_and_counted(too_long, lengths, truncated, left_out):
    examples = fill_rows([5, 9, 9], 4, prompts=[2, 2, 6], too_long=too_long)  # the last is all prompt within the context
    assert [length for row in span_lengths(examples) for length in row] == lengths
    assert (examples.truncated, examples.left_out) == (truncated, left_out)


@settings(max_examples=60)
@given(
    st.lists(st.integers(3, 12), min_size=6, max_size=12), st.integers(2, 9), st.sampled_from(["concat", "documents"]),
    st.sampled_from([0.0, 0.4]),
)  # fmt: skip
def test_chat_examples_every_answer_is_learnt_once(lengths, context, packing, fraction):
    try:
        examples = fill_rows(lengths, context, packing=packing, eval_fraction=fraction)
    except ConfigError:  # so few rows that one split is empty
        return
    splits = [(np.arange(examples.train_samples), 0), (np.arange(examples.eval_samples), None)]
    batches = [examples.make_batch(*split) for split in splits if len(split[0])]
    learnt = sorted(torch.cat([batch.targets[batch.targets != IGNORE_INDEX] for batch in batches]).tolist())
    starts = np.cumsum([0, *lengths[:-1]])
    assert learnt == [t for s, n in zip(starts, lengths) for t in range(s + 2, min(s + n, s + context + 1))]
    assert examples.targets.sum() == len(learnt)
    assert [examples.count_targets(*split) for split in splits if len(split[0])] == [batch.target_tokens for batch in batches]
    assert all(sum(length - 1 for length in row) <= context for row in span_lengths(examples))


# What cannot be read.


NO_FORM = 'line 2 has neither "prompt" and "response"'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ('{"prompt": "a"}', NO_FORM),
        ('{"prompt": "a", "response": 3}', NO_FORM),
        ('{"messages": []}', NO_FORM),
        ('{"messages": [{"role": "user"}]}', NO_FORM),
        ("[1]", "line 2 is not a JSON object, but list"),
        ('{"prompt": "a", "response": "\\ud800"}', "line 2 holds half a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2 has messages, and the tokenizer no chat template"),
    ],
)
def test_read_chats_wrong_line_raises_on_all_ranks(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(lines({"prompt": "a", "response": "b"}) + line + "\n")
    with pytest.raises(CollectiveError) as caught:
        run_ranks(2, lambda comm: read(tmp_path / "a.jsonl", comm))
    assert f"{tmp_path / 'a.jsonl'}: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{{ raise_exception('only one system message') }}",
            "x: line 1: the chat template of T, line 1, refuses it: only one system",
        ),
        ("{{ messages | length }}", "changes what came before when message 2 is added"),
        ("{{ messages[0].__class__.__mro__ }}", "refuses it"),
        ("{% if %}", "the chat template of T, line 1, cannot be read"),
    ],
)
def test_chat_template_unusable_raises(source, message):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=message):
        ChatTemplate(source, {}, "T").split_turns(messages, "x: line 1")


GREEDY = {
    '\n{{ "a" * 3000000000 }}': "line 2, refuses it: the result of . is too large",
    "{{ [0] * 1000000000 }}": "line 1, refuses it: the result of . is too large",
    "{{ 9 ** 9 ** 9 }}": "line 1, refuses it: the result of .. is too large",
    "{% for i in range(1000000000) %}x{% endfor %}": "line 1, refuses it: Range too big",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "line 1, .* takes more than 0.2 s",
    "{% for i in range(9) %}\n{{ 'x' * 1000000 }}{% endfor %}": "line 1, refuses it: it makes 9,000,000 characters of",
    "\n{{ 'a'.center(3000000000) }}": "line 2, refuses it: it takes too much memory",
    "\n\n{{ 'a'|center(3000000000) }}": "line 3, refuses it: it takes too much memory",
    "{{ '%03000000000d' % 1 }}": "line 1, refuses it: it takes too much memory",
    "{% set n = namespace(s='aa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}": "line 1, refuses it: it ",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "line 1, refuses it: maximum recursion",
    "{{ " + "(" * 5000: "line 1, cannot be read: ",
}


@pytest.mark.parametrize("source", GREEDY)
def test_chat_template_that_takes_too_much_raises(source, monkeypatch):
    monkeypatch.setattr(chat, "RENDER_S", 0.2)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=f"the chat template of FOLDER, {GREEDY[source]}"):
        ChatTemplate(source, {}, "FOLDER").split_turns(messages, "x: line 1")
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_chat_template_limits_the_time_of_a_conversation(monkeypatch):
    monkeypatch.setattr(chat, "RENDER_S", 0.2)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 5000
    with pytest.raises(DataError, match=r"refuses it: it takes more than 0\.2 s"):
        ChatTemplate(CHATML, {}, "FOLDER").split_turns(messages, "x: line 1")


def test_find_chat_template_that_is_no_text_raises(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(DataError, match=r"chat_template\.jinja is not UTF-8 at byte 1"):
        find_chat_template(tmp_path)


def test_chat_template_without_answers_raises():
    with pytest.raises(DataError, match='no message has the role "assistant"'):
        ChatTemplate(CHATML, {}, "T").split_turns([{"role": "user", "content": "a"}], "x")


def test_chat_examples_empty_split_raises():
    with pytest.raises(DataError, match=r"--data\.path a\.jsonl: none of 2 conversations has an answer within"):
        fill_rows([9, 9], 4, prompts=[8, 8])
    with pytest.raises(ConfigError, match=r"--data\.eval-fraction 0\.5 of 1 rows leaves 1 to train on and 0 held out"):
        fill_rows([5], 4, eval_fraction=0.5)
