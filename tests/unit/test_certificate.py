"""The lines of a certificate: the Merkle tree of RFC 6962, and damage."""

import json

import pytest

from mpilm.errors import DataError
from mpilm.trainer.certificate import CERTIFICATE, CertificateWriter, digest_facts, list_leaves, merkle_root, read_certificate

# The inputs and roots that the Certificate Transparency implementations share as test vectors, as text.
INPUTS = ("", "\x00", "\x10", " !", "01", "@ABC", "PQRSTUVW", "`abcdefghijklmno")
ROOTS = {
    0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


def facts(step, digest="ab"):
    numbers = {"loss": 0.1 + step, "grad_norm": None, "losses": [1.5, 2.5], "samples": [0, 8 * step]}
    digests = {"settings": "s", "data": "d", "program": "p"}
    return {"step": step, **numbers, **digests, "tensors": {"a": digest, "b.exp_avg": "cd"}}


def write(folder, *steps, after=0):
    writer = CertificateWriter(folder, after)
    for step in steps:
        writer.write(facts(step))
    writer.close()
    return writer


def edit(folder, change):
    """Change the lines of a certificate, as a list, in place."""
    path = folder / CERTIFICATE
    lines = path.read_text().splitlines()
    change(lines)
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("count", ROOTS)
def test_merkle_root_has_the_published_values(count):
    assert merkle_root(INPUTS[:count]) == ROOTS[count]


def test_lines_are_read_as_they_were_written(tmp_path):
    write(tmp_path, 3, 6)
    lines = list(read_certificate(tmp_path))
    assert [line.step for line in lines] == [3, 6]
    assert lines[0].fields["loss"] == 3.1
    assert lines[0].tensors == {"a": "ab", "b.exp_avg": "cd"}
    assert lines[1].fields["previous"] == lines[0].digest
    assert lines[0].fields["previous"] == ""


def test_resumed_certificate_is_that_of_an_uninterrupted_run(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
    write(whole, 3, 6, 9)
    write(resumed, 3, 6, 8)
    with open(resumed / CERTIFICATE, "ab") as file:
        file.write(b'{"step": 9, "lo')  # killed while it wrote
    assert [line.step for line in read_certificate(resumed)] == [3, 6, 8]
    assert write(resumed, after=6).last_step == 6
    write(resumed, 9, after=6)
    assert (resumed / CERTIFICATE).read_bytes() == (whole / CERTIFICATE).read_bytes()


def test_facts_have_one_digest_in_any_order():
    assert digest_facts({"a": 1, "b": [2.5]}) == digest_facts({"b": [2.5], "a": 1})
    assert digest_facts({"a": 1}) != digest_facts({"a": 2})


def replace_in(line, old, new):
    def change(lines):
        assert old in lines[line - 1]
        lines[line - 1] = lines[line - 1].replace(old, new)

    return change


def forge_second_line(lines):
    """Edit a value of the second line and make its root fit again."""
    fields = json.loads(lines[1])
    forged = facts(6, digest="00")
    lines[1] = json.dumps({**forged, "root": merkle_root(list_leaves(forged)), "previous": fields["previous"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_in(2, "6.1", "6.2"), "line 2 .step 6. has been changed: its root is not that of its values"),
        (replace_in(2, '"ab"', '"ac"'), "line 2 .step 6. has been changed"),
        (forge_second_line, "the chain is broken: line 3 .step 9. was not written after"),
        (lambda lines: lines.pop(1), "the chain is broken: line 2 .step 9. was not"),
        (lambda lines: lines.pop(0), "the chain is broken: line 1 .step 6. was not"),
        (lambda lines: lines.insert(1, lines[0]), "the chain is broken: line 2 .step 3. was not"),
        (lambda lines: lines.insert(1, "{}"), "line 2 is not a line of a certificate: it has no step"),
        (lambda lines: lines.insert(1, "?"), "line 2 is not JSON"),
        (replace_in(1, '"step": 3', '"step": "3"'), "line 1 is not a line of a certificate: its step has the wrong type"),
    ],
)
def test_every_change_is_found_and_its_line_named(tmp_path, change, message):
    write(tmp_path, 3, 6, 9)
    edit(tmp_path, change)
    with pytest.raises(DataError, match=message):
        list(read_certificate(tmp_path))
