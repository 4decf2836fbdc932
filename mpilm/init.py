"""Make a folder to work in: a config to start from, the batch scripts, and a .gitignore. Overwrite nothing.

--site NAME takes the modules and the launcher of a known machine from jobs/sites/NAME.sh. If mpilm is installed in a virtual
environment, jobs/site.sh activates it, so that batch jobs find it.

$ mpilm init my_project
$ mpilm init my_project --site NAME
"""

import os
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mpilm.config.help import field_comments
from mpilm.config.parse import parse
from mpilm.config.presets import COMMON_SETTINGS
from mpilm.config.schema import Config
from mpilm.config.settings import flatten
from mpilm.data.files import file_errors
from mpilm.errors import ConfigError
from mpilm.formatting import command_text
from mpilm.launch.local import run_local

JOBS = Path(__file__).parent / "jobs"  # in the wheel and, by a link, in the repository
CONFIG, RUN_DIR, IGNORED = "train.toml", "runs/first", "runs/\n*.log\n.venv/\n"


@dataclass(frozen=True)
class InitArguments:
    """The folder to make."""

    folder: Annotated[str, Positional, arg(metavar="FOLDER")] = ""  # Folder to write into; it may exist.
    site: str = ""  # Machine to run on, one of jobs/sites/; empty: another.


def write_project(folder: Path, site: str) -> list[Path]:
    """Write the files of a project and return their names in `folder`; raises ConfigError or FileError."""
    sites = sorted(path.stem for path in (JOBS / "sites").glob("*.sh"))
    if site and site not in sites:
        raise ConfigError(f"--site {site}: no such machine; known are {', '.join(sites) or 'none'}. Leave it out for another")
    texts = {Path(CONFIG): "\n".join(_config_lines()) + "\n", Path(".gitignore"): IGNORED}
    activate = Path(sys.prefix) / "bin" / "activate"
    commands = [(JOBS / "sites" / f"{site}.sh").read_text()] if site else []
    commands += [f"source {shlex.quote(str(activate))}\n"] * (sys.prefix != sys.base_prefix and activate.is_file())
    if commands:
        texts[Path("jobs/site.sh")] = "".join(commands)
    files = {Path("jobs") / path.relative_to(JOBS): path for path in sorted(JOBS.rglob("*")) if path.is_file()}
    scripts = {name: path for name, path in files.items() if name not in texts}
    if existing := [name for name in (*texts, *scripts) if (folder / name).exists()]:
        raise ConfigError(f"{folder / existing[0]} exists; init overwrites nothing: name another folder")
    with file_errors(folder, "written"):
        for name in (*texts, *scripts):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(texts[name].encode() if name in texts else scripts[name].read_bytes())
            (folder / name).chmod(0o755 if name in scripts and os.access(scripts[name], os.X_OK) else 0o644)
    return [*texts, *scripts]


def _config_lines() -> Iterator[str]:
    """Yield the lines of a config with the common settings. Those of the model are comments: init-from sets them."""
    import tomli_w

    values, section = flatten(Config()) | {"run.dir": RUN_DIR}, ""
    yield f"# Settings of training; {command_text('train')} --help explains all of them."
    yield "# A line such as `# n-layers = 4` states a default; remove the # to change it."
    for name in COMMON_SETTINGS:
        before, (section, _, key) = section, name.partition(".")
        if section != before:
            yield from ("", f"[{section}]")
        comment = field_comments(type(getattr(Config(), section)))[key]
        yield from textwrap.wrap(comment, 100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
        value = list(values[name]) if isinstance(values[name], tuple) else values[name]
        yield ("# " if section == "model" else "") + tomli_w.dumps({key.replace("_", "-"): value}).strip()


def main() -> Callable[[], None]:
    arguments = parse(sys.argv[1:], InitArguments(), "init", __doc__ or "", positional="folder")
    if not arguments.folder:
        raise ConfigError(f"name a folder: {command_text('init')} my_project")

    def init() -> None:
        names = write_project(Path(arguments.folder).expanduser(), arguments.site)
        print(f"wrote   {len(names)} files: {CONFIG}, jobs/, .gitignore; go on with cd {shlex.quote(arguments.folder)}")
        print(f"here    mpirun -n 2 {command_text('train')} --config {CONFIG}")
        print(f"SLURM   sbatch jobs/train.sbatch --config {CONFIG} --run.dir {RUN_DIR}")

    return init


if __name__ == "__main__":
    run_local(main)
