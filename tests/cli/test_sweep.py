"""The sweep of the bottleneck: what it writes, that it goes on where it was stopped, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA

import narrows as nw
from cli_runs import SMALL, metrics, narrows, table
from narrows.cli import rundir
from narrows.data import ArraySource
from narrows.evaluation.baselines import pca, pca_errors
from narrows.evaluation.metrics import elbow
from narrows.fitting.feed import split_rows
from pages import Page

FEW = [a for a in SMALL if a not in ("--components", "3")]


def result(out):
    return json.loads((out / "sweep.json").read_text())


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A finished sweep of labelled data, with what it printed."""
    home = tmp_path_factory.mktemp("swept")
    X = table()
    np.savez(home / "x.npz", X=X, labels=(X[:, 0] > 0).astype(int))
    command = [sys.executable, "-m", "narrows", "sweep", home / "x.npz", "--components", "8,1,3,8", "--out", home / "o"]
    done = subprocess.run([*map(str, command), *FEW], capture_output=True, text=True, check=True)
    return home / "o", X, done


def test_sweep_writes_everything(swept):
    out, _, done = swept
    assert done.stderr == ""
    made = {"_SUCCESS", "config.toml", "report.html", "sweep.json", "components-1", "components-3", "components-8"}
    assert {p.name for p in out.iterdir()} == made
    assert os.path.getmtime(out / "_SUCCESS") >= max(p.stat().st_mtime for p in out.iterdir())
    found = result(out)
    assert [row["n_components"] for row in found["sizes"]] == [1, 3, 8]
    assert (found["status"], found["n_held_out"], found["pca_rows"]) == ("finished", 9, 81)
    head, *rows, _ = [line.split() for line in done.stdout.splitlines()]
    assert head[:2] == ["components", "validation"]
    assert [row[0] for row in rows] == ["1", "3", "8"]
    for row in found["sizes"]:
        folder = out / row["folder"]
        assert (folder / "_SUCCESS").exists()
        assert metrics(folder)["val_loss"] == row["val_loss"]
        assert 0 <= row["knn_accuracy_latent"] <= 1


def test_errors_are_those_of_the_rows_held_out(swept):
    out, X, _ = swept
    trained, held = split_rows(90, 0.1, 0)
    scaled = (X - X.mean(axis=0, dtype=float)) / X.std(axis=0, dtype=float)
    for row in result(out)["sizes"]:
        k = row["n_components"]
        model = nw.load(out / row["folder"] / "model.safetensors")
        error = np.mean((model.reconstruct(scaled[held]) - scaled[held]) ** 2)
        assert row["held_out_mse_per_feature"] == pytest.approx(error, rel=1e-4)
        assert row["val_loss"] == pytest.approx(12 * error, rel=1e-4)  # the best epoch's, a sum over features
        exact = PCA(k, svd_solver="full").fit(scaled[trained])
        error = np.mean((exact.inverse_transform(exact.transform(scaled[held])) - scaled[held]) ** 2)
        assert row["pca_held_out_mse_per_feature"] == pytest.approx(error, rel=1e-3)


def test_sizes_are_fits_of_their_own(swept, tmp_path):
    out, _, _ = swept
    assert narrows("fit", out.parent / "x.npz", "--out", tmp_path / "alone", "--components", 3, *FEW) == 0
    ours, theirs = ((folder / "latent.npy").read_bytes() for folder in (tmp_path / "alone", out / "components-3"))
    assert ours == theirs


def test_report_shows_the_sizes_and_is_written_again(swept, capsys):
    out, _, _ = swept
    page = Page((out / "report.html").read_text())
    assert page.links == []
    assert len(page.images) == 2
    assert f"{result(out)['sizes'][1]['val_loss']:.5g}" in page.text
    before = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert narrows("report", out) == 0
    assert (out / "report.html").read_bytes() == before
    assert capsys.readouterr().out.strip() == str(out / "report.html")


def test_sizes_are_added_and_finished_ones_left_alone(npy, tmp_path, capsys):
    out = tmp_path / "o"
    args = ["sweep", npy, "--out", out, *FEW]
    assert narrows(*args, "--components", "2,4") == 0
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.parent != out}
    assert narrows(*args, "--components", "2,4,6") == 0
    assert [row["n_components"] for row in result(out)["sizes"]] == [2, 4, 6]
    whole = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert {p: whole[p] for p in before} == before
    capsys.readouterr()
    assert narrows(*args[:-1], "--components", "6,4,2") == 0
    assert "already finished" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == whole
    model = out / "components-4" / "model.safetensors"
    lost = model.read_bytes()
    model.unlink()
    assert narrows(*args, "--components", "2,4,6") == 0
    assert model.read_bytes() == lost
    assert {p: p.stat().st_mtime_ns for p in (out / "components-6").iterdir()} == {
        p: at for p, at in whole.items() if p.parent == out / "components-6"
    }
    assert narrows(*args, "--components", "2", "--resume", "never") == 0
    assert [p.name for p in out.glob("components-*")] == ["components-2"]
    assert metrics(out / "components-2")["status"] == "finished"


