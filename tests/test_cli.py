"""The command line: what fit writes, that it resumes and refuses, exit codes, encode / decode / score."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

import narrows as nw
from narrows import cli
from narrows.cli import applying, rundir, tables
from narrows.cli.settings import FitSettings, parse_setting, parse_size
from narrows.cli.stopping import Stopped, Stopper
from narrows.data import ArraySource
from narrows.errors import MissingExtraError

SMALL = [
    "--components",
    "3",
    "--hidden",
    "8",
    "--epochs",
    "4",
    "--batch-size",
    "32",
    "--threads",
    "1",
    "--quiet",
]


def narrows(*args):
    return cli.main([str(a) for a in args])


@pytest.fixture
def line(capsys):
    """The one line that a failed command leaves on standard error."""

    def read():
        out = capsys.readouterr()
        assert out.out == ""
        assert out.err.count("\n") == 1, out.err
        assert out.err.startswith("narrows: error: ")
        return out.err

    return read


def table(n=90, d=12, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, 3)) @ rng.normal(size=(3, d)) + 0.1 * rng.normal(size=(n, d))).astype(np.float32)


@pytest.fixture
def npy(tmp_path):
    np.save(tmp_path / "x.npy", table())
    return tmp_path / "x.npy"


@pytest.fixture
def named(tmp_path):
    """A csv with row and column names."""
    path = tmp_path / "named.csv"
    X = table()
    rows = ["," + ",".join(f"gene{j}" for j in range(12))]
    rows += [f"cell{i}," + ",".join(map(str, row)) for i, row in enumerate(X)]
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A finished fit of the bundled counts, in this process."""
    out = tmp_path_factory.mktemp("fitted") / "run"
    code = narrows("fit", "pbmc4k", "--out", out, "--hidden", "16", "--components", "8", "--epochs", "2",
                   "--threads", "1", "--quiet")  # fmt: skip
    assert code == 0
    return out


def metrics(out):
    return json.loads((Path(out) / "metrics.json").read_text())


# --- fit --------------------------------------------------------------------------------------------------


def test_fit_writes_everything(fitted):
    made = {p.name for p in fitted.iterdir()}
    assert made == {
        "_SUCCESS", "checkpoints", "config.toml", "history.jsonl", "latent.npy", "metrics.json",
        "model.safetensors", "narrows_mqc.json", "report.html", "run.log",
    }  # fmt: skip
    m = metrics(fitted)
    assert m.keys() >= {
        "status", "exit_reason", "epochs_run", "best_epoch", "train_loss", "val_loss", "baseline_pca_loss",
        "wall_s", "samples_per_s", "peak_rss_bytes", "n_threads", "backend", "isa", "precision", "seed",
        "input_sha256", "bytes_in", "bytes_out", "version", "argv", "mse_per_feature", "knn_accuracy_latent",
        "knn_accuracy_pca", "report",
    }  # fmt: skip
    assert m["status"] == "finished"
    assert m["normalize"] == "log1p"
    assert m["epochs_run"] == 2
    assert m["argv"][:3] == ["narrows", "fit", "pbmc4k"]
    assert re.fullmatch("[0-9a-f]{64}", m["input_sha256"])
    assert 0 < m["baseline_pca_loss"] < m["mse_per_feature"]  # two epochs do not reach PCA
    assert 0.5 < m["knn_accuracy_pca"] <= 1
    assert m["bytes_out"] > (fitted / "latent.npy").stat().st_size
    lines = [json.loads(text) for text in (fitted / "history.jsonl").read_text().splitlines()]
    assert [x["epoch"] for x in lines] == [1, 2]
    assert lines[-1]["val_loss"] == m["val_loss"]
    assert np.load(fitted / "latent.npy").shape == (4271, 8)
    assert os.path.getmtime(fitted / "_SUCCESS") >= max(p.stat().st_mtime for p in fitted.iterdir())


