"""The rules of the house, read from the source. Each test looks at all files and reports every breach."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mpilm"
NAMES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))

MAX_PACKAGE_LINES, MAX_CORE_LINES = 25_600, 18_600
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
CORE = {
    "comm", "mesh", "ops", "model", "data", "parallel", "optim", "checkpoint", "engine", "trainer", "launch", "config",
}  # fmt: skip
ROOMS = (  # from the lowest layer to the highest
    ("__init__", "errors", "formatting"),
    ("config",),
    ("kernels",),
    ("comm", "model"),
    ("testing",),
    ("launch", "mesh", "data"),
    ("ops",),
    ("parallel",),
    ("optim", "checkpoint", "telemetry", "planner"),
    ("engine", "report"),
    ("inference",),
    ("trainer",),
    ("verification",),
    ("doctor",),
)
LAYERS = {room: layer for layer, rooms in enumerate(ROOMS) for room in rooms}
COMMAND_LAYER = len(ROOMS)  # every other file at the top of the package
PURE = (
    "errors", "formatting", "config.schema", "config.presets", "config.old_names", "config.parse", "config.check",
    "mesh.shape", "ops.halving", "ops.tree", "parallel.flat_layout", "parallel.layout", "parallel.layout_check",
    "parallel.plan",
    "parallel.pipeline.partition", "parallel.pipeline.actions", "parallel.pipeline.schedules", "planner.simulate",
    "planner.draw", "data.order",
)  # fmt: skip
PARALLEL_WORDS = {"rank", "ranks", "mesh", "comm", "comms", "communicator", "world", "mpi"}
MATRIX_RANKS = {"lora_rank"}  # ranks of matrices, which a model may know
PRIVATE_TORCH_FILES = {"kernels/blockwise_attention.py", "optim/optimizer.py", "parallel/context.py"}  # torch's fused kernels
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "np.load", "numpy.load"}
MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_MAKERS = {"list", "dict", "set", "bytearray", "defaultdict", "Counter", "deque", "OrderedDict"}
MUTATING_METHODS = {
    "append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear",
}  # fmt: skip
SHARED_NAMES = {"main"}  # may be defined in several modules
HOME_MADE_WORDS = {
    "say", "said", "heard", "look", "whole", "apart", "met", "meet", "kept", "carried", "told", "speaks", "mind", "wish",
    "fleeting", "dealt", "owed", "asked", "glance", "forgetful", "anew",
}  # fmt: skip
FIELD_NAMES = {"whole_words"}  # BERT's whole-word masking
HEADLESS = re.compile(r"(What|Of|How|Where|Whether|Which|Whose|In what|As it|But for)\b")

Functions = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def source(name: str) -> str:
    return (PACKAGE / name).read_text(encoding="utf-8")


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(source(name))


def assert_no_breaches(rule: str, breaches: Iterable[str]) -> None:
    breaches = list(breaches)
    assert not breaches, "\n".join([rule, *breaches])


# Imports.


def imported_names(name: str) -> Iterator[str]:
    """Yield what a file imports, anywhere in it, by full name."""
    folder = ["mpilm", *Path(name).parts[:-1]]
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_and_layer(part: str) -> tuple[str, int]:
    """Return the folder that `part` of the package belongs to, and its layer; files of one layer at the top are one folder."""
    if (PACKAGE / part).is_dir():
        assert part in LAYERS, f"mpilm/{part}/ has no layer; give it one in ROOMS (design, section 3)"
        return part, LAYERS[part]
    layer = LAYERS.get(part, COMMAND_LAYER)
    return f"layer {layer}", layer


def upward_imports(name: str) -> Iterator[str]:
    room, layer = room_and_layer(Path(name).parts[0].removesuffix(".py"))
    for module in imported_names(name):
        if module.startswith("mpilm."):
            part = module.split(".")[1]
            exists = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()
            other_room, other_layer = room_and_layer(part if exists else "__init__")
            if other_room != room and other_layer >= layer:
                yield f"mpilm/{name} (layer {layer}) imports {module} (layer {other_layer})"


def test_imports_point_to_lower_layers() -> None:
    breaches = (breach for name in NAMES for breach in upward_imports(name))
    assert_no_breaches("a file imports from its own folder and lower layers", breaches)


def module_graph() -> dict[str, set[str]]:
    """Return which modules of the package each one imports, under TYPE_CHECKING and inside functions too."""
    modules = {"mpilm." + name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): name for name in NAMES}
    modules["mpilm"] = modules.pop("mpilm.__init__", "__init__.py")
    graph: dict[str, set[str]] = {}
    for module, name in modules.items():
        targets = [target for target in imported_names(name) if target.split(".")[0] == "mpilm"]
        graph[module] = {next(m for m in _prefixes(target) if m in modules) for target in targets} - {module}
    return graph


def _prefixes(dotted: str) -> list[str]:
    """Return a dotted name and what it lies in, the longest first."""
    parts = dotted.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other (Tarjan's strongly connected components of two or more)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
            if target in stack:
                lowest[node] = min(lowest[node], lowest[target])
        if lowest[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_modules_have_no_import_cycles() -> None:
    assert_no_breaches("no modules import each other", (" <-> ".join(group) for group in cycles(module_graph())))


def test_mpi4py_is_imported_by_one_file() -> None:
    importers = {name for name in NAMES if any(module.split(".")[0] == "mpi4py" for module in imported_names(name))}
    assert importers == {"comm/mpi.py"}


WITHOUT_TORCH = """
import importlib, sys
sys.modules["torch"] = None  # importing it raises
for name in sys.argv[1:]:
    try:
        importlib.import_module(f"mpilm.{name}")
    except ImportError as error:
        print(f"mpilm.{name}: {error}")