def test_killed_sweep_goes_on(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.normal(size=(2500, 150)).astype(np.float32))
    base = ["sweep", tmp_path / "x.npy", "--components", "3,5", "--hidden", "64",
            "--epochs", "16", "--threads", "1", "--quiet", "--backend", "reference", "--batch-size", "128",
            "--checkpoint-minutes", "0.0001", "--set", "n_iter_no_change=25"]  # fmt: skip
    out = tmp_path / "cut"
    for size, number, code in ((3, signal.SIGTERM, 143), (5, signal.SIGKILL, -9)):
        command = [sys.executable, "-m", "narrows", *map(str, base), "--out", str(out)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        history = out / f"components-{size}" / "history.jsonl"
        deadline = time.monotonic() + 120
        while len(rundir.read_history(history)) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == code, err
        assert not (out / "_SUCCESS").exists()
        assert ("repeat the command" in err) == (code == 143)
    assert [row["n_components"] for row in result(out)["sizes"]] == [3]
    assert result(out)["status"] == "running"
    done = time.time()
    for folder in (out, tmp_path / "whole"):
        assert narrows(*base, "--out", folder) == 0
    assert (out / "components-3" / "_SUCCESS").stat().st_mtime < done
    drop = {"wall_s"}
    ours, theirs = ([{k: v for k, v in row.items() if k not in drop} for row in result(f)["sizes"]]
                    for f in (out, tmp_path / "whole"))  # fmt: skip
    assert ours == theirs
    for size in (3, 5):
        codes = [(f / f"components-{size}" / "latent.npy").read_bytes() for f in (out, tmp_path / "whole")]
        assert codes[0] == codes[1]


def test_other_settings_or_folders_are_refused(npy, tmp_path, line, capsys):
    out = tmp_path / "o"
    args = ["sweep", npy, "--components", "2", "--out", out, *FEW]
    assert narrows(*args, "--resume", "require") == 5
    assert "no sweep to resume" in line()
    assert not out.exists()
    assert narrows(*args) == 0
    capsys.readouterr()
    assert narrows(*args, "--components", "4", "--seed", "1") == 5
    assert "seed (0 there, 1 here)" in line()
    assert not (out / "components-4").exists()
    assert narrows("fit", npy, "--out", out, *SMALL) == 3
    assert "holds no run of narrows fit" in line()
    assert narrows("sweep", npy, "--components", "2", "--out", out / "components-2", *FEW) == 3
    assert "holds no run of narrows sweep" in line()
    (out / "components-9").mkdir()
    (out / "components-9" / "mine.txt").write_text("keep")
    assert narrows(*args, "--resume", "never") == 3
    assert "components-9" in line()
    assert (out / "components-9" / "mine.txt").exists()
    (out / "sweep.json").write_text("{")
    assert narrows("report", out) == 3
    assert "damaged" in line()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--components", "2,0"], "at least 1"),
        (["--components", "2,x"], "whole number"),
        (["--components", ""], "whole number"),
        (["--set", "early_stopping=false"], "early_stopping"),
        (["--set", "n_components=3"], "n_components"),
        (["--estimator", "linear", "--components", "2"], "early_stopping"),
    ],
)
def test_usage_errors(options, text, npy, tmp_path, line):
    assert narrows("sweep", npy, "--out", tmp_path / "o", *options) == 2
    assert text in line()
    assert narrows("sweep", npy) == 2
    assert "narrows sweep DATA --out DIR" in line()
    assert not (tmp_path / "o").exists()


def test_an_error_names_its_size(npy, tmp_path, line):
    args = ["sweep", npy, "--out", tmp_path / "o", "--components", "2,3", *FEW]
    assert narrows(*args, "--set", "learning_rate_init=1e30", "--set", "solver=sgd") == 4
    assert "2 components: " in line()
    assert not (tmp_path / "o" / "_SUCCESS").exists()


def test_memory_is_asked_for_all_sizes_before_the_first(npy, tmp_path, line):
    args = ["sweep", npy, "--out", tmp_path / "o", "--components", "2,60000000", "--max-memory", "2GB", *FEW]
    assert narrows(*args) == 6
    assert "--max-memory 2.00 GB is too small" in line()
    assert not (tmp_path / "o").exists()


