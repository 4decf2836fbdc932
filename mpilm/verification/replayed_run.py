"""A run recomputed from one of its checkpoints, or from its start, on other ranks and in another layout."""

from collections.abc import Iterator, Mapping
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
from mpilm.config.schema import Config, ParallelConfig, override, resolve_config
from mpilm.data.batch import Batches
from mpilm.data.training_data import TrainingData
from mpilm.engine.hardware import numerics_environment
from mpilm.engine.step import StepResult, train_step
from mpilm.engine.train_model import TrainModel
from mpilm.errors import ConfigError, DataError, FileError
from mpilm.mesh.mesh import Mesh
from mpilm.trainer.build import build_train_model, load_state, open_inputs
from mpilm.verification.arguments import ReplaySettings

DECIDES_BITS = ("mpilm", "torch", "threads", "device", "compile")  # of the conditions of a run; the others may
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
    settings: Mapping[str, Any]  # that were in force, by section
    newest: Mapping[str, Any]  # trainer.json of the newest checkpoint; empty if there is none

    @property
    def step(self) -> int:
        """The number of steps completed at the checkpoint."""
        return (checkpoint_step(self.checkpoint) or 0) if self.checkpoint else 0


def find_stored_run(folder: Path, step: int, world: Comm) -> StoredRun:
    """Find what is stored of the state after `step` steps. Collective; raises CollectiveError."""

    def find() -> list[Any]:
        checkpoints = list_checkpoints(folder / "checkpoints")
        if not checkpoints and not (folder / "config.toml").is_file():
            raise FileError(f"{folder} is not a run folder: it has neither config.toml nor checkpoints")
        before = [path for path in checkpoints if (checkpoint_step(path) or 0) <= step]
        after = [path for path in checkpoints if (checkpoint_step(path) or 0) > step]
        newest = read_trainer(checkpoints[-1]) if checkpoints else {}
        settings = read_trainer(after[0])["config"] if after else read_toml(folder / "config.toml")
        return [str(before[-1]) if before else "", settings, newest]

    path, settings, newest = world.broadcast_json(run_on_root(world, find))
    return StoredRun(folder, Path(path) if path else None, settings, newest)


@dataclass(frozen=True)
class ReplayedRun:
    """A run in the state after `step` steps, and what recomputes the following ones."""

    stored: StoredRun
    config: Config
    mesh: Mesh
    data: TrainingData
    model: TrainModel
    batches: Batches
    notes: tuple[str, ...]  # on what may change the bits

    def advance(self, first: int, last: int) -> Iterator[tuple[int, StepResult]]:
        """Recompute the steps from `first` to `last`, counted from 1, and yield each; skip those that changed nothing in the
        run. Collective: iterate to the end."""
        skipped = set(self.stored.newest.get("skipped", ()))
        for done in range(first, last + 1):
            if done not in skipped:
                self.mesh.recorder.enter("step", done - 1)
                yield done, train_step(self.model, self.batches, done - 1)

    def digest_checkpoint(self, folder: Path) -> dict[str, str]:
        """Return the digests of the tensors in a checkpoint of the run. Collective."""
        files = plan_files(self.config.model, self.model.state_shapes, self.model.parts)
        return digest_tensor_files(folder, files, self.mesh.world)


def open_replayed_run(stored: StoredRun, settings: ReplaySettings, world: Comm) -> ReplayedRun:
    """Build the model of a run in the stored state, in the layout that `settings` ask for. Collective; raises CollectiveError
    if the run cannot be recomputed exactly, or its data have changed."""
    config = _replay_config(stored, settings)
    inputs = open_inputs(config, world)
    mesh, newest = inputs.mesh, stored.newest
    _check_content(stored, inputs.content)
    environment = numerics_environment(inputs.hardware, mesh.world, inputs.config.parallel)
    notes = _compare_environment(newest.get("conditions", {}), environment, settings.allow_version)
    model, batches = build_train_model(inputs, inputs.config)
    skipped = [step for step in newest.get("skipped", ()) if step <= stored.step]
    load_state(model, stored.checkpoint, stored.step - len(skipped), mesh.world)
    return ReplayedRun(stored, inputs.config, mesh, inputs.data, model, batches, notes)


def _replay_config(stored: StoredRun, settings: ReplaySettings) -> Config:
    """Return the settings of the run in the layout of `settings`. Raises CollectiveError: all ranks read the same."""
    try:
        run = merge_settings(Config(), stored.settings, str(stored.folder))
        for name, (exact, reason) in INEXACT.items():
            section, _, key = name.partition(".")
            if (value := getattr(getattr(run, section), key)) != exact:
                flag = name.replace("_", "-")
                raise ConfigError(f"{stored.folder} was trained with {flag} {value} and cannot be recomputed exactly: {reason}")
        compute = {"device": settings.train.device, "threads": settings.train.threads}
        compute["threads"] = compute["threads"] or int(stored.newest.get("conditions", {}).get("threads", 0))
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
    before = stored.newest.get("content", content)
    if changed := [name for name in content if before.get(name) != content[name]]:
        rows = "; ".join(f"{name}: digest {str(before.get(name))[:12]} then, {content[name][:12]} now" for name in changed)
        advice = "name the text as it was with --data.path"
        raise CollectiveError(DataError(f"{stored.folder} was trained on other data: {rows}; {advice}"))


def _compare_environment(before: Mapping[str, str], now: Mapping[str, str], allow: bool) -> tuple[str, ...]:
    """Return notes on what has changed since the run; refuse other versions unless `allow`. Raises CollectiveError."""
    changed = {name: f"{name} {before[name]} then, {now[name]} now" for name in now if before.get(name, now[name]) != now[name]}
    deciding = [text for name, text in changed.items() if name in DECIDES_BITS]
    if deciding and not allow:
        advice = "use what the run used, or write --allow-version true: bits may differ then"
        raise CollectiveError(ConfigError(f"the run was computed with {'; '.join(deciding)}; {advice}"))
    return (f"the last bits may differ from those of the run: {'; '.join(changed.values())}",) if changed else ()
