"""The layout of a run, where its ranks are to choose it themselves: `parallel.auto`."""

from __future__ import annotations

from mpilm.comm.base import Comm
from mpilm.comm.together import on_root
from mpilm.config import Config, replaced, to_dict
from mpilm.errors import ConfigError
from mpilm.planner.machine import Machine as Measured
from mpilm.planner.machine import read
from mpilm.planner.search import Job, adopted, search
from mpilm.trainer.machine import Machine, versions

SETTINGS = ("pipeline", "schedule", "chunks", "zero")


def choose_layout(config: Config, vocab_size: int, machine: Machine, world: Comm) -> tuple[Config, str]:
    """The config with the layout that the planner finds fastest, and words for it; as it is, where nothing is to be chosen.
    Collective; raises AgreedError where machine.json is not of this machine, or no layout works."""
    if not config.parallel.auto:
        return config, ""
    most = max(world.all_gather_json(world.split_node().size))
    found: list[object] = []
    on_root(world, lambda: found.extend(_chosen(config, vocab_size, machine, world, most)))
    settings, recompute, words = world.broadcast_json(found)
    changes = {f"parallel__{name}": value for name, value in settings.items()}
    return replaced(config, parallel__auto="", train__recompute=recompute, **changes), words


def _chosen(config: Config, vocab_size: int, machine: Machine, world: Comm, ranks_per_node: int) -> list[object]:
    """Settings of the layout, recomputation, and words."""
    if config.model.lora_rank:
        raise ConfigError("--parallel.auto plans for training whole models: leave it or --model.lora-rank out")
    measured = read(config.parallel.auto, "--parallel.auto")
    _refuse_another(measured, machine, world)
    asked = replaced(config, parallel__auto="")
    found, rejected = search(Job(asked, vocab_size, measured, ranks_per_node), world.size)
    if not found:
        raise ConfigError(f"--parallel.auto: no layout of {world.size} ranks works: {rejected[0].words}: {rejected[0].reason}")
    best = adopted(asked, found[0])
    words = (
        f"chosen among {len(found)} by {config.parallel.auto} (--parallel.auto): {found[0].words}; a step is predicted to take "
        f"{found[0].time.total_s:.3g} s"
    )
    settings = to_dict(best.parallel)
    return [{name: settings[name] for name in SETTINGS}, best.train.recompute, words]


def _refuse_another(measured: Measured, machine: Machine, world: Comm) -> None:
    here = {**versions(world), "device": machine.device.type}
    for name in ("processor", "device", "torch"):
        if getattr(measured, name) != here[name]:
            raise ConfigError(
                f"--parallel.auto {measured.source} was measured with {name} {getattr(measured, name)}, and here it is "
                f"{here[name]}: calibrate here (mpirun -n {world.size} python -m mpilm.doctor --calibrate)"
            )
