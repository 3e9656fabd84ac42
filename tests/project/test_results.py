"""Stored measurements: the bounds that the pages state are kept, and bfloat16 trains as well as float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from bench.accuracy import ulp
from bench.accuracy.precision import CASES as FITS
from bench.accuracy.precision import OUT, PRECISIONS, compare, run
from native_functions import FUNCTIONS


def test_worse_or_unknown_is_not_within_noise() -> None:
    rng = np.random.default_rng(0)
    single = rng.normal(50, 1, 20)
    half = single + rng.normal(0, 0.5, 20)
    assert compare(list(single), list(half))["within_noise"]
    for worse in (half + 1.2, half - 1.2):
        found = compare(list(single), list(worse))
        assert not found["within_noise"]
        assert abs(found["difference"]["mean"]) == pytest.approx(1.2, abs=0.4)
    # Equal on average, but from too few pairs to know.
    assert not compare([50, 51, 52], [51, 51, 51])["within_noise"]


def test_the_quality_of_pairs_is_measured() -> None:
    case = FITS[0]
    case = dataclasses.replace(case, parameters={**case.parameters, "max_iter": 1})
    split = case.split(Path("unused: the data come with the package"))
    assert {row.tobytes() for row in split.X}.isdisjoint(row.tobytes() for row in split.X_held)
    found = run(case, split, 2, None)
    values = found["values"]
    assert values["bfloat16"]["loss"] == pytest.approx(values["float32"]["loss"], rel=0.02)
    assert values["bfloat16"]["loss"] != values["float32"]["loss"]
    assert min(values["bfloat16"]["accuracy"]) > 0.5
    assert compare(values["float32"]["loss"], values["bfloat16"]["loss"]) == found["compared"]["loss"]


def test_stored_fits_are_within_noise(repository: Path) -> None:
    """What docs/accuracy.md shows: bfloat16 trains as well as float32."""
    cases = json.loads(OUT.read_text(encoding="utf-8"))["cases"]
    assert list(cases) == [case.name for case in FITS]
    for name, case in cases.items():
        for figure, stored in case["compared"].items():
            single, half = (case["values"][p][figure] for p in PRECISIONS)
            assert len(single) == case["seeds"] >= 5
            for part in ("difference", *PRECISIONS):
                assert compare(single, half)[part] == pytest.approx(stored[part]), f"{name}, {figure}"
            assert stored["within_noise"], f"{name}, {figure}"


def test_stored_results_keep_the_bounds(repository: Path) -> None:
    by_name = {function.key: function for function in FUNCTIONS}
    report = json.loads(ulp.OUT.read_text(encoding="utf-8"))
    assert list(report["functions"]) == list(by_name)
    for key, found in report["functions"].items():
        assert found["same_bits"]
        for isa, worst in found["worst"].items():
            assert found["bound"][isa] == by_name[key].bound_of(isa), f"{key}: run `python bench/accuracy/ulp.py`"
            assert worst["ulp"] <= found["bound"][isa], key