"""


def test_pure_modules_import_no_torch() -> None:
    """In a fresh process, so that what they import counts as well."""
    code = [sys.executable, "-c", WITHOUT_TORCH, *PURE]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert_no_breaches("pure modules can be imported without torch", done.stdout.splitlines())


def test_private_torch_functions_are_in_listed_files() -> None:
    used = {name: private_torch_names(tree(name)) for name in NAMES}
    breaches = [f"mpilm/{name}: {found}" for name, found in used.items() if found and name not in PRIVATE_TORCH_FILES]
    assert_no_breaches("torch's private functions may change with any version; they stand in PRIVATE_TORCH_FILES", breaches)
    assert {name for name, found in used.items() if found} == PRIVATE_TORCH_FILES


def private_torch_names(module: ast.Module) -> list[str]:
    used = [ast.unparse(node) for node in ast.walk(module) if isinstance(node, ast.Attribute)]
    used += [
        f"{node.module}.{alias.name}" for node in ast.walk(module) if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    return sorted({name for name in used if re.fullmatch(r"torch(\.\w+)*\._[a-zA-Z]\w*(\.\w+)*", name)})


def test_nothing_read_from_a_file_is_executed_or_unpickled() -> None:
    breaches = (breach for name in NAMES for breach in unsafe_uses(name))
    assert_no_breaches("nothing runs, or unpickles, what may come from a stranger", breaches)


def unsafe_uses(name: str) -> Iterator[str]:
    for module in imported_names(name):
        if module.split(".")[0] in UNSAFE_MODULES:
            yield f"mpilm/{name}: import of {module}"
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in UNSAFE_CALLS or re.search(r"_comm\.[a-z]\w*$", called):  # mpi4py's lower-case calls pickle
                yield f"mpilm/{name}:{node.lineno}: {called}"


def test_json_of_others_is_parsed_in_one_place() -> None:
    """parse_json limits depth and size, and its message names the place; the other files parse what ranks of one job wrote."""
    callers = {name for name in NAMES if re.search(r"\bjson\.loads?\(", source(name))}
    assert callers == {"data/files.py", "comm/base.py", "launch/lock.py", "launch/watchdog.py", "planner/profile.py"}


# Sizes.


def test_files_and_functions_are_short() -> None:
    def long_parts() -> Iterator[str]:
        for name in NAMES:
            if (lines := len(source(name).splitlines())) > MAX_FILE_LINES:
                yield f"mpilm/{name} has {lines} lines"
            for node in ast.walk(tree(name)):
                if isinstance(node, Functions) and (lines := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES:
                    yield f"mpilm/{name}:{node.lineno}: {node.name} has {lines} lines"

    assert_no_breaches(f"a file has at most {MAX_FILE_LINES} lines, a function {MAX_FUNCTION_LINES}", long_parts())


def test_package_and_core_stay_small() -> None:
    lines = {name: len(source(name).splitlines()) for name in NAMES}
    core = sum(count for name, count in lines.items() if name.split("/")[0].removesuffix(".py") in CORE)
    totals = {"mpilm/": (sum(lines.values()), MAX_PACKAGE_LINES), "its core": (core, MAX_CORE_LINES)}
    breaches = (f"{part} has {count} lines, at most {most}" for part, (count, most) in totals.items() if count > most)
    assert_no_breaches("the package stays small enough to be read", breaches)


# Names and English.


def name_words(identifier: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", identifier)}


def defined_names(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and name of every class, function, parameter and attribute that a module defines."""
    for node in ast.walk(module):
        if isinstance(node, (ast.ClassDef, *Functions)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, (ast.Assign, ast.AnnAssign)):
                    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                    yield from ((statement.lineno, target.id) for target in targets if isinstance(target, ast.Name))


def test_names_are_the_words_of_the_field() -> None:
    found = {
        f"mpilm/{name}:{line}: {identifier}"
        for name in NAMES
        for line, identifier in defined_names(tree(name))
        if name_words(identifier) & HOME_MADE_WORDS and identifier not in FIELD_NAMES
    }
    rule = "a name is the word of a paper, torch, Megatron or DeepSpeed, or a noun phrase an engineer would say aloud"
    assert_no_breaches(rule, sorted(found))


