"""The doctor: right answers are called right, and each wrong one is noticed and named."""

import pytest
import torch

from mpilm.comm.base import Request
from mpilm.comm.collective_errors import CollectiveError
from mpilm.comm.threads import ThreadComm, run_ranks
from mpilm.errors import RanksDisagreeError
from mpilm.trainer.examine import examine

CHECKS = ("ring", "all to all", "reduce", "gather", "broadcast", "shared")


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_healthy_mpi(size, capsys):
    run_ranks(size, lambda comm: examine(comm, 1 << 16))
    said = capsys.readouterr().out
    assert "all answers were right" in said
    assert all(any(line.startswith(check) and " ok" in line for line in said.splitlines()) for check in CHECKS)
    assert ("us between rank 0 and the others" in said) == (size > 1)


def lying(op):
    """A communicator whose last rank gets a wrong element where `op` brings it something."""

    class Lying(ThreadComm):
        def _wrong(self, request, out):
            def finish():
                request.wait()
                if self.rank == self.size - 1 and out.numel() > 2 and out.dtype != torch.uint8:
                    out.view(-1)[1] += 1

            return Request(finish)

        def _irecv(self, out, source, tag):
            request = super()._irecv(out, source, tag)
            return self._wrong(request, out) if op == "ring" else request

        def _iall_to_all(self, x, out, send_counts, receive_counts):
            request = super()._iall_to_all(x, out, send_counts, receive_counts)
            return self._wrong(request, out) if op == "all to all" else request

        def _iall_reduce(self, x, how):
            request = super()._iall_reduce(x, how)
            return self._wrong(request, x) if op == "reduce" else request

        def _iall_gather(self, x, out, counts):
            request = super()._iall_gather(x, out, counts)
            return self._wrong(request, out) if op == "gather" and out.dtype == torch.bfloat16 else request

        def _broadcast(self, x, root):
            super()._broadcast(x, root)
            if op == "broadcast" and self.rank == self.size - 1 and x.numel() == 5000:
                x[7] += 1

        def split(self, color, key, name):
            part = super().split(color, key, name)
            part.__class__ = type(self)
            return part

        def share(self, numel):
            parts = super().share(numel)
            return [part.clone() for part in parts] if op == "shared" else parts

    return Lying


@pytest.mark.parametrize("op", CHECKS)
def test_what_is_wrong_is_named(op, capsys):
    def body(comm):
        comm.__class__ = lying(op)
        with pytest.raises(CollectiveError, match=rf"this MPI gives wrong answers \({op}\): do not train with it") as caught:
            examine(comm, 1 << 16)
        assert isinstance(caught.value.error, RanksDisagreeError)

    run_ranks(3, body)
    assert "all answers were right" not in capsys.readouterr().out
