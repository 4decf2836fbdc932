"""The barrier of a node, with threads in the place of processes."""

import threading
import time

import pytest
import torch

from mpilm.comm import node_barrier
from mpilm.comm.node_barrier import SEMAPHORE_NUMEL, NodeBarrier
from mpilm.comm.processes import lengthen_time_slice


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


def test_time_slice_is_lengthened_or_left_alone():
    lengthen_time_slice()
    lengthen_time_slice()
