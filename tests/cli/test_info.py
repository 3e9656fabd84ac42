"""The command info: what it says of model files, runs and sweeps, and of damaged ones."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import narrows as nw
from cli_runs import SMALL, metrics, narrows
from cli_runs import table as rows
from estimator_cases import BACKEND


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished fit of a table with names, as the folder `run`."""
    home = tmp_path_factory.mktemp("info")
    names = [f"gene{i}" for i in range(12)]
    np.savez(home / "x.npz", X=rows(), var_names=names, obs_names=[f"c{i}" for i in range(90)])
    args = [*SMALL, "--normalize", "standard", "--set", "alpha=0.5"]
    assert narrows("fit", home / "x.npz", "--out", home / "run", *args) == 0
    return home


def said(capsys, *args):
    capsys.readouterr()
    assert narrows("info", *args) == 0
    return capsys.readouterr().out


def test_a_run_and_its_model_file(home, capsys):
    found = json.loads(said(capsys, home / "run", "--json"))
    model, known = nw.load(home / "run" / "model.safetensors"), metrics(home / "run")
    expected = {
        "estimator": "Autoencoder", "name": "autoencoder", "loss": "mse", "n_components": 3, "rows": 90, "features": 12,
        "feature_names": ["gene0", "gene1", "gene2", "gene3", "gene4"], "n_parameters": known["n_parameters"],
        "parameters": json.loads(json.dumps(model.get_params())), "epochs": 4, "train_loss": known["train_loss"],
        "val_loss": known["val_loss"], "stopped": "limit reached", "status": "finished", "version": nw.__version__,
        "input_sha256": known["input_sha256"], "normalisation": "standard (as asked)",
        "bytes": (home / "run" / "model.safetensors").stat().st_size,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert [(layer["inputs"], layer["outputs"], layer["activation"]) for layer in found["layers"]] == [
        (12, 8, "relu"), (8, 3, "linear"), (3, 8, "relu"), (8, 12, "linear")
    ]  # fmt: skip
    assert found["changed_parameters"].keys() == {
        "alpha", "batch_size", "hidden_layer_sizes", "max_iter", "n_components", "n_threads", "random_state"
    }  # fmt: skip
    alone = json.loads(said(capsys, home / "run" / "model.safetensors", "--json"))
    assert alone == {name: value for name, value in found.items() if name not in ("status", "checkpoint")} | {
        "data": alone["data"]
    }
    text = said(capsys, home / "run")
    for shown in ("12 - 8 relu - 3 linear - 8 relu - 12 linear", "gene0, gene1, gene2, gene3, gene4, ...", "alpha=0.5"):
        assert shown in text
    assert "momentum" not in text


def test_models_of_python_need_no_data(tmp_path, capsys):
    X = np.random.default_rng(0).poisson(2, (40, 16)).astype(np.float32)
    params = {"max_iter": 2, "random_state": 0, "backend": BACKEND}
    conv = nw.ConvAutoencoder(2, image_shape=(4, 4, 1), filters=(2,), **params)
    counts = nw.VariationalAutoencoder(2, loss="nb", hidden_layer_sizes=4, early_stopping=False, **params)
    for model, batch, shown in (
        (conv, None, "16 - convolution to"),
        (nw.RBM(3, **params), None, "16 - 3 sigmoid - 16 sigmoid"),
        (counts, np.arange(40) % 2, "batches"),
    ):
        model.fit(X / X.max() if isinstance(model, nw.RBM) else X, batch=batch).save(tmp_path / "m.safetensors")
        text = said(capsys, tmp_path / "m.safetensors")
        assert shown in text
        assert "rows" not in text
        json.loads(said(capsys, tmp_path / "m.safetensors", "--json"), parse_constant=pytest.fail)


def test_a_sweep_and_an_unfinished_run(home, tmp_path, capsys):
    few = [a for a in SMALL if a not in ("--components", "3")]
    assert narrows("sweep", home / "x.npz", "--components", "1,2", "--out", tmp_path / "s", *few) == 0
    found = json.loads(said(capsys, tmp_path / "s", "--json"))
    assert (found["kind"], found["sizes"], found["status"], found["rows"]) == ("sweep", [1, 2], "finished", 90)
    assert "validation loss" in said(capsys, tmp_path / "s")
    shutil.copytree(home / "run", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    (tmp_path / "cut" / "metrics.json").unlink()
    text = said(capsys, tmp_path / "cut")
    assert "running or killed" in text
    assert "last.safetensors" in text
    (tmp_path / "s" / "sweep.json").unlink()
    assert "unfinished sweep" in said(capsys, tmp_path / "s")


def test_what_is_damaged_or_no_model_is_one_line(home, tmp_path, line, capsys):
    capsys.readouterr()
    good = (home / "run" / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(good[:-9])
    (tmp_path / "flipped.safetensors").write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.toml").write_text("data = 1")
    shutil.copytree(home / "run", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text("{")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("[1]")
    checkpoint = home / "run" / "checkpoints" / "last.safetensors"
    for path, text in (
        (tmp_path / "cut.safetensors", "cut.safetensors: damaged"),
        (tmp_path / "flipped.safetensors", "flipped.safetensors: damaged"),
        (tmp_path / "text.txt", "text.txt: damaged or not a model file"),
        (tmp_path / "none", "none: no such model file"),
        (tmp_path / "other", "other holds no model.safetensors and no run of narrows"),
        (tmp_path / "empty", "holds no model.safetensors and no run of narrows"),
        (tmp_path / "run", "metrics.json is damaged"),
        (tmp_path / "sweep", "sweep.json is damaged"),
        (checkpoint, "holds a checkpoint, not a 'model'"),
    ):
        assert narrows("info", path) == 3
        assert text in line()


def test_both_losses_are_of_the_epoch_with_the_best_weights(home, tmp_path, capsys):
    model = nw.load(home / "run" / "model.safetensors")
    model.history_["val_loss"][1] = 1e-3
    model.save(tmp_path / "best.safetensors")
    found = json.loads(said(capsys, tmp_path / "best.safetensors", "--json"))
    assert (found["train_loss"], found["val_loss"]) == (model.history_["loss"][1], 1e-3)
