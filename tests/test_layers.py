"""The core stays small and its imports run downwards."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hbp_titan"
# Higher may import lower or equal. Every other package is a tool, above all of them.
LAYERS = {
    "errors": 0,
    "utils": 0,
    "packing": 1,
    "job_config": 2,
    "config": 2,
    "models": 3,
    "data": 4,
    "distributed": 5,
    "components": 6,
    "preflight": 7,
    "engine": 7,
    "train": 8,
}
TOOLS = ("tuning", "evaluation", "report", "testing", "experiments", "scripts")


def _imports(path: Path) -> Iterator[str]:
    """Return the modules of the project that `path` imports at module level, but for type checking."""
    stack: list[ast.AST] = [*ast.parse(path.read_text()).body]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hbp_titan"):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if _file(submodule).exists() else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("hbp_titan"))
        stack += ast.iter_child_nodes(node)


def _file(module: str) -> Path:
    """Return the file of a module or package."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _own_part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


CORE_FILES = sorted(path for path in PACKAGE.rglob("*.py") if _own_part(path) in LAYERS)


@pytest.mark.parametrize("path", CORE_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    own = _own_part(path)
    for module in _imports(path):
        part = _part(module)
        assert part not in TOOLS, f"{path.name} imports the tool {module} at module level"
        assert LAYERS.get(part, 0) <= LAYERS[own], f"{path.name} imports {module}, which is above it"


def test_planning_needs_neither_torch_nor_the_rest_of_the_package() -> None:
    for path in (PACKAGE / "packing").glob("*.py"):
        assert not re.search(r"^\s*(import|from) torch|from hbp_titan\.(?!packing)", path.read_text(), re.M), path.name


def test_the_core_imports_no_experiment_but_the_embedded_corpus() -> None:
    # Inside a function: the debug preset trains on it.
    found = [path.name for path in CORE_FILES if "hbp_titan.experiments" in path.read_text()]
    assert found == ["prepare.py"]


def test_a_training_run_imports_the_core_alone() -> None:
    modules, left = set[str](), ["hbp_titan.train"]
    while left:
        if (module := left.pop()) not in modules:
            modules.add(module)
            package = module.rpartition(".")[0]
            left += [*_imports(_file(module)), *([package] if package else [])]
    assert not {_part(module) for module in modules} & set(TOOLS)
    files = [_file(module) for module in modules]
    lines = [path.read_text().count("\n") for path in files if path.name != "__init__.py"]
    assert len(lines) <= 65
    assert sum(lines) <= 13_500
