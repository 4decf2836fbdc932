"""Certificates on all layouts, audits of runs and of altered runs, and the first difference of two runs."""

import json
import re
import shutil
from unittest import mock

import pytest
import torch
from runs import FAMILIES, layout, train_to_end, train_until_killed
from safetensors.torch import load_file, save_file
from text import make_text, tiny_config, write_tokens
from thread_ranks import run_ranks

from mpilm.checkpoint import tensor_digests
from mpilm.checkpoint.format import MANIFEST, hash_blocks, manifest_entry
from mpilm.comm.base import SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import DataConfig
from mpilm.config.settings import override
from mpilm.data.prepare import prepare_tokens
from mpilm.errors import ConfigError, DataError, FileError, NotReproducedError
from mpilm.trainer import loop
from mpilm.trainer.build import build_run
from mpilm.trainer.certificate import CERTIFICATE
from mpilm.verification.arguments import AuditArguments, ReplayData, ReplayParallel
from mpilm.verification.audit import audit_run
from mpilm.verification.bisection import find_first_difference

STEPS = {"train__steps": 8, "checkpoint__every": 3, "checkpoint__keep": 0, "run__certify_every": 2, "run__eval_every": 0}
PARTS = {"model__tensor_parts": 2, "model__sequence_parts": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPILM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A run of 8 steps on two ranks: checkpoints at 3, 6 and 8, lines at 2, 3, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_to_end(tiny_config(data, folder, **STEPS, **PARTS), 2)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run, to be altered."""
    return shutil.copytree(trained, tmp_path / "copy")


def audit(*runs, size=1, steps="", command=audit_run, **settings):
    """Return what the command prints on thread ranks."""
    arguments, printed = AuditArguments(runs=tuple(map(str, runs)), steps=steps, **settings), []
    run_ranks(size, lambda comm: command(arguments, comm, printed.append if comm.rank == 0 else lambda text: None))
    return "\n".join(printed)


def refuse(kind, *runs, **options):
    """Return the message with which an audit ends."""
    with pytest.raises(CollectiveError) as caught:
        audit(*runs, **options)
    assert type(caught.value.error) is kind, caught.value
    return str(caught.value)


@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {}),
        (3, layout(zero=1)),
        (4, layout(pipeline=2, tensor=2)),
        (4, layout(context=2, zero=3)),
        (8, layout(pipeline=2, tensor=2, schedule="zero-bubble", zero=2)),
    ],
)
def test_certificate_is_the_same_on_every_layout(tmp_path, data, trained, size, changes):
    train_to_end(tiny_config(data, tmp_path / "run", **STEPS, **PARTS, **changes), size)
    assert (tmp_path / "run" / CERTIFICATE).read_bytes() == (trained / CERTIFICATE).read_bytes()


def test_certificate_has_a_line_of_each_due_step_and_checkpoint(trained):
    lines = [json.loads(line) for line in (trained / CERTIFICATE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8]
    assert [line["samples"] for line in lines] == [[0, 32], [32, 48], [48, 64], [64, 96], [96, 128]]
    assert [len(line["losses"]) for line in lines] == [16] * 5
    assert {"model.embed_tokens.weight", "blocks.1.attn.q.weight.exp_avg_sq"} <= lines[0]["tensors"].keys()


def test_killed_and_resumed_run_has_the_same_certificate(tmp_path, data, trained):
    config = tiny_config(data, tmp_path / "run", **STEPS, **PARTS)
    train_until_killed(config, 3, step=5)
    train_to_end(override(config, parallel__tensor=2), 4)
    assert (tmp_path / "run" / CERTIFICATE).read_bytes() == (trained / CERTIFICATE).read_bytes()


def test_no_certificate_is_written_if_none_is_wanted(tmp_path, data):
    changes = {**STEPS, "run__certify_every": 0, "train__steps": 2}
    train_to_end(tiny_config(data, tmp_path / "run", **changes), 1)
    assert not (tmp_path / "run" / CERTIFICATE).exists()
    assert "has no certificate.jsonl to check" in refuse(ConfigError, tmp_path / "run")
    assert "equal in 2 logged losses, 1 checkpoint" in audit(tmp_path / "run", steps="1:2")
    flip_bit(tmp_path / "run/checkpoints/step-00000002/model.safetensors", "model.norm.weight")
    assert "step 2: the state is not that of" in refuse(NotReproducedError, tmp_path / "run", steps="1:2")


def flip_bit(path, name):
    """Flip the lowest bit of a tensor's first element in a file, and let the manifest agree."""
    tensors = load_file(path)
    tensors[name].view(torch.int32).flatten()[0] ^= 1
    save_in_place(path, tensors)


def save_in_place(path, tensors):
    """Change the bytes of tensors in a file, and let the manifest agree, as someone with a purpose would."""
    before = path.read_bytes()
    start = 8 + int.from_bytes(before[:8], "little")
    header = json.loads(before[8:start])
    content = bytearray(before)
    for name, tensor in tensors.items():
        first, last = header[name]["data_offsets"]
        content[start + first : start + last] = tensor.numpy().tobytes()
    path.write_bytes(bytes(content))
    manifest = json.loads((path.parent / MANIFEST).read_text())
    manifest.pop("sha256")
    manifest["files"][path.name] = manifest_entry(len(content), hash_blocks(bytes(content)))
    (path.parent / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


@pytest.mark.parametrize(
    ("size", "parallel"), [(1, {}), (3, {"zero": 2}), (4, {"pipeline": 2, "tensor": 2}), (2, {"context": 2}), (8, {})]
)
def test_audit_on_other_ranks_finds_the_same_bits(run, size, parallel):
    printed = audit(run, size=size, steps="5:7", parallel=ReplayParallel(**parallel))
    assert "recomputing  steps 4 to 7 from step-00000003" in printed
    assert "steps 5 to 7, equal in 3 logged losses, 1 certified state" in printed


def test_audit_of_the_first_steps_begins_at_the_start(run):
    printed = audit(run, size=2, steps="1:2")
    assert "recomputing  steps 1 to 2 from the start on 2 ranks (data 2)" in printed


def test_audit_needs_no_checkpoint(run):
    shutil.rmtree(run / "checkpoints")
    assert "these bits   steps 2 to 3" in audit(run, steps="2:3")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_every_family_is_audited(tmp_path, data, family):
    config = tiny_config(data, tmp_path / "run", **{**STEPS, "train__steps": 4, **FAMILIES[family]})
    train_to_end(config, 2)
    assert "these bits" in audit(tmp_path / "run", size=3, steps="4:4")


def test_digests_of_a_checkpoint_are_those_of_the_state(tmp_path, data):
    """With blocks so small that tensors are cut in many places."""
    with mock.patch.object(tensor_digests, "DIGEST_BLOCK_BYTES", 1000):
        train_to_end(tiny_config(data, tmp_path / "run", **STEPS, **PARTS, **layout(zero=2)), 3)
        assert "these bits" in audit(tmp_path / "run", size=2, steps="4:8", parallel=ReplayParallel(tensor=2))
    assert "step-00000003 is not what the run computed" in refuse(NotReproducedError, tmp_path / "run", steps="4:4")


def test_altered_checkpoint_is_found_and_the_tensor_named(run):
    flip_bit(run / "checkpoints/step-00000006/model.safetensors", "model.layers.1.mlp.up_proj.weight")
    for steps in ("4:6", "7:8"):
        message = refuse(NotReproducedError, run, steps=steps)
        assert "step-00000006 is not what the run computed" in message
        assert "certificate: model.layers.1.mlp.up_proj.weight" in message


def test_other_tensors_in_a_checkpoint_are_refused(run):
    path = run / "checkpoints/step-00000006/model.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    assert "does not hold the tensors of this run" in refuse(DataError, run, steps="4:6")
    assert "it is a checkpoint of another model" in refuse(ConfigError, run, steps="7:8")


def edit_metrics(run, step, **values):
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row.get("step") == step and "loss" in row:
            row.update(values)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(("step", "name"), [(5, "loss"), (8, "grad_norm")])
def test_edited_metrics_are_found_and_the_step_named(run, step, name):
    edit_metrics(run, step, **{name: 1.5})
    message = refuse(NotReproducedError, run, steps="4:8")
    assert message.startswith(f"step {step} (the first that differs of 4 to 8): metrics.jsonl has the")
    assert " 1.5, recomputed it is " in message


def test_damaged_certificate_is_refused(run):
    path = run / CERTIFICATE
    path.write_text(path.read_text().replace('"step": 4', '"step": 5'))
    assert "line 3 (step 5) has been changed" in refuse(DataError, run)


def test_checkpoint_without_a_line_is_compared_with_the_recomputed_state(run):
    """Someone has removed the last line of the certificate, and changed the checkpoint that it was of."""
    path = run / CERTIFICATE
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert "the certificate ends at step 6: later lines may have been removed" in audit(run, steps="7:8")
    flip_bit(run / "checkpoints/step-00000008/model.safetensors", "model.norm.weight")
    assert "step 8: the state is not that of" in refuse(NotReproducedError, run, steps="7:8")


def test_edited_settings_are_told_from_a_wrong_computation(run):
    path = run / "checkpoints/step-00000006/trainer.json"
    path.write_text(path.read_text().replace('"lr": 0.003', '"lr": 0.002'))
    message = refuse(NotReproducedError, run, steps="4:5")
    assert "the settings in the run folder are not those with which step 4 was computed" in message


def test_damaged_file_of_a_checkpoint_is_named(run):
    (run / "checkpoints/step-00000003/tokenizer.json").write_text("{}")
    assert "tokenizer.json has 2 bytes, but the manifest lists" in refuse(DataError, run, steps="4:5")


def test_lost_metrics_are_said(run):
    (run / "metrics.jsonl").unlink()
    assert "note         metrics.jsonl has no loss of steps 4 to 5, or cannot be read" in audit(run, steps="4:5")


def test_steps_of_which_nothing_was_recorded_prove_nothing(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", **STEPS, **PARTS)
    train_to_end(override(config, run__log_every=8, run__certify_every=0, checkpoint__every=0), 1)
    message = refuse(ConfigError, tmp_path / "run", steps="3:4")
    assert "--steps 3:4: the run recorded no loss, state or checkpoint of these steps" in message


def test_settings_changed_at_a_resume_divide_the_steps(tmp_path, data):
    config = tiny_config(data, tmp_path / "run", **STEPS, **PARTS)
    train_until_killed(config, 2, step=4)
    changes = {"train__lr": 1e-3, "checkpoint__allow_change": ("train.lr",)}
    train_to_end(override(config, **changes), 2)
    message = refuse(ConfigError, tmp_path / "run", steps="2:5")
    assert "went on with another train.lr after step 3; take steps 2 to 3 and 4 to 5 one after the other" in message
    assert "these bits" in audit(tmp_path / "run", steps="2:3")
    assert "these bits" in audit(tmp_path / "run", steps="4:5")


def test_skipped_steps_are_said(tmp_path, data):
    """The run takes the loss of step 5 for a spike."""
    right = loop.train_step

    def reject(model, source, step, flags, max_loss, recheck):
        return right(model, source, step, flags, 0.0 if step == 4 else max_loss, recheck)

    with mock.patch.object(loop, "train_step", reject):
        train_to_end(tiny_config(data, tmp_path / "run", **STEPS), 2)
    printed = audit(tmp_path / "run", size=3, steps="4:8")
    assert "  step 5: skipped by the run\n  step 6: loss" in printed
    assert "these bits   steps 4 to 8, equal in 4 logged losses, 3 certified states" in printed


def test_rewound_steps_are_left_out(tmp_path, data):
    """The run takes the loss of step 5 for a spike and returns to the state after step 3: the line of step 4 is of a state that
    it has left."""
    right = loop.train_step

    def reject(model, source, step, flags, max_loss, recheck):
        return right(model, source, step, flags, 0.0 if step == 4 else max_loss, recheck)

    with mock.patch.object(loop, "train_step", reject):
        train_to_end(tiny_config(data, tmp_path / "run", **STEPS, train__on_spike="rewind"), 2)
    printed = audit(tmp_path / "run", size=3, steps="4:8")
    assert "  step 4: skipped by the run\n  step 5: skipped by the run, equal in every tensor\n  step 6: loss" in printed
    assert "these bits   steps 4 to 8, equal in 3 logged losses, 3 certified states" in printed


def test_changed_text_is_refused_by_content(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    text = make_text().splitlines()
    text[7] = text[7][::-1]
    (other / "text.txt").write_text("\n".join(text) + "\n")
    message = refuse(DataError, run, steps="1:2", data=ReplayData((str(other / "text.txt"),)))
    assert "was trained on other data: data.path: digest" in message


def test_lost_text_may_be_named_anew(run, tmp_path, data):
    for path in data.parent.iterdir():
        shutil.copy(path, tmp_path)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace(str(data), "/nowhere/tokens"))
    for path in run.glob("checkpoints/*"):
        (path / "trainer.json").write_text((path / "trainer.json").read_text().replace(str(data), "/nowhere/tokens"))
    assert "/nowhere/tokens" in refuse(FileError, run, steps="1:2")
    assert "these bits" in audit(run, steps="1:2", data=ReplayData((str(tmp_path / "tokens"),)))


def test_other_versions_are_refused_unless_allowed(run):
    path = run / "checkpoints/step-00000003/trainer.json"
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "1.0"'))
    assert "torch 1.0 then" in refuse(ConfigError, run, steps="1:2")
    assert "note         the last bits may differ" in audit(run, steps="1:2", allow_version=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": "7:9"}, "has 8 steps"),
        ({"steps": "7:8", "parallel": ReplayParallel(pipeline=4), "size": 4}, "--model.n-layers is 2"),
        ({"steps": "7:8", "parallel": ReplayParallel(tensor=4), "size": 4}, "--parallel.tensor 4"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(run, options, message):
    assert message in refuse(ConfigError, run, **options)


def test_folders_that_are_no_runs_are_refused(tmp_path):
    assert "is not a run folder" in refuse(FileError, tmp_path, steps="1:2")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"train__reproducible": False}, "no fixed order"), ({"parallel__wire_dtype": "bfloat16"}, "carry over")],
)
def test_runs_without_exact_sums_are_refused(tmp_path, data, changes, reason):
    train_to_end(tiny_config(data, tmp_path / "run", **{**STEPS, "train__steps": 2, **changes}), 2)
    assert reason in refuse(ConfigError, tmp_path / "run", steps="1:2")


# Two runs.


def same_tokens(one, other):
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.targets, other.targets)


