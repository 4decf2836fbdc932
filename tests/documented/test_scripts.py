"""The scripts import names that exist: they are not type-checked, and most benchmarks run on request only."""

import ast
import importlib
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def find_imports(path: Path) -> set[tuple[str, str]]:
    """Return module and name of everything that a script imports from the package or from the benchmarks."""
    return {
        (node.module, alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("mpilm", "benchmarks")
        for alias in node.names
    }


def test_scripts_import_names_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    files = [*SCRIPTS.rglob("*.py"), SCRIPTS / "soak"]
    missing = []
    for module, name in sorted(set().union(*map(find_imports, files))):
        try:
            if not hasattr(importlib.import_module(module), name):
                importlib.import_module(f"{module}.{name}")
        except ImportError as error:
            missing.append(f"{module}.{name}: {error}")
    assert not missing
