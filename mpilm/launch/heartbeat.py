"""Heartbeats of the ranks of a job, without MPI: a table in the memory of each node, and datagrams between nodes."""

import contextlib
import math
import mmap
import os
import socket
import struct
import tempfile
import time
from pathlib import Path

import numpy as np

from mpilm.comm.addresses import list_own_addresses
from mpilm.comm.base import Comm

TICK, MOVED, WAITING = range(3)  # columns: when its process last lived, when it last moved, if it waits for other ranks
REPORTED = 0  # column of the header: 1 once a rank of this node reports a hang
ARITY = 16  # children of a node in the tree of nodes: no node sends to more
FIRST_S = 1.0  # in which neighbours send their first heartbeat
MESSAGE = struct.Struct("<16sId?")  # token, node, seconds since any rank of its subtree moved, request of a report


class HeartbeatTable:
    """One row for each rank of the world, which the rank itself writes and the ranks of its node read; times of
    time.monotonic(), which they share. Without a path, or if the file cannot be opened, only this process sees the table."""

    def __init__(self, rank: int, size: int, path: Path | None = None):
        nbytes, memory, self.path = 8 * 3 * (size + 1), None, None
        if path is not None:
            with contextlib.suppress(OSError):
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                os.ftruncate(file, nbytes)
                memory, self.path = mmap.mmap(file, nbytes), path
                os.close(file)
        table = np.frombuffer(bytearray(nbytes) if memory is None else memory, dtype=np.float64).reshape(size + 1, -1)
        self.header, self.rows, self.own = table[0], table[1:], table[1 + rank]
        self.own[[TICK, MOVED]] = time.monotonic()

    def unlink(self) -> None:
        """Remove the name of the file; processes that have opened it keep the table."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def shared_path(key: str) -> Path:
    """Return the path of a file in memory that all processes of this user on this node find under `key`."""
    folder = Path("/dev/shm")
    return (folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())) / f"mpilm-{os.getuid()}-{key}"


class NodeLinks:
    """Datagrams between a node and its neighbours in a tree of nodes. Each tick the lowest living rank of a node tells the
    first two ranks of its parent and of its children how long no rank of its subtree has moved; the root so learns it of all.
    If a neighbour that has sent stops, its node, or the network to it, is down. Collective: the constructor gathers
    addresses."""

    def __init__(self, world: Comm, nodes: list[list[int]]):
        self.nodes = nodes
        self.node = next(i for i, ranks in enumerate(nodes) if world.rank in ranks)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("", 0))
        self.socket.setblocking(False)
        port = self.socket.getsockname()[1]
        self.addresses = world.all_gather_json([[address, port] for address in list_own_addresses()])
        self.token = bytes.fromhex(world.broadcast_json(os.urandom(16).hex()))
        children = range(ARITY * self.node + 1, min(ARITY * self.node + 1 + ARITY, len(nodes)))
        self.neighbours = [*([(self.node - 1) // ARITY] if self.node else []), *children]
        self.received_s = dict.fromkeys(self.neighbours, math.nan)  # when each has sent last; nan: never
        self.still_s = dict.fromkeys(children, 0.0)  # how long no rank below it has moved
        self.is_report_requested = False
        end = time.monotonic() + FIRST_S
        while world.rank in nodes[self.node][:2] and self.unheard_nodes() and time.monotonic() < end:
            self.exchange(0.0)  # a node that fails before the first tick is missed, too
            time.sleep(0.01)

    def unheard_nodes(self) -> list[int]:
        """Return the neighbours that have never sent anything: down from the start, or behind a firewall."""
        return [node for node, received_s in self.received_s.items() if math.isnan(received_s)]

    def exchange(self, own_still_s: float) -> float:
        """Receive, then send if this rank speaks for its node; return how long no rank of the subtree has moved."""
        with contextlib.suppress(OSError):
            while True:
                data = self.socket.recv(MESSAGE.size + 1)
                if len(data) == MESSAGE.size and data.startswith(self.token):
                    _, node, still_s, is_request = MESSAGE.unpack(data)
                    self.is_report_requested |= is_request
                    self.received_s[node] = time.monotonic()
                    if node in self.still_s:
                        self.still_s[node] = still_s
        still_s = min([own_still_s, *self.still_s.values()])
        for neighbour in self.neighbours:
            self._send(self.nodes[neighbour][:2], still_s, False)
        return still_s

    def silent_nodes(self, limit_s: float, resumed_s: float) -> list[int]:
        """Return the neighbours that have sent something, but not for `limit_s`."""
        now = time.monotonic()
        return [node for node, received_s in self.received_s.items() if now - max(received_s, resumed_s) > limit_s]

    def request_reports(self) -> None:
        """Ask all ranks of the other nodes to write down what they do."""
        self._send([rank for i, ranks in enumerate(self.nodes) if i != self.node for rank in ranks], 0.0, True)

    def _send(self, ranks: list[int], still_s: float, is_request: bool) -> None:
        message = MESSAGE.pack(self.token, self.node, still_s, is_request)
        for address in (address for rank in ranks for address in self.addresses[rank]):
            with contextlib.suppress(OSError):
                self.socket.sendto(message, tuple(address))
