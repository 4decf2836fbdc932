"""Data parallelism for your own torch model and training loop: docs/guides/own-model.md, scripts/own_model.py."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from mpilm.checkpoint.format import MANIFEST, TEMPORARY, CheckpointFolder, checkpoint_name
from mpilm.checkpoint.manager import prune_checkpoints, remove_leftovers, set_aside
from mpilm.checkpoint.verify import Verifier, find_newest_valid, run_on_root_with_verify
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, run_on_all_ranks, run_on_root
from mpilm.data.files import blake2b_digest, file_errors, read_json
from mpilm.engine.hardware import cores_per_rank
from mpilm.engine.step import total_loss
from mpilm.errors import ConfigError, DataError, NonFiniteError, RanksDisagreeError
from mpilm.launch.run import Body, run
from mpilm.model.layers import hash_key
from mpilm.ops.tree import block_of_rank
from mpilm.parallel.digests import CAUSE
from mpilm.parallel.flat import FlatParameters
from mpilm.parallel.layout import resolve_layouts
from mpilm.parallel.reduce.build import make_step_reducer


def launch(main: Body) -> NoReturn:
    """Run `main(comm)` on all ranks and exit; an error on any rank ends the whole job. Waiting ranks yield cores they share."""
    run(
        lambda: lambda comm: main(comm.with_options(gpu_aware=False, yield_while_waiting=cores_per_rank(comm.split_node()) < 1))
    )


class DataParallel:
    """Distributes the microbatches of each step over the ranks of `comm` and sums their gradients in one fixed order: the bits
    of the result do not depend on the number of ranks (with equal threads). Nor does dropout: `seed` reseeds torch for each
    microbatch. BatchNorm normalizes each microbatch by itself; its running statistics are those of the microbatches of all
    ranks, in their order. The model lies on one device and gets rank 0's values. Its parameters stay the same objects, but
    their memory moves. All methods are collective and raise user errors on all ranks."""

    def __init__(self, model: nn.Module, comm: Comm, microbatches: int, seed: int = 0):
        self.model, self.comm, self.count, self.seed = model, comm, microbatches, seed
        self.extra: Any = None  # as saved with the loaded checkpoint
        parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

        def check() -> None:
            if comm.size > microbatches:
                raise ConfigError(f"{comm.size} ranks for {microbatches} microbatches a step; start {microbatches} or fewer")
            if not parameters:
                raise ConfigError("the model has no parameters that require a gradient")
            for name, parameter in parameters.items():
                if parameter.dtype != torch.float32:
                    raise ConfigError(f"parameter {name} is {parameter.dtype}; sums are made in float32: use model.float()")

        run_on_all_ranks(comm, check)
        layouts = resolve_layouts({name: tuple(p.shape) for name, p in parameters.items()}, {})
        self.flat = FlatParameters(layouts, next(iter(parameters.values())).device, comm=comm)
        for name, parameter in parameters.items():
            parameter.data = self.flat.parameter(name).copy_(parameter.detach())
        comm.broadcast(self.flat.values.tensor)
        for fixed in [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]:
            fixed.data = fixed.detach().contiguous()
            comm.broadcast(fixed.data)
        self.statistics = RunningStatistics(model)
        if self.statistics.norms and comm.rank == 0:
            problem = "normalizes each microbatch by itself, so results depend on the size of a microbatch"
            warnings.warn(f"{type(self.statistics.norms[0]).__name__} {problem}; GroupNorm and LayerNorm do not", stacklevel=2)
        self.reducer = make_step_reducer(self.flat, model, microbatches, overlap=self.flat.device.type != "cpu")

    def microbatches(self, step: int) -> Iterator[int]:
        """Yield the numbers of this rank's microbatches; call backward in each round. After the last round, gradients are
        summed over the microbatches of all ranks. Every rank must finish the loop."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        if changed := sorted(trained ^ set(self.reducer.parameters)):
            raise ConfigError(f"{changed[0]}: requires_grad has changed since DataParallel was created; create a new one")
        statistics = self.statistics.read()
        rows = torch.zeros(self.count, len(statistics), dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):
            for i, number in enumerate(range(*block_of_rank(self.comm.rank, self.comm.size, self.count))):
                self.reducer.begin_microbatch(i)
                torch.manual_seed(hash_key("microbatch", self.seed, step, number) >> 1)
                yield number
                self.reducer.end_microbatch(i)
                rows[number] = self.statistics.read()
                self.statistics.write(statistics)  # each microbatch begins with the same ones
        self.reducer.reduce()
        for name, parameter in self.reducer.parameters.items():
            parameter.grad = self.flat.parameter(name, self.reducer.sums)
        if self.statistics.norms:
            self.comm.all_reduce(rows)  # each row meets only zeros: exact
            self.statistics.write(self.statistics.accumulate(statistics, rows))

    def total(self, values: Mapping[int, float | Tensor]) -> float:
        """Return the sum of one value per microbatch, such as its loss, over all ranks, in a fixed order."""
        return total_loss(values, self.count, self.comm)

    def save(self, folder: str | Path, step: int, optimizer: Optimizer | None = None, extra: Any = None, keep: int = 2) -> None:
        """Write FOLDER/step-NNNNNNNN atomically: model, optimizer state, `extra` (JSON) and digests. Keep the `keep` newest."""
        final, temporary = Path(folder, checkpoint_name(step)), Path(folder, TEMPORARY + checkpoint_name(step))

        def write() -> None:
            if (final / MANIFEST).is_file():
                return  # this run has just been resumed from it
            tensors, numbers = _split_state(optimizer, self.model) if optimizer is not None else ({}, None)
            with file_errors(f"checkpoint {final}", "written"):
                final.parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers(final.parent)
                temporary.mkdir()
                writer = CheckpointFolder(temporary)
                for file, values in (("model", self.model.state_dict()), ("optimizer", tensors)):
                    copies = {name: x.detach().cpu().clone().contiguous() for name, x in values.items()}
                    writer.write_bytes(f"{file}.safetensors", save(copies))  # refuses tensors that share memory
                writer.write_json("trainer.json", {"step": step, "optimizer": numbers, "extra": extra})
                writer.commit(final)
            prune_checkpoints(final.parent, keep, keep_best=False)

        self._check_parameters(f"checkpoint {final} is not written")
        run_on_root(self.comm, write)

    def _check_parameters(self, consequence: str) -> None:
        """Raise CollectiveError if a parameter is not finite, or differs between ranks. Collective."""
        own = {name: parameter.detach().cpu().reshape(-1) for name, parameter in self.model.named_parameters()}
        digests = [blake2b_digest(x.view(torch.uint8).numpy().tobytes()).hex() for x in own.values()]
        rows = self.comm.all_gather_json([[bool(x.isfinite().all()), digest] for x, digest in zip(own.values(), digests)])
        for name, of_ranks in zip(own, zip(*rows)):
            if not all(is_finite for is_finite, _ in of_ranks):
                raise CollectiveError(NonFiniteError(f"{name} is not finite; {consequence}"))
            if len({digest for _, digest in of_ranks}) > 1:
                raise CollectiveError(RanksDisagreeError(f"{name} is not the same on all ranks: {CAUSE}; {consequence}"))

    def load(self, folder: str | Path, optimizer: Optimizer | None = None) -> int:
        """Load the newest undamaged checkpoint in FOLDER and its `extra`; return its step, or 0 if there is none."""

        def find(verify: Verifier) -> str:
            newest, broken = find_newest_valid(Path(folder), verify)
            if broken and newest is None:
                raise DataError(f"every checkpoint in {folder} is damaged:\n  " + "\n  ".join(broken.values()))
            set_aside(broken)
            return str(newest or "")

        def read() -> int:
            try:
                self.model.load_state_dict(load(Path(path, "model.safetensors").read_bytes()))
            except RuntimeError as error:
                raise ConfigError(f"{path} is a checkpoint of another model: {error}") from None
            trainer = read_json(Path(path, "trainer.json"))
            if optimizer is not None:
                tensors = load(Path(path, "optimizer.safetensors").read_bytes())
                optimizer.load_state_dict(_join_state(tensors, trainer["optimizer"], optimizer, self.model))
            self.extra = trainer["extra"]
            return int(trainer["step"])

        path = self.comm.broadcast_json(run_on_root_with_verify(self.comm, find))
        return run_on_all_ranks(self.comm, read) if path else 0


