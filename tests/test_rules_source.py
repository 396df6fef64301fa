"""Rules on the source under lfm/, read from its syntax trees: sizes, signatures, import directions, unsafe calls."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "lfm").rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_KERNEL_FUNCTION_LINES = 150

# Which other parts of the package each part may import, besides these three.
ALWAYS = {"config", "errors", "protocol"}
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "errors": set(),
    "protocol": set(),
    "http_client": set(),
    "agent": {"http_client"},
    "kernels": set(),
    "model": {"kernels"},
    "engine": {"model", "kernels"},
    "chat": set(),
    "service": set(),
    "search": set(),
    "server": {"chat", "engine", "model", "kernels", "service", "search"},
    "llm": {"chat", "engine", "model", "kernels"},
    "train": {"chat", "search", "model", "kernels"},
    "cli": {
        "agent",
        "http_client",
        "llm",
        "server",
        "train",
        "service",
        "search",
        "chat",
        "engine",
        "model",
        "kernels",
    },
    "__init__": {"llm"},
}
# Single modules that a part may import beyond that, each with its reason.
EXCEPTIONS = {
    ("engine", "lfm.chat.grammar"),  # grammar masks are made in the engine process
    ("engine", "lfm.chat.tokenizer"),  # only how many ids have a text: ids beyond are never sampled
    ("config", "lfm.model.hf_config"),  # the table of config.json's spellings, read inside ModelConfig.from_dict
}

ONLY_VALIDATED = {"insecure"}  # config fields that only decide whether the config is valid

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "multiprocessing"}
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}
UNSAFE_ATTRIBUTES = {"torch.load", "torch.save", "torch.hub", "numpy.load", "np.load"}
UNSAFE_METHODS = {"recv_pyobj", "send_pyobj"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def functions_in(path: Path) -> Iterator[Function]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imports_in(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every imported module, also inside functions; `from lfm.chat import prompt` counts as lfm.chat.prompt."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node, f"{node.module}.{alias.name}"


def part_of(path: Path) -> str:
    """`lfm/engine/cache.py` -> "engine"; `lfm/llm.py` -> "llm"."""
    return path.relative_to(ROOT / "lfm").parts[0].removesuffix(".py")


def is_wrapper(function: Function) -> bool:
    """Whether a function passes on the arguments of the one that it decorates."""
    return any(
        ast.unparse(decorator).startswith(("wraps(", "functools.wraps(")) for decorator in function.decorator_list
    )


def oversized(path: Path, *, max_function_lines: int) -> list[str]:
    lines = path.read_text(encoding="utf-8").count("\n")
    found = [f"{path.relative_to(ROOT)} has {lines} lines"] if lines > MAX_FILE_LINES else []
    for function in functions_in(path):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > max_function_lines:
            found.append(f"{where(path, function)} {function.name} has {length} lines")
    return found


def wrong_imports(part: str, tree: ast.Module) -> list[str]:
    allowed = MAY_IMPORT[part] | ALWAYS | {part, "__version__"}
    found = []
    for node, name in imports_in(tree):
        package, *rest = name.split(".")
        if package != "lfm" or not rest or rest[0] in allowed:
            continue
        if not any(part == user and f"{name}.".startswith(f"{module}.") for user, module in EXCEPTIONS):
            found.append(f"line {node.lineno}: {part} imports {name}")
    return found


def unsafe_uses(tree: ast.Module) -> list[str]:
    found = [
        f"line {node.lineno}: import {name}" for node, name in imports_in(tree) if name.split(".")[0] in UNSAFE_MODULES
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in UNSAFE_BUILTINS:
            found.append(f"line {node.lineno}: {node.func.id}()")
        if isinstance(node, ast.Attribute) and (ast.unparse(node) in UNSAFE_ATTRIBUTES or node.attr in UNSAFE_METHODS):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append(f"line {node.value.lineno}: trust_remote_code")
        if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append(f"line {node.lineno}: trust_remote_code")
    return found


def test_sources_are_found() -> None:
    assert ROOT / "lfm" / "config.py" in SOURCES


def test_no_file_and_no_function_is_too_long() -> None:
    found = []
    for path in SOURCES:
        limit = MAX_KERNEL_FUNCTION_LINES if part_of(path) == "kernels" else MAX_FUNCTION_LINES
        found += oversized(path, max_function_lines=limit)
    assert not found, "split these: " + "; ".join(found)


def test_no_signature_takes_arbitrary_keywords() -> None:
    found = [
        f"{where(path, function)} {function.name}"
        for path in SOURCES
        for function in functions_in(path)
        if function.args.kwarg and not is_wrapper(function)
    ]
    assert not found, "name the parameters of: " + "; ".join(found)


def test_imports_point_downwards_only() -> None:
    found = [
        f"{path.relative_to(ROOT)} {wrong}" for path in SOURCES for wrong in wrong_imports(part_of(path), tree_of(path))
    ]
    assert not found, "; ".join(found)


def test_nothing_unsafe_is_imported_or_called() -> None:
    found = [f"{path.relative_to(ROOT)} {unsafe}" for path in SOURCES for unsafe in unsafe_uses(tree_of(path))]
    assert not found, "; ".join(found)


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("chat", "from lfm.engine.client import EngineBackend"),
        ("chat", "def later():\n    import lfm.model.lfm2"),
        ("engine", "from lfm.chat import prompt"),
        ("model", "from lfm.engine.cache import BlockPool"),
        ("kernels", "from lfm.model import ops"),
        ("server", "from lfm.cli.serve import serve"),
        ("llm", "from lfm.cli import main"),
    ],
)
def test_an_upward_import_is_noticed(part: str, source: str) -> None:
    assert len(wrong_imports(part, ast.parse(source))) == 1


@pytest.mark.parametrize("source", ["from lfm.chat.grammar import Grammar", "from lfm.chat import grammar"])
def test_the_engine_may_import_grammars(source: str) -> None:
    assert wrong_imports("engine", ast.parse(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import multiprocessing as mp",
        "eval('1')",
        "exec(text)",
        "weights = torch.load(path)",
        "load = torch.load",
        "socket.recv_pyobj()",
        "AutoModel.from_pretrained(folder, trust_remote_code=False)",
        "options = {'trust_remote_code': True}",
    ],
)
def test_an_unsafe_use_is_noticed(source: str) -> None:
    assert len(unsafe_uses(ast.parse(source))) == 1


@pytest.mark.parametrize("source", ["model.eval()", "pattern = re.compile('a')", "image = torch.compile(model)"])
def test_a_harmless_namesake_is_let_through(source: str) -> None:
    assert unsafe_uses(ast.parse(source)) == []


def test_an_overlong_function_is_noticed() -> None:
    path = ROOT / "lfm" / "config.py"
    longest = max((f.end_lineno or 0) - f.lineno + 1 for f in functions_in(path))
    assert oversized(path, max_function_lines=longest) == []
    assert len(oversized(path, max_function_lines=longest - 1)) == 1


def config_fields() -> list[tuple[str, str]]:
    """Every field of every dataclass in lfm/config.py, as (class, field)."""
    return [
        (node.name, statement.target.id)
        for node in tree_of(ROOT / "lfm" / "config.py").body
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    ]


def test_every_config_field_is_read_outside_config() -> None:
    """A field that nobody reads is a promise that nobody keeps."""
    read = {
        node.attr
        for path in SOURCES
        if path != ROOT / "lfm" / "config.py"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    fields = config_fields()
    assert ("ServerConfig", "port") in fields
    unread = [f"{owner}.{field}" for owner, field in fields if field not in read | ONLY_VALIDATED]
    assert not unread, f"nothing reads {', '.join(unread)}"
