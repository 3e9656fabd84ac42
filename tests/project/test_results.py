"""Stored results: each is in the folder of its machine, keeps its bounds, and is on a page."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench.accuracy.precision import CASES as FITS
from bench.accuracy.precision import PRECISIONS, compare, run
from bench.pages import PAGES, write
from bench.support.results import RESULTS, header, load, path_of, reports, slug, store
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
    for report in reports("precision"):
        assert list(report["cases"]) == [case.name for case in FITS]
        for name, case in report["cases"].items():
            for figure, stored in case["compared"].items():
                single, half = (case["values"][p][figure] for p in PRECISIONS)
                assert len(single) == case["seeds"] >= 5
                for part in ("difference", *PRECISIONS):
                    assert compare(single, half)[part] == pytest.approx(stored[part]), f"{name}, {figure}"
                assert stored["within_noise"], f"{name}, {figure}"


def test_stored_results_keep_the_bounds(repository: Path) -> None:
    by_name = {function.key: function for function in FUNCTIONS}
    for report in reports("ulp"):
        assert list(report["functions"]) == list(by_name)
        for key, found in report["functions"].items():
            assert found["same_bits"]
            for isa, worst in found["worst"].items():
                assert found["bound"][isa] == by_name[key].bound_of(isa), f"{key}: run `python bench/accuracy/ulp.py`"
                assert worst["ulp"] <= found["bound"][isa], key


def test_each_result_is_in_the_folder_of_its_machine(repository: Path) -> None:
    paths = list(RESULTS.rglob("*.json"))
    assert paths
    for path in paths:
        report = load(path)
        assert path == RESULTS / slug(report) / path.name
        assert report["date"]
        assert report["versions"]["narrows"]


@pytest.mark.parametrize(
    ("cpu", "cores", "isa", "folder"),
    [
        (("AMD EPYC", "26", "2"), 2, "avx512", "amd-epyc-family-26-model-2-2c-avx512"),
        (
            ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "6", "143"),
            2,
            "amx",
            "intel-xeon-platinum-8481c-family-6-model-143-2c-amx",
        ),
        (
            ("AMD Ryzen 9 7950X 16-Core Processor", "25", "97"),
            16,
            "avx512",
            "amd-ryzen-9-7950x-family-25-model-97-16c-avx512",
        ),
    ],
)
def test_a_folder_names_a_cpu_as_people_do(cpu: tuple[str, str, str], cores: int, isa: str, folder: str) -> None:
    fields = dict(zip(("model name", "cpu family", "model"), cpu, strict=True))
    assert slug({"machine": {"cpu": fields, "cores": cores, "isa": isa}}) == folder


def test_a_folder_names_a_gpu() -> None:
    machine = {"cpu": {"model name": "AMD EPYC"}, "cores": 16, "isa": "avx512"}
    assert slug({"machine": machine, "gpu": {"name": "NVIDIA H200"}}) == "nvidia-h200"


def test_a_result_on_a_gpu_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(getDeviceProperties=lambda device: {"name": b"NVIDIA H200"})
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime), __version__="14.2")
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setenv("NARROWS_BENCH_DEVICE", "cuda")
    report = header(threads=2)
    assert report["gpu"]["name"] == "NVIDIA H200"
    assert path_of(report, "peers", Path("results")) == Path("results/nvidia-h200/peers.json")


def test_pages_show_a_gpu_apart(repository: Path, tmp_path: Path) -> None:
    for name in ("peers", "counts"):
        (report,) = reports(name)[:1]
        store(report | {"gpu": {"name": "NVIDIA H200"}}, name, tmp_path)
    page = PAGES["benchmarks.md"](tmp_path)
    assert "\n## Training steps on a GPU\n" in page
    assert "\n## Steps on counts on a GPU\n" in page
    assert "NVIDIA H200 with AMD EPYC" in page
    assert "## Training steps\n" not in page


def test_pages_show_each_machine_with_its_date_and_versions(repository: Path, tmp_path: Path) -> None:
    """Results of a second machine: the stored ones, with other names, another date and other figures."""
    for path in RESULTS.rglob("*.json"):
        report = load(path)
        store(report, path.stem, tmp_path)
        report["date"] = "2027-01-02"
        report["machine"] |= {
            "cpu": {"model name": "Intel(R) Xeon(R)", "cpu family": "6", "model": "143"},
            "isa": "amx",
        }
        report["versions"]["narrows"] = "9.9"
        if path.stem == "peers":
            del report["cases"]["conv-pool"]
            report["cases"]["tabular"]["contenders"]["narrows"]["median"] = 0.12345
        store(report, path.stem, tmp_path)
    write(tmp_path, tmp_path / "docs")
    second = "Intel Xeon (family 6, model 143)"
    for name in PAGES:
        page = (tmp_path / "docs" / name).read_text(encoding="utf-8")
        assert f"Measured on 2027-01-02, {second}: 2 cores, amx, " in page
        assert "Measured on 2026-11-21, AMD EPYC (family 26, model 2): 2 cores, avx512, " in page
        assert "narrows 9.9" in page
        for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
            assert len({line.count("|") for line in table.splitlines()}) == 1, f"{name}: {table}"
    page = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "| case | target | ms, AMD EPYC (family 26, model 2) | usual ways, all ways, AMD" in page
    assert f"| ms, {second} | usual ways, all ways, {second} |" in page
    assert re.search(r"^\| tabular \| 12x \| 0.00921 \| [^|]* \| 0.123 \|", page, re.MULTILINE)
    assert re.search(r"^\| conv-pool \| 4x \| 3.38 \| [^|]* \|  \|  \|$", page, re.MULTILINE)
    assert f"### {second}" in page, "wide tables have a section for each machine"
