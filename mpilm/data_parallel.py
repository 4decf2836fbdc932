"""Data parallelism for a torch model and a training loop of one's own: scripts/own_model.py is a whole program.

    def main(comm):
        model = MyModel()
        parallel = DataParallel(model, comm, microbatches=8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(parallel.load("run", optimizer), 1000):
            for m in parallel.microbatches(step):       # this rank's
                x, y = my_batch(step, m)
                (my_loss(model(x), y) / 8).backward()
            optimizer.step()                            # gradients are the sums over all microbatches, on all ranks
        parallel.save("run", 1000, optimizer)

    launch(main)

The bits of the result do not depend on the number of ranks (float32, equal threads).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from mpilm.checkpoint.format import MANIFEST, TEMPORARY, Writer, folder_name, read_json, step_of
from mpilm.checkpoint.save import prune, remove_leftovers, set_aside
from mpilm.checkpoint.verify import Verify, newest_valid, with_help
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import run_on_all_ranks, run_on_root
from mpilm.engine.hardware import cores_per_rank
from mpilm.engine.step import total_loss
from mpilm.errors import ConfigError, DataError, FileError
from mpilm.launch.run import Body, run
from mpilm.model.init import hash_key
from mpilm.ops.tree import block_of_rank
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.layout import resolve_layouts
from mpilm.parallel.reduce.step import StepReducer


def launch(main: Body) -> NoReturn:
    """Run `main(comm)` on every rank that mpirun has started, or on one, and exit: an error on any rank ends the whole job.

    Where a node has more ranks than cores, ranks that wait give their core away.
    """
    run(
        lambda: lambda comm: main(comm.with_options(gpu_aware=False, yield_while_waiting=cores_per_rank(comm.split_node()) < 1))
    )


class DataParallel:
    """Shares the `microbatches` of each step out over the ranks of `comm` and sums their gradients in one fixed order.

    All ranks get rank 0's parameters and buffers. `model`: on one device, the same on all ranks, what requires a gradient in
    float32; its parameters stay the same objects, so that an optimizer may hold them already, but their memory moves. `seed`:
    of torch's generator, which is set anew for each microbatch, so that dropout does not depend on the ranks. Statistics of a
    BatchNorm are of the rank's own microbatches; use another norm. Collective; raises ConfigError on all ranks where there are
    more ranks than microbatches, or a parameter that requires a gradient is not float32, or none does.
    """

    def __init__(self, model: nn.Module, comm: Comm, microbatches: int, seed: int = 0):
        self.model, self.comm, self.count, self.seed = model, comm, microbatches, seed
        self.extra: Any = None
        """What was saved with the checkpoint that was loaded."""
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        run_on_all_ranks(comm, lambda: self._refuse(parameters))
        device = next(iter(parameters.values())).device
        layouts = resolve_layouts({name: tuple(p.shape) for name, p in parameters.items()}, {})
        self.flat = FlatParameters(layouts, device, rank=comm.rank, ranks=comm.size)
        for name, parameter in parameters.items():
            view = self.flat.parameter(name)
            view.copy_(parameter.detach())
            parameter.data = view
        comm.broadcast(self.flat.values.tensor)
        for fixed in [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]:
            value = fixed.detach().contiguous()
            comm.broadcast(value)
            fixed.data = value
        self.sum = StepReducer(self.flat, model, comm, microbatches, overlap=device.type == "cuda")

    def _refuse(self, parameters: Mapping[str, Tensor]) -> None:
        if self.comm.size > self.count:
            raise ConfigError(
                f"{self.comm.size} ranks, but a step has only {self.count} microbatches; start {self.count} ranks or fewer"
            )
        if not parameters:
            raise ConfigError("the model has no parameters that require a gradient")
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32:
                raise ConfigError(f"parameter {name} is {parameter.dtype}; sums are made in float32: use model.float()")

    def microbatches(self, step: int) -> Iterator[int]:
        """The numbers of this rank's microbatches; call backward once in each round of the loop. After the last round the
        gradients are the sums over all microbatches of all ranks. Collective: to be run to its end on every rank."""
        self._refuse_others()
        outside = torch.get_rng_state()
        for i, number in enumerate(range(*block_of_rank(self.comm.rank, self.comm.size, self.count))):
            self.sum.begin_microbatch(i)
            torch.manual_seed(hash_key("microbatch", self.seed, step, number) >> 1)
            yield number
            self.sum.end_microbatch(i)
        torch.set_rng_state(outside)
        self.sum.reduce()
        for name, parameter in self.sum.parameters.items():
            parameter.grad = self.flat.parameter(name, self.sum.sums)

    def _refuse_others(self) -> None:
        """Raise ConfigError where other parameters are to be trained now than at first: their sums would be nobody's."""
        now = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        changed = sorted(now ^ set(self.sum.parameters))
        if changed:
            raise ConfigError(f"{changed[0]}: requires_grad has changed since DataParallel was made; make a new one after that")

    def total(self, values: Mapping[int, float | Tensor]) -> float:
        """The sum of numbers that belong to microbatches (of a step's loss, say), each known to one rank; the same on all ranks
        and on any number of them. Collective."""
        return total_loss(values, self.count, self.comm)

    def save(
        self, folder: str | Path, step: int, optimizer: torch.optim.Optimizer | None = None, extra: Any = None, keep: int = 2
    ) -> None:
        """Write FOLDER/step-NNNNNNNN with the model, the optimizer's state and `extra`, which JSON can hold; the `keep` newest
        stay. It gets its name when it is whole, with a digest of every file. Collective; raises FileError on all ranks."""
        run_on_root(self.comm, lambda: self._save(Path(folder), step, optimizer, extra, keep))

    def load(self, folder: str | Path, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Put back the newest checkpoint in FOLDER whose every byte is right; returns its step, 0 where there is none. What was
        saved as `extra` is then in `self.extra`. Collective; raises FileError, DataError or ConfigError on all ranks."""
        found = with_help(self.comm, lambda verify: self._find(Path(folder), verify))
        path = self.comm.broadcast_json(str(found) if found else None)
        if path is None:
            return 0
        return run_on_all_ranks(self.comm, lambda: self._load(Path(path), optimizer))

    def _find(self, folder: Path, verify: Verify) -> Path | None:
        """The newest checkpoint that is whole; newer ones that are not are set aside."""
        found, broken = newest_valid(folder, verify)
        if broken and found is None:
            raise DataError(f"no checkpoint in {folder} is whole:\n  " + "\n  ".join(broken.values()))
        set_aside(broken)
        return found

    def _save(self, folder: Path, step: int, optimizer: torch.optim.Optimizer | None, extra: Any, keep: int) -> None:
        final, temporary = folder / folder_name(step), folder / f"{TEMPORARY}{folder_name(step)}"
        if (final / MANIFEST).is_file():
            return  # of this run, which has just been taken up there
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            temporary.mkdir()
            writer = Writer(temporary)
            writer.data("model.safetensors", save(_own(self.model.state_dict())))
            tensors, words = _taken_apart(optimizer, self.model)
            writer.data("optimizer.safetensors", save(tensors))
            writer.json("trainer.json", {"step": step, "optimizer": words, "extra": extra})
            writer.all_gather_parameters(final)
        except OSError as error:
            raise FileError(f"checkpoint {final} could not be written: {error.strerror}") from None
        prune(folder, keep, keep_best=False)

    def _load(self, path: Path, optimizer: torch.optim.Optimizer | None) -> int:
        try:
            self.model.load_state_dict(load((path / "model.safetensors").read_bytes()))
        except RuntimeError as error:
            raise ConfigError(f"{path} is a checkpoint of another model: {error}") from None
        trainer = read_json(path / "trainer.json")
        if optimizer is not None:
            tensors = load((path / "optimizer.safetensors").read_bytes())
            optimizer.load_state_dict(_put_together(tensors, trainer["optimizer"], optimizer, self.model))
        self.extra = trainer["extra"]
        step = step_of(path)
        assert step is not None
        return step


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each with memory of its own, on the host, as the format wants them."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names of an optimizer's parameters, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _taken_apart(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> tuple[dict[str, Tensor], Any]:
    """An optimizer's state as tensors called PARAMETER.KIND, and as what JSON can hold."""
    if optimizer is None:
        return {}, None
    names, state = _names(optimizer, model), optimizer.state_dict()
    tensors = {f"{names[i]}.{kind}": x for i, of in state["state"].items() for kind, x in of.items() if isinstance(x, Tensor)}
    numbers = {names[i]: {kind: x for kind, x in of.items() if not isinstance(x, Tensor)} for i, of in state["state"].items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    return _own(tensors), {"numbers": numbers, "groups": groups}


def _put_together(
    tensors: Mapping[str, Tensor], words: Any, optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, Any]:
    names, groups = _names(optimizer, model), optimizer.state_dict()["param_groups"]
    if words is None or len(words["groups"]) != len(groups):
        raise ConfigError("the checkpoint holds the state of another optimizer")
    state: dict[str, dict[str, Any]] = {name: dict(words["numbers"].get(name, {})) for name in names}
    for key, x in tensors.items():
        name, _, kind = key.rpartition(".")
        if name not in state:
            raise ConfigError(f"the checkpoint holds the state of an optimizer that has {name}, which this one has not")
        state[name][kind] = x
    merged = [{**saved, "params": group["params"]} for saved, group in zip(words["groups"], groups)]
    return {"state": {i: state[name] for i, name in enumerate(names) if state[name]}, "param_groups": merged}