class RunningStatistics:
    """The running statistics of a model's BatchNorm modules, as vectors in float64."""

    def __init__(self, model: nn.Module):
        kinds = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
        self.norms = [module for module in model.modules() if isinstance(module, kinds) and module.track_running_stats]
        names = ("num_batches_tracked", "running_mean", "running_var")
        self.buffers: list[Tensor] = [getattr(norm, name) for norm in self.norms for name in names]

    def read(self) -> Tensor:
        """Return number of updates, means and variances of each module, one after the other."""
        parts = [buffer.detach().double().cpu().view(-1) for buffer in self.buffers]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def write(self, values: Tensor) -> None:
        """Set all buffers from what `read` returned."""
        for buffer, part in zip(self.buffers, values.split([buffer.numel() for buffer in self.buffers])):
            buffer.copy_(part.view_as(buffer))

    def accumulate(self, start: Tensor, rows: Tensor) -> Tensor:
        """Return the statistics after the updates of all microbatches in turn. A row: `start` after those of one alone."""
        sizes, ends = [1 + 2 * norm.num_features for norm in self.norms], []
        for norm, first, afters in zip(self.norms, start.split(sizes), rows.split(sizes, dim=1)):
            end = first.clone()
            for after in afters:
                count = float(after[0] - first[0])
                if norm.momentum is None and count:  # the mean of all updates
                    end[1:] = (end[0] * end[1:] + after[0] * after[1:] - first[0] * first[1:]) / (end[0] + count)
                elif norm.momentum is not None:
                    end[1:] = after[1:] + (1 - norm.momentum) ** count * (end[1:] - first[1:])
                end[0] += count
            ends.append(end)
        return torch.cat(ends)