def test_measures_agree_with_direct_computation(npy, tmp_path):
    assert narrows("fit", npy, "--out", tmp_path / "o", *SMALL) == 0
    m = metrics(tmp_path / "o")
    X = StandardScaler().fit_transform(table().astype(float))
    model = nw.load(tmp_path / "o" / "model.safetensors")
    assert m["mse_per_feature"] == pytest.approx(np.mean((model.reconstruct(X) - X) ** 2), rel=1e-4)
    exact = PCA(3).fit(X)
    error = np.mean((exact.inverse_transform(exact.transform(X)) - X) ** 2)
    assert m["baseline_pca_loss"] == pytest.approx(error, rel=1e-3)
    assert m["knn_accuracy_latent"] is None  # no labels
    worst = np.argmax(np.mean((model.reconstruct(X) - X) ** 2, axis=0))
    assert m["worst_features"][0]["name"] == f"feature {worst}"


def test_finished_run_is_left_alone(npy, tmp_path, capsys):
    args = ["fit", npy, "--out", tmp_path / "o", *SMALL]
    assert narrows(*args) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("*")}
    capsys.readouterr()
    assert narrows(*args[:-1]) == 0
    assert "finished already" in capsys.readouterr().err
    assert narrows(*args, "--resume", "require", "--threads", "2") == 0  # threads change nothing
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("*")}


def test_other_settings_or_data_are_refused_by_name(npy, tmp_path, line):
    out = tmp_path / "o"
    args = ["fit", npy, "--out", out, *SMALL]
    assert narrows(*args, "--set", "alpha=0.5") == 0
    before = (out / "config.toml").read_bytes()
    assert narrows(*args) == 5
    assert "set.alpha (0.5 there, unset here)" in line()
    assert narrows(*args, "--set", "alpha=0.5", "--components", "4", "--layer", "counts") == 3  # no layers in npy
    line()
    assert narrows(*args, "--set", "alpha=0.5", "--components", "4") == 5
    assert "components (3 there, 4 here)" in line()
    np.save(npy, table(seed=1))
    assert narrows(*args, "--set", "alpha=0.5") == 5
    assert "run.input_sha256" in line()
    assert (out / "config.toml").read_bytes() == before
    assert (out / "_SUCCESS").exists()
    assert narrows(*args, "--resume", "never") == 0
    assert "alpha" not in (out / "config.toml").read_text()


def test_require_without_a_run(npy, tmp_path, line):
    assert narrows("fit", npy, "--out", tmp_path / "o", *SMALL, "--resume", "require") == 5
    assert "--resume auto" in line()
    assert not (tmp_path / "o").exists()


def test_foreign_or_unwritable_output_is_refused_untouched(npy, tmp_path, line):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for name, text in (("thesis.txt", "thesis.txt"), ("config.toml", "config.toml")):
        (foreign / name).write_text("mine")
        assert narrows("fit", npy, "--out", foreign, *SMALL) == 3
        assert text in line() or name == "config.toml"
    assert sorted(p.name for p in foreign.iterdir()) == ["config.toml", "thesis.txt"]
    (tmp_path / "file").write_text("x")
    assert narrows("fit", npy, "--out", tmp_path / "file", *SMALL) == 3
    line()
    assert narrows("fit", npy, "--out", tmp_path / "file" / "below", *SMALL) == 3
    line()
    assert narrows("fit", npy, "--out", "/proc/narrows", *SMALL) == 3
    line()


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert narrows("fit", "pbmc4k", "--out", tmp_path / "o", "--dry-run", "--hidden", "64", "--components", "10") == 0
    out = capsys.readouterr().out
    assert "2000 - 64 - 10 - 64 - 2000" in out
    assert f"{2000 * 64 * 2 + 64 * 10 * 2 + 64 + 10 + 64 + 2000:,}" in out
    assert "16 of 256 rows" in out  # 4271 rows less 427 held out
    assert "memory" in out
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_names_what_would_do(npy, tmp_path, line):
    assert narrows("fit", npy, "--out", tmp_path / "o", *SMALL, "--max-memory", "20MB") == 6
    least = re.search(r"at least (\d+) MB", line()).group(1)
    assert not (tmp_path / "o").exists()
    assert narrows("fit", npy, "--out", tmp_path / "o", *SMALL, "--max-memory", f"{least}MB") == 0
    assert narrows("encode", tmp_path / "o", npy, "-o", tmp_path / "z.npy", "--max-memory", "1MB", "--quiet") == 6


