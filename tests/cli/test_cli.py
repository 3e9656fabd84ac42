"""The command line: what fit writes, that it resumes and refuses, encode / decode / score."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

import narrows as nw
from cli_runs import SMALL, metrics, narrows, table
from narrows.cli import applying, rundir, tables
from narrows.cli.stopping import Stopped, Stopper
from narrows.data import ArraySource
from narrows.errors import MissingExtraError


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
    assert "already finished" in capsys.readouterr().err
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


@pytest.mark.parametrize("locks", [True, False], ids=["with locks", "without"])
def test_one_run_at_a_time_writes(locks, npy, tmp_path, line, monkeypatch):
    """Where the file system has locks; they go with the run, and leave no file."""
    args = ["fit", npy, "--out", tmp_path / "o", *SMALL]
    assert narrows(*args) == 0
    if not locks:
        monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with rundir.RunDir(tmp_path / "o").claimed():
        assert narrows(*args, "--resume", "never") == (3 if locks else 0)
        assert not locks or "wait for its end" in line()
        assert (tmp_path / "o" / "_SUCCESS").exists()
    assert narrows(*args, "--resume", "never") == 0
    assert not [p for p in (tmp_path / "o").rglob("*") if "lock" in p.name]


def test_a_run_that_is_killed_before_it_writes_its_settings_can_begin_again(npy, tmp_path):
    with rundir.RunDir(tmp_path / "o").claimed():
        pass
    assert narrows("fit", npy, "--out", tmp_path / "o", *SMALL) == 0


def test_what_another_run_has_finished_meanwhile_stays(npy, tmp_path, line, monkeypatch):
    """Between the look at the folder and the lock on it."""
    args, claimed = ["fit", npy, "--out", tmp_path / "o", *SMALL], rundir.RunDir.claimed

    def late(run):
        monkeypatch.setattr(rundir.RunDir, "claimed", claimed)
        assert narrows(*args) == 0
        return claimed(run)

    monkeypatch.setattr(rundir.RunDir, "claimed", late)
    assert narrows(*args, "--set", "alpha=0.5") == 5
    assert "set.alpha (unset there, 0.5 here)" in line()
    assert (tmp_path / "o" / "_SUCCESS").exists()


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert narrows("fit", "pbmc4k", "--out", tmp_path / "o", "--dry-run", "--hidden", "64", "--components", "10") == 0
    out = capsys.readouterr().out
    assert "2000 - 64 - 10 - 64 - 2000" in out
    assert f"{2000 * 64 * 2 + 64 * 10 * 2 + 64 + 10 + 64 + 2000:,}" in out
    assert "16 of 256 rows" in out  # 4271 rows less 427 held out
    assert "memory" in out
    assert "log1p (counts: whole numbers, 89.8% zeros; --normalize NAME chooses another)" in out
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_names_what_would_do(npy, tmp_path, line):
    assert narrows("fit", npy, "--out", tmp_path / "o", *SMALL, "--max-memory", "20MB") == 6
    least = re.search(r"at least ([\d.]+ [MG]B)", line()).group(1)
    assert not (tmp_path / "o").exists()
    assert narrows("fit", npy, "--out", tmp_path / "o", *SMALL, "--max-memory", least) == 0
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


@pytest.mark.parametrize("estimator", ["linear", "denoising", "sparse", "variational", "deep", "rbm"])
def test_every_estimator(estimator, npy, tmp_path):
    args = [a for a in SMALL if a not in ("--hidden", "8")] if estimator in ("linear", "rbm") else SMALL
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

SLOW = ["--hidden", "64", "--components", "8", "--epochs", "28", "--threads", "1", "--quiet",
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
    out = tmp_path / "cut"
    args = [*base, "--out", out, "--checkpoint-minutes", "0.0001"]
    stops = [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
    for i, (number, code) in enumerate(stops):
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
    wait_for_epoch(out, process, 14)
    process.kill()
    process.communicate()
    with (out / "history.jsonl").open("a") as file:
        file.write('{"epoch": 99, "lo')  # as torn by a crash
    process = start(*args)
    assert process.communicate(timeout=120)[1] == ""
    assert process.returncode == 0
    assert narrows(*base, "--out", tmp_path / "whole") == 0
    assert (out / "latent.npy").read_bytes() == (tmp_path / "whole" / "latent.npy").read_bytes()
    ours, theirs = (rundir.read_history(p / "history.jsonl") for p in (out, tmp_path / "whole"))
    assert [x["loss"] for x in ours] == [x["loss"] for x in theirs]
    assert len(ours) == 28


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
        signal.raise_signal(signal.SIGTERM)  # sent twice, as to a process and to its group
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.check()  # also if a library has swallowed the first exception
    with Stopper() as stop:
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


def test_a_stop_before_training_promises_no_checkpoint(monkeypatch, capsys):
    def stopped(args, argv, stop):
        raise Stopped("SIGTERM")

    monkeypatch.setitem(sys.modules["narrows.cli.main"]._COMMANDS, "fit", stopped)
    assert narrows("fit", "digits", "--out", "never") == 143
    assert "it continues from its last checkpoint, if it saved one" in capsys.readouterr().err
