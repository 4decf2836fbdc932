"""The barrier of a node, with threads in the place of processes."""

import ctypes
import platform
import struct
import threading
import time

import pytest
import torch

from mpilm.comm import node_barrier
from mpilm.comm.node_barrier import SEMAPHORE_NUMEL, NodeBarrier
from mpilm.comm.processes import SCHED_ATTR_BYTES, TIME_SLICE_NS, lengthen_time_slice


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_nobody_passes_before_the_last_has_come(size):
    memory = list(torch.zeros(size, SEMAPHORE_NUMEL))
    barriers = [NodeBarrier(rank, memory, lambda: None) for rank in range(size)]
    arrived, passed_early = [0] * size, []

    def body(rank):
        for turn in range(1, 30):
            if (turn + rank) % 7 == 0:
                time.sleep(0.001)
            arrived[rank] = turn
            barriers[rank].wait()
            if min(arrived) < turn:
                passed_early.append((rank, turn))

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert arrived == [29] * size
    assert passed_early == []


def test_a_rank_that_waits_makes_progress_and_uses_no_processor(monkeypatch):
    monkeypatch.setattr(node_barrier, "WAKE_S", 0.02)
    memory, calls = list(torch.zeros(2, SEMAPHORE_NUMEL)), []
    first, second = (NodeBarrier(rank, memory, lambda: calls.append(1)) for rank in range(2))
    timer = threading.Timer(0.3, second.wait)
    timer.start()
    began = time.thread_time()
    first.wait()
    assert time.thread_time() - began < 0.1
    assert len(calls) >= 3
    timer.join()


def read_attributes():
    """Return policy, nice value and time slice of this thread, as the kernel states them (sched_getattr)."""
    attributes = ctypes.create_string_buffer(SCHED_ATTR_BYTES)
    number = {"x86_64": 315, "aarch64": 275}[platform.machine()]
    assert ctypes.CDLL(None).syscall(number, 0, attributes, SCHED_ATTR_BYTES, 0) == 0
    _, policy, _, nice, _, slice_ns, *_ = struct.unpack("IIQiIQQQ", attributes.raw)
    return policy, nice, slice_ns


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="numbers of other system calls")
def test_time_slice_is_lengthened_where_the_kernel_can():
    found = []

    def body():  # a thread of its own, because the slice is that of a thread
        found.append(read_attributes())
        lengthen_time_slice()
        found.append(read_attributes())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    (*before, _), (*after, slice_ns) = found
    assert before == after
    if tuple(map(int, platform.release().split(".")[:2])) >= (6, 12):
        assert slice_ns == TIME_SLICE_NS
