"""The run folder: found or created, compared with the present settings, never overwritten."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mpilm.checkpoint.format import checkpoint_step, list_checkpoints, read_trainer
from mpilm.checkpoint.manager import remove_leftovers, set_aside
from mpilm.checkpoint.verify import Verifier, find_newest_valid, run_on_root_with_verify
from mpilm.comm.base import Comm
from mpilm.config.old_names import OLD_NAMES
from mpilm.config.parse import merge_settings, read_toml
from mpilm.config.schema import PART_SETTINGS, Config, result_settings, state_parts
from mpilm.config.settings import flatten, override, to_dict
from mpilm.data.files import write_durably
from mpilm.errors import ConfigError, DataError, FileError
from mpilm.formatting import count_noun
from mpilm.launch.lock import LOCK_NAME, FolderLock
from mpilm.model.layers import hash_key
from mpilm.parallel.layout_check import can_divide_parts
from mpilm.trainer.recovery.bad_steps import BadStepTracker
from mpilm.trainer.recovery.memory_checkpoint import RecoveredState

NOT_SHAPE = (*(f"model.{name}" for name in (*PART_SETTINGS, "dropout", "router_loss", "lora_alpha", "init_from")),)
CONTENT_KEYS = ("data.path", "data.tokenizer", "model.init_from")  # compared by content
NEW_CONFIG = ".config.toml.tmp"
Facts = Mapping[str, str]  # by name


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and the state it resumes from."""

    path: Path
    checkpoint: Path | None  # the verified one to resume from; None for a fresh start
    step: int
    logged: int  # the step up to which everything has been logged
    bad_steps: BadStepTracker
    notes: tuple[str, ...]  # for the header
    retained: Mapping[str, int | str]  # settings that a resumed run keeps unless it states them
    lock: FolderLock | None = field(default=None, compare=False)  # on rank 0

    def release(self) -> None:
        """Let another job use the folder."""
        if self.lock is not None:
            self.lock.release()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"


def open_run_folder(
    config: Config, content: Facts, environment: Facts, comm: Comm, recovered: RecoveredState | None = None
) -> RunFolder:
    """Find the state to resume from (`recovered` or a checkpoint), refuse what does not match, and write config.toml.
    `content`: digests by CONTENT_KEYS. `environment`: versions, threads, device, compared with the checkpoint's. Collective."""
    opened = run_on_root_with_verify(comm, lambda verify: _open(config, content, environment, recovered, verify))
    values, lock = opened or (None, None)
    path, checkpoint, step, logged, trainer, notes, retained = comm.broadcast_json(values)
    checkpoint = Path(checkpoint) if checkpoint else None
    return RunFolder(Path(path), checkpoint, step, logged, BadStepTracker.from_state(trainer), tuple(notes), retained, lock)


def _open(
    config: Config, content: Facts, environment: Facts, recovered: RecoveredState | None, verify: Verifier
) -> tuple[list[Any], FolderLock]:
    """Return path, checkpoint, step, logged step, trainer state, notes and retained settings, and the lock."""
    if recovered is not None:
        path, done, trainer, lock = recovered.folder, recovered.done, dict(recovered.trainer), _lock(recovered.folder)
        remove_leftovers(path / "checkpoints")
        return [str(path), "", done, done - 1, trainer, [recovered.note], trainer["retained"]], lock
    path = _choose_path(config)
    _check_is_same_run(path, config)
    lock = _lock(path)
    trainer, notes = dict[str, Any](), list[str]()
    try:
        checkpoint, broken = _choose_checkpoint(path, config, verify)
        if checkpoint is not None:
            trainer = read_trainer(checkpoint)
            config = override(config, _choose_kernels(config, trainer))
            if config.train.kernels != "auto":
                environment = {**environment, "kernels": config.train.kernels}
            notes += _compare_with_checkpoint(checkpoint, trainer, config, content, environment)
        step = trainer.get("step", 0)
        if step > config.train.steps:
            raise ConfigError(f"{checkpoint} is at step {step}, past --train.steps {config.train.steps}; ask for more steps")
        retained = {**_choose_parts(config, trainer), "train.kernels": config.train.kernels}
        notes += _prepare_folder(path, override(config, retained), broken)
    except BaseException:
        lock.release()
        with contextlib.suppress(OSError):
            (path / NEW_CONFIG).unlink(missing_ok=True)
            path.rmdir()  # if it is still empty
        raise
    return [str(path), str(checkpoint or ""), step, step, trainer, notes, retained], lock


