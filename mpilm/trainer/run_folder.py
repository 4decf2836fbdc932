"""The run folder: found or made, compared with what is asked for now, and never written over."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpilm.checkpoint.format import checkpoints, incomplete, read_json, step_of
from mpilm.checkpoint.save import remove_leftovers, set_aside
from mpilm.checkpoint.verify import Verify, newest_valid, with_help
from mpilm.comm.base import Comm
from mpilm.config import Config, flatten, mathematics, to_dict
from mpilm.errors import ConfigError, DataError, FileError
from mpilm.guard.lock import NAME, FolderLock
from mpilm.model.init import key_of
from mpilm.settings import merge, read_toml
from mpilm.trainer.elastic import Carried
from mpilm.trainer.history import History

NO_SHAPE = ("model.dropout", "model.router_loss", "model.lora_alpha", "model.init_from")
DATA_KEYS = ("data.path", "data.tokenizer", "model.init_from")  # compared by content


@dataclass(frozen=True)
class RunFolder:
    """`checkpoint`: the verified one to go on from, None for a fresh start; `history`: of the run until there; `notes`: what
    the user should know of it. `lock`: on rank 0."""

    path: Path
    checkpoint: Path | None
    step: int
    history: History
    notes: tuple[str, ...]
    lock: FolderLock | None = field(default=None, compare=False)

    logged: int = -1
    """The step up to which all has been written down; -1: `step`."""

    def __post_init__(self) -> None:
        if self.logged < 0:
            object.__setattr__(self, "logged", self.step)

    def release(self) -> None:
        """Let another job have the folder."""
        if self.lock is not None:
            self.lock.release()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def open_run_folder(
    config: Config, content: Mapping[str, str], present: Mapping[str, str], comm: Comm, carried: Carried | None = None
) -> RunFolder:
    """Find what to go on from, refuse what does not fit, and write config.toml. Collective; rank 0 looks and writes.

    `content`: digests of the corpus and the tokenizer by DATA_KEYS. `present`: versions, threads, device, to be compared
    with those that the checkpoint was made with. `carried`: what this run goes on from, in the place of a checkpoint.
    """
    found = with_help(comm, lambda verify: _open(config, content, present, carried, verify))
    values = None
    if found:
        words = found.history.words()
        values = [str(found.path), str(found.checkpoint or ""), found.step, words, found.notes, found.logged]
    path, checkpoint, step, history, notes, logged = comm.broadcast_json(values)
    lock = found.lock if found else None
    checkpoint = Path(checkpoint) if checkpoint else None
    return RunFolder(Path(path), checkpoint, step, History.of(history), tuple(notes), lock, logged)


def _open(
    config: Config, content: Mapping[str, str], present: Mapping[str, str], carried: Carried | None, verify: Verify
) -> RunFolder:
    if carried is not None:
        path, lock = carried.folder, _lock(carried.folder)
        remove_leftovers(path / "checkpoints")
        return RunFolder(path, None, carried.done, History.of(carried.history), (carried.note,), lock, carried.done - 1)
    path = _choose_path(config)
    _refuse_foreign(path, config)
    lock = _lock(path)
    try:
        return _take(path, lock, config, content, present, verify)
    except BaseException:
        lock.release()
        with contextlib.suppress(OSError):
            path.rmdir()  # where nothing else has come into it
        raise


def _lock(path: Path) -> FolderLock:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return FolderLock(path)
    except OSError as error:
        raise FileError(f"--run.dir {path} cannot be written: {error.strerror}") from None


def _take(
    path: Path, lock: FolderLock, config: Config, content: Mapping[str, str], present: Mapping[str, str], verify: Verify
) -> RunFolder:
    """Choose a checkpoint and write config.toml, in a folder that is this job's."""
    checkpoint, broken, notes = _choose_checkpoint(path, config, content, present, verify)
    step = step_of(checkpoint) if checkpoint else 0
    assert step is not None
    if step > config.train.steps:
        raise ConfigError(f"{checkpoint} is at step {step}, past --train.steps {config.train.steps}; ask for more steps")
    try:
        write_config(path / "config.toml", config)  # first: it is what makes the folder a run's
        (path / "checkpoints").mkdir(exist_ok=True)
        remove_leftovers(path / "checkpoints")
        aside = set_aside([*broken, *incomplete(path / "checkpoints")])
        notes += [*broken.values(), *(f"set aside as {folder}" for folder in aside)]
    except OSError as error:
        raise FileError(f"--run.dir {path} cannot be written: {error.strerror}") from None
    history = History.of(read_json(checkpoint / "trainer.json") if checkpoint else {})
    return RunFolder(path, checkpoint, step, history, tuple(notes), lock)


def _choose_path(config: Config) -> Path:
    if config.run.dir != "auto":
        return Path(config.run.dir)
    decides = mathematics(config) | {key: flatten(config)[key] for key in DATA_KEYS}
    path = Path("runs") / f"{config.model.arch}-{key_of(sorted(decides.items())) & 0xFFFFFF:06x}"
    if config.checkpoint.resume != "never":
        return path
    copies = (path.with_name(f"{path.name}-{n}") for n in range(2, 10**6))
    return path if not path.exists() else next(copy for copy in copies if not copy.exists())


