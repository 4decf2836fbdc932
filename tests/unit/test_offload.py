"""Parts of the state in files: the files, what is refused, and moments that are copied block by block."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import CPU, build_train_model, small_config

from mpilm.comm.base import SelfComm
from mpilm.config.check import check_config
from mpilm.config.schema import Config, TrainConfig
from mpilm.config.settings import override
from mpilm.errors import ConfigError, FileError
from mpilm.ops.tensor_axis import TensorAxis
from mpilm.optim import optimizer
from mpilm.optim.optimizer import AdamW
from mpilm.parallel import offload
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.layout import resolve_layouts
from mpilm.parallel.offload import make_offload, measure_write_rate

GPU = torch.device("cuda")
GROWTH = """
import re, torch
from pathlib import Path
from mpilm.config.schema import TrainConfig
from mpilm.parallel.offload import make_offload
def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
before = anonymous()
cpu = torch.device("cpu")
x = make_offload(TrainConfig(offload="optimizer", offload_dir=FOLDER), cpu).zeros("moments", 1 << 26, cpu)
x.fill_(1.0)
print(anonymous() - before, float(x.sum(dtype=torch.float64)), len(list(Path(FOLDER).iterdir())))
"""


def test_offloaded_tensor_is_not_in_the_memory_of_the_process_and_leaves_no_file(tmp_path):
    code = GROWTH.replace("FOLDER", repr(str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    growth, total, files = done.stdout.split()
    assert int(growth) < 16 << 20  # of 256 MiB
    assert (float(total), files) == (1 << 26, "0")


def test_model_holds_in_memory_what_is_not_offloaded(tmp_path):
    held = {}
    for kind in ("none", "optimizer", "parameters"):
        model = build_train_model(small_config(train__offload=kind, train__offload_dir=str(tmp_path)), SelfComm())
        held[kind] = {part: model.memory_bytes()[part] for part in ("weights", "moments", "gradients")}
        assert model.offloaded_bytes == sum(held["none"].values()) - sum(held[kind].values())
    assert all(held["none"].values())
    assert held["optimizer"] == {**held["none"], "moments": 0}
    assert not any(held["parameters"].values())


@pytest.mark.parametrize(
    ("train", "device", "problem"),
    [
        ({"offload_dir": "/nonexistent"}, CPU, r"/nonexistent: no file can be created there \(No such file or directory\)"),
        ({"offload_dir": "/proc"}, CPU, r"/proc: no file can be created there \(No such file or directory\); name a folder"),
        ({"offload_dir": "/dev/shm"}, CPU, r"/dev/shm lies in memory \(tmpfs\); name a folder on a local disk"),
        ({"offload": "parameters"}, GPU, "parameters needs --train.device cpu"),
        ({"optimizer": "muon"}, GPU, "needs --train.optimizer adamw or sgd, not muon"),
    ],
)
def test_offload_that_cannot_work_is_refused(train, device, problem):
    with pytest.raises(ConfigError, match=problem):
        make_offload(TrainConfig(**{"offload": "optimizer", **train}), device)


def test_disk_without_room_is_refused_at_once(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    wanted = make_offload(TrainConfig(offload="optimizer", offload_dir=str(tmp_path)), CPU)
    with pytest.raises(FileError, match=r"No space left on device: 4 MiB more are needed there, [\d,]+ MiB are free"):
        wanted.zeros("moments", 1 << 20, CPU)


@pytest.mark.parametrize("changes", [{"parallel__sync_every": 2}, {"fault__elastic": True}])
def test_settings_that_copy_the_state_into_memory_are_refused(changes):
    with pytest.raises(ConfigError, match="keeps copies of the state in memory: leave it out"):
        check_config(override(Config(), train__offload="optimizer", **changes))


def test_gradients_in_shared_memory_and_in_files_at_once_are_refused():
    both = override(Config(), train__offload="parameters", parallel__reduce="shared-memory")
    with pytest.raises(ConfigError, match=r"--parallel.reduce shared-memory needs gradients in memory: write messages"):
        check_config(both)


def test_write_rate_of_a_full_disk_is_unknown(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", refuse)
    assert measure_write_rate(tmp_path) is None


def test_write_rate_is_that_of_the_folder(tmp_path):
    assert 1e6 < measure_write_rate(tmp_path) < 1e12
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a/b", "a"])
def test_file_system_of_a_folder_is_that_of_the_deepest_mount(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    table = f"x / ext4 rw 0 0\nx {tmp_path}/a tmpfs rw 0 0\nx {tmp_path}/a/b xfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda _: table)
    assert offload._find_file_system(folder) == ("xfs" if name == "a/b" else "tmpfs")


def test_moments_that_are_copied_block_by_block_get_the_same_update(monkeypatch):
    """As from a GPU, whose moments lie in the memory of the host."""
    monkeypatch.setattr(optimizer, "BLOCK_NUMEL", 64)
    settings, layouts = TrainConfig(lr=0.1), resolve_layouts({"embed": (13, 8), "blocks.0.up": (24, 8), "norm": (5,)}, {})
    results = []
    for copies in (False, True):
        flat = FlatParameters(layouts, CPU)
        adamw, gradients = AdamW({(0, False): flat}, settings, TensorAxis(SelfComm(), 1)), flat.zeros("gradients", flat.reduced)
        generator = torch.Generator().manual_seed(0)
        for vector in (flat.values, gradients):
            vector.tensor.copy_(torch.randn(vector.tensor.shape, generator=generator))
        for count in (1, 2, 3):
            if copies:
                adamw.count = count
                for decays, spans in adamw.spans.items():
                    views = [[adamw.moments[name][key].view(*span) for key, span in spans] for name in adamw.STATE_NAMES]
                    values, grads = ([vector.view(*span) for _, span in spans] for vector in (flat.values, gradients))
                    adamw.update_in_blocks(values, grads, views, 0.1, settings.weight_decay * decays)
            else:
                adamw.step({(0, False): gradients}, 0.1)
        results.append([flat.values.tensor, *(adamw.moments[name][0, False].tensor for name in adamw.STATE_NAMES)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