def compare(*runs, size=1):
    return refuse(NotReproducedError, *runs, size=size, command=find_first_difference)


def test_equal_runs_are_equal(tmp_path, data, trained):
    train_to_end(tiny_config(data, tmp_path / "run", **{**STEPS, "run__certify_every": 4}, **PARTS), 1)
    assert "equal bits   in all 5 common lines, up to step 8" in audit(trained, trained, command=find_first_difference)
    assert "equal bits   in all 4 common lines, up to step 8" in audit(trained, tmp_path / "run", command=find_first_difference)


def test_first_step_of_another_setting_is_found(tmp_path, data, trained):
    train_to_end(tiny_config(data, tmp_path / "run", **STEPS, **PARTS, train__warmup_steps=3), 1)
    message = compare(trained, tmp_path / "run", size=2)
    assert "differ first in step 1: the update of model.norm.weight" in message


def test_first_microbatch_with_other_tokens_is_found(tmp_path, data, trained):
    """A part of the text differs; it is first read in some step, and all before is equal."""
    text = make_text()
    (tmp_path / "text.txt").write_text(text[:3000] + text[3000:3400].swapcase() + text[3400:])
    prepare_tokens(DataConfig(path=(str(tmp_path / "text.txt"),), tokenizer="bytes"), tmp_path / "tokens", SelfComm())
    train_to_end(tiny_config(tmp_path / "tokens", tmp_path / "run", **STEPS, **PARTS), 1)
    found = re.search(r"differ first in step (\d+): microbatch (\d+) of 8 has other tokens", compare(trained, tmp_path / "run"))
    step, microbatch = map(int, found.groups())
    runs = [tiny_config(path, tmp_path / path.parent.name / "new", **STEPS) for path in (data, tmp_path / "tokens")]
    sources = [build_run(config, SelfComm()).batches for config in runs]  # the same conclusion, drawn directly
    places = [(s, m) for s in range(8) for m in range(8) if not same_tokens(*(each.training_batch(s, m) for each in sources))]
    assert places[0] == (step - 1, microbatch)


def test_run_that_computed_wrongly_is_told_from_the_other(tmp_path, data, trained):
    """One rank of one run flips a bit of a gradient in step 5: both recompute to the right one."""
    right = loop.train_step

    def flip(model, source, step, *more):
        if step == 4:
            with mock.patch.object(model.optimizer, "step", wraps=model.optimizer.step) as update:
                update.side_effect = lambda sums, lr: (next(iter(sums.values())).tensor.mul_(-3.0), mock.DEFAULT)[1]
                return right(model, source, step, *more)
        return right(model, source, step, *more)

    with mock.patch.object(loop, "train_step", flip):
        train_to_end(tiny_config(data, tmp_path / "run", **STEPS, **PARTS), 1)
    message = compare(trained, tmp_path / "run")
    assert f"recomputed, both runs are equal up to step 6; the record of {tmp_path / 'run'} is another" in message


def test_runs_without_common_steps_cannot_be_compared(tmp_path, data, trained):
    train_to_end(tiny_config(data, tmp_path / "run", **{**STEPS, "train__steps": 1}), 1)
    assert "no certified step in common" in refuse(ConfigError, trained, tmp_path / "run", command=find_first_difference)
