"""The benches and their scripts run to their end, on little work, so that a fault in them is found at once."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import gzip
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from bench.pages.tables import number
from bench.support.results import load, path_of
from narrows.backends.cuda.emit import launches
from narrows.backends.cuda.launches import Area, Launch, View
from narrows.backends.cuda.layout import Operands
from narrows.backends.cuda.schedule import schedule
from narrows.benchmark import CASES
from narrows.plan.ops import OpCode
from narrows.plan.plan import Mode
from op_cases import OP_CASES

ROOT = Path(__file__).parents[2]
FEW = "tabular or table or images or narrows-16"


def test_a_few_of_each_file_run() -> None:
    pytest.importorskip("pytest_benchmark")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)}
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "bench",
            "--benchmark-disable",
            "-q",
            "-rA",
            "-p",
            "no:cacheprovider",
            "-k",
            FEW,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    passed = set(re.findall(r"^PASSED bench/speed/(test_\w+\.py)", result.stdout, flags=re.MULTILINE))
    assert passed == {path.name for path in (ROOT / "bench" / "speed").glob("test_*.py")}


def test_every_op_has_a_bench() -> None:
    assert {op.code for case in OP_CASES for op in case.plan.ops} == set(OpCode)


def test_peers_are_given_the_standard_cases() -> None:
    """bench has its own copy of the cases, because the memory of a process without narrows is measured too."""
    code = """
from bench.libraries.cases import *
print([(c.name, c.widths, c.batch, c.loss) for c in CASES if type(c) is Case and c.precision == "float32"])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    theirs = ast.literal_eval(result.stdout)
    standard = [(c.name, c.widths, c.batch, c.loss.name.lower()) for c in CASES]
    assert theirs == standard


LAUNCHES = {"keras-simple": 6, "keras-deep": 8, "tabular": 2, "conv-pool": 19, "conv-stride": 18}
"""Launches of a training step on a GPU. Without `schedule` they are 12, 28, 20, 33 and 32."""


def test_a_training_step_of_the_peers_networks_takes_few_launches() -> None:
    from bench.libraries.cases import CASES as PEER_CASES

    names = ("records", "begun", "terms", "kept")
    operands = Operands("step", **{name: View(Area.CONTROL, 64 * i, 1, 16, 16) for i, name in enumerate(names)})
    begin, end = Launch("begin_step", 1, 32, operands), Launch("end_step", 1, 32, operands)
    cases = {case.name: case for case in PEER_CASES}
    for name, most in LAUNCHES.items():
        steps = schedule(launches(cases[name].plan(), cases[name].batch, Mode.TRAIN), begin, end)
        assert len(steps) <= most, (name, [launch.kernel for launch in steps])


