"""Rules on what a checkout promises: the lock, the declared dependencies, the make targets and the documents."""

import ast
import functools
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
MODULE_OF = {"pyzmq": "zmq", "prometheus-client": "prometheus_client"}  # where the names differ
NEVER_IMPORTED = {"httptools"}  # uvicorn's parser, which uvicorn imports


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def runtime_dependencies() -> list[Requirement]:
    return [Requirement(line) for line in pyproject()["project"]["dependencies"]]


def extra_dependencies() -> list[Requirement]:
    """What a user may add: every extra but `dev`."""
    extras: dict[str, list[str]] = pyproject()["project"]["optional-dependencies"]
    return [Requirement(line) for extra, lines in extras.items() if extra != "dev" for line in lines]


def dev_dependencies() -> list[Requirement]:
    return [Requirement(line) for line in pyproject()["project"]["optional-dependencies"]["dev"]]


def torch_needs() -> list[Requirement]:
    lines = (ROOT / "requirements.in").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def locked_needs() -> list[Requirement]:
    needs = runtime_dependencies() + extra_dependencies() + dev_dependencies() + torch_needs()
    return [need for need in needs if need.name != "torch"]


def locked_blocks() -> dict[str, list[tuple[Requirement, int]]]:
    """Each locked project with its pins (one for each set of Pythons), and the number of hashes of each pin."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks: dict[str, list[tuple[Requirement, int]]] = {}
    for line in text.splitlines():
        if line and not line.lstrip().startswith("#"):
            pin, *hashes = line.split(" --hash=sha256:")
            requirement = Requirement(pin.strip())
            blocks.setdefault(canonicalize_name(requirement.name), []).append((requirement, len(hashes)))
    return blocks


def version_of(pin: Requirement) -> str:
    return str(pin.specifier).removeprefix("==")


def make_targets() -> set[str]:
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    phony = next(line for line in lines if line.startswith(".PHONY:"))
    return set(phony.removeprefix(".PHONY:").split())


def recipe_of(target: str) -> list[str]:
    """The commands of one target, with continuation lines joined."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{target}:"))
    commands = []
    for line in lines[start + 1 :]:
        if not line.startswith("\t"):
            break
        commands.append(line.strip())
    return commands


def test_every_locked_version_has_hashes() -> None:
    blocks = locked_blocks()
    assert len(blocks) > 50
    assert not [name for name, pins in blocks.items() for _, num_hashes in pins if num_hashes == 0]


def test_the_lock_names_no_index_and_no_torch() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert not re.findall(r"--(?:extra-)?index|--find-links|://", text)
    assert not [name for name in locked_blocks() if name == "torch" or name.startswith("nvidia")]


def test_the_lock_has_every_dependency_in_its_range() -> None:
    blocks = locked_blocks()
    assert len(locked_needs()) > 25
    wrong = [
        str(need)
        for need in locked_needs()
        if not (pins := blocks.get(canonicalize_name(need.name)))
        or not all(need.specifier.contains(version_of(pin)) for pin, _ in pins)
    ]
    assert not wrong, f"run make lock; it lacks {wrong}"


@pytest.mark.parametrize(("folder", "names"), [("node", ["openai", "together-ai"]), ("node_ai", ["ai", "zod"])])
def test_the_node_locks_have_hashes_and_name_no_index(folder: str, names: list[str]) -> None:
    lock = json.loads((ROOT / "tests" / "clients" / folder / "package-lock.json").read_text(encoding="utf-8"))
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert set(packages) >= {f"node_modules/{name}" for name in names}
    assert all(package["integrity"].startswith("sha512-") for package in packages.values())
    assert "resolved" not in {key for package in packages.values() for key in package}


@pytest.mark.parametrize(
    "lock", sorted((ROOT / "tests" / "clients" / "locks").glob("*.txt")), ids=lambda path: path.stem
)
def test_the_locks_of_other_clients_have_hashes_and_name_no_index(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    pins = re.findall(r"^[a-z0-9][^\n]*==[^\n]*\\\n +--hash=sha256:", text, flags=re.MULTILINE)
    assert len(pins) == len(re.findall(r"^[a-z0-9].*==", text, flags=re.MULTILINE)) > 10
    assert not re.findall(r"--(?:extra-)?index|--find-links|://", text)


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_pins_every_dependency_once_on_each_python(python: str) -> None:
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    blocks = locked_blocks()
    for need in locked_needs():
        pins = [
            pin for pin, _ in blocks[canonicalize_name(need.name)] if not pin.marker or pin.marker.evaluate(machine)
        ]
        assert len(pins) == 1, f"{need.name} on Python {python}: {pins}"


def test_torch_has_one_version_and_it_is_in_range() -> None:
    version = pyproject()["tool"]["lfm"]["torch-version"]
    torch = next(need for need in runtime_dependencies() if need.name == "torch")
    assert torch.specifier.contains(version)
    repeated = [name for name in ("Makefile", "requirements.in", ".ci/run") if version in (ROOT / name).read_text()]
    assert not repeated, f"the torch version stands in pyproject.toml only, not in {repeated}"


def test_the_set_up_is_three_lines() -> None:
    commands = [shlex.split(line) for line in recipe_of("$(INSTALLED)") if "install" in line and "$(PIP)" in line]
    assert [command[1:] for command in commands] == [
        ["install", "--require-hashes", "-r", "requirements.lock"],
        ["install", "torch==$(TORCH)"],
        ["install", "--no-deps", "--no-build-isolation", "-e", "."],
    ]


def test_ci_runs_check_and_test_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith(("#", "set -", "cd "))] == ["make check", "make test"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_every_make_target_is_described() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    described = set(re.findall(r"^([a-z-]+):.* ## ", text, flags=re.MULTILINE))
    assert described == make_targets()


def test_documents_name_only_make_targets_that_exist() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    named = {
        (path.name, target)
        for path in documents
        for block in re.findall(r"```.*?```|`[^`]+`", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"(?<![\w-])make ([a-z][a-z-]*)", block)
    }
    assert not {(name, target) for name, target in named if target not in make_targets()}


def test_the_readme_begins_with_the_two_commands() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:40])
    for command in ("make serve", "make test"):
        assert re.search(rf"^\s*{command}\b", first_screen, flags=re.MULTILINE), command


@functools.cache
def imported_modules() -> frozenset[str]:
    """Top-level names of everything that lfm/ imports from other projects."""
    names = set()
    for path in (ROOT / "lfm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    return frozenset(names - sys.stdlib_module_names - {"lfm"})


def test_every_import_is_a_declared_dependency() -> None:
    declared = {MODULE_OF.get(need.name, need.name) for need in runtime_dependencies() + extra_dependencies()}
    undeclared = imported_modules() - declared - {"triton"}  # triton comes with torch
    assert not undeclared, f"declare them in pyproject.toml, or do without: {sorted(undeclared)}"


def test_every_declared_dependency_is_used() -> None:
    declared = {need.name for need in runtime_dependencies() + extra_dependencies()} - NEVER_IMPORTED
    unused = {name for name in declared if MODULE_OF.get(name, name) not in imported_modules()}
    assert not unused, f"nothing under lfm/ imports {sorted(unused)}"
