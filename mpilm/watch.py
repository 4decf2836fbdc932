"""Watch a run from any machine that sees its folder, while it trains or afterwards.

Show loss and its curve, speed, where the time of a step goes, memory, the slowest rank, the time left, the next checkpoint.
It only reads the run folder: start and stop it at any time. It ends with the run or on Ctrl-C.

$ python -m mpilm.watch runs/NAME
$ python -m mpilm.watch runs/NAME --once true
"""

import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from mpilm.config.parse import parse
from mpilm.config.schema import PositiveFloat
from mpilm.launch.local import run_local
from mpilm.telemetry.live import watch_run


@dataclass(frozen=True)
class WatchConfig:
    """The run to watch."""

    folder: Annotated[str, Positional, arg(metavar="RUN")] = ""  # Run folder.
    interval: PositiveFloat = 2.0  # Seconds between updates.
    once: bool = False  # Show the present state once and exit.


def main() -> None:
    config = parse(sys.argv[1:], WatchConfig(), "watch", __doc__ or "", positional="folder")
    watch_run(config.folder, config.interval, config.once)


if __name__ == "__main__":
    run_local(lambda: main)