def test_named_rows_give_h5ad_and_without_anndata_npy_and_names(named, tmp_path, monkeypatch, capsys):
    anndata = pytest.importorskip("anndata")
    assert narrows("fit", named, "--out", tmp_path / "a", *SMALL) == 0
    codes = anndata.read_h5ad(tmp_path / "a" / "latent.h5ad")
    assert codes.shape == (90, 3)
    assert list(codes.obs_names[:2]) == ["cell0", "cell1"]
    real = tables.require

    def absent(module, extra, purpose):
        if module == "anndata":
            raise MissingExtraError(f"{purpose} needs anndata: pip install 'narrows[anndata]'")
        return real(module, extra, purpose)

    monkeypatch.setattr(tables, "require", absent)
    capsys.readouterr()
    assert narrows("fit", named, "--out", tmp_path / "b", *SMALL) == 0
    assert "latent_obs_names.txt" in capsys.readouterr().err
    assert np.array_equal(np.load(tmp_path / "b" / "latent.npy"), codes.X)
    assert (tmp_path / "b" / "latent_obs_names.txt").read_text().split() == list(codes.obs_names)


def test_without_the_report_extra_no_report_is_claimed(npy, tmp_path, monkeypatch, capsys):
    from narrows.cli import report

    def absent(module, extra, purpose):
        raise MissingExtraError(f"{purpose} needs {module}: pip install 'narrows[{extra}]'")

    monkeypatch.setattr(report, "require", absent)
    assert narrows("fit", npy, "--out", tmp_path / "o", *SMALL) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "narrows[report]" in err
    assert "narrows[report]" in (tmp_path / "o" / "run.log").read_text()
    assert metrics(tmp_path / "o")["report"] is None
    assert not (tmp_path / "o" / "report.html").exists()
    assert (tmp_path / "o" / "_SUCCESS").exists()
    assert narrows("report", tmp_path / "o") == 3


def test_divergence_is_exit_4_without_success(npy, tmp_path, line):
    args = [*SMALL, "--set", "learning_rate_init=1e30", "--set", "solver=sgd", "--normalize", "none"]
    assert narrows("fit", npy, "--out", tmp_path / "o", *args) == 4
    assert "diverged" in line()
    m = metrics(tmp_path / "o")
    assert m["status"] == "diverged"
    assert not (tmp_path / "o" / "_SUCCESS").exists()


@pytest.mark.parametrize("estimator", ["linear", "denoising", "sparse"])
def test_every_estimator(estimator, npy, tmp_path):
    args = [a for a in SMALL if a not in ("--hidden", "8")] if estimator == "linear" else SMALL
    assert narrows("fit", npy, "--out", tmp_path / "o", *args, "--estimator", estimator) == 0
    assert metrics(tmp_path / "o")["estimator"].lower().startswith(estimator)


@pytest.mark.parametrize(("loss", "kind"), [("bce", "minmax"), ("huber", "standard"), ("multinomial", "none")])
def test_every_loss(loss, kind, npy, tmp_path):
    if loss == "multinomial":
        np.save(npy, np.random.default_rng(0).poisson(4.0, (90, 12)))
    assert narrows("fit", npy, "--out", tmp_path / "o", *SMALL, "--loss", loss) == 0
    m = metrics(tmp_path / "o")
    assert (m["loss"], m["normalize"]) == (loss, kind)
    assert narrows("score", tmp_path / "o", npy, "-o", tmp_path / "s.npy", "--quiet") == 0
    assert np.isfinite(np.load(tmp_path / "s.npy")).all()


