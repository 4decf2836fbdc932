"""One HTML page of a run, or of several that are compared. In one process, without torch and MPI.

python -m mpilm.report runs/NAME                              # writes runs/NAME/report.html
python -m mpilm.report runs/A runs/B --output comparison.html # curves over each other, and what differs
python -m mpilm.report runs/NAME --png plots                  # the plots as images too
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import tyro

from mpilm.config.parse import parse
from mpilm.errors import ConfigError
from mpilm.launch.local import run_local
from mpilm.telemetry.report import page, png
from mpilm.telemetry.report.read import read_run

DESCRIPTION = (
    "Make one HTML page of the folder of a run, which opens in any browser without a network: curves, where the time of a step "
    "goes, the pipeline of a traced step beside the simulated one, memory, events, settings. Of several runs: their curves "
    "over each other, and in what they differ. A run that goes on, or of which files are missing, is shown as far as it is "
    "there."
)


@dataclass(frozen=True)
class ReportConfig:
    """Which runs, and where to."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders of runs."""
    output: str = ""
    """The file to write; empty: report.html in the folder, or of several comparison.html in the first."""
    png: str = ""
    """A folder for the plots as PNG images; empty: none."""


def prepare() -> Callable[[], None]:
    config = parse(sys.argv[1:], ReportConfig(), "report", DESCRIPTION)
    if not config.runs:
        raise ConfigError("say which run: python -m mpilm.report runs/NAME")

    def body() -> None:
        runs = [read_run(folder) for folder in config.runs]
        path = page.save(runs, config.output)
        for text in dict.fromkeys(text for run in runs for text in run.missing):
            print(f"  note     {text}")
        for plot in png.save(runs, config.png) if config.png else []:
            print(f"plot       {plot}")
        print(f"report     {path}  ({path.stat().st_size / 1024:,.0f} KiB)")

    return body


if __name__ == "__main__":
    run_local(prepare)
