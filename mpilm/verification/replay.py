"""One step of a run, recomputed with a look at its tensors."""

import contextlib
import difflib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, run_on_root
from mpilm.config.schema import microbatch_count
from mpilm.data.files import hex_digest
from mpilm.data.samples import TextExamples
from mpilm.engine.step import forward_backward, optimizer_step
from mpilm.engine.train_model import TrainModel
from mpilm.errors import ConfigError, FileError
from mpilm.parallel.flat_layout import ParamSlice
from mpilm.parallel.pipeline.stage import ModelStage
from mpilm.verification.arguments import ReplayArguments
from mpilm.verification.audit import PrintLine
from mpilm.verification.replayed_run import ReplayedRun, StoredRun, find_stored_run, open_replayed_run

KINDS = ("grad", "update", "value")  # of what is shown of a parameter
TAG = 6
Tensors = dict[str, Tensor]  # by name: of a module, or NAME.KIND of a parameter


def replay_step(arguments: ReplayArguments, world: Comm, print_line: PrintLine) -> None:
    """Recompute a step of a run, and of another to compare, and print the watched tensors. Collective; raises."""
    runs = [Path(run) for run in (*arguments.runs, arguments.compare) if run]
    stored = [find_stored_run(run, arguments.step, arguments.step, world) for run in runs]
    if arguments.save:
        run_on_root(world, lambda: _check_can_save(Path(arguments.save)))
    shown = [_watch_run(each, arguments, world, print_line) for each in stored]
    if world.rank == 0:
        for name, tensor in shown[0].items():
            missing = f"; not in {arguments.compare}" if len(shown) > 1 and name not in shown[1] else ""
            print_line(_describe(name, tensor, shown[-1].get(name) if len(shown) > 1 else None) + missing)
        print_line("" if shown[0] or not arguments.watch else "these modules have no output of their own; name others")
    if arguments.save:
        run_on_root(world, lambda: _save(Path(arguments.save), shown[0]))
        print_line(f"saved {arguments.save}")


def _watch_run(stored: StoredRun, arguments: ReplayArguments, world: Comm, print_line: PrintLine) -> Tensors:
    """Return the watched tensors of a run's step, on rank 0. Collective."""
    step, run = arguments.step, stored.folder
    replayed = open_replayed_run(stored, arguments, world)
    count = microbatch_count(replayed.config)
    if not -1 <= arguments.microbatch < count:
        limits = f"{run} has {count} microbatches a step, numbered from 0"
        raise CollectiveError(ConfigError(f"--microbatch {arguments.microbatch}: {limits}"))
    names = _choose_names(replayed.model, arguments.watch, world)
    for note in replayed.notes:
        print_line(f"note: {note}")
    for done, result in replayed.advance(stored.step + 1, step - 1):
        print_line(f"  {run} step {done}: " + ("skipped" if result is None else f"loss {result.loss:.6f}"))
    if step in stored.skipped:
        print_line(f"note: {run} skipped step {step}: it did not apply this update")
    if arguments.text:
        _print_text(replayed, arguments, print_line)
    return _watch_step(replayed, step - 1, names, arguments.microbatch)