# --- resume -----------------------------------------------------------------------------------------------

SLOW = ["--hidden", "64", "--components", "8", "--epochs", "40", "--threads", "1", "--quiet",
        "--set", "early_stopping=false", "--backend", "reference", "--batch-size", "128"]  # fmt: skip


@pytest.fixture
def start():
    """Starts the command in a process of its own; none outlives the test."""
    started = []

    def run(*args):
        command = [sys.executable, "-m", "narrows", *map(str, args)]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()


def wait_for_epoch(out, process, epoch):
    deadline = time.monotonic() + 120
    while len(rundir.read_history(out / "history.jsonl")) < epoch:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_signals_save_and_the_same_command_ends_bit_for_bit(tmp_path, start):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.normal(size=(2500, 150)).astype(np.float32))
    base = ["fit", tmp_path / "x.npy", *SLOW]
    whole = start(*base, "--out", tmp_path / "whole")
    out = tmp_path / "cut"
    args = [*base, "--out", out, "--checkpoint-minutes", "0.0001"]
    for i, (number, code) in enumerate([(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)]):
        process = start(*args)
        wait_for_epoch(out, process, 2 + 3 * i)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == code, err
        assert err.count("\n") == 1
        m = metrics(out)
        assert (m["status"], m["exit_reason"]) == ("interrupted", number.name)
        assert not (out / "_SUCCESS").exists()
        assert not (out / "model.safetensors").exists()
    process = start(*args)
    wait_for_epoch(out, process, 12)
    process.kill()
    process.communicate()
    with (out / "history.jsonl").open("a") as file:
        file.write('{"epoch": 99, "lo')  # as torn by a crash
    process = start(*args)
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 0
    assert whole.communicate(timeout=120)[1] == ""
    assert (out / "latent.npy").read_bytes() == (tmp_path / "whole" / "latent.npy").read_bytes()
    ours, theirs = (rundir.read_history(p / "history.jsonl") for p in (out, tmp_path / "whole"))
    assert [x["loss"] for x in ours] == [x["loss"] for x in theirs]
    assert len(ours) == 40


