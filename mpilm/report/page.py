"""Writes the page and the images of a report."""

import io
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mpilm import __version__
from mpilm.data.files import file_errors
from mpilm.errors import ConfigError, FileError
from mpilm.formatting import count_noun, format_mebibytes, format_number
from mpilm.mesh.shape import AXES
from mpilm.report import figures, summary, trace
from mpilm.report.read import RecordedRun, read_run
from mpilm.telemetry.metrics import SLOW, to_float

PAGE = "report.html"
MARKER = b"mpilm.report"  # within the first KiB of every file that a report may overwrite


def write_report(folders: Sequence[str | Path], output: str | Path = "") -> tuple[Path, list[RecordedRun]]:
    """Write the report of the runs in `folders`, by default into the first one. Return its path and the runs. Raises FileError
    if a folder is not a run or the file cannot be written, ConfigError if plotly is not installed."""
    runs = [read_run(folder) for folder in folders]
    path = Path(output) if output else runs[0].folder / (PAGE if len(runs) == 1 else "comparison.html")
    _replace_file(path, render_page(runs).encode("utf-8", errors="backslashreplace"))  # JSON may hold lone surrogates
    return path, runs


def render_page(runs: Sequence[RecordedRun]) -> str:
    """Return the page as HTML."""
    from jinja2 import Environment, FileSystemLoader  # not at the top: training imports this module at its start

    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError("a report needs plotly: pip install 'mpilm[report]'") from None
    template_folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=template_folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"default": lambda value: value.tolist()}
    environment.filters |= {"number": format_number, "mebibytes": format_mebibytes, "count": count_noun, "float": to_float}
    environment.filters |= {"digits": lambda value: f"{to_float(value):.3g}", "facts": summary.collect_facts}
    environment.globals |= {"figures": figures, "summary": summary, "trace": trace}
    environment.globals |= {"axes": AXES, "slow": SLOW, "version": __version__}
    charts = {chart.key: asdict(chart) for chart in figures.make_charts(runs)}
    return environment.get_template("page.html.j2").render(runs=runs, charts=charts, plotly=get_plotlyjs()).lstrip()


def save_images(runs: Sequence[RecordedRun], folder: str | Path) -> list[Path]:
    """Draw the charts of the runs as PNG files in `folder` and return their paths. Raises ConfigError or FileError."""
    drawn = {Path(folder) / f"{chart.key}.png": figures.draw_chart(chart) for chart in figures.make_charts(runs)}
    with file_errors(f"--png {folder}", "created"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    for path, figure in drawn.items():
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150, metadata={"Software": MARKER.decode()})
        _replace_file(path, image.getvalue())
    return list(drawn)


def _replace_file(path: Path, content: bytes) -> None:
    """Write a file at once, so that a reader sees the old one or the new one. Only a report or its images are overwritten."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with file_errors(path, "written"):
        if path.is_dir():
            raise FileError(f"{path} is a folder; pass the name of a file")
        if path.exists() and path.name != PAGE:
            with open(path, "rb") as file:
                if MARKER not in file.read(1024):
                    raise FileError(f"{path} exists and is not a report of mpilm, so it was not overwritten; pass another name")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
