"""The recipes in packaging/ state the version and the requirements of setup.cfg, and copy files that exist."""

import configparser
import re
from pathlib import Path

import mpilm

ROOT = Path(__file__).parents[2]
PACKAGING = ROOT / "packaging"
OTHER_NAMES = {"torch": "pytorch"}  # of PyPI's packages in conda-forge


def read_requirements(*extras: str) -> dict[str, tuple[int, ...]]:
    """Return the lowest version of each package that setup.cfg requires."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    texts = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in extras)]
    return {name: parse(version) for name, version in re.findall(r"^([\w-]+) >= ([\d.]+)", "\n".join(texts), re.M)}


def parse(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, without zeros at its end."""
    return tuple(map(int, re.sub(r"(\.0)+$", "", version).split(".")))


def test_conda_recipe_requires_what_setup_cfg_does() -> None:
    run = re.findall(r"  run:\n(.*?)\n\n", (PACKAGING / "recipe.yaml").read_text(), re.S)[0]
    found = {name: parse(version) for name, version in re.findall(r"- ([\w-]+) >=([\d.]+)", run)}
    assert found == {OTHER_NAMES.get(name, name): version for name, version in read_requirements().items()}


def test_spack_package_requires_what_setup_cfg_does() -> None:
    text = (PACKAGING / "spack_repo" / "mpilm" / "packages" / "py_mpilm" / "package.py").read_text()
    run = text[text.index('default_args(type="run")') :]
    found = {name: parse(version) for name, version in re.findall(r'depends_on\("py-([\w-]+)@([\d.]+):"', run)}
    assert found == read_requirements("data", "report")


def test_recipes_state_the_version() -> None:
    files = ["packaging/recipe.yaml", "packaging/spack_repo/mpilm/packages/py_mpilm/package.py", "packaging/mpilm.eb"]
    for file in [*files, "CITATION.cff"]:
        versions = re.findall(r"^ *version(?::|\(| =) *[\"']?([\d.]+)", (ROOT / file).read_text(), re.M)
        assert versions == [mpilm.__version__], file


def test_images_copy_files_that_exist() -> None:
    for definition in PACKAGING.glob("apptainer-*.def"):
        section = re.findall(r"^%files\n(.*?)\n\n", definition.read_text(), re.M | re.S)[0]
        sources = [line.split()[0] for line in section.splitlines()]
        assert sources
        assert [name for name in sources if not (ROOT / name).exists()] == []
    copied = re.findall(r"^COPY (.*) \S+$", (PACKAGING / "Dockerfile").read_text(), re.M)
    assert sorted(" ".join(copied).split()) == sorted(sources)
