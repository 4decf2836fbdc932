"""Seeded mutations of bytes, texts, JSON and files of several kinds."""

import gzip
import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

DEEP = 100_000
HOSTILE_JSON = (
    "0", "-1", "1", "1.5", "1e999", "NaN", "-Infinity", "true", "null", '""', '"x"', "[]", "{}", "[[1]]", '{"a": 1}', "9" * 30,
    "-" + "9" * 30, "1" + "0" * 400, "9" * 5000, str(2**31), str(2**53), str(2**63 - 1), str(2**63), str(2**64), "1000000000",
    '"\\ud800"', '"\\u0000"', '"../../etc/passwd"', '"' + "a" * 100_000 + '"', "[" * DEEP, "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 150 + "]" * 150, "[" + "[]," * 10_000 + "[]]",
)  # fmt: skip
HOSTILE_NUMBERS = (
    "0",
    "-1",
    "1",
    "3",
    "1.5",
    "1e999",
    "nan",
    "inf",
    "9" * 30,
    "9" * 5000,
    str(2**31),
    str(2**63),
    "0x" + "f" * 5000,
)
HOSTILE_TEXTS = (
    *HOSTILE_NUMBERS, "", "''", "true", "[]", "[" * 5000, "a." * 5000, "[[", "]]", "{", "}", '"', "\\", "\x00", "\ud800", "é",
    "=", "--", "\n", "[model]\n", "a = 1\n", "../..", "/dev/zero", "1" * 50 + "e9",
)  # fmt: skip
HOSTILE_JINJA = (
    '{{ "a" * 3000000000 }}', "{{ [0] * 1000000000 }}", "{% for i in range(1000000000) %}x{% endfor %}", "{{ 9 ** 9 ** 9 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "{{ 'a'.center(3000000000) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ '%03000000000d' % 1 }}",
    "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s=9) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}", "{{ lipsum(n=100000) }}",
    "{{ messages|join('a' * 9999) }}", "{{ '{:3000000000}'.format(1) }}", "{{ ''.__class__.__mro__ }}", "{{ (" * 500,
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{% if true %}" * 200, "{% endfor %}", "{{ a.b.c }}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%9999999Y') }}", "{{ messages|tojson(indent=100000000) }}",
    "{{ 'a'|indent(1000000000) }}", "{% break %}",
)  # fmt: skip


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Change one to three places of a file."""
    for _ in range(random.randint(1, 3)):
        at, size = random.randrange(len(data) + 1), random.choice((1, 1, 2, 4, 8, 64, len(data)))
        kind = random.choice((0, 0, 1, 1, 1, 1, 2, 3, 4, 5, 6))
        if kind <= 1 and at < len(data):
            data = (
                data[:at] + bytes([data[at] ^ (1 << random.randrange(8) if kind else random.randrange(256))]) + data[at + 1 :]
            )
        elif kind == 2:
            data = data[:at] + data[at + size :]
        elif kind == 3:
            data = data[:at] + data[at : at + size] * random.choice((2, 3, 1000 if size < 99 else 2)) + data[at:]
        elif kind == 4:
            data = data[:at]
        elif kind == 5:
            number = random.choice((0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, random.getrandbits(40)))
            data = data[:at] + number.to_bytes(8, "little")[: random.choice((4, 8))] + data[at + 8 :]
        else:
            data = data[:at] + random.choice(HOSTILE_JSON).encode() + data[at:]
    return data


def mutate_json(random: Random, data: bytes) -> bytes:
    """Replace, remove, rename or repeat a value of a JSON text, or change its bytes."""
    if random.random() < 0.3:
        return mutate_bytes(random, data)
    root = [json.loads(data)]
    places: list[tuple[Any, Any]] = [(root, 0)]
    for holder, key in places:
        value = holder[key]
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        places += [(value, each) for each in list(keys)[:200]]
    hole = "@HOLE@"
    holder, key = random.choice(places)
    kind = random.randrange(8)
    if kind == 0 and holder is not root:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[random.choice(("x", "", "__metadata__", "../a"))] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder += [holder[key]] * random.choice((1, 1000)) if holder is not root else []
    else:
        holder[key] = hole
    return json.dumps(root[0]).replace(f'"{hole}"', random.choice(HOSTILE_JSON)).encode()


def mutate_text(hostile: tuple[str, ...]) -> Callable[[Random, bytes], bytes]:
    """Return a mutation that puts hostile texts in the place of numbers, words or lines."""

    def mutate(random: Random, data: bytes) -> bytes:
        if random.random() < 0.2:
            return mutate_bytes(random, data)
        text = data.decode()
        for _ in range(random.randint(1, 2)):
            pattern = random.choice((r"-?\d[\d.e-]*", r"[\w.-]+", r"[^\n]*\n", r"\"[^\"]*\"", r"(?=[^\w])", r"(?m)^(?=.)"))
            spots = [match.span() for match in re.finditer(pattern, text)] or [(0, 0)]
            start, stop = random.choice(spots)
            text = text[:start] + random.choice(hostile) + text[stop if random.random() < 0.8 else start :]
        return text.encode("utf-8", "surrogatepass")

    return mutate


def mutate_header(random: Random, data: bytes) -> bytes:
    """Change the JSON header of a safetensors file, with its length made right, or any byte of the file."""
    if random.random() < 0.3:
        return mutate_bytes(random, data)
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(random, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutate_compressed(random: Random, data: bytes) -> bytes:
    """Change the text inside a stream, or the stream, or make it expand to 256 MiB."""
    if random.random() < 0.01:
        return gzip.compress(random.choice((b'{"text": "' + b"a" * 2**28 + b'"}\n', b"{}\n" * 2**26)), 1)
    if random.random() < 0.5:
        return mutate_bytes(random, data)
    return gzip.compress(mutate_json(random, gzip.decompress(data).splitlines()[0]) + b"\n")


def mutate_row(random: Random, data: bytes) -> bytes:
    """Change one row of a file of JSON lines."""
    rows = data.splitlines(keepends=True)
    at = random.randrange(len(rows))
    return b"".join([*rows[:at], mutate_json(random, rows[at].strip()) + b"\n" * (random.random() < 0.9), *rows[at + 1 :]])
