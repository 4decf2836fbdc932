"""The rules of the house, read from the source: what may import what, sizes, and what must not appear at all."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mpilm"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]

LAYERS = {
    "__init__": 0, "errors": 0, "formatting": 0, "config": 0, "settings": 0, "validation": 0, "presets": 0, "usage": 0,
    "comm": 1, "model": 1,
    "guard": 2, "mesh": 2, "data": 2,
    "ops": 3,
    "parallel": 4,
    "optim": 5, "checkpoint": 5, "telemetry": 5, "planner": 5,
    "trainer": 6,
}  # fmt: skip
COMMANDS = 7  # every other file at the top of the package: what a person runs
PURE = (
    "errors.py", "config.py", "settings.py", "validation.py", "presets.py", "usage.py", "mesh/shape.py",
    "parallel/layout.py", "parallel/plan.py",
    "parallel/shard.py", "parallel/partition.py", "parallel/feasible.py", "parallel/tree.py",
    "parallel/pipeline/actions.py", "parallel/pipeline/schedules.py", "parallel/pipeline/lower.py",
    "parallel/pipeline/check.py", "planner/simulate.py", "planner/draw.py",
    "validation.py", "data/order.py", "optim/rate.py",
)  # fmt: skip
PARALLEL_WORDS = {"rank", "ranks", "mesh", "comm", "comms", "communicator", "world", "mpi"}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MAKERS = {"list", "dict", "set", "bytearray", "defaultdict", "Counter", "deque", "OrderedDict"}
CHANGES = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear"}

each_file = pytest.mark.parametrize("name", NAMES)


def tree(name: str) -> ast.Module:
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"))


def imports(name: str) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, by its full name."""
    here = ["mpilm", *Path(name).parts[:-1]]
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def folder_and_layer(part: str) -> tuple[str, int]:
    """A folder of the package, or the files of one layer at its top, which count as a folder too."""
    if (PACKAGE / part).is_dir():
        assert part in LAYERS, f"mpilm/{part}/ has no layer; give it one in LAYERS (design, section 3)"
        return part, LAYERS[part]
    layer = LAYERS.get(part, COMMANDS)
    return f"layer {layer}", layer


def upward_imports(name: str) -> list[str]:
    folder, layer = folder_and_layer(Path(name).parts[0].removesuffix(".py"))
    wrong = []
    for module in imports(name):
        if module.startswith("mpilm."):
            part = module.split(".")[1]
            exists = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()
            their_folder, their_layer = folder_and_layer(part if exists else "__init__")
            if their_folder != folder and their_layer >= layer:
                wrong.append(f"{module} (layer {their_layer})")
    return wrong


@each_file
def test_imports_only_point_down(name: str) -> None:
    assert not upward_imports(name), f"mpilm/{name} may import its own folder and lower layers only"


@each_file
def test_only_one_file_knows_mpi4py(name: str) -> None:
    knows = any(module.split(".")[0] == "mpi4py" for module in imports(name))
    assert knows == (name == "comm/mpi.py"), f"mpilm/{name}: mpi4py is imported by mpilm/comm/mpi.py, and nowhere else"


@pytest.mark.parametrize("name", PURE)
def test_pure_parts_need_no_torch(name: str) -> None:
    """Imported in a fresh Python, so that what they import counts as well."""
    if not (PACKAGE / name).exists():
        pytest.skip(f"mpilm/{name} is not written yet")
    assert not any(module.split(".")[0] == "torch" for module in imports(name))
    module = "mpilm." + name.removesuffix(".py").replace("/", ".")
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"import {module} brings torch with it\n{done.stderr}"


def identifiers(node: ast.AST) -> Iterator[str]:
    for field in ("id", "arg", "attr", "name", "asname"):
        value = getattr(node, field, None)
        if isinstance(value, str):
            yield value


def words(identifier: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", identifier)}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("model/")])
def test_the_model_knows_no_ranks(name: str) -> None:
    found = {i for node in ast.walk(tree(name)) for i in identifiers(node) if words(i) & PARALLEL_WORDS}
    found -= {"lora_rank"}  # of a matrix
    assert not found, f"mpilm/{name} is a plain model; ranks are the business of mpilm/parallel"


@each_file
def test_files_and_functions_are_short(name: str) -> None:
    lines = len((PACKAGE / name).read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"mpilm/{name} has {lines} lines; split it"
    for node in ast.walk(tree(name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"mpilm/{name}: {node.name} has {length} lines; split it"


@each_file
def test_nothing_runs_what_it_reads(name: str) -> None:
    found = [module for module in imports(name) if module.split(".")[0] in UNSAFE_MODULES]
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("eval", "exec", "torch.load", "np.load", "numpy.load") or re.search(r"_comm\.[a-z]\w*$", called):
                found.append(called)  # mpi4py's lower-case calls pickle
    assert not found, f"mpilm/{name}: {found} would run, or unpickle, what may come from a stranger"


def module_level_state(source: ast.Module) -> list[str]:
    """Names at module level that hold something which can change, and constants that are changed."""
    found = [f"global {', '.join(node.names)}" for node in ast.walk(source) if isinstance(node, ast.Global)]
    for node in source.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and _is_mutable(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [ast.unparse(t) for t in targets if not re.fullmatch(r"_?[A-Z][A-Z0-9_]*|__all__", ast.unparse(t))]
    for node in ast.walk(source):
        changed = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            changed = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            changed = node.func.value
        if isinstance(changed, ast.Name) and re.fullmatch(r"_?[A-Z][A-Z0-9_]+", changed.id):
            found.append(f"a change of {changed.id}")
    return found


def _is_mutable(value: ast.expr) -> bool:
    made_by = ast.unparse(value.func).split(".")[-1] if isinstance(value, ast.Call) else ""
    return isinstance(value, MUTABLE) or made_by in MAKERS


@each_file
def test_modules_hold_no_state(name: str) -> None:
    found = module_level_state(tree(name))
    assert not found, f"mpilm/{name}: {found}: the world, the config and all else are arguments; constants are UPPER_CASE"


def test_the_rules_see_what_they_forbid() -> None:
    """The checks above pass on a clean package; here each sees a breach."""
    assert module_level_state(ast.parse("cache = {}")) == ["cache"]
    assert module_level_state(ast.parse("cache: dict = defaultdict(list)")) == ["cache"]
    assert module_level_state(ast.parse("CACHE = {}\ndef f(k):\n    CACHE[k] = 1")) == ["a change of CACHE"]
    assert module_level_state(ast.parse("SEEN = set()\ndef f(k):\n    SEEN.add(k)")) == ["a change of SEEN"]
    assert module_level_state(ast.parse("def f():\n    global x\n    x = 1")) == ["global x"]
    assert module_level_state(ast.parse("SIZES = [1]\n__all__ = ['f']\nn = 3")) == []
    assert words("localRank") & words("world_size") == set()
    assert (words("localRank") | words("world_size") | words("MPIComm")) >= {"rank", "world"}
    assert folder_and_layer("config") == ("layer 0", 0)
    assert folder_and_layer("comm") == ("comm", 1)
    assert folder_and_layer("train") == ("layer 7", COMMANDS)
