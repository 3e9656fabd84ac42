"""The how-tos in docs: each lists exactly the product files whose code names its example, and no more than promised.

Comments and docstrings are not code. Strings are: tables of kernels and of names have them.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMITS = {"op": 6, "activation": 5, "loss": 6, "estimator": 3, "format": 2}
"""The most product files that an addition touches."""


@cache
def code() -> dict[str, str]:
    """The product files by their path from the root, without comments and docstrings."""
    files = {path: python_code(path.read_text(encoding="utf-8")) for path in (ROOT / "python/narrows").rglob("*.py")}
    for path in (ROOT / "csrc").rglob("*.*"):
        files[path] = re.sub(r"//.*|(?s:/\*.*?\*/)", "", path.read_text(encoding="utf-8"))
    return {path.relative_to(ROOT).as_posix(): text for path, text in files.items()}


def python_code(text: str) -> str:
    statements = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)]
    docstrings = {(s.lineno, s.col_offset) for s in statements if isinstance(s, ast.Constant)}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return " ".join(t.string for t in tokens if t.type != tokenize.COMMENT and t.start not in docstrings)


@pytest.mark.parametrize("kind", LIMITS)
def test_a_how_to_lists_the_files_to_touch(kind: str) -> None:
    (path,) = (ROOT / "docs").glob(f"adding-a*-{kind}.md")
    page = path.read_text(encoding="utf-8")
    listed = re.findall(r"^\d+\. `([\w/.]+)`", page, flags=re.MULTILINE)
    (example,) = re.findall(r"^Example: .*?`(\w+)`", page, flags=re.MULTILINE)
    name = re.compile(rf"(?<![a-z\d]){example.replace('_', '_?')}(?![a-z\d])", re.IGNORECASE)
    assert sorted(listed) == sorted(file for file, text in code().items() if name.search(text))
    assert len(listed) <= LIMITS[kind]
