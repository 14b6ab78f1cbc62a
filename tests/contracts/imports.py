"""What each module of the package imports, read from its source: late imports too, type checking blocks left out."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"


@dataclass(frozen=True)
class Import:
    """One import statement: the importing module, the full name it imports, and the line."""

    module: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def module_name(path: Path, source: Path = SOURCE) -> str:
    """`src/vilau/data/sample.py` -> `vilau.data.sample`."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, source: Path = SOURCE) -> list[Import]:
    """Every import of a file that can run: statements anywhere, and `importlib.import_module` of a literal."""
    module = module_name(path, source)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: list[Import] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(module, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                root = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*root, base] if base else root)
            found.extend(Import(module, f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            name = node.args[0]
            found.extend([Import(module, str(name.value), node.lineno)] if isinstance(name, ast.Constant) else [])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


@lru_cache(maxsize=1)
def all_imports() -> tuple[Import, ...]:
    """Every import of the package."""
    return tuple(item for path in sorted((SOURCE / "vilau").rglob("*.py")) for item in imports_of(path))


def within(name: str, *rooms: str) -> bool:
    """Whether a dotted name is one of the rooms or lies in one."""
    return any(name == room or name.startswith(room + ".") for room in rooms)


def crossings(importers: tuple[str, ...], forbidden: tuple[str, ...]) -> list[str]:
    """Imports of `forbidden` names by modules in `importers`."""
    return [str(i) for i in all_imports() if within(i.module, *importers) and within(i.target, *forbidden)]


def strays(importers: tuple[str, ...], allowed: tuple[str, ...]) -> list[str]:
    """Imports of our own package by modules in `importers` that lie outside `allowed`."""
    return [
        str(i)
        for i in all_imports()
        if within(i.module, *importers) and within(i.target, "vilau") and not within(i.target, *allowed)
    ]
