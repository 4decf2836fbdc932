"""The hardware of a rank: its cores among the ranks of a node, its threads, its GPU."""

import os
import time
from dataclasses import replace
from fractions import Fraction
from itertools import count, repeat

import pytest
import torch
from thread_ranks import run_ranks

from mpilm.comm.base import SelfComm
from mpilm.config.schema import ParallelConfig, TrainConfig
from mpilm.engine import core_binding, hardware
from mpilm.engine.core_binding import core_domain, core_position, describe_cores, slice_affinity
from mpilm.engine.hardware import choose_device, detect_hardware, fair_share, numerics_environment
from mpilm.errors import ConfigError

UNLIMITED = float("inf")


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("affinities", "rank", "limit", "share"),
    [
        ([[0, 1, 2, 3]], 0, UNLIMITED, 4),
        ([[0, 1, 2, 3]] * 2, 1, UNLIMITED, 2),
        ([[0, 1, 2, 3]] * 3, 0, UNLIMITED, Fraction(4, 3)),
        ([[0, 1]] * 8, 5, UNLIMITED, Fraction(1, 4)),
        ([[0, 1], [2, 3]], 0, UNLIMITED, 2),  # bound by the launcher
        ([[0, 1], [1, 2]], 0, UNLIMITED, Fraction(3, 2)),
        ([[0, 1, 2, 3], [3]], 1, UNLIMITED, Fraction(1, 2)),
        ([[0, 1, 2, 3]] * 2, 0, 2.0, 1),  # a container's quota
        ([[0, 1, 2, 3]] * 2, 0, 100.0, 2),
        ([list(range(64))], 0, 1.5, Fraction(3, 2)),
    ],
)
def test_fair_share_divides_cores_among_their_ranks(affinities, rank, limit, share):
    assert fair_share(affinities, rank, limit) == share


@pytest.mark.parametrize(
    ("affinities", "threads", "expected"),
    [
        ([[0, 1]] * 2, 1, [[0], [1]]),
        ([[0, 2, 1, 3]] * 2, 2, [[0, 2], [1, 3]]),
        ([list(range(8))] * 3, 2, [[0, 1], [2, 3, 4], [5, 6, 7]]),
        ([list(range(8))] * 2, 1, [[0, 1, 2, 3], [4, 5, 6, 7]]),  # room for others
        ([[0, 1]] * 2, 2, [[], []]),
        ([[0, 1]] * 3, 1, [[], [], []]),
        ([[0], [1]], 1, [[], []]),  # bound by the launcher
        ([[0, 1], [1, 2]], 1, [[], []]),
        ([[0, 1, 2, 3]], 2, [[]]),
    ],
)
def test_slice_affinity_gives_each_rank_its_own_neighbours(affinities, threads, expected):
    assert [slice_affinity(affinities, rank, threads) for rank in range(len(affinities))] == expected