def _choose_names(model: TrainModel, patterns: Sequence[str], world: Comm) -> list[str]:
    """Return the names that match, in the order of the model; raises CollectiveError for a pattern that matches none."""
    modules = [name for stage in model.stages.values() for name, _ in stage.model.named_modules() if name]
    names = list(dict.fromkeys(name for each in world.all_gather_json(modules) for name in each))
    names += [f"{name}.{kind}" for name in model.shapes for kind in KINDS]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            nearest = ", ".join(difflib.get_close_matches(pattern, names, 3, 0.5))
            advice = f"the nearest names: {nearest}" if nearest else f"names are such as {names[0]} and {names[-1]}"
            problem = f"--watch {pattern} matches no module, nor a parameter with .grad, .update or .value"
            raise CollectiveError(ConfigError(f"{problem}; {advice}"))
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _watch_step(replayed: ReplayedRun, step: int, names: Sequence[str], microbatch: int) -> Tensors:
    """Compute a step and return the tensors with these names, on rank 0. Collective."""
    model, outputs, gradients = replayed.model, Tensors(), Tensors()
    replayed.mesh.recorder.enter("step", step)
    watched = {kind: [name for name in model.shapes if f"{name}.{kind}" in names] for kind in KINDS}
    replayed.begin_step(step)
    before = {
        name: _gather(model, name, model.owned_slices()) for name in dict.fromkeys([*watched["value"], *watched["update"]])
    }

    def add_gradient(_: int, number: int, name: str, gradient: Tensor) -> None:
        if number == microbatch and name in model.layouts:
            own = gradient.float() / model.loss_scale
            gradients[name] = gradients[name] + own if name in gradients else own

    with contextlib.ExitStack() as stack:
        stack.enter_context(model.observing(add_gradient))
        for stage in model.stages.values():
            for name, module in stage.model.named_modules():
                keep = partial(_keep_output, outputs, name, stage, max(0, microbatch))
                stack.callback(module.register_forward_hook(keep).remove) if name in names else None
        _, norm, *_ = forward_backward(model, replayed.batches, step)
    slices = {ParamSlice(name, 0, x.numel()): x.flatten() for name, x in gradients.items()}
    slices = model.gradient_slices() if microbatch < 0 else slices
    shown = _gather_outputs(outputs, model.mesh.world)
    shown |= {f"{name}.value": before[name] for name in watched["value"]}
    shown |= {f"{name}.grad": _gather(model, name, slices) for name in watched["grad"]}
    optimizer_step(model, step, norm)
    updates = {f"{name}.update": _gather(model, name, model.owned_slices()) - before[name] for name in watched["update"]}
    return {name: x.clone() for name, x in (shown | updates).items()}


def _keep_output(outputs: Tensors, name: str, stage: ModelStage, microbatch: int, *call: Any) -> None:
    """Keep the output of a module for a microbatch; a forward hook. Recomputation in backward calls it again."""
    ids, output = stage.inputs.microbatch_ids, call[-1]
    is_wanted = stage.forward_microbatch < len(ids) and ids[stage.forward_microbatch] == microbatch
    if is_wanted and isinstance(output, Tensor) and name not in outputs:
        outputs[name] = output.detach().float().cpu().clone()


