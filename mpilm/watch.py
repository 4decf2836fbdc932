"""Look at a run, from any machine that sees its folder, while it trains or afterwards.

python -m mpilm.watch runs/mine
python -m mpilm.watch runs/mine --once true
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mpilm.cli import parse, run_alone
from mpilm.config import Config
from mpilm.errors import ConfigError, FileError
from mpilm.settings import merge, read_toml
from mpilm.telemetry.live import Glance
from mpilm.telemetry.metrics import Tail

DESCRIPTION = (
    "Show how a run is doing: loss and its curve, speed, what the time of a step goes into, memory, the slowest rank, what is "
    "left, the next checkpoint. Reads files of the run folder and writes none: start and stop it as you like, on another node "
    "too. Ctrl-C ends it, and it ends with the run."
)


@dataclass(frozen=True)
class WatchConfig:
    """The run to look at."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """The run folder."""
    interval: float = 2.0
    """Seconds between looks."""
    once: bool = False
    """Show how it stands now, and end."""


def prepare() -> Callable[[], None]:
    config = parse(sys.argv[1:], WatchConfig(), "watch", DESCRIPTION)
    folder = Path(config.folder)
    if config.folder and not folder.exists():
        raise FileError(f"{folder}: there is no such folder, or not yet")
    if not (folder / "config.toml").is_file():
        raise ConfigError(
            f"{config.folder or 'no folder'}: a run folder is wanted, with a config.toml: python -m mpilm.watch runs/NAME"
        )
    if not config.interval > 0:
        raise ConfigError(f"--interval {config.interval}: must be above zero")
    return lambda: watch(folder, config.interval, config.once)


def watch(folder: Path, interval: float, once: bool) -> None:
    """Show the run until it ends or Ctrl-C; once, where there is no terminal to draw on anew."""
    from rich.console import Console
    from rich.live import Live

    glance, tail, console = _glance(folder), Tail(folder / "metrics.jsonl"), Console()
    if once or not console.is_terminal:
        console.print(_told(glance, tail, folder))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            glance = _told(glance, tail, folder)
            live.update(glance, refresh=True)
            if glance.ended:
                break
            time.sleep(interval)


def _told(glance: Glance, tail: Tail, folder: Path) -> Glance:
    """The glance with the rows that have come; another one where some have gone, since the run was taken up again."""
    try:
        rows, anew = tail.read()
    except OSError as error:
        raise FileError(f"{tail.path} cannot be read: {error.strerror}") from None
    glance = _glance(folder) if anew else glance
    for row in rows:
        if row.get("event") == "start":
            glance.steps = _glance(folder).steps  # which a resume may have changed
        glance.see(row)
    return glance


def _glance(folder: Path) -> Glance:
    path = folder / "config.toml"
    config = merge(Config(), read_toml(path), str(path))
    return Glance(str(folder), config.train.steps, config.checkpoint.every)


if __name__ == "__main__":
    run_alone(prepare)
