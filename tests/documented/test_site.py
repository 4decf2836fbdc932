"""The documentation site: it builds without a warning, links to no missing page, and loads nothing from a network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_links_between_pages_resolve_to_files():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_navigation_lists_every_page():
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == pages | {"CONTRIBUTING.md", "CHANGELOG.md"}


def test_how_it_works_lists_every_file_of_the_package():
    text = (ROOT / "docs" / "concepts" / "how-it-works.md").read_text()
    listed = set(re.findall(r"\w+\.py", re.findall(r"```text\nmpilm/\n(.*?)\ntests/", text, re.S)[0]))
    files = {path.name for path in (ROOT / "mpilm").rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert not files - listed
    assert not listed - files


def test_files_that_concept_pages_name_exist():
    for page in (ROOT / "docs" / "concepts").glob("*.md"):
        for name in re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", page.read_text()):
            assert (ROOT / name).exists() or (ROOT / "mpilm" / name).exists(), f"{page.name} names {name}"


def test_names_in_how_it_works_exist():
    source = "\n".join(path.read_text() for path in (ROOT / "mpilm").rglob("*.py"))
    for name in re.findall(r"`([A-Za-z_]\w+(?:\.\w+)?)`", (ROOT / "docs" / "concepts" / "how-it-works.md").read_text()):
        owner, _, member = name.partition(".")
        if member in ("py", "json") or name == "REDUCE":
            continue
        defined = rf"(?:class|def) {owner}\b|^{owner}\b.*="
        assert re.search(defined, source, re.M), f"{name} is not defined in mpilm"
        assert not member or re.search(rf"def {member}\b", source), f"{name} is not defined in mpilm"


@pytest.mark.timeout(300)
def test_site_builds_and_loads_nothing_from_a_network(tmp_path):
    pytest.importorskip("material", reason="needs pip install -e '.[docs]'")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        external = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="?(https?://[^" >]+)', page.read_text())
        assert not external, f"{page.name} loads {external}"