def test_public_names_are_unique_in_the_package() -> None:
    places = defaultdict(list)
    for name in NAMES:
        for node in tree(name).body:
            if isinstance(node, (ast.ClassDef, *Functions)) and not node.name.startswith("_"):
                places[node.name].append(f"mpilm/{name}:{node.lineno}")
    repeated = (f"{name}: {', '.join(at)}" for name, at in sorted(places.items()) if len(at) > 1 and name not in SHARED_NAMES)
    assert_no_breaches("one word, one meaning: no two public classes or functions have the same name", repeated)


def test_docstrings_begin_with_a_verb_or_a_noun_phrase() -> None:
    breaches = (breach for name in NAMES for breach in headless_docstrings(name, tree(name)))
    assert_no_breaches("a docstring begins with a verb (functions) or a noun phrase (classes, modules)", breaches)


def headless_docstrings(name: str, module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, (ast.Module, ast.ClassDef, *Functions)):
            docstring = ast.get_docstring(node) or ""
            if HEADLESS.match(docstring):
                yield f"mpilm/{name}:{getattr(node, 'lineno', 1)}: {docstring.splitlines()[0]}"


def test_model_knows_no_ranks() -> None:
    def parallel_names() -> Iterator[str]:
        for name in (name for name in NAMES if name.startswith("model/")):
            used = {identifier for node in ast.walk(tree(name)) for identifier in identifiers(node)} - MATRIX_RANKS
            yield from sorted(f"mpilm/{name}: {identifier}" for identifier in used if name_words(identifier) & PARALLEL_WORDS)

    assert_no_breaches("the model is plain torch; ranks are the business of mpilm/parallel", parallel_names())


def identifiers(node: ast.AST) -> Iterator[str]:
    for field in ("id", "arg", "attr", "name", "asname"):
        value = getattr(node, field, None)
        if isinstance(value, str):
            yield value


# State.


def module_level_state(module: ast.Module) -> list[str]:
    """Return the names at module level that hold something mutable, and the constants that are changed."""
    found = [f"global {', '.join(node.names)}" for node in ast.walk(module) if isinstance(node, ast.Global)]
    for node in module.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and _is_mutable(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [ast.unparse(t) for t in targets if not re.fullmatch(r"_?[A-Z][A-Z0-9_]*|__all__", ast.unparse(t))]
    for node in ast.walk(module):
        changed = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            changed = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING_METHODS:
            changed = node.func.value
        if isinstance(changed, ast.Name) and re.fullmatch(r"_?[A-Z][A-Z0-9_]+", changed.id):
            found.append(f"a change of {changed.id}")
    return found


def _is_mutable(value: ast.expr) -> bool:
    maker = ast.unparse(value.func).split(".")[-1] if isinstance(value, ast.Call) else ""
    return isinstance(value, MUTABLE) or maker in MUTABLE_MAKERS


def test_modules_hold_no_state() -> None:
    breaches = (f"mpilm/{name}: {found}" for name in NAMES for found in module_level_state(tree(name)))
    assert_no_breaches("the world, the config and all else are arguments; constants are UPPER_CASE", breaches)


def test_rules_detect_breaches() -> None:
    """The package keeps the rules above; each must fail where it is broken."""
    assert module_level_state(ast.parse("cache = {}")) == ["cache"]
    assert module_level_state(ast.parse("cache: dict = defaultdict(list)")) == ["cache"]
    assert module_level_state(ast.parse("CACHE = {}\ndef f(k):\n    CACHE[k] = 1")) == ["a change of CACHE"]
    assert module_level_state(ast.parse("SEEN = set()\ndef f(k):\n    SEEN.add(k)")) == ["a change of SEEN"]
    assert module_level_state(ast.parse("def f():\n    global x\n    x = 1")) == ["global x"]
    assert module_level_state(ast.parse("SIZES = [1]\n__all__ = ['f']\nn = 3")) == []
    assert name_words("localRank") | name_words("world_size") | name_words("MPIComm") >= {"rank", "world"}
    assert room_and_layer("errors") == ("layer 0", 0)
    assert room_and_layer("comm") == ("comm", 3)
    assert room_and_layer("train") == (f"layer {COMMAND_LAYER}", COMMAND_LAYER)
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert "mpilm.comm.base" in module_graph()["mpilm.comm.mpi"]
    names = {name for _, name in defined_names(ast.parse("class A:\n    b: int\n    def c(self, d):\n        self.e = d"))}
    assert names == {"A", "b", "c", "self", "d", "e"}
    docstrings = ast.parse('"""Whether it is."""\ndef f():\n    """Of all."""\ndef g():\n    """Return it."""')
    assert [breach.split(": ")[1] for breach in headless_docstrings("x.py", docstrings)] == ["Whether it is.", "Of all."]
    private = "import torch\nfrom torch._inductor import x\ntorch._fused_sgd_()\ntorch.__version__\ntorch.nn.functional._y"
    assert private_torch_names(ast.parse(private)) == ["torch._fused_sgd_", "torch._inductor.x", "torch.nn.functional._y"]
