"""Which module of narrows imports which: read from the sources, imports inside functions included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "python" / "narrows"


def modules() -> dict[str, Path]:
    """Each module's file, by its name within narrows (``plan.spec``); packages by the name of their folder."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _targets(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "narrows"):
            base = package[: len(package) - node.level + 1] if node.level else []
            inner = (node.module or "").split(".") if node.level else (node.module or "").split(".")[1:]
            target = ".".join([*base, *filter(None, inner)])
            for alias in node.names:
                whole = f"{target}.{alias.name}".lstrip(".")
                yield whole if whole in known else target
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("narrows."):
                    yield alias.name.removeprefix("narrows.")


def graph() -> dict[str, set[str]]:
    """The modules that each module imports. The root, which imports lazily, and the extension are left out."""
    known = modules()
    found = {name: set(_targets(name, path, known)) & known.keys() for name, path in known.items() if name}
    return {name: targets - {"", name} for name, targets in found.items()}