def test_dry_run_and_config(npy, tmp_path, capsys):
    args = ["sweep", npy, "--components", "2,5", "--out", tmp_path / "o", *FEW]
    assert narrows(*args, "--dry-run") == 0
    text = capsys.readouterr().out
    assert "12 - 8 - 2 - 8 - 12" in text
    assert "12 - 8 - 5 - 8 - 12" in text
    assert not (tmp_path / "o").exists()
    assert narrows(*args) == 0
    assert narrows("sweep", "--config", tmp_path / "o" / "config.toml", "--out", tmp_path / "again", "--quiet") == 0
    ours, theirs = (
        [row["val_loss"] for row in result(tmp_path / name)["sizes"]] for name in ("o", "again")
    )  # fmt: skip
    assert ours == theirs


def test_without_the_report_extra(npy, tmp_path, monkeypatch, capsys):
    for module in ("matplotlib", "jinja2"):
        monkeypatch.setitem(sys.modules, module, None)
    assert narrows("sweep", npy, "--components", "2", "--out", tmp_path / "o", *FEW) == 0
    assert "no report.html" in capsys.readouterr().err
    assert not (tmp_path / "o" / "report.html").exists()
    assert (tmp_path / "o" / "_SUCCESS").exists()


def test_sparse_counts_with_a_count_loss(tmp_path):
    counts = sp.random(
        80, 30, 0.2, "csr", random_state=0, data_rvs=lambda n: np.random.default_rng(0).integers(1, 9, n)
    )
    sp.save_npz(tmp_path / "x.npz", counts)
    args = ["sweep", tmp_path / "x.npz", "--components", "2,3", "--loss", "multinomial", "--out", tmp_path / "o", *FEW]
    assert narrows(*args) == 0
    page = Page((tmp_path / "o" / "report.html").read_text())
    assert len(page.images) == 2  # squared error beside PCA, and the loss itself
    assert "multinomial" in page.text


def test_a_sweep_worse_than_pca_marks_no_elbow(npy, tmp_path, capsys, monkeypatch):
    """Its table, log and report say so, and that the epochs were too few. One size as good as PCA is enough."""
    monkeypatch.setattr("narrows.cli.sweep.elbow", lambda sizes, losses: 2)
    args = ["sweep", npy, "--components", "1,2,3", *FEW[:-1], "--out"]
    assert narrows(*args, tmp_path / "short", "--epochs", "1") == 0
    out, err = capsys.readouterr()
    found = result(tmp_path / "short")
    assert all(row["held_out_mse_per_feature"] > row["pca_held_out_mse_per_feature"] for row in found["sizes"])
    assert found["elbow"] is None
    assert out.splitlines()[-1] == "no elbow: every size is worse than PCA"
    assert "every size is worse than PCA, so no elbow is marked" in err
    assert "when --epochs ended the training of 1, 2, 3 components" in err
    page = Page((tmp_path / "short" / "report.html").read_text()).text
    assert "Every size is worse than PCA" in page
    log = (tmp_path / "short" / "components-1" / "run.log").read_text()
    assert "the error is worse than that of PCA (" in log
    assert "the loss still fell when --epochs 1 ended training" in log
    assert log.count("more epochs") == 1  # advice of this line alone
    assert "The loss still fell" in (tmp_path / "short" / "components-1" / "report.html").read_text()
    found["sizes"][1]["pca_held_out_mse_per_feature"] = found["sizes"][1]["held_out_mse_per_feature"]
    found["elbow"] = 2
    (tmp_path / "short" / "sweep.json").write_text(json.dumps(found))
    assert narrows("report", tmp_path / "short") == 0
    assert "worse than PCA" not in Page((tmp_path / "short" / "report.html").read_text()).text


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_array])
def test_pca_errors_of_rows_apart(layout):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 40)) + 0.5 * rng.normal(size=(400, 40)) + 2
    X[X < 1] = 0
    trained, held = np.arange(300), np.arange(300, 400)
    source = ArraySource(layout(X))
    ours = pca_errors(pca(source, 8, rows=trained), source, held)
    for k in (1, 5, 8):
        exact = PCA(k, svd_solver="full").fit(X[trained])
        error = np.mean((exact.inverse_transform(exact.transform(X[held])) - X[held]) ** 2)
        assert ours[k - 1] == pytest.approx(error, rel=2e-3)


def test_elbow():
    assert elbow([2, 4, 8, 16, 32], [10.0, 6.0, 3.0, 2.8, 2.7]) == 8
    assert elbow([2, 4, 8], [3.0, 2.0, 1.0]) is None  # a straight line
    assert elbow([2, 4], [3.0, 1.0]) is None
    assert elbow([2, 4, 8], [1.0, 0.5, 2.0]) is None  # more components are worse
    assert elbow([2, 4, 8], [3.0, float("nan"), 1.0]) is None
