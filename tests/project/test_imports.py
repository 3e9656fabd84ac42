"""The order of the packages is the README's reading order: nothing imports upward, nothing imports in a circle."""

from __future__ import annotations

import graphlib
import re
from pathlib import Path

import pytest

from imports import graph

README = Path(__file__).parents[2] / "README.md"


def layers() -> list[str]:
    """The packages at the top of narrows, from the lowest layer to the highest, as the README lists them."""
    found = re.search(r"From the lowest layer to the highest: (.+?)\.\n", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found, "the README has no line that lists the layers"
    return re.findall(r"`(\w+)`", found[1])


def test_nothing_is_imported_upward() -> None:
    order = {name: i for i, name in enumerate(layers())}
    arrows = {(a, b) for a, targets in graph().items() for b in targets}
    missing = {a.split(".")[0] for a, _ in arrows} - order.keys()
    assert not missing, f"the README's layers lack {missing}"
    upward = {(a, b) for a, b in arrows if order[b.split(".")[0]] > order[a.split(".")[0]]}
    assert not upward


def test_nothing_is_imported_in_a_circle() -> None:
    arrows = graph()
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        pytest.fail("a circle of imports: " + " -> ".join(error.args[1][::-1]))


def test_the_plan_knows_nothing_of_the_rest() -> None:
    for name, targets in graph().items():
        if name.split(".")[0] == "plan":
            assert {target.split(".")[0] for target in targets} <= {"plan", "errors"}, name
