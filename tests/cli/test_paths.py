"""Paths that are bytes and no text, links in circles, and an interpreter without docstrings and asserts."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from cli_runs import SMALL, metrics, narrows, table
from narrows.cli.rundir import to_toml
from narrows.cli.settings import read_toml

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="file names of Linux")


def test_paths_that_are_not_utf8(tmp_path, capsys):
    """For data, --out, models and tables; ``config.toml`` repeats the run."""
    anndata = pytest.importorskip("anndata")
    home = tmp_path / os.fsdecode(b"d\xff \xe9%")
    home.mkdir()
    np.save(home / "x.npy", table())
    anndata.AnnData(table()).write_h5ad(home / "x.h5ad")
    codes = []
    for name in ("x.npy", "x.h5ad"):
        out = home / f"{name}.out"
        args = ["fit", home / name, "--out", out, *SMALL]
        assert narrows(*args) == 0
        assert narrows(*args, "--resume", "require") == 0
        assert narrows("fit", "--config", out / "config.toml", "--out", tmp_path / name, "--quiet") == 0
        assert metrics(out)["data"] == str(home / name)
        assert narrows("report", out, "--quiet") == 0
        assert narrows("encode", out, home / name, "-o", home / "z.csv", "--quiet") == 0
        assert narrows("encode", out / "model.safetensors", home / name, "-o", home / "z.npy", "--quiet") == 0
        assert narrows("decode", out, home / "z.csv", "-o", home / "r.h5ad", "--quiet") == 0
        codes.append(np.load(home / "z.npy"))
    assert np.array_equal(*codes)
    assert np.array_equal(np.load(tmp_path / "x.npy" / "latent.npy"), codes[0])
    assert narrows("sweep", home / "x.npy", "--out", home / "s", *SMALL, "--components", "2") == 0
    capsys.readouterr()
    assert narrows("fit", home / "none", "--out", tmp_path / "o") == 3
    assert "no such file" in capsys.readouterr().err


def test_texts_of_a_config_file_come_back(tmp_path):
    texts = ["plain", "file:///a%20b", os.fsdecode(b"/\xff%\n\x80"), "/é"]
    (tmp_path / "c").write_text(to_toml({"set": {"a": texts}}), encoding="utf-8")
    assert read_toml(tmp_path / "c")["set"]["a"] == texts


def test_links_in_circles_are_one_line(npy, tmp_path, line, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink("b", "a")
    os.symlink("a", "b")
    os.symlink("z.npy", "z.npy")
    assert narrows("fit", npy, "--out", "good", *SMALL) == 0
    for code, *args in (
        (3, "fit", "a", "--out", "o"),
        (3, "fit", npy, "--out", "a"),
        (3, "fit", npy, "--out", "a/below"),
        (3, "encode", "a", npy, "-o", "y.npy"),
        (3, "encode", "good", npy, "-o", "z.npy", "--quiet"),
        (3, "report", "a"),
        (2, "fit", npy, "--out", "o", "--config", "a"),
    ):
        assert narrows(*args) == code, args
        line()
    assert os.readlink("z.npy") == "z.npy"
    assert sorted(os.listdir()) == ["a", "b", "good", "x.npy", "z.npy"]


def test_without_docstrings_and_asserts(npy, tmp_path):
    code = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from narrows.cli import main
from narrows.models import ESTIMATORS
assert False, "asserts are on"
X = np.random.default_rng(0).poisson(3.0, (40, 16)).astype(np.float32)
options = {"ConvAutoencoder": {"image_shape": (4, 4, 1)}, "RBM": {"visible": "gaussian"}}
for name, cls in ESTIMATORS.items():
    ae = cls(2, max_iter=1, n_threads=1, **options.get(name, {})).fit(X)
    if ae.transform(X).shape[0] != 40: sys.exit(name)
for args in sys.argv[1:]:
    if code := main(args.split()): sys.exit(code)
"""
    commands = [
        f"fit {npy} --out {tmp_path}/o {' '.join(SMALL)}", f"score {tmp_path}/o {npy} -o {tmp_path}/s.csv --quiet",
        f"sweep {npy} --out {tmp_path}/s {' '.join(SMALL)} --components 1,2",
    ]  # fmt: skip
    command = [sys.executable, "-OO", "-c", code, *commands]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "o" / "_SUCCESS").exists()