def run(script: str, *arguments: object) -> None:
    """Run a script of bench in its own process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)}
    command = [sys.executable, str(ROOT / "bench" / script), *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_comparison_of_libraries_runs_to_its_end(tmp_path: Path) -> None:
    """NumPy is always installed, so narrows has another library to be compared with. A second run adds to the first."""
    run("peers.py", "--cases", "tabular", "--rounds", 1, "--threads", 1, "--results", tmp_path)
    run("peers.py", "--cases", "memory", "--rounds", 1, "--threads", 1, "--results", tmp_path)
    (path,) = tmp_path.glob("*/peers.json")
    report = load(path)
    assert path == path_of(report, "peers", tmp_path)
    assert report["cases"]["tabular"]["fastest"] in report["cases"]["tabular"]["contenders"]
    assert report["memory"]["libraries"]["narrows"]["peak"] > 0
    assert report["overall"]["cases"] == 1
    page = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    median = number(report["cases"]["tabular"]["contenders"]["narrows"]["median"])
    assert f"| tabular | 12x | {median} | " in page
    assert "\n## Memory of a fit\n" in page


@pytest.mark.parametrize(
    ("script", "name", "arguments"),
    [
        ("counts.py", "counts", ["--cases", "genomics-mse", "--rounds", 1, "--threads", 1]),
        ("speed/contractive.py", "contractive", ["--cases", "cae-single,cae-step", "--rounds", 1, "--threads", 1]),
        ("speed/profiles.py", "profiles", ["--cases", "tabular", "--seconds", 0.01, "--threads", 1]),
        ("speed/busy.py", "busy", ["--cases", "tabular", "--rounds", 1]),
    ],
)
def test_a_script_that_times_runs_to_its_end(script: str, name: str, arguments: list[object], tmp_path: Path) -> None:
    run(script, *arguments, "--results", tmp_path)
    (path,) = tmp_path.glob(f"*/{name}.json")
    assert path == path_of(load(path), name, tmp_path)
    assert (tmp_path / "docs" / "benchmarks.md").exists()


def test_two_builds_are_compared(cpp: str, tmp_path: Path) -> None:
    from narrows import _core

    run(
        "speed/builds.py",
        _core.__file__,
        _core.__file__,
        "--cases",
        "tabular",
        "--starts",
        2,
        "--rounds",
        1,
        "--results",
        tmp_path,
    )
    (path,) = tmp_path.glob("*/builds.json")
    (found,) = load(path)["cases"]
    assert found["case"] == "tabular"
    assert found["same_bits"]
    assert found["old"]["median"] > 0


@pytest.fixture(scope="module")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 300 and 40 images of squares, in the files of MNIST and Fashion-MNIST."""
    data = tmp_path_factory.mktemp("data")
    for folder in ("mnist", "fashion_mnist"):
        (data / folder).mkdir()
        for part, count in (("train", 300), ("t10k", 40)):
            labels = np.arange(count, dtype=np.uint8) % 10
            X = np.full((count, 28, 28), 25, np.uint8)
            for image, label in zip(X, labels, strict=True):
                image[4 + label : 18 + label, 4:24] = 230
            for kind, header, values in (("images-idx3", 16, X), ("labels-idx1", 8, labels)):
                with gzip.open(data / folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
                    file.write(bytes(header) + values.tobytes())
    return data


def test_the_experiments_run_to_their_end(tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stores its result and writes its section, with fewer epochs and smaller networks."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("anndata")
    from bench.accuracy import deep, denoising, doublets, likelihood, precision, real_data, thinning, ulp

    few, kinds = (part[:150] for part in doublets.load_pbmc4k(return_labels=True))
    few = few[:, np.argsort(-np.asarray(few.sum(axis=0)).ravel())[:40]]
    monkeypatch.setattr(doublets, "load_pbmc4k", lambda return_labels: (few, kinds))
    monkeypatch.setattr(doublets, "MODEL", doublets.MODEL | {"max_iter": 1})
    monkeypatch.setattr(doublets, "NEIGHBOURS", 20)
    data = ["--data", str(tiny_images)]
    monkeypatch.setattr(denoising, "HELD", 60)
    monkeypatch.setattr(thinning, "METHODS", {"no denoising": thinning.unchanged})
    case = dataclasses.replace(precision.CASES[1], parameters=precision.CASES[1].parameters | {"max_iter": 1})
    monkeypatch.setattr(precision, "CASES", (case,))
    monkeypatch.setattr(ulp, "sweep", functools.partial(lambda sweep, f, _, n: sweep(f, 2**20 - 1, n), ulp.sweep))
    monkeypatch.setattr(ulp, "nanoseconds", lambda function, isa: 1.0)
    scripts = [
        (real_data, [*data, "--only", "mnist_pca"], "## MNIST by PCA"),
        (deep, [*data, "--components", "2", "--epochs", "1", "--set", '{"hidden_layer_sizes": [20]}'], "## Deep"),
        (denoising, [*data, "--epochs", "1", "--picture", str(tmp_path / "denoising.png")], "## Denoising Fashion"),
        (likelihood, [*data, "--epochs", "2", "--importance", "2", "--images", "30"], "## Binarised MNIST"),
        (precision, [*data, "--seeds", "2"], "## Training in bfloat16"),
        (thinning, ["--seeds", "1"], "## Denoising the counts"),
        (doublets, ["--seeds", "1"], "## Simulated doublets"),
        (ulp, ["--functions", "sqrt"], "## Native functions"),
    ]
    for module, arguments, title in scripts:
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments, "--results", str(tmp_path)])
        module.main()
        name = "mnist_pca" if module is real_data else module.__name__.rpartition(".")[2]
        (path,) = tmp_path.glob(f"*/{name}.json")
        assert path == path_of(load(path), name, tmp_path)
        pages = [page.read_text(encoding="utf-8") for page in (tmp_path / "docs").glob("*.md")]
        assert any(f"\n{title}" in page for page in pages), name


def test_each_planted_fault_fits_its_file() -> None:
    """The text that a fault replaces stands exactly once in its file, and the tests that should notice it exist."""
    from bench.mutants import MUTANTS

    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.text) == 1, mutant.name
        assert mutant.fault != mutant.text
        for name in mutant.tests.partition(" -")[0].split():
            assert (ROOT / name).is_file(), (mutant.name, name)


def test_the_nightly_checks_name_existing_files() -> None:
    script = (ROOT / "bench" / "nightly.sh").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:tests|bench)/[\w/]+\.\w+", script))
    assert len(named) > 20
    missing = {name for name in named if not (ROOT / name).is_file()}
    assert not missing
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    (threads,) = re.findall(r'-k "(two_programs[^"]*)"', script)
    for word in threads.split(" or "):
        assert re.search(rf"def test_\w*{word}", tests), word