def test_end_of_allotted_time_stops_with_a_checkpoint(npy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    args = ["fit", npy, "--out", tmp_path / "o", *SMALL]
    assert narrows(*args) == 143
    assert "walltime" in capsys.readouterr().err
    assert (tmp_path / "o" / "checkpoints" / "last.safetensors").exists()
    assert metrics(tmp_path / "o")["exit_reason"] == "walltime"
    assert narrows(*args, "--walltime-margin", "10") == 0
    monkeypatch.setenv("SLURM_JOB_END_TIME", "tomorrow")
    assert narrows(*args) == 2


def raise_in_training(stop, *signals):
    with stop.training():
        for number in signals:
            signal.raise_signal(number)
            assert stop() == signals[0].name
    pytest.fail("a signal was lost")


def interrupt_twice(stop):
    with stop.training():
        signal.raise_signal(signal.SIGINT)
        assert stop() == "SIGINT"
        signal.raise_signal(signal.SIGINT)  # the second does not wait for the step to end
        pytest.fail("not reached")


def test_stopper_notes_in_training_and_raises_elsewhere():
    before = signal.getsignal(signal.SIGTERM)
    with Stopper() as stop:
        with pytest.raises(Stopped, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
        assert stop() is None
        with pytest.raises(Stopped, match="SIGUSR2"):
            raise_in_training(stop, signal.SIGUSR2)
    assert signal.getsignal(signal.SIGTERM) is before
    with Stopper() as stop, pytest.raises(Stopped, match="SIGINT"):
        interrupt_twice(stop)


# --- encode, decode, score --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--threads", "2"], ["--max-memory", "2GB"]])
def test_encode_gives_the_codes_of_fit(fitted, tmp_path, options):
    assert narrows("encode", fitted, "pbmc4k", "-o", tmp_path / "z.npy", *options, "--quiet") == 0
    assert (tmp_path / "z.npy").read_bytes() == (fitted / "latent.npy").read_bytes()


def test_encode_in_small_blocks_gives_the_same_bits(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(applying, "apply_bytes", lambda estimator, limit: 37 * 4 * 2000)
    model = fitted / "model.safetensors"
    assert narrows("encode", model, "pbmc4k", "-o", tmp_path / "z.npy", "--quiet") == 0
    assert (tmp_path / "z.npy").read_bytes() == (fitted / "latent.npy").read_bytes()


def test_csv_and_h5ad_hold_the_same_numbers(named, tmp_path):
    anndata = pytest.importorskip("anndata")
    out = tmp_path / "o"
    assert narrows("fit", named, "--out", out, *SMALL) == 0
    for suffix in ("csv", "h5ad", "npy"):
        assert narrows("encode", out, named, "-o", tmp_path / f"z.{suffix}", "--quiet") == 0
        assert narrows("decode", out, tmp_path / f"z.{suffix}", "-o", tmp_path / f"x_{suffix}.npy", "--quiet") == 0
    codes = anndata.read_h5ad(out / "latent.h5ad").X
    assert np.array_equal(np.load(tmp_path / "z.npy"), codes)
    assert np.array_equal(anndata.read_h5ad(tmp_path / "z.h5ad").X, codes)
    decoded = np.load(tmp_path / "x_npy.npy")
    for suffix in ("csv", "h5ad"):
        assert np.array_equal(np.load(tmp_path / f"x_{suffix}.npy"), decoded)
    assert decoded.shape == (90, 12)
    # standard was undone: the scale is that of the data
    scaler = StandardScaler().fit(table().astype(np.float64))
    plain = nw.load(out / "model.safetensors").inverse_transform(codes)
    np.testing.assert_allclose(decoded, scaler.inverse_transform(plain), rtol=1e-4, atol=1e-5)
    assert narrows("decode", out, tmp_path / "z.csv", "-o", tmp_path / "x.csv", "--quiet") == 0
    head, first = (tmp_path / "x.csv").read_text().splitlines()[:2]
    assert head.startswith(",gene0,gene1")
    assert first.startswith("cell0,")
    assert np.array_equal(np.array(first.split(",")[1:], np.float32), decoded[0])


def test_score_is_the_loss_of_each_row(named, tmp_path):
    assert narrows("fit", named, "--out", tmp_path / "o", *SMALL, "--normalize", "none") == 0
    assert narrows("score", tmp_path / "o", named, "-o", tmp_path / "s.csv", "--quiet") == 0
    model = nw.load(tmp_path / "o" / "model.safetensors")
    X = table()
    source = ArraySource(X, var_names=model.feature_names_in_)
    expected = ((model.reconstruct(source) - X) ** 2).sum(axis=1)
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert lines[0] == ",loss"
    assert lines[1].startswith("cell0,")
    np.testing.assert_allclose([float(x.split(",")[1]) for x in lines[1:]], expected, rtol=1e-4)
    assert narrows("score", tmp_path / "o", named, "-o", tmp_path / "s.npy", "--quiet") == 0
    assert np.load(tmp_path / "s.npy").shape == (90,)


def test_features_must_be_those_of_the_model(named, tmp_path, line):
    assert narrows("fit", named, "--out", tmp_path / "o", *SMALL) == 0
    text = named.read_text()
    other = tmp_path / "other.csv"

    def encode():
        assert narrows("encode", tmp_path / "o", other, "-o", tmp_path / "z.npy", "--quiet") == 3
        assert not (tmp_path / "z.npy").exists()
        return line()

    other.write_text(text.replace("gene4", "GENE4"))
    assert "column 4: 'GENE4' here, 'gene4' in the model" in encode()
    other.write_text(text.replace("gene4", "swap").replace("gene5", "gene4").replace("swap", "gene5"))
    assert "another order" in encode()
    other.write_text("\n".join(row.rsplit(",", 1)[0] for row in text.splitlines()))
    assert "11 features, the model has 12" in encode()
    np.save(tmp_path / "t.npy", table().T)
    assert narrows("encode", tmp_path / "o", tmp_path / "t.npy", "-o", tmp_path / "z.npy", "--quiet") == 3
    assert "90 features, the model has 12" in line()


# --- usage and bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["fly"],
        ["fit"],
        ["fit", "pbmc4k"],
        ["fit", "pbmc4k", "--out", "OUT", "--epochs", "0"],
        ["fit", "pbmc4k", "--out", "OUT", "--epochs", "many"],
        ["fit", "pbmc4k", "--out", "OUT", "--epoch", "3"],  # no abbreviations
        ["fit", "pbmc4k", "--out", "OUT", "--loss", "poisson"],
        ["fit", "pbmc4k", "--out", "OUT", "--hidden", "12,-1"],
        ["fit", "pbmc4k", "--out", "OUT", "--seed", "-1"],
        ["fit", "pbmc4k", "--out", "OUT", "--seed", str(2**64)],
        ["fit", "pbmc4k", "--out", "OUT", "--max-memory", "lots"],
        ["fit", "pbmc4k", "--out", "OUT", "--checkpoint-minutes", "nan"],
        ["fit", "pbmc4k", "--out", "OUT", "--set", "dropout"],
        ["fit", "pbmc4k", "--out", "OUT", "--set", "dropout=2"],
        ["fit", "pbmc4k", "--out", "OUT", "--set", "nonsense=2"],
        ["fit", "pbmc4k", "--out", "OUT", "--set", "loss=bce"],
        ["fit", "pbmc4k", "--out", "OUT", "--set", "verbose=1"],
        ["fit", "pbmc4k", "--out", "OUT", "--estimator", "linear", "--hidden", "5"],
        ["fit", "pbmc4k", "--out", "OUT", "--loss", "multinomial", "--normalize", "log1p"],
        ["fit", "pbmc4k", "--out", "OUT", "--config", "missing.toml"],
        ["encode", "OUT", "pbmc4k"],
        ["encode", "OUT", "pbmc4k", "-o", "OUT.npy", "--threads", "0"],
    ],
)
def test_usage_errors_are_exit_2(args, tmp_path, line, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert narrows(*args) == 2
    line()
    assert list(tmp_path.iterdir()) == []


def test_bad_files_are_exit_3(tmp_path, line, monkeypatch):
    monkeypatch.chdir(tmp_path)
    X = table()
    X[41, 7] = np.nan
    np.save("nan.npy", X)
    X[41, 7] = -3
    np.save("negative.npy", X.round())
    np.save("one.npy", X[:1])
    Path("damaged.npy").write_bytes(b"\x93NUMPY broken")
    Path("model.safetensors").write_bytes(b"x" * 100)
    for args, text in (
        (["fit", "missing.npy", "--out", "o"], "missing.npy"),
        (["fit", "nan.npy", "--out", "o"], "row 41, column 7"),
        (["fit", "negative.npy", "--out", "o", "--normalize", "log1p"], "negative value"),
        (["fit", "negative.npy", "--out", "o", "--loss", "multinomial"], "negative.npy"),
        (["fit", "one.npy", "--out", "o"], "at least 2"),
        (["fit", "damaged.npy", "--out", "o"], "damaged.npy"),
        (["encode", "missing.safetensors", "pbmc4k", "-o", "z.npy"], "missing.safetensors"),
        (["encode", "model.safetensors", "pbmc4k", "-o", "z.npy"], "model.safetensors"),
        (["encode", ".", "pbmc4k", "-o", "z.txt"], "z.txt"),
        (["encode", ".", "pbmc4k", "-o", "no/z.npy"], "no/z.npy"),
        (["report", "nowhere"], "nowhere"),
        (["report", "."], "metrics.json"),
    ):
        assert narrows(*args) == 3, args
        assert text in line()
        assert not Path("o").exists()


def test_debug_shows_the_traceback(capsys, tmp_path):
    assert narrows("fit", "missing.npy", "--out", tmp_path / "o", "--debug") == 3
    assert "Traceback" in capsys.readouterr().err
    assert narrows("fit", "missing.npy", "--out", tmp_path / "o") == 3
    assert "Traceback" not in capsys.readouterr().err


def test_unexpected_errors_are_exit_1(npy, tmp_path, monkeypatch, line):
    from narrows.cli import evaluation

    def broken(*args, **kwargs):
        raise KeyError("inside")

    monkeypatch.setattr(evaluation, "pca", broken)
    assert narrows("fit", npy, "--out", tmp_path / "o", *SMALL) == 1
    assert "--debug" in line()
    assert metrics(tmp_path / "o")["status"] == "failed"
    assert not (tmp_path / "o" / "_SUCCESS").exists()
    monkeypatch.undo()
    assert narrows("fit", npy, "--out", tmp_path / "o", *SMALL) == 0  # training is not repeated, the rest is
    assert metrics(tmp_path / "o")["status"] == "finished"


def test_environment_of_threads_and_backend(npy, tmp_path, monkeypatch, line):
    monkeypatch.setenv("NARROWS_NUM_THREADS", "some")
    args = [a for a in SMALL if a not in ("--threads", "1")]
    assert narrows("fit", npy, "--out", tmp_path / "o", *args) == 2
    assert "NARROWS_NUM_THREADS" in line()
    monkeypatch.setenv("NARROWS_NUM_THREADS", "1")
    monkeypatch.setenv("NARROWS_BACKEND", "abacus")
    assert narrows("fit", npy, "--out", tmp_path / "o", *args) == 2
    assert "abacus" in line()
    monkeypatch.setenv("NARROWS_BACKEND", "reference")
    assert narrows("fit", npy, "--out", tmp_path / "o", *args) == 0
    m = metrics(tmp_path / "o")
    assert (m["backend"], m["n_threads"], m["threads_from"], m["isa"]) == (
        "reference",
        1,
        "NARROWS_NUM_THREADS",
        None,
    )


def test_config_file(npy, tmp_path, line):
    config = tmp_path / "c.toml"
    config.write_text(
        'components = 2\nhidden = [7, 5]\nquiet = true\nepochs = 3\nmax-memory = "8GB"\n[set]\nalpha = 0.01\n'
    )
    out = tmp_path / "o"
    assert narrows("fit", npy, "--out", out, "--config", config, "--epochs", "2") == 0
    written = tomllib.loads((out / "config.toml").read_text())
    assert (written["components"], written["hidden"], written["epochs"]) == (2, [7, 5], 2)
    assert written["set"] == {"alpha": 0.01}
    assert written["max-memory"] == 8 * 10**9
    codes = np.load(out / "latent.npy")
    # what fit wrote repeats the fit
    again = tmp_path / "again"
    assert narrows("fit", "--config", out / "config.toml", "--out", again, "--quiet") == 0
    assert np.array_equal(np.load(again / "latent.npy"), codes)
    for text in (
        "componets = 3", "components = 0", "components = true", "hidden = 'a'", "[components]\nx = 1",
        "quiet = 'yes'", "loss = 'nb'", "not toml", "set = 3", "[set]\nnonsense = 1",
    ):  # fmt: skip
        config.write_text(text)
        assert narrows("fit", npy, "--out", tmp_path / "p", "--config", config) == 2, text
        line()
        assert not (tmp_path / "p").exists()


def test_progress_lines_and_quiet(npy, tmp_path, capsys):
    args = ["fit", npy, *SMALL[:-1], "--out"]
    assert narrows(*args, tmp_path / "a") == 0
    err = capsys.readouterr().err
    assert re.search(r"narrows: epoch \d+/4, loss [\d.]+, val_loss [\d.]+, \d+ s\n", err)
    assert all(text.startswith("narrows: ") for text in err.splitlines())
    assert narrows(*args, tmp_path / "b", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_help_version_doctor(capsys):
    for args in (["--help"], ["fit", "--help"], ["encode", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as end:
            narrows(*args)
        assert end.value.code == 0
        assert capsys.readouterr().out
    assert narrows() == 2
    capsys.readouterr()
    assert narrows("doctor") == 0
    out = capsys.readouterr().out
    for word in ("narrows", "python", "threads", "backends", "extras"):
        assert word in out


def test_h5ad_layer_is_remembered(tmp_path):
    anndata = pytest.importorskip("anndata")
    counts = np.random.default_rng(0).poisson(2.0, (80, 15)).astype(np.float32)
    adata = anndata.AnnData(np.zeros((80, 15), np.float32), layers={"counts": sp.csr_matrix(counts)})
    adata.write_h5ad(tmp_path / "x.h5ad")
    out = tmp_path / "o"
    assert narrows("fit", tmp_path / "x.h5ad", "--out", out, *SMALL, "--layer", "counts") == 0
    assert metrics(out)["normalize"] == "log1p"
    assert narrows("encode", out, tmp_path / "x.h5ad", "-o", tmp_path / "z.npy", "--quiet") == 0
    assert np.array_equal(np.load(tmp_path / "z.npy"), anndata.read_h5ad(out / "latent.h5ad").X)


# --- small parts ------------------------------------------------------------------------------------------


def test_sizes():
    assert parse_size("8GB") == 8 * 10**9
    assert parse_size("1.5 GiB") == 3 << 29
    assert parse_size("500m") == 500 * 10**6
    assert parse_size("12345") == 12345
    for text in ("", "GB", "8XB", "-1GB", "0", "inf", "nan", "8 G B x"):
        with pytest.raises(ValueError, match="size"):
            parse_size(text)


def test_settings_of_the_estimator():
    assert parse_setting("alpha=1e-4") == ("alpha", 1e-4)
    assert parse_setting("shuffle=false") == ("shuffle", False)
    assert parse_setting("clip_norm=none") == ("clip_norm", None)
    assert parse_setting("decoder-layer-sizes=(3, 4)") == ("decoder_layer_sizes", (3, 4))
    assert parse_setting("activation=gelu") == ("activation", "gelu")
    assert parse_setting("a=b=c") == ("a", "b=c")


json_like = st.recursive(
    st.one_of(st.booleans(), st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=8), st.one_of(json_like, st.dictionaries(st.text(max_size=5), json_like))))
def test_toml_reads_back(value):
    read = tomllib.loads(rundir.to_toml(value))
    assert read == {k: v for k, v in value.items() if v != {}}


def test_identity_leaves_out_how_a_run_is_done():
    a = FitSettings(data="x", out="o", threads=1, max_memory=10**9, quiet=True, resume="never")
    b = FitSettings(data="y", out="p", threads=8, checkpoint_minutes=1)
    assert a.identity() == b.identity()
    assert a.identity() != FitSettings(data="x", out="o", seed=1).identity()


def test_torn_history_is_read_up_to_the_tear(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"epoch": 1, "loss": 2.0}\n{"epoch": 2, "loss": 1.0}\n{"epo')
    assert [x["epoch"] for x in rundir.read_history(path)] == [1, 2]


def test_table_of_wrong_length_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="rows"):
        tables.write_table(tmp_path / "t.npy", [np.zeros((3, 2))], (4, 2), np.float64)
    assert list(tmp_path.iterdir()) == []