def _choose_kernels(config: Config, trainer: Mapping[str, Any]) -> dict[str, str]:
    """Return the kernels to resume with: torch's if they are not stated and the run has used those."""
    is_torch = config.train.kernels == "auto" and trainer["conditions"].get("kernels", "torch") == "torch"
    return {"train.kernels": "torch"} if is_torch else {}


def _choose_parts(config: Config, trainer: Mapping[str, Any]) -> dict[str, int]:
    """Return the parts of the model, by setting: as stated, or those of the checkpoint with this `trainer` state, or as many as
    the layout needs."""
    model = trainer["config"]["model"] if trainer else {}
    stored = {name: getattr(config.model, name) or model.get(name, int(bool(trainer))) for name in PART_SETTINGS}
    stated = state_parts(replace(config, model=replace(config.model, **stored)))
    parts = {f"model.{name}": getattr(stated.model, name) for name in PART_SETTINGS}
    for axis, kind, fits in (("tensor", "tensor", lambda n, ranks: n % ranks == 0), ("context", "sequence", can_divide_parts)):
        ranks, count = getattr(config.parallel, axis), parts[f"model.{kind}_parts"]
        if not fits(count, ranks):
            possible = ", ".join(str(n) for n in range(1, count + 1) if fits(count, n))
            problem = f"--parallel.{axis} {ranks} does not divide {count_noun(count, f'{kind} part')} of the run"
            raise ConfigError(f"{problem}; write {possible}, or choose another --run.dir for another run")
    return parts


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an OSError into a FileError that names the file and the setting."""
    try:
        yield
    except OSError as error:
        raise FileError(f"--run.dir {error.filename or folder} cannot be written: {error.strerror}") from None


def _lock(path: Path) -> FolderLock:
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        return FolderLock(path)


def _prepare_folder(path: Path, config: Config, broken: Mapping[Path, str]) -> list[str]:
    """Write config.toml and set broken checkpoints aside, in a folder that this job has locked; return notes."""
    import tomli_w

    temporary = path / NEW_CONFIG
    with writing(path):
        write_durably(temporary, tomli_w.dumps(to_dict(config)).encode())
        os.replace(temporary, path / "config.toml")  # first: it marks the folder as a run's
        (path / "checkpoints").mkdir(exist_ok=True)
        remove_leftovers(path / "checkpoints")
        aside = set_aside([*broken, *list_checkpoints(path / "checkpoints", complete=False)])
    return [*broken.values(), *(f"set aside as {folder}" for folder in aside)]


def _choose_path(config: Config) -> Path:
    if config.run.dir != "auto":
        return Path(config.run.dir).expanduser()
    first_names = {new: old for old, new in OLD_NAMES.items()}  # a renamed setting must not change the name of the folder
    settings = result_settings(config) | {name: flatten(config)[name] for name in CONTENT_KEYS}
    for name in [f"model.{name}" for name in PART_SETTINGS if getattr(config.model, name) <= 1]:
        del settings[name]  # unstated, or as in runs of earlier versions
    key = {first_names.get(name, name): value for name, value in settings.items()}
    path = Path("runs") / f"{config.model.arch}-{hash_key(sorted(key.items())) & 0xFFFFFF:06x}"
    if config.checkpoint.resume != "never":
        return path
    copies = (path.with_name(f"{path.name}-{n}") for n in range(2, 10**6))
    return path if not path.exists() else next(copy for copy in copies if not copy.exists())


def _check_is_same_run(path: Path, config: Config) -> None:
    """Refuse a folder that holds something else, or a run that must not be resumed."""
    if not path.exists() or (path.is_dir() and all(LOCK_NAME in i.name or i.name == NEW_CONFIG for i in path.iterdir())):
        return  # a job may have ended before it had written config.toml
    if not (path / "config.toml").is_file():
        raise ConfigError(f"--run.dir {path} exists and is not a run folder; choose another")
    if config.checkpoint.resume == "never":
        raise ConfigError(f"--run.dir {path} holds a run, and --checkpoint.resume is never; choose another folder")
    if config.checkpoint.resume == "auto" and not list_checkpoints(path / "checkpoints"):
        old = merge_settings(Config(), read_toml(path / "config.toml"), str(path / "config.toml"))
        _check_same_result(result_settings(old), config, f"the run in {path}")


def _choose_checkpoint(path: Path, config: Config, verify: Verifier) -> tuple[Path | None, dict[Path, str]]:
    """Return the verified checkpoint to resume from, and the problems of broken ones."""
    resume = config.checkpoint.resume
    if resume == "never":
        return None, {}
    if resume != "auto" and not _has_continued_from(path, resume):
        _check_is_newest(Path(resume), path)
        verify(Path(resume))
        return Path(resume), {}
    checkpoint, broken = find_newest_valid(path / "checkpoints", verify)
    if checkpoint is None and broken:
        problems = "\n  ".join(broken.values())
        raise DataError(f"no checkpoint in {path} can be used:\n  {problems}\nChoose another --run.dir to start anew")
    return checkpoint, broken


def _has_continued_from(path: Path, resume: str) -> bool:
    """Return whether this run started from the given checkpoint and has saved since: the same job was submitted again."""
    settings = path / "config.toml"
    has_saved = bool(list_checkpoints(path / "checkpoints")) and settings.is_file()
    return has_saved and read_toml(settings).get("checkpoint", {}).get("resume") == resume


def _check_is_newest(checkpoint: Path, path: Path) -> None:
    if checkpoint_step(checkpoint) is None or not checkpoint.is_dir():
        raise FileError(f"--checkpoint.resume {checkpoint} is not a checkpoint folder (.../checkpoints/step-NNNNNNNN)")
    newest = list_checkpoints(path / "checkpoints")[-1:]
    if newest and newest[0].resolve() != checkpoint.resolve():
        advice = f"to resume from {checkpoint} choose another --run.dir, for the newest write --checkpoint.resume auto"
        raise ConfigError(f"--run.dir {path} already holds {newest[0].name}; {advice}")


def _compare_with_checkpoint(
    checkpoint: Path, trainer: Mapping[str, Any], config: Config, content: Facts, environment: Facts
) -> list[str]:
    """Refuse differences that the result depends on; return notes on the others."""
    old_config = merge_settings(Config(), trainer["config"], str(checkpoint / "trainer.json"))
    _check_same_result(result_settings(old_config) | trainer["content"], config, str(checkpoint), content, old_config)
    before = trainer["conditions"]
    changed = [f"{key} {before[key]} then, {now} now" for key, now in environment.items() if before.get(key, now) != now]
    return [f"the last bits may differ from those of an uninterrupted run: {'; '.join(changed)}"] if changed else []


def _check_same_result(
    old: Mapping[str, Any], config: Config, what: str, content: Facts | None = None, old_config: Config | None = None
) -> None:
    """Raise ConfigError naming each setting that the result depends on and that differs from the old run's."""
    new = result_settings(config) | dict(content or {})
    for name in [f"model.{name}" for name in PART_SETTINGS]:
        old = {**old, name: old[name] or 1}  # runs of earlier versions state none
        if not new[name]:  # not stated: it may be anything
            del new[name]
    allowed = {name.replace("-", "_") for name in config.checkpoint.allow_change} - {"train.optimizer"}
    if changed := [k for k in new if k in old and old[k] != new[k] and k not in allowed]:
        values = [[key, _format_value(key, old[key], old_config), _format_value(key, new[key], config)] for key in changed]
        rows = "".join(f"\n  {key}: was {before}, now {now}" for key, before, now in values)
        advice = f"Choose another --run.dir for another run{_suggest_change(changed)}"
        if "data.tokenizer" in changed and config.model.arch != "bert":  # whose tokenizer has a mask token in its checkpoints
            advice += f"\nTo go on with its tokenizer: --run.dir {Path(what).parents[1]} --data.tokenizer {what}"
            advice += "; if another text is meant, also --checkpoint.allow-change data.path"
        raise ConfigError(f"{what} was made with other settings, and the result depends on them:{rows}\n{advice}")


def _suggest_change(changed: list[str]) -> str:
    if any(key not in NOT_SHAPE and key.startswith("model.") for key in changed):
        return "; a model of another shape cannot resume from it."
    if "data.tokenizer" in changed:
        return ". The tokens are others, since the text or the tokenizer is another; a model has one tokenizer."
    if "train.optimizer" in changed:
        return ", which may start from a checkpoint of this one (--model.init-from): its moments fit no other optimizer."
    return ", or allow the change: --checkpoint.allow-change " + " ".join(changed)


def _format_value(key: str, value: Any, config: Config | None) -> str:
    name = flatten(config)[key] if config and key in CONTENT_KEYS else ""
    where = f" ({' '.join(name) if isinstance(name, tuple) else name})" if name else ""
    return f"text or folder with digest {str(value)[:12]}{where}" if key in CONTENT_KEYS else repr(value)
