"""Every layout of these ranks on real MPI, compared with the serial run: `mpirun -n 1|2|3|4 pytest`."""

from collections.abc import Iterator

import pytest
import torch
from runs import assemble, layout, serial_config, small_config, train_steps

from mpilm.comm.base import Comm, SelfComm
from mpilm.comm.collective_errors import CollectiveError
from mpilm.config.schema import Config
from mpilm.launch.run import launcher_world_size
from mpilm.parallel.pipeline.schedules import SCHEDULES
from mpilm.verification.layouts import list_layouts, verify_layouts

SIZE = launcher_world_size() or 1  # of the world, known while tests are collected


@pytest.fixture(autouse=True)
def unbound(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the cores and threads of this process as they are."""
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def runnable(config: Config) -> int:
    return sum(not reason for _, reason in list_layouts(config, SIZE))


EVEN = {
    "model__n_layers": 2 * SIZE, "train__global_batch": 2 * SIZE, "train__steps": 1, "model__n_heads": 4,
    "model__n_kv_heads": 4,
}  # fmt: skip
UNEVEN = {
    "model__n_layers": SIZE, "train__global_batch": SIZE + 1, "train__steps": 2, "model__tie_embeddings": False,
    "model__arch": "mixtral" if SIZE < 4 else "llama", "model__n_experts": 6, "train__recompute": "block",
    "model__n_heads": 6, "model__n_kv_heads": 6, "model__d_model": 24, "model__context_length": 12,
}  # fmt: skip


@pytest.mark.parametrize("changes", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_every_layout_has_the_bits_of_the_serial_run(world: Comm, changes: dict[str, object]) -> None:
    config, lines = small_config(**changes), list[str]()
    verify_layouts(config, world, False, lines.append)
    assert runnable(config) >= min(SIZE, 2)
    assert sum(line.endswith("equal bits") for line in lines) == runnable(config)
    assert lines[-1].endswith("bitwise identical, as guaranteed")


@pytest.mark.skipif(SIZE > 3, reason="fewer ranks prove the same in a tenth of the time")
def test_flipped_bit_is_found_on_every_layout(world: Comm) -> None:
    config = small_config(**EVEN)
    with pytest.raises(CollectiveError, match=f"found the flipped bit on {runnable(config)} of {runnable(config)} layouts"):
        verify_layouts(config, world, True, lambda line: None)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_activations_too_long_for_mpi_to_buffer_arrive(world: Comm, schedule: str) -> None:
    """128 KiB each: a send ends when the other rank receives."""
    shape = {"model__n_layers": 2 * SIZE, "model__d_model": 32, "model__context_length": 128, "model__dropout": 0.0}
    config = small_config(**layout(SIZE, schedule), **shape, train__micro_batch=8, train__global_batch=8 * SIZE)
    outcome = train_steps(config, world.with_options(gpu_aware=False, yield_while_waiting=True), steps=1)
    serial = train_steps(serial_config(config), SelfComm(), steps=1)
    expected = assemble([serial.state])
    assert outcome.numbers == serial.numbers
    for kind, slices in outcome.state.items():
        for item, values in slices.items():
            assert torch.equal(values.view(torch.int32), expected[f"{kind} of {item.name}"][item.start : item.stop]), item
