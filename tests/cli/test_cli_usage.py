"""The command line: usage, settings, configuration, bad input, exit codes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import narrows as nw
from cli_runs import SMALL, metrics, narrows, table
from narrows.backends import probe
from narrows.cli import rundir, tables
from narrows.cli.settings import FitSettings, in_flags, parse_setting, parse_size

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
        ["fit", "pbmc4k", "--out", "OUT", "--loss", "gamma"],
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
        (["fit", "negative.npy", "--out", "o", "--normalize", "log1p"], "log1p needs counts"),
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
    from narrows.evaluation import baselines as evaluation

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


@pytest.mark.skipif(probe("cuda").ok, reason="a GPU has tf32")
def test_a_precision_of_another_backend_is_refused_before_anything_is_written(npy, tmp_path, line):
    assert narrows("fit", npy, "--out", tmp_path / "o", "--precision", "tf32", *SMALL) == 6
    assert "--precision tf32 needs --backend cuda" in line()
    assert not (tmp_path / "o").exists()


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
        "quiet = 'yes'", "loss = 'gamma'", "not toml", "set = 3", "[set]\nnonsense = 1",
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


# --- batches ----------------------------------------------------------------------------------------------


def in_batches(path, *, write="write_h5ad", **obs):
    """A file of counts of samples a, b and c, the second of which has three times as many of some genes."""
    anndata = pytest.importorskip("anndata")
    sample = np.array(["a", "b", "c"])[np.arange(90) % 3]
    mean = np.where((sample == "b")[:, None] & (np.arange(12) % 2 == 0), 6.0, 2.0)
    counts = np.random.default_rng(0).poisson(mean).astype(np.float32)
    adata = anndata.AnnData(sp.csr_matrix(counts))
    adata.obs_names = [f"cell{i}" for i in range(90)]
    for name, values in ({"sample": sample} | obs).items():
        adata.obs[name] = values
    getattr(adata, write)(path)
    return counts, sample


COUNT = [*SMALL, "--estimator", "count", "--batch-key", "sample"]


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore")
def test_batches_of_a_file_are_those_of_the_estimator(suffix, tmp_path):
    if suffix == "zarr":
        pytest.importorskip("zarr")
    path, out = tmp_path / f"x.{suffix}", tmp_path / "o"
    counts, sample = in_batches(path, write=f"write_{suffix}")
    assert narrows("fit", path, "--out", out, *COUNT) == 0
    assert metrics(out)["batch_key"] == "sample"
    assert metrics(out)["n_batches"] == 3
    model = nw.load(out / "model.safetensors")
    own = nw.CountAutoencoder(3, hidden_layer_sizes=8, max_iter=4, batch_size=32, n_threads=1, random_state=0).fit(
        sp.csr_array(counts), batch=sample
    )
    assert np.array_equal(model.batches_, ["a", "b", "c"])
    assert np.array_equal(model.coefs_[2], own.coefs_[2])
    X = nw.data.ArraySource(counts, var_names=model.feature_names_in_)
    assert metrics(out)["nll_per_row"] == pytest.approx(-model.score(X, batch=sample), rel=1e-5)

    def written(command, *args):
        target = tmp_path / "t.npy"
        assert narrows(command, out, *args, "-o", target, "--quiet") == 0
        return np.load(target)

    assert np.array_equal(written("encode", path), model.transform(X))
    assert np.array_equal(written("score", path), -model.score_samples(X, batch=sample))
    assert np.array_equal(written("score", path, "--batch", "b"), -model.score_samples(X, batch="b"))
    codes = model.transform(X)
    np.save(tmp_path / "codes.npy", codes)
    assert np.array_equal(written("decode", out / "latent.h5ad"), model.inverse_transform(codes, batch=sample))
    as_b = written("decode", tmp_path / "codes.npy", "--batch", "b")
    assert np.array_equal(as_b, model.inverse_transform(codes, batch="b"))
    assert narrows("report", out) == 0
    assert narrows("fit", path, "--out", out, *COUNT) == 0, "already finished"


def test_squared_errors_are_of_rows_in_their_batches(tmp_path):
    in_batches(tmp_path / "x.h5ad")
    out = tmp_path / "o"
    assert narrows("fit", tmp_path / "x.h5ad", "--out", out, *SMALL, "--batch-key", "sample") == 0
    model = nw.load(out / "model.safetensors")
    X = nw.Normalizer.from_dict(model.metadata_["normalizer"]).transform(in_batches(tmp_path / "y.h5ad")[0])
    X = nw.data.ArraySource(X, var_names=model.feature_names_in_)
    errors = model.feature_errors(X, batch=np.array(["a", "b", "c"])[np.arange(90) % 3])
    assert metrics(out)["mse_per_feature"] == pytest.approx(errors.mean(), rel=1e-5)


def test_numbers_of_batches_in_a_file(tmp_path):
    counts, _ = in_batches(tmp_path / "x.h5ad", day=np.arange(90) % 2 + 7, old=np.arange(90) % 2 == 0)
    for key, known, one in (("day", [7, 8], "8"), ("old", ["False", "True"], "True")):
        out = tmp_path / key
        assert narrows("fit", tmp_path / "x.h5ad", "--out", out, *COUNT[:-1], key) == 0
        model = nw.load(out / "model.safetensors")
        assert model.batches_.tolist() == known
        assert narrows("score", out, tmp_path / "x.h5ad", "--batch", one, "-o", tmp_path / "t.npy", "--quiet") == 0
        X = nw.data.ArraySource(counts, var_names=model.feature_names_in_)
        assert np.array_equal(np.load(tmp_path / "t.npy"), -model.score_samples(X, batch=known[-1]))


def test_a_resume_is_of_the_same_column(tmp_path, line):
    in_batches(tmp_path / "x.h5ad", other=["one", "two"] * 45)
    out = tmp_path / "o"
    assert narrows("fit", tmp_path / "x.h5ad", "--out", out, *COUNT) == 0
    for args in (COUNT[:-2], [*COUNT[:-1], "other"]):
        assert narrows("fit", tmp_path / "x.h5ad", "--out", out, *args) == 5
        assert "batch-key" in line()


def test_batches_that_cannot_be_read_are_one_line(tmp_path, line):
    pandas = pytest.importorskip("pandas")
    holes = pandas.Categorical(["a"] * 41 + [None] * 49)
    counts, _ = in_batches(tmp_path / "x.h5ad", holes=holes, share=np.linspace(0, 1, 90))
    np.save(tmp_path / "x.npy", counts)
    out = tmp_path / "o"

    def refused(code, *args, word):
        assert narrows(*args) == code
        text = line()
        assert word in text, text

    fit = [tmp_path / "x.h5ad", "--out", out, *COUNT[:-1]]
    refused(3, "fit", *fit, "none", word="obs has no column 'none'; it has 'sample', 'holes', 'share'")
    refused(3, "fit", *fit, "holes", word="column 'holes' of obs has a missing value in row 41")
    refused(3, "fit", *fit, "share", word="obs['share']: 0.0 in row 0: labels must be all strings or all integers")
    refused(
        3,
        "fit",
        tmp_path / "x.npy",
        *fit[1:],
        "sample",
        word="x.npy: this file has no column 'sample' of obs; it has no obs",
    )
    refused(3, "fit", "pbmc4k", *fit[1:], "sample", word="this file has no column 'sample' of obs")
    refused(2, "fit", *fit, "sample", "--genes-by-cells", word="--genes-by-cells")
    conv = ["--out", out, "--estimator", "conv", "--batch-key", "sample"]
    refused(2, "fit", tmp_path / "x.h5ad", *conv, word="ConvAutoencoder cannot be conditioned on batches")
    refused(2, "fit", *fit, "sample", "--estimator", "autoencoder", "--set", "tied_weights=true", word="tied_weights")
    assert not out.exists()

    assert narrows("fit", *fit, "sample") == 0
    in_batches(tmp_path / "new.h5ad", sample=["a"] * 40 + ["d"] * 50)
    in_batches(tmp_path / "bare.h5ad")
    target = ["-o", tmp_path / "t.npy"]
    refused(3, "score", out, tmp_path / "new.h5ad", *target, word="obs['sample']: 'd' in row 40 is none of the batches")
    refused(3, "score", out, tmp_path / "x.h5ad", *target, "--batch", "d", word="--batch: 'd' is none of the batches")
    refused(3, "score", out, tmp_path / "x.h5ad", *target, "--batch-key", "none", word="obs has no column 'none'")
    refused(3, "score", out, tmp_path / "x.npy", *target, word="has no column 'sample' of obs")
    np.save(tmp_path / "z.npy", np.zeros((4, 3), np.float32))
    refused(3, "decode", out, tmp_path / "z.npy", *target, word="has no column 'sample' of obs")
    refused(2, "score", out, tmp_path / "x.h5ad", *target, "--batch", "a", "--batch-key", "sample", word="not allowed")
    refused(2, "encode", out, tmp_path / "x.h5ad", *target, "--batch", "a", word="--batch")
    assert not (tmp_path / "t.npy").exists()

    nw.CountAutoencoder(3, hidden_layer_sizes=8, max_iter=1).fit(counts, batch=["a", "b"] * 45).save(tmp_path / "own")
    refused(2, "score", tmp_path / "own", tmp_path / "x.npy", *target, word="give --batch-key NAME or --batch LABEL")
    nw.CountAutoencoder(3, hidden_layer_sizes=8, max_iter=1).fit(counts).save(tmp_path / "own")
    refused(
        2, "score", tmp_path / "own", tmp_path / "x.npy", *target, "--batch", "a", word="was fitted without batches"
    )


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


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("n_components=0 must be at least 1", "--components 0 must be at least 1"),
        ("hidden_layer_sizes=(3, 0) must be positive", "--hidden 3,0 must be positive"),
        ("choose one with layer=NAME: raw, scaled", "choose one with --layer NAME: raw, scaled"),
        ("drop genes_by_cells=True", "drop --genes-by-cells"),
        ("likelihood='zinb', resume='never'", "--loss zinb, --resume never"),
        ("n_threads", "--threads"),
        ("--set n_components: 'batch_size' in /data/batch_size/n_threads.npy", None),
        ("alpha=-1 must be in [0, inf); the loss and the layer are words", None),
    ],
)
def test_messages_name_flags(message: str, shown: str | None) -> None:
    assert in_flags(message) == (message if shown is None else shown)


@pytest.mark.parametrize(
    ("args", "meant", "page"),
    [
        ("fti x --out o", "fit", "narrows"),
        ("fit x --out o --componets 3", "--components", "narrows fit"),
        ("fit x --ouput o", "--out", "narrows fit"),
        ("fit x -out o", "--out", "narrows fit"),
        ("fit x --out o --batch_size=3", "--batch-size", "narrows fit"),
        ("sweep x --out o --Epochs 3", "--epochs", "narrows sweep"),
        ("encode m x --ouput z.npy", "--output", "narrows encode"),  # not: -o is missing
        ("bench --secnds 3", "--seconds", "narrows bench"),
        ("doctor --quite", "--quiet", "narrows doctor"),
        ("fit x --out o --loss poison", "poisson", "narrows fit"),
        ("fit x --out o --estimator variatonal", "variational", "narrows fit"),
        ("bench --cases tablar", "tabular", None),
        ("fit x --out o --set learning_rate_int=1", "learning_rate_init", None),
        ("fit x --out o --set batchsize=1", "--batch-size", None),
        ("fit x --out o --config c.toml", "components", None),
    ],
)
def test_a_misspelt_word_gets_the_right_one(args, meant, page, tmp_path, line, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text("componets = 3")
    assert narrows(*args.split()) == 2
    text = line()
    assert f"(did you mean {meant}?)" in text
    assert page is None or text.endswith(f"(see {page} --help)\n")


def test_words_like_no_other_get_no_advice_but_the_right_page(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert narrows("encode", "o", "-o", "z.npy", "out") == 3  # "o" is a model, not a flag
    assert "o: no such model file" in line()
    for args in (["doctor", "extra"], ["fit", "x", "--zzz"], ["report", "x", "-Z"]):
        assert narrows(*args) == 2
        text = line()
        assert "did you mean" not in text
        assert text.endswith(f"(see narrows {args[0]} --help)\n")