def test_the_nightly_extra_builds_the_extension() -> None:
    """The checks build it in a copy of the source, without the build environment of pip."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[\[>=]", text)[0] for text in project["optional-dependencies"]["nightly"]}
    assert names >= {"pybind11", "cmake", "ninja"}


def test_the_experiment_on_contractive_codes_runs_and_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a hundred small images of two kinds, which each of its classifiers tells apart."""
    from bench.accuracy import invariance
    from bench.data.images import Split
    from bench.pages import reproduction as reproduction_page

    rng = np.random.default_rng(0)
    labels = np.arange(100, dtype=np.uint8) % 2
    X = np.clip(0.2 + 0.6 * (labels[:, None] == np.arange(16) % 2) + 0.1 * rng.normal(size=(100, 16)), 0, 1)
    data = Split(X[:80].astype(np.float32), labels[:80], X[80:].astype(np.float32), labels[80:])
    monkeypatch.setattr(invariance, "HELD", 20)
    monkeypatch.setattr(invariance, "MODEL", invariance.MODEL | {"n_components": 12, "batch_size": 20, "max_iter": 30})
    monkeypatch.setattr(invariance, "FINE_TUNING", {"epochs": 40, "batch": 10, "learning_rate": 3e-3})
    found = invariance.measure(data, 2, contextlib.nullcontext)
    assert found["methods"].keys() == reproduction_page.RIFAI.keys()
    for name, method in found["methods"].items():
        assert len(method["runs"]) == 2
        for run in method["runs"]:
            assert run["linear_error"] == run["fine_tuned_error"] == 0, name
    norms = {name: np.mean([run["jacobian_norm"] for run in m["runs"]]) for name, m in found["methods"].items()}
    assert norms["CAE"] < norms["AE"]
    assert any(f"{norms['CAE']:.2f}" in row[3] for row in reproduction_page.contractive(found).rows)


def test_the_norm_of_the_jacobian_is_correct() -> None:
    from bench.accuracy import invariance
    from narrows import Autoencoder

    X = np.random.default_rng(0).random((9, 5)).astype(np.float32)
    ae = Autoencoder(4, hidden_layer_sizes=(), latent_activation="sigmoid", max_iter=1, random_state=0).fit(X)
    h = ae.transform(X).astype(float)
    norms = [np.linalg.norm(np.asarray(ae.coefs_[0], float) * (row * (1 - row))) for row in h]
    assert invariance.jacobian_norm(ae, X) == pytest.approx(np.mean(norms), rel=1e-5)


def test_the_experiment_on_denoising_runs_and_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On bright squares, which its models separate from the noise."""
    pytest.importorskip("matplotlib")
    from bench.accuracy import denoising
    from bench.data.images import Split
    from bench.pages import reproduction as reproduction_page

    kinds = np.arange(300, dtype=np.uint8) % 10
    X = np.full((300, 28, 28), 0.1, np.float32)
    for image, kind in zip(X, kinds, strict=True):
        image[4 + kind : 18 + kind, 4:24] = 0.9
    X = X.reshape(300, 784)
    data = Split(X[:260], kinds[:260], X[260:], kinds[260:])
    monkeypatch.setattr(denoising, "HELD", 60)
    small = {name: (kind, parameters | {"batch_size": 20}) for name, (kind, parameters) in denoising.MODELS.items()}
    small["convolutional"][1]["filters"] = (8, 8, 8)
    monkeypatch.setattr(denoising, "MODELS", small)
    monkeypatch.setattr(denoising, "RATES", dict.fromkeys(small, (1e-2, 1e-4)))
    found, test, rebuilt = denoising.measure(data, 8, 0, contextlib.nullcontext)
    assert found["noisy"]["all"] == pytest.approx(-10 * np.log10(np.mean((test - data.X_held) ** 2)), abs=1e-4)
    for each in (*found["pca"].values(), *found["models"].values()):
        assert each["image"] > found["noisy"]["image"] + 3
    assert found["models"]["convolutional"]["all"] == pytest.approx(denoising.psnr(rebuilt, data.X_held)["all"])
    denoising.draw(data, test, rebuilt, tmp_path / "denoising.png")
    assert (tmp_path / "denoising.png").stat().st_size > 1000
    about = {"level": 0.5, "images": 40, "epochs": 8, "seed": 0}
    shown = [row[1] for row in reproduction_page.denoising(about | found).rows]
    assert f"{found['models']['convolutional']['image']:.2f}" in shown