def _gather(model: TrainModel, name: str, slices: Mapping[ParamSlice, Tensor]) -> Tensor:
    """Return a parameter, or what has its shape, on rank 0 from the slices of all ranks; zeros on others. Collective."""
    parts = {piece: part for piece, part in model.parts.items() if part.source == name}
    own = {item: x for item, x in slices.items() if item.name == name or item.name in parts}
    full, world = torch.zeros(prod(model.shapes[name]), device="cpu"), model.mesh.world
    runs = {piece: part.runs for piece, part in parts.items()}
    sizes = {piece: full.numel() // distance * run for piece, (_, run, distance) in runs.items()}
    pieces = {piece: torch.zeros(size, device="cpu") for piece, size in sizes.items()} or {name: full}
    labels = [[item.name, item.start, item.stop] for item in own]
    for (piece, start, stop), values in _send_to_root(labels, list(own.values()), world):
        pieces[piece][start:stop] = values
    for piece, (first, run, distance) in runs.items():
        full.as_strided((full.numel() // distance, run), (distance, 1), first).copy_(pieces[piece].view(-1, run))
    return full.view(model.shapes[name])


def _gather_outputs(outputs: Tensors, world: Comm) -> Tensors:
    """Return the outputs of modules on rank 0; of modules that several ranks have parts of, each with its rank. Collective."""
    labels = [[name, world.rank, list(x.shape)] for name, x in outputs.items()]
    received = list(_send_to_root(labels, list(outputs.values()), world))
    counts = Counter(name for (name, _, _), _ in received)
    return {f"{name} (rank {rank})" if counts[name] > 1 else name: x.view(shape) for (name, rank, shape), x in received}


def _send_to_root(labels: Sequence[list[Any]], tensors: Sequence[Tensor], world: Comm) -> Iterator[tuple[list[Any], Tensor]]:
    """Yield label and values, flat on the CPU, of the tensors of all ranks on rank 0; equal labels once. Collective."""
    seen: list[list[Any]] = []
    counts = [x.numel() for x in tensors]
    for rank, (names, numels) in enumerate(world.all_gather_json([labels, counts])):
        for place, (label, numel) in enumerate(zip(names, numels)):
            if label in seen:
                continue
            seen.append(label)
            values = tensors[place].detach().float().cpu().flatten().contiguous() if rank == world.rank else torch.empty(numel)
            if rank != 0 and world.rank in (0, rank):
                (world.irecv(values, rank, TAG) if world.rank == 0 else world.isend(values, 0, TAG)).wait()
            if world.rank == 0:
                yield label, values


def _describe(name: str, x: Tensor, other: Tensor | None) -> str:
    """Return a line with the statistics of a tensor, and how another one differs."""
    shape, finite, wide = " x ".join(map(str, x.shape)) or "one", x[torch.isfinite(x)], x.double()
    spread = f"min {finite.min():.4g}, max {finite.max():.4g}" if finite.numel() else "no finite element"
    numbers = f"norm {wide.norm():.6g}, mean {wide.mean():.4g}, std {wide.std(correction=0):.4g}, {spread}"
    bad = f", {x.numel() - finite.numel()} not finite" * (finite.numel() < x.numel())
    text = f"{name}  {shape}  {numbers}{bad}, digest {hex_digest(x.contiguous().numpy().tobytes())[:8]}"
    if other is None:
        return text
    if x.shape != other.shape:
        return f"{text}; the other has shape {' x '.join(map(str, other.shape))}"
    differing = (x.contiguous().view(torch.int32) != other.contiguous().view(torch.int32)).nonzero()
    if not len(differing):
        return f"{text}; equal bits"
    count, first = f"{len(differing):,} of {x.numel():,} elements", differing[0].tolist()
    return f"{text}; {count} differ by at most {(wide - other.double()).abs().max():.4g}, the first at {first}"


def _print_text(replayed: ReplayedRun, arguments: ReplayArguments, print_line: PrintLine) -> None:
    """Print the text of each sample of the step, or of a microbatch, with its place."""
    train, examples = replayed.config.train, replayed.data.examples
    first, count = (arguments.step - 1) * train.global_batch, train.global_batch
    if arguments.microbatch >= 0:
        first, count = first + arguments.microbatch * train.micro_batch, train.micro_batch
    for number in range(first, first + count):
        batch = examples.make_batch(np.array([number]), train.seed)
        place = ""
        if isinstance(examples, TextExamples):
            corpus, at = examples.samples.locate(np.array([number]), train.seed)[0]
            place = f", {corpus.source}, tokens {at} to {at + examples.context_length} of {corpus.path}"
        text = replayed.data.tokenizer.decode(batch.tokens[0].tolist())
        print_line(f"sample {number} (microbatch {(number % train.global_batch) // train.micro_batch}{place}):\n{text}\n")


def _check_can_save(path: Path) -> None:
    """Raise FileError if a file cannot be written, before anything is computed."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        problem = "is a folder" if path.is_dir() else f"the folder {path.parent} does not exist, or cannot be written to"
        raise FileError(f"--save {path}: {problem}; name a file")


def _save(path: Path, tensors: Tensors) -> None:
    """Write tensors as a safetensors file."""
    try:
        save_file({name: x.contiguous() for name, x in tensors.items()}, path)
    except SafetensorError as error:
        raise FileError(f"--save {path}: {error}") from None
