"""A run recomputed from one of its checkpoints, or from its start, on other ranks and in another layout."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpilm.checkpoint.format import checkpoint_step, list_checkpoints, read_trainer
from mpilm.checkpoint.plan import plan_files
from mpilm.checkpoint.tensor_digests import digest_tensor_files
from mpilm.comm.base import Comm
from mpilm.comm.collective_errors import CollectiveError, run_on_root
from mpilm.config.check import check_config
from mpilm.config.parse import merge_settings, read_toml
from mpilm.config.schema import Config, ParallelConfig, resolve_config
from mpilm.config.settings import flag_of, override
from mpilm.data.batch import Batches
from mpilm.data.training_data import TrainingData
from mpilm.engine.hardware import numerics_environment
from mpilm.engine.step import StepResult, train_step
from mpilm.engine.train_model import TrainModel
from mpilm.errors import ConfigError, DataError, FileError
from mpilm.mesh.mesh import Mesh
from mpilm.trainer.build import build_train_model, load_state, open_inputs
from mpilm.trainer.certificate import certified_settings
from mpilm.trainer.recovery.loss_scale import loss_scale
from mpilm.verification.arguments import ReplaySettings

DECIDES_BITS = ("mpilm", "torch", "threads", "device", "compile", "kernels")  # of the conditions of a run; the others may
INEXACT = {
    "train.reproducible": (True, "its sums have no fixed order"),
    "parallel.wire_dtype": ("float32", "what ranks carry over from step to step is not in its checkpoints"),
    "parallel.powersgd_rank": (0, "what ranks carry over from step to step is not in its checkpoints"),
    "parallel.sync_every": (0, "its replicas train apart from each other"),
}  # settings of runs that cannot be recomputed: the value that can, and the reason


@dataclass(frozen=True)
class StoredRun:
    """Checkpoint and settings from which steps of a run can be recomputed, the same on all ranks."""

    folder: Path
    checkpoint: Path | None  # the newest from before these steps; None: the run begins anew
    settings: Mapping[str, Any]  # that were in force in the steps to recompute, by section
    trainer: Mapping[str, Any]  # trainer.json of a checkpoint of these steps, else of the newest; empty if there is none
    skipped: Sequence[int]  # steps of the run that changed nothing, or whose changes were undone
    overflows: Sequence[int]  # those among them that overflowed in float16

    @property
    def step(self) -> int:
        """The number of steps completed at the checkpoint."""
        return (checkpoint_step(self.checkpoint) or 0) if self.checkpoint else 0


def find_stored_run(folder: Path, first: int, last: int, world: Comm) -> StoredRun:
    """Find what is stored of a run from before step `first`, counted from 1, to recompute the steps up to `last`. Collective;
    raises CollectiveError, also if the run has no such steps, or its settings changed between them."""

    def find() -> list[Any]:
        checkpoints = list_checkpoints(folder / "checkpoints")
        check_is_run(folder)
        before = [path for path in checkpoints if (checkpoint_step(path) or 0) < first]
        after = [path for path in checkpoints if (checkpoint_step(path) or 0) >= first]
        trainers = [read_trainer(path) for path in after]
        settings = [trainer["config"] for trainer in trainers]
        if not after or (checkpoint_step(after[-1]) or 0) < last:  # the steps since are those of the present settings
            settings.append(read_toml(folder / "config.toml"))
        start = (checkpoint_step(before[-1]) or 0) if before else 0
        _check_settings(folder, settings, [start, *(checkpoint_step(path) or 0 for path in after)], first, last)
        newest = trainers[-1] if after else read_trainer(before[-1]) if before else {}
        path, trainer = str(before[-1]) if before else "", trainers[0] if after else newest
        return [path, settings[0], trainer, newest.get("skipped", []), newest.get("overflows", [])]

    path, settings, trainer, skipped, overflows = world.broadcast_json(run_on_root(world, find))
    return StoredRun(folder, Path(path) if path else None, settings, trainer, skipped, overflows)


def check_is_run(folder: Path) -> None:
    """Raise FileError unless a folder is that of a run."""
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder; name that of a run, such as runs/NAME")
    if not any((folder / name).exists() for name in ("config.toml", "metrics.jsonl", "checkpoints")):
        raise FileError(f"{folder} is not a run folder: it has neither config.toml nor checkpoints")


def _check_settings(folder: Path, settings: Sequence[Mapping[str, Any]], borders: Sequence[int], first: int, last: int) -> None:
    """Raise ConfigError if the run has fewer than `last` steps, or if settings that its result depends on changed before.
    `settings`: of the steps from each of `borders` on."""
    configs = [merge_settings(Config(), each, str(folder)) for each in settings]
    facts = [certified_settings(config) for config in configs]
    if last > configs[-1].train.steps:
        raise ConfigError(f"step {last}: the run in {folder} has {configs[-1].train.steps} steps")
    for border, one in zip(borders[1:], facts[1:]):
        if changed := [name for name in one if one[name] != facts[0].get(name)]:
            if border < last:
                parts = f"take steps {first} to {border} and {border + 1} to {last} one after the other"
                raise ConfigError(f"{folder}: the run went on with another {', '.join(changed)} after step {border}; {parts}")
            return


@dataclass(frozen=True)
class ReplayedRun:
    """A run in the state after `step` steps, and what recomputes the following ones."""

    stored: StoredRun
    config: Config
    mesh: Mesh
    data: TrainingData
    model: TrainModel
    batches: Batches
    content: Mapping[str, str]  # digests of what was read, by setting
    notes: tuple[str, ...]  # on what may change the bits

    def advance(self, first: int, last: int) -> Iterator[tuple[int, StepResult | None]]:
        """Recompute the steps from `first` to `last`, counted from 1, and yield each; None for those that changed nothing in
        the run. Collective: iterate to the end."""
        for done in range(first, last + 1):
            self.begin_step(done - 1)
            is_skipped = done in self.stored.skipped
            yield done, None if is_skipped else train_step(self.model, self.batches, done - 1)

    def begin_step(self, step: int) -> None:
        """Prepare the model for step `step`, counted from 0."""
        self.mesh.recorder.enter("step", step)
        self.model.loss_scale = loss_scale(self.config.train.dtype, self.stored.overflows, step)

    def digest_checkpoint(self, folder: Path) -> dict[str, str]:
        """Return the digests of the tensors in a checkpoint of the run. Collective."""
        files = plan_files(self.config.model, self.model.state_shapes, self.model.parts)
        return digest_tensor_files(folder, files, self.mesh.world)


def open_replayed_run(stored: StoredRun, settings: ReplaySettings, world: Comm) -> ReplayedRun:
    """Build the model of a run in the stored state, in the layout that `settings` ask for. Collective; raises CollectiveError
    if the run cannot be recomputed exactly, or its data have changed."""
    config = _replay_config(stored, settings)
    inputs = open_inputs(config, world)
    mesh = inputs.mesh
    _check_content(stored, inputs.content)
    environment = numerics_environment(inputs.hardware, mesh.world, inputs.config.parallel)
    notes = _compare_environment(stored.trainer.get("conditions", {}), environment, settings.allow_version)
    model, batches = build_train_model(inputs, inputs.config)
    skipped = [step for step in stored.skipped if step <= stored.step]
    load_state(model, stored.checkpoint, stored.step - len(skipped), mesh.world)
    return ReplayedRun(stored, inputs.config, mesh, inputs.data, model, batches, inputs.content, notes)


def _replay_config(stored: StoredRun, settings: ReplaySettings) -> Config:
    """Return the settings of the run in the layout of `settings`. Raises CollectiveError: all ranks read the same."""
    try:
        run = merge_settings(Config(), stored.settings, str(stored.folder))
        for name, (exact, reason) in INEXACT.items():
            section, _, key = name.partition(".")
            if (value := getattr(getattr(run, section), key)) != exact:
                setting = f"{flag_of(name)} {str(value).lower()}"
                raise ConfigError(f"{stored.folder} was trained with {setting} and cannot be recomputed exactly: {reason}")
        stored_threads = int(stored.trainer.get("conditions", {}).get("threads", run.train.threads))
        used = stored.trainer.get("conditions", {"kernels": ""}).get("kernels", "torch")  # versions before had torch's alone
        kernels = "torch" if used == "torch" else run.train.kernels
        compute = {**asdict(settings.train), "threads": settings.train.threads or stored_threads, "kernels": kernels}
        config = override(run, parallel=ParallelConfig(**asdict(settings.parallel)))
        config = override(config, {f"train.{name}": value for name, value in compute.items()})
        config = override(config, {"data.path": settings.data.path} if settings.data.path else {})
        parts = {name: getattr(config.model, name) or 1 for name in ("tensor_parts", "sequence_parts")}
        config = resolve_config(override(config, {f"model.{name}": count for name, count in parts.items()}))
        check_config(config)
        return config
    except ConfigError as error:
        raise CollectiveError(error) from None


def _check_content(stored: StoredRun, content: Mapping[str, str]) -> None:
    """Raise CollectiveError if the text, the tokenizer or the start weights are not those that the run read."""
    before = stored.trainer.get("content", content)
    if changed := [name for name in content if before.get(name) != content[name]]:
        rows = "; ".join(f"{name}: digest {str(before.get(name))[:12]} then, {content[name][:12]} now" for name in changed)
        advice = "name the text as it was with --data.path (the run's own path counts from the folder in which it was started)"
        raise CollectiveError(DataError(f"{stored.folder} was trained on other data: {rows}; {advice}"))


def _compare_environment(before: Mapping[str, str], now: Mapping[str, str], allow: bool) -> tuple[str, ...]:
    """Return notes on what has changed since the run; refuse other versions unless `allow`. Raises CollectiveError."""
    changed = {name: f"{name} {before[name]} then, {now[name]} now" for name in now if before.get(name, now[name]) != now[name]}
    deciding = [text for name, text in changed.items() if name in DECIDES_BITS]
    if deciding and not allow:
        advice = "use what the run used, or write --allow-version true: bits may differ then"
        raise CollectiveError(ConfigError(f"the run was computed with {'; '.join(deciding)}; {advice}"))
    return (f"the last bits may differ from those of the run: {'; '.join(changed.values())}",) if changed else ()
