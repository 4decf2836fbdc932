"""Make one HTML page of a run folder, which opens in any browser without a network.

It shows curves, step time by rank, the pipeline of a traced step beside the simulated one, memory, events and settings. Several
runs are overlaid and their differences listed. A run that is still going on, or whose files are incomplete, is shown as far as
its files go.

$ python -m mpilm.report runs/NAME                               # writes runs/NAME/report.html
$ python -m mpilm.report runs/A runs/B --output comparison.html  # overlaid curves, and the differences
$ python -m mpilm.report runs/NAME --png plots                   # the charts as images too
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from mpilm.config.parse import parse
from mpilm.errors import ConfigError
from mpilm.launch.local import run_local
from mpilm.report import page


@dataclass(frozen=True)
class ReportArguments:
    """Runs to show, and files to write."""

    runs: Annotated[tuple[str, ...], Positional, arg(metavar="RUN [RUN ...]")] = ()  # Run folders.
    output: str = ""  # File to write; empty: report.html in the run folder or, for several, comparison.html in the first.
    png: str = ""  # Folder for the charts as PNG images; empty: none.


def main() -> Callable[[], None]:
    arguments = parse(sys.argv[1:], ReportArguments(), "report", __doc__ or "", positional="runs")
    if not arguments.runs:
        raise ConfigError("no run folder given: python -m mpilm.report runs/NAME")

    def report() -> None:
        path, runs = page.write_report(arguments.runs, arguments.output)
        for line in dict.fromkeys(line for run in runs for line in run.missing):
            print(f"  note     {line}")
        for image in page.save_images(runs, arguments.png) if arguments.png else ():
            print(f"plot       {image}")
        print(f"report     {path}  ({path.stat().st_size / 1024:,.0f} KiB)")

    return report


if __name__ == "__main__":
    run_local(main)