def _refuse_foreign(path: Path, config: Config) -> None:
    """A folder that holds something else, or a run that is not to be resumed, is left alone."""
    if not path.exists() or (path.is_dir() and all(NAME in item.name for item in path.iterdir())):
        return
    if not (path / "config.toml").is_file():
        raise ConfigError(f"--run.dir {path} exists and is not a run folder; choose another")
    if config.checkpoint.resume == "never":
        raise ConfigError(f"--run.dir {path} holds a run, and --checkpoint.resume is never; choose another folder")
    if config.checkpoint.resume == "auto" and not checkpoints(path / "checkpoints"):
        old = merge(Config(), read_toml(path / "config.toml"), str(path / "config.toml"))
        _refuse_changes(mathematics(old), config, f"the run in {path}")


def _choose_checkpoint(
    path: Path, config: Config, content: Mapping[str, str], present: Mapping[str, str], verify: Verify
) -> tuple[Path | None, dict[Path, str], list[str]]:
    """The verified checkpoint to go on from, the broken ones with what is wrong with them, and notes."""
    asked = config.checkpoint.resume
    if asked == "never":
        return None, {}, []
    if asked == "auto" or _began_from(path, asked):
        checkpoint, broken = newest_valid(path / "checkpoints", verify)
    else:
        checkpoint, broken = Path(asked), {}
        _refuse_branch(checkpoint, path)
        verify(checkpoint)
    if checkpoint is None and broken:
        raise DataError(
            f"no checkpoint in {path} is whole:\n  " + "\n  ".join(broken.values()) + "\nChoose another --run.dir to start anew"
        )
    return checkpoint, broken, _compare(checkpoint, config, content, present) if checkpoint else []


def _began_from(path: Path, asked: str) -> bool:
    """Whether this run was started from the checkpoint asked for and has saved since: the same job submitted again."""
    if not checkpoints(path / "checkpoints") or not (path / "config.toml").is_file():
        return False
    return read_toml(path / "config.toml").get("checkpoint", {}).get("resume") == asked


def _refuse_branch(checkpoint: Path, path: Path) -> None:
    if step_of(checkpoint) is None or not checkpoint.is_dir():
        raise FileError(f"--checkpoint.resume {checkpoint} is not a checkpoint folder (.../checkpoints/step-NNNNNNNN)")
    newest = checkpoints(path / "checkpoints")[-1:]
    if newest and newest[0].resolve() != checkpoint.resolve():
        raise ConfigError(
            f"--run.dir {path} already holds {newest[0].name}; to go on from {checkpoint} choose another --run.dir, "
            "to go on from the newest write --checkpoint.resume auto"
        )


def _compare(checkpoint: Path, config: Config, content: Mapping[str, str], present: Mapping[str, str]) -> list[str]:
    """Refuse what must not differ; returns notes on what may."""
    trainer = read_json(checkpoint / "trainer.json")
    source = str(checkpoint / "trainer.json")
    _refuse_changes(
        mathematics(merge(Config(), trainer["config"], source)) | trainer["content"], config, str(checkpoint), content
    )
    old = trainer["conditions"]
    changed = [f"{key} was {old[key]}, is {now}" for key, now in present.items() if key in old and old[key] != now]
    return [f"the last bits may differ from those of an uninterrupted run: {'; '.join(changed)}"] if changed else []


def _refuse_changes(old: Mapping[str, Any], config: Config, what: str, content: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError naming each setting on which the numbers depend and that differs from the old run's."""
    new = mathematics(config) | dict(content or {})
    allowed = {name.replace("-", "_") for name in config.checkpoint.allow_change} - {"train.optimizer"}
    changed = [k for k in new if k in old and old[k] != new[k] and k not in allowed]
    if changed:
        rows = "".join(f"\n  {key}: was {_shown(key, old[key])}, now {_shown(key, new[key])}" for key in changed)
        raise ConfigError(
            f"{what} was made with other settings, and the result depends on them:{rows}\n"
            "Choose another --run.dir for another run" + _how_to_allow(changed)
        )


def _how_to_allow(changed: list[str]) -> str:
    if any(key not in NO_SHAPE and (key.startswith("model.") or key == "data.tokenizer") for key in changed):
        return "; a model of another shape cannot go on from it."
    if "train.optimizer" in changed:
        return ", which may start from a checkpoint of this one (--model.init-from): its moments fit no other optimizer."
    return ", or allow the change: --checkpoint.allow-change " + " ".join(changed)


def _shown(key: str, value: Any) -> str:
    return f"content {str(value)[:12]}" if key in DATA_KEYS else repr(value)


def write_config(path: Path, config: Config) -> None:
    """The resolved config as TOML, replaced whole or not at all."""
    import tomli_w

    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(tomli_w.dumps(to_dict(config)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