def _parameter_names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _split_state(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], Any]:
    """Return an optimizer's state as tensors named PARAMETER.KIND, and the rest as JSON."""
    names, saved = _parameter_names(optimizer, model), optimizer.state_dict()
    state = {names[i]: values for i, values in saved["state"].items()}
    tensors = {f"{name}.{kind}": x for name, values in state.items() for kind, x in values.items() if isinstance(x, Tensor)}
    numbers = {name: {kind: x for kind, x in values.items() if not isinstance(x, Tensor)} for name, values in state.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in saved["param_groups"]]
    return tensors, {"numbers": numbers, "groups": groups}


def _join_state(tensors: Mapping[str, Tensor], saved: Any, optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    names, groups = _parameter_names(optimizer, model), optimizer.state_dict()["param_groups"]
    if saved is None or len(saved["groups"]) != len(groups):
        raise ConfigError("the checkpoint holds the state of another optimizer")
    state: dict[str, dict[str, Any]] = {name: dict(saved["numbers"].get(name, {})) for name in names}
    for key, x in tensors.items():
        name, _, kind = key.rpartition(".")
        if name not in state:
            raise ConfigError(f"the checkpoint holds optimizer state of {name}, a parameter that this optimizer does not have")
        state[name][kind] = x
    merged = [{**old, "params": group["params"]} for old, group in zip(saved["groups"], groups)]
    return {"state": {i: state[name] for i, name in enumerate(names) if state[name]}, "param_groups": merged}
