"""The README, the examples and the pages say what the code does."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import narrows
from narrows.backends import probe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_readme_has_exactly_two_setup_commands(repository: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 2
    fit, test = commands
    assert "narrows fit pbmc4k --out " in fit
    assert test.endswith("-m pytest")
    ci = (repository / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in ci, "CI takes the test command from the README"


def test_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert (names["same"] == names["Z"]).all()  # type: ignore[attr-defined]


def test_contractive_examples_run() -> None:
    page = (ROOT / "docs" / "contractive.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for example in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(example, "contractive.md", "exec"), names)
    none, some, much = names["norms"]
    assert none > 1.2 * some > 1.2 * 1.2 * much
    assert names["value"] == names["estimate"].value == much


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_run(path: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)}
    result = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```python" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_of_pages_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """One after the other, as a reader would; what a comment says is asserted in the page itself."""
    if page.name == "gpu.md" and not probe("cuda").ok:
        from fake_cupy import FakeCupy

        FakeCupy(request.getfixturevalue("libraries")).install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(example, page.name, "exec"), names)


MACHINERY = {"Block", "Feed", "Options", "SavedRun", "Trainer", "TrainingState"}
"""Names of `training` that users do not call; they stand in for a part of `fit` in tests and backends."""


def public() -> dict[str, Any]:
    """Every public class and function by its name, without errors."""
    modules = ["narrows", *(f"narrows.{name}" for name in sorted(narrows._MODULES - {"errors"}))]
    found: dict[str, Any] = {}
    for module in map(importlib.import_module, modules):
        for name in getattr(module, "__all__", ()):
            each = getattr(module, name)
            if inspect.isfunction(each) or (inspect.isclass(each) and not issubclass(each, Exception)):
                found.setdefault(f"{each.__module__}.{each.__qualname__}", each)
    return {name: each for name, each in found.items() if name.rpartition(".")[2] not in MACHINERY}


def test_docstring_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each public class and function has a section Examples, and it says what happens."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("anndata")
    monkeypatch.chdir(tmp_path)
    finder, names = doctest.DocTestFinder(recurse=False), public()
    assert len(names) > 40
    told: list[str] = []
    for name, each in names.items():
        for found in finder.find(each, name, globs={}) or [None]:
            runner = doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL, verbose=False)
            if found is None or not found.examples:
                told.append(f"{name} has no example")
            elif runner.run(found, out=told.append).failed:
                told.append(f"{name}: the example above fails")
    assert not told, "\n".join(told)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXCLUDED = PROJECT["tool"]["scikit-build"]["sdist"]["exclude"]
"""What a source distribution lacks."""

TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "bench/README.md", ROOT / "tests/README.md"]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not any(linked.resolve().is_relative_to(ROOT / path) for path in EXCLUDED), f"{target} is excluded"
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


SOURCES = [path for top in ("bench", "csrc", "examples", "python", "tests") for path in (ROOT / top).rglob("*.*")]


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_named_in_pages_exist(page: Path) -> None:
    """Source files, by their path from the root, from the package, or by their name alone."""
    there = {"/" + path.relative_to(ROOT).as_posix() for path in SOURCES}
    code = " ".join(re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")))
    named = re.findall(r"(?<![\w/.*-])[\w/-]+\.(?:py|sh|cpp|cu|cuh|def|h|inl)\b", code)
    assert not [name for name in named if not any(path.endswith("/" + name) for path in there)]


def test_tests_named_in_pages_exist() -> None:
    named = [found for page in TEXTS for found in re.findall(r"([\w/]+\.py)::(\w+)", page.read_text(encoding="utf-8"))]
    assert named
    for path, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE), (path, test)


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    for page in folder.glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_every_option_is_in_the_pages() -> None:
    from narrows.cli.arguments import build_parser

    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    _, commands = build_parser()
    for command in commands.values():
        for action in command._actions:
            for option in action.option_strings:
                assert option in page or option in ("-h", "--help", "-o"), f"{command.prog} {option}"


def test_extras_named_in_errors_exist() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    asked = set()
    for source in (ROOT / "python" / "narrows").rglob("*.py"):
        asked |= set(re.findall(r'require\(\s*"[\w.]+",\s*"(\w+)"', source.read_text(encoding="utf-8")))
    assert asked
    assert asked <= extras.keys()


@pytest.mark.parametrize("name", ["accuracy.md", "benchmarks.md", "performance.md", "reproduction.md"])
def test_a_page_is_what_the_results_say(name: str, repository: Path) -> None:
    from bench.pages import PAGES
    from bench.support.results import DOCS, RESULTS

    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name](RESULTS), "run `python bench/pages`"