def slices(size, threads, *domains):
    """Return the slices of ranks, for domains of so many cores each."""
    cores = list(range(sum(domains)))
    places = [(number // 2, number) for number, count in enumerate(domains) for _ in range(count)]
    found = [slice_affinity([cores] * size, rank, threads, dict(zip(cores, places))) for rank in range(size)]
    return [len(each) for each in found] if all(found) and [core for each in found for core in each] == cores else found


@pytest.mark.parametrize(
    ("size", "threads", "domains", "expected"),
    [
        (3, 2, (8, 8), [4, 4, 8]),  # and not 5, 5 and 6, of which one would lie in both
        (4, 4, (8, 8), [4, 4, 4, 4]),
        (2, 1, (4, 4, 4, 4), [8, 8]),
        (3, 1, (4, 4, 4, 4), [4, 4, 8]),
        (6, 1, (4, 12), [2, 2, 3, 3, 3, 3]),
        (6, 1, (2, 4, 6), [2, 2, 2, 2, 2, 2]),
        (5, 3, (8, 8), [3, 3, 3, 3, 4]),  # 2 and 3 ranks: the 3 would have 2 cores
    ],
)
def test_slices_lie_within_caches_and_memory_nodes_where_they_fit(size, threads, domains, expected):
    assert slices(size, threads, *domains) == expected


def test_place_of_a_core_is_read_from_the_kernel(tmp_path, monkeypatch):
    monkeypatch.setattr(core_binding, "CPUS", tmp_path)
    for core, (node, cache, package, number) in enumerate([(0, "0-1", 0, 0), (1, "2,5", 1, 0), (1, "4", 1, 2)]):
        folder = tmp_path / f"cpu{core}"
        (folder / "topology").mkdir(parents=True)
        (folder / "cache" / "index3").mkdir(parents=True)
        (folder / f"node{node}").mkdir()
        (folder / "cache" / "index3" / "shared_cpu_list").write_text(f"{cache}\n")
        (folder / "topology" / "physical_package_id").write_text(f"{package}\n")
        (folder / "topology" / "core_id").write_text(f"{number}\n")
    assert [core_position(core) for core in range(4)] == [[0, 0, 0, 0], [1, 2, 1, 0], [1, 4, 1, 2], []]
    domains = {core: core_domain(core) for core in range(4)}
    assert domains == {0: (0, 0), 1: (1, 2), 2: (1, 4), 3: (0, 0)}
    assert describe_cores([1, 2], domains) == "1-2 (memory node 1, 2 L3 caches)"
    assert describe_cores([0, 2, 3], domains) == "0,2-3 (memory nodes 0 and 1, 2 L3 caches)"
    assert describe_cores([0, 3], {0: (0, 0), 3: (0, 0)}) == "0,3"


def bound_cores(monkeypatch, ranks, processes, environment=(), device="cpu", **options):
    """Return the cores to which ranks were bound, on a node of 4 cores."""
    bound = []
    monkeypatch.setattr(hardware, "allowed_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(core_binding, "allowed_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(hardware, "_read_cgroup_cores", lambda _: UNLIMITED)
    monkeypatch.setattr(hardware, "_load_libraries", lambda *arguments: None)
    monkeypatch.setattr(hardware, "choose_device", lambda setting, node: torch.device(device))
    monkeypatch.setattr(core_binding, "core_position", lambda core: [core % 2])
    monkeypatch.setattr(os, "getpid", lambda: next(processes))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(cores))
    for name in (*core_binding.VARIABLES, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name in environment:
        monkeypatch.setenv(name, "close")
    found = run_ranks(ranks, lambda comm: detect_hardware(TrainConfig(threads=1), comm, **options))
    assert [bool(m.bound_to) for m in found] == [bool(bound)] * ranks
    return sorted(bound)


def test_ranks_of_a_node_are_bound_to_neighbouring_cores(monkeypatch):
    assert bound_cores(monkeypatch, 2, count(100)) == [[0, 2], [1, 3]]


def test_ranks_are_not_bound_as_threads_on_gpus_or_if_the_user_binds(monkeypatch):
    assert bound_cores(monkeypatch, 2, repeat(100)) == []
    assert bound_cores(monkeypatch, 2, count(100), bind=False) == []
    assert bound_cores(monkeypatch, 2, count(100), device="cuda") == []
    assert bound_cores(monkeypatch, 5, count(100)) == []
    for name in core_binding.VARIABLES:
        assert bound_cores(monkeypatch, 2, count(100), [name]) == []


@pytest.mark.parametrize(
    ("content", "cores"),
    [("200000 100000\n", 2.0), ("50000 100000\n", 0.5), ("max 100000\n", UNLIMITED), ("", UNLIMITED), (None, UNLIMITED)],
)
def test_cgroup_quota_is_read(tmp_path, content, cores):
    file = tmp_path / "cpu.max"
    if content is not None:
        file.write_text(content)
    assert hardware._read_cgroup_cores(file) == cores


@pytest.mark.parametrize(
    ("cores", "ranks", "threads", "oversubscribed"), [(4, 1, 4, False), (4, 2, 2, False), (4, 3, 1, False), (2, 3, 1, True)]
)
def test_threads_follow_the_cores_of_a_rank(monkeypatch, cores, ranks, threads, oversubscribed):
    monkeypatch.setattr(hardware, "allowed_cores", lambda: list(range(cores)))
    monkeypatch.setattr(hardware, "_read_cgroup_cores", lambda _: UNLIMITED)
    monkeypatch.setattr(hardware, "_load_libraries", lambda *arguments: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = run_ranks(ranks, lambda comm: detect_hardware(TrainConfig(device="cpu"), comm))
    assert [(m.threads, m.oversubscribed) for m in found] == [(threads, oversubscribed)] * ranks


def test_threads_setting_overrides_omp_num_threads(monkeypatch):
    monkeypatch.setattr(hardware, "_load_libraries", lambda *arguments: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    train = TrainConfig(device="cpu")
    assert detect_hardware(train, SelfComm()).threads == 3
    assert torch.get_num_threads() == 3
    assert detect_hardware(replace(train, threads=2), SelfComm()).threads == 2
    assert torch.get_num_threads() == 2


def test_missing_gpu_is_refused_if_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", SelfComm()).type == "cpu"
    assert choose_device("cpu", SelfComm()).type == "cpu"
    with pytest.raises(ConfigError, match=r"--train\.device cuda: torch sees no GPU here"):
        choose_device("cuda", SelfComm())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("xpu", "torch sees no GPU here; write cpu, or install a build of torch for xpu"),
        ("mps", r"no such type of device; write cpu, cuda \(NVIDIA, AMD\) or xpu \(Intel\)"),
        ("cuda:1", "the ranks of a node take its devices in turn; write cuda"),
    ],
)
def test_device_that_ranks_cannot_use_is_refused(setting, message):
    with pytest.raises(ConfigError, match=f"--train\\.device {setting}: {message}"):
        choose_device(setting, SelfComm())


def test_gpus_of_any_type_are_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in (("is_available", lambda: True), ("device_count", lambda: 4), ("set_device", lambda device: None)):
        monkeypatch.setattr(torch.xpu, name, value)
    assert [choose_device(setting, SelfComm()) for setting in ("auto", "xpu")] == [torch.device("xpu", 0)] * 2


def test_gpus_are_assigned_round_robin(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert [device.index for device in run_ranks(5, lambda comm: choose_device("auto", comm))] == [0, 1, 0, 1, 0]


def test_numerics_environment_names_what_may_change_the_last_bits():
    found = numerics_environment(hardware.Hardware(torch.device("cpu"), 3, False), SelfComm(), ParallelConfig(powersgd_rank=4))
    assert set(found) == {"mpilm", "torch", "python", "mpi", "processor", "threads", "device", "compile", "kernels", "exchange"}
    assert (found["threads"], found["device"], found["torch"]) == ("3", "cpu", torch.__version__)
    assert (found["compile"], found["exchange"]) == ("false", "compressed to rank 4")
    for parallel, exchange in ((ParallelConfig(), "float32"), (ParallelConfig(sync_every=20), "apart for 20 steps")):
        assert (
            numerics_environment(hardware.Hardware(torch.device("cpu"), 3, False), SelfComm(), parallel)["exchange"] == exchange
        )
    assert torch.backends.cpu.get_cpu_capability() in found["processor"]


@pytest.mark.parametrize(
    ("cores", "threads", "counted"),
    [(Fraction(2, 3), 1, 2 / 3), (Fraction(1), 2, 1), (Fraction(2), 2, 2), (Fraction(2), 4, 2), (Fraction(2), 1, 1)],
)
def test_peak_counts_each_core_once(monkeypatch, cores, threads, counted):
    timers = []
    monkeypatch.setattr(hardware, "PROBE_SIZE", 10)
    monkeypatch.setattr(hardware.timeit, "repeat", lambda *_, timer, **__: timers.append(timer) or [1e-6, 2e-6])
    rank = hardware.Hardware(torch.device("cpu"), threads, cores < 1, cores=cores)
    assert hardware.measure_peak_flops(rank, "float32")[0] == pytest.approx(counted * 2 * 10**3 / 1e-6)
    assert timers == [time.process_time]  # other ranks on the same core do not count


def test_allowed_cores_are_the_affinity_of_the_process():
    assert core_binding.allowed_cores() == sorted(os.sched_getaffinity(0))
