"""What is given to models of counts: values that are none, empty cells and genes, CSR of any order and index type,
layouts and layers of files, offsets past 2**31; through the estimators, `narrows.scanpy` and the command line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import narrows
from estimator_cases import BACKEND, SMALL
from narrows import Autoencoder, CountAutoencoder, VariationalAutoencoder, cli
from narrows.backends import compile_plan
from narrows.cli import resources
from narrows.data import ArraySource
from narrows.data import open as open_data
from narrows.errors import DataError
from narrows.fitting.start import initial_state
from narrows.plan.lowering import lower
from narrows.plan.spec import Activation, LayerSpec, Loss
from networks import make_spec

CELLS, GENES = [f"cell{i}" for i in range(60)], [f"gene{j}" for j in range(30)]
BAD = (43, 4)
TINY: dict[str, Any] = SMALL | {"hidden_layer_sizes": 8, "max_iter": 2, "batch_size": 16}
FIT = ["--components", "3", "--hidden", "8", "--epochs", "2", "--batch-size", "16", "--threads", "1", "--quiet"]


def table(value: float | None = None) -> np.ndarray:
    """Counts of 60 cells and 30 genes; cell 5 and gene 7 have none. `value` is put at `BAD`."""
    rng = np.random.default_rng(0)
    X = rng.poisson(rng.gamma(2, 0.2, (60, 30))).astype(np.float32)
    X[5], X[:, 7] = 0, 0
    if value is not None:
        X[BAD] = value
    return X


def source(X: Any) -> ArraySource:
    return ArraySource(X, obs_names=CELLS, var_names=GENES, name="matrix")


@pytest.fixture(scope="module")
def models() -> tuple[CountAutoencoder, VariationalAutoencoder]:
    X = table()
    return CountAutoencoder(3, **TINY).fit(X), VariationalAutoencoder(3, loss="nb", **TINY).fit(X)


# --- values that are no counts ---------------------------------------------------------------------------------------

IN_X = r"X: {} in row 43, column 4 is not a count"
IN_Y = r"y: {} in row 43, column 4 is not a count"
IN_X_VAL, IN_Y_VAL = IN_X.replace("X", "X_val", 1), IN_Y.replace("y", "y_val", 1)
NAMED = r"matrix: {} in row 43 \(cell43\), column 4 \(gene4\) is not a count"
STREAM = {"block_bytes": 1500}
"""Less than the rows that are held out, and than half of the rows."""

FITS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "X": (IN_X, lambda good, bad: CountAutoencoder(3, **TINY).fit(bad)),
    "sparse X": (IN_X, lambda good, bad: CountAutoencoder(3, **TINY).fit(sp.csr_array(bad))),
    "frame": (
        r"X: {} in row 43, column 4 \(gene4\)",
        lambda good, bad: CountAutoencoder(3, **TINY).fit(pd.DataFrame(bad, columns=GENES)),
    ),
    "partial_fit": (IN_X, lambda good, bad: CountAutoencoder(3, **TINY).partial_fit(bad)),
    "poisson": (IN_X, lambda good, bad: CountAutoencoder(3, likelihood="poisson", **TINY).fit(bad)),
    "zinb": (IN_X, lambda good, bad: CountAutoencoder(3, likelihood="zinb", **TINY).fit(bad)),
    "autoencoder": (IN_X, lambda good, bad: Autoencoder(3, loss="nb", **TINY).fit(bad)),
    "variational": (IN_X, lambda good, bad: VariationalAutoencoder(3, loss="nb", **TINY).fit(bad)),
    "y": (IN_Y, lambda good, bad: CountAutoencoder(3, **TINY).fit(good, bad)),
    "frame y": (
        r"y: {} in row 43, column 4 \(gene4\)",
        lambda good, bad: CountAutoencoder(3, **TINY).fit(good, pd.DataFrame(bad, columns=GENES)),
    ),
    "y of other rows": (IN_Y, lambda good, bad: Autoencoder(3, loss="nb", **TINY).fit(good - 0.5, bad)),
    "X with y": (IN_X, lambda good, bad: CountAutoencoder(3, **TINY).fit(bad, good)),
    "X_val": (IN_X_VAL, lambda good, bad: CountAutoencoder(3, **TINY).fit(good, X_val=bad)),
    "X of a pair": (IN_X_VAL, lambda good, bad: CountAutoencoder(3, **TINY).fit(good, good, X_val=(bad, good))),
    "y of a pair": (IN_Y_VAL, lambda good, bad: CountAutoencoder(3, **TINY).fit(good, good, X_val=(good, bad))),
    "source": (NAMED, lambda good, bad: CountAutoencoder(3, **TINY).fit(source(bad))),
    "stream": (NAMED, lambda good, bad: CountAutoencoder(3, **TINY).fit(source(bad), **STREAM)),
    "stream y": (NAMED, lambda good, bad: CountAutoencoder(3, **TINY).fit(source(good), source(bad), **STREAM)),
    "unnamed stream y": (
        IN_Y,
        lambda good, bad: CountAutoencoder(3, **TINY).fit(ArraySource(good), ArraySource(bad), **STREAM),
    ),
    "stream X with y": (NAMED, lambda good, bad: CountAutoencoder(3, **TINY).fit(source(bad), source(good), **STREAM)),
    "stream X with array": (NAMED, lambda good, bad: CountAutoencoder(3, **TINY).fit(source(bad), good, **STREAM)),
    "stream X_val": (
        NAMED,
        lambda good, bad: CountAutoencoder(3, **TINY).fit(source(good), X_val=source(bad), **STREAM),
    ),
    "stream y_val": (
        NAMED,
        lambda good, bad: CountAutoencoder(3, **TINY).fit(
            source(good), source(good), X_val=(source(good), source(bad)), **STREAM
        ),
    ),
}


@pytest.mark.parametrize("value", [-1.0, 0.5])
@pytest.mark.parametrize("name", FITS)
def test_what_is_no_count_is_not_fitted(name: str, value: float) -> None:
    message, fit = FITS[name]
    with pytest.raises(DataError, match=message.format(f"{value:g}")) as error:
        fit(table(), table(value))
    assert "\n" not in str(error.value)


def test_with_counts_to_explain_other_rows_need_be_none() -> None:
    X = table(-0.5)
    model = Autoencoder(3, loss="nb", **TINY).fit(X, table())
    assert np.isfinite(model.score_samples(X, table())).all()
    assert np.isfinite(model.transform(X)).all()


@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_what_is_no_count_is_not_applied_to(value: float, models: Any) -> None:
    model, drawn = models
    good, bad = table(), table(value)
    for apply in (
        *(getattr(model, name) for name in ("transform", "reconstruct", "denoise", "score", "score_samples")),
        *(model.feature_errors, model.latent_sensitivity, drawn.transform, drawn.elbo, drawn.log_likelihood),
    ):
        with pytest.raises(DataError, match=IN_X.format(f"{value:g}")):
            apply(bad)
        with pytest.raises(DataError, match=NAMED.format(f"{value:g}")):
            apply(source(bad))
    for score in (model.score, model.feature_errors, lambda X, y: drawn.elbo(X, y=y)):
        with pytest.raises(DataError, match=IN_Y.format(f"{value:g}")):
            score(good, bad)
        with pytest.raises(DataError, match=IN_X.format(f"{value:g}")):
            score(bad, good)
        for pair in ((source(good), source(bad)), (source(bad), source(good))):
            with pytest.raises(DataError, match=NAMED.format(f"{value:g}")):
                score(*pair)


@pytest.mark.parametrize("loss", ["poisson", "nb", "zinb"])
@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_files_of_what_is_no_count(
    loss: str, value: float, tmp_path: Path, line: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by the row in the file, also where it is read in blocks."""
    anndata = pytest.importorskip("anndata")
    pytest.importorskip("matplotlib")
    model = tmp_path / "run"
    np.save(tmp_path / "good.npy", table())
    assert cli.main(["fit", str(tmp_path / "good.npy"), "--out", str(model), "--loss", loss, *FIT]) == 0
    named = anndata.AnnData(sp.csr_matrix(table(value)), {"n": np.zeros(60)}, {"n": np.zeros(30)})
    named.obs_names, named.var_names = CELLS, GENES
    named.write_h5ad(tmp_path / "bad.h5ad")
    sp.save_npz(tmp_path / "bad.npz", sp.csr_matrix(table(value)))
    capsys.readouterr()
    monkeypatch.setattr(resources, "APPLY_BYTES", 4 * 30 * 16)
    for name, where in (
        ("bad.h5ad", r"row 43 (cell43), column 4 (gene4) is not a count"),
        ("bad.npz", "row 43, column 4 is not a count"),
    ):
        path = str(tmp_path / name)
        for command in (
            ["fit", path, "--out", str(tmp_path / "new"), "--loss", loss, *FIT],
            ["encode", str(model), path, "-o", str(tmp_path / "z.npy"), "--quiet"],
            ["score", str(model), path, "-o", str(tmp_path / "s.csv"), "--quiet"],
        ):
            assert cli.main(command) == 3, command
            assert f"{path}: {value:g} in {where}" in line()
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "z.npy").exists()


# --- cells and genes without counts ----------------------------------------------------------------------------------


def test_empty_cells_and_genes_are_counted(tmp_path: Path) -> None:
    sp.save_npz(tmp_path / "x.npz", sp.csr_matrix(table()))
    out = tmp_path / "run"
    assert cli.main(["fit", str(tmp_path / "x.npz"), "--out", str(out), "--loss", "nb", *FIT]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["n_empty_rows"], metrics["n_empty_features"]) == (1, 1)
    logged = (out / "run.log").read_text()
    assert "1 empty row(s) sum to zero; 1 feature(s) have no counts" in logged
    assert "1 of 30 features to train on have no counts" in logged
    assert np.isfinite(np.load(out / "latent.npy")).all()
    assert cli.main(["score", str(out), str(tmp_path / "x.npz"), "-o", str(tmp_path / "s.npy"), "--quiet"]) == 0
    losses = np.load(tmp_path / "s.npy")
    assert losses[5] == 0
    assert (np.delete(losses, 5) > 0).all()


# --- CSR of any order and index type ---------------------------------------------------------------------------------


def parts(duplicates: bool, index: Any) -> tuple[Any, Any, Any]:
    """The table as data, indices and indptr in disorder; of duplicates, each is one molecule of a gene."""
    rng = np.random.default_rng(1)
    data, indices, indptr = [], [], [0]
    for row in table():
        stored = [(j, 1.0) for j in np.flatnonzero(row) for _ in range(int(row[j]))]
        if not duplicates:
            stored = [(j, row[j]) for j in np.flatnonzero(row)]
        order = rng.permutation(len(stored))
        indices += [stored[k][0] for k in order]
        data += [stored[k][1] for k in order]
        indptr.append(len(data))
    return np.array(data, np.float32), np.array(indices, index), np.array(indptr, index)


disorder = pytest.mark.parametrize("duplicates", [False, True])
indices = pytest.mark.parametrize("index", [np.int32, np.int64])


@disorder
@indices
@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csr_array])
def test_csr_in_disorder(kind: Any, index: Any, duplicates: bool, models: Any) -> None:
    model, _ = models
    ordered = sp.csr_array(table())
    X = kind((60, 30), dtype=np.float32)
    X.data, X.indices, X.indptr = parts(duplicates, index)
    before = [a.copy() for a in (X.data, X.indices, X.indptr)]
    codes = CountAutoencoder(3, **TINY).fit(ordered).transform(ordered)
    for fitted in (
        CountAutoencoder(3, **TINY).fit(X),
        CountAutoencoder(3, **TINY).fit(ArraySource(X)),
        CountAutoencoder(3, **TINY).fit(ordered, X),
        CountAutoencoder(3, **TINY).fit(X, ordered),
    ):
        np.testing.assert_array_equal(fitted.transform(ordered), codes)
    np.testing.assert_array_equal(model.transform(X), model.transform(ordered))
    np.testing.assert_array_equal(model.score_samples(ordered, X), model.score_samples(ordered))
    streamed = [CountAutoencoder(3, **TINY).fit(ArraySource(M), **STREAM).transform(ordered) for M in (X, ordered)]
    np.testing.assert_array_equal(*streamed)
    for array, was in zip((X.data, X.indices, X.indptr), before, strict=True):
        np.testing.assert_array_equal(array, was)
        assert array.dtype == was.dtype


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Those of the command for the table in order."""
    folder = tmp_path_factory.mktemp("ordered")
    sp.save_npz(folder / "x.npz", sp.csr_matrix(table()))
    assert cli.main(["fit", str(folder / "x.npz"), "--out", str(folder / "o"), "--loss", "nb", *FIT]) == 0
    return np.load(folder / "o" / "latent.npy")


@disorder
@indices
@pytest.mark.parametrize("container", ["npz", "h5ad"])
def test_files_in_disorder(container: str, index: Any, duplicates: bool, tmp_path: Path, codes: np.ndarray) -> None:
    path = tmp_path / f"x.{container}"
    named = dict(zip(("data", "indices", "indptr"), parts(duplicates, index), strict=True))
    if container == "npz":
        np.savez(path, format=b"csr", shape=(60, 30), **named)
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            group = file.create_group("X")
            group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [60, 30]})
            for key, value in named.items():
                group[key] = value
    assert fitted_codes(path, tmp_path / "o") == pytest.approx(codes, rel=0, abs=0)


def fitted_codes(path: Path, out: Path, *args: str) -> np.ndarray:
    assert cli.main(["fit", str(path), "--out", str(out), "--loss", "nb", *args, *FIT]) == 0
    with open_data(next(out.glob("latent.[hn]*"))) as found:
        return np.asarray(found.read_rows(slice(None)))


@pytest.mark.parametrize("layout", [sp.csc_matrix, np.asarray, lambda X: X.astype(np.int64)])
def test_layouts_and_layers_of_anndata(layout: Any, tmp_path: Path, codes: np.ndarray, line: Any, capsys: Any) -> None:
    anndata = pytest.importorskip("anndata")
    given = anndata.AnnData(layout(table()))
    given.layers["counts"], given.layers["half"] = layout(table()), table() / 2
    path = tmp_path / "x.h5ad"
    given.write_h5ad(path)
    np.testing.assert_array_equal(fitted_codes(path, tmp_path / "a"), codes)
    np.testing.assert_array_equal(fitted_codes(path, tmp_path / "b", "--layer", "counts"), codes)
    capsys.readouterr()
    absent = ["fit", str(path), "--out", str(tmp_path / "c"), "--loss", "nb", "--layer", "raw_counts"]
    assert cli.main(absent) == 3
    assert f"{path}: no layer 'raw_counts'; the file has 'counts', 'half'" in line()
    assert cli.main([*absent[:-1], "half"]) == 3
    assert line().endswith(
        "is not a count; this loss needs raw counts (whole numbers from 0); "
        "if a layer holds them, choose it with --layer NAME\n"
    )
    with pytest.raises(KeyError, match=r"adata\.layers has no 'raw_counts'; it has counts, half"):
        narrows.scanpy.autoencoder(given, estimator="count", layer="raw_counts")
    with pytest.raises(DataError, match=r"layers\['half'\]: 0.5 in row \d+, column \d+ \(\d+\) is not a count"):
        narrows.scanpy.autoencoder(given, estimator="count", layer="half")


@pytest.mark.parametrize("name", ["x.h5ad", "x.npz", "x.mtx"])
def test_truncated_files(name: str, tmp_path: Path, line: Any, capsys: Any) -> None:
    path = tmp_path / name
    if name == "x.h5ad":
        pytest.importorskip("anndata").AnnData(sp.csr_matrix(table())).write_h5ad(path)
    elif name == "x.npz":
        sp.save_npz(path, sp.csr_matrix(table()))
    else:
        from scipy.io import mmwrite

        mmwrite(path, sp.coo_array(table()))
    content = path.read_bytes()
    capsys.readouterr()
    for part in (0, 0.3, 0.9):
        path.write_bytes(content[: int(part * len(content))])
        assert cli.main(["fit", str(path), "--out", str(tmp_path / "o"), "--loss", "nb", *FIT]) == 3
        assert str(path) in line()
    assert not (tmp_path / "o").exists()


# --- offsets past 2**31 ----------------------------------------------------------------------------------------------

PAST = 2**31 + 7
"""Values of a first row, which nobody reads."""


def far() -> sp.csr_array:
    """A matrix whose rows but the first are the table, past 2**31; of the first, no memory is taken."""
    tail = sp.csr_array(table())
    try:
        data, columns = np.zeros(PAST + tail.nnz, np.float32), np.zeros(PAST + tail.nnz, np.int64)
    except MemoryError:
        pytest.skip("this machine does not lend 26 GB of addresses")
    data[PAST:], columns[PAST:] = tail.data, tail.indices
    X = sp.csr_array((61, 30), dtype=np.float32)
    X.data, X.indices, X.indptr = data, columns, np.r_[0, PAST + tail.indptr.astype(np.int64)]
    return X


def test_steps_on_rows_past_2_to_the_31() -> None:
    layers = LayerSpec(30, 4, Activation.LINEAR), LayerSpec(4, 30, Activation.SOFTMAX)
    spec = make_spec(layers, 1, loss=Loss.NB, log_normalize=True)
    found = []
    for X, rows in ((far(), np.arange(1, 17)), (sp.csr_array(table()), np.arange(16))):
        program = compile_plan(lower(spec, 16), BACKEND, precision="float32", n_threads=2)
        program.load(initial_state(spec, 0, np.float32))
        program.bind(X)
        terms, gradient = program.gradient(rows)
        found.append({"terms": terms, **gradient})
    for name, value in found[1].items():
        np.testing.assert_array_equal(found[0][name], value, err_msg=name)
    assert found[0]["terms"][0] > 0


def test_rows_of_an_array_past_2_to_the_31() -> None:
    rows = ArraySource(far())
    assert rows.nnz == PAST + np.count_nonzero(table())
    np.testing.assert_array_equal(rows.read_rows(slice(1, None)).toarray(), table())
    np.testing.assert_array_equal(rows.read_rows([44, 6, 44]).toarray(), table()[[43, 5, 43]])


def test_rows_of_a_file_past_2_to_the_31(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    tail = sp.csr_array(table())
    path = tmp_path / "x.h5ad"
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [61, 30]})
        for name, values in (("data", tail.data), ("indices", tail.indices)):
            stored = group.create_dataset(name, (PAST + tail.nnz,), values.dtype, chunks=(1 << 16,))
            stored[PAST:] = values  # chunks that nobody writes take no room
        group["indptr"] = np.r_[0, PAST + tail.indptr.astype(np.int64)]
    with open_data(path) as rows:
        assert rows.nnz == PAST + tail.nnz
        np.testing.assert_array_equal(rows.read_rows(slice(1, None)).toarray(), table())
        np.testing.assert_array_equal(rows.read_rows([44, 6, 44]).toarray(), table()[[43, 5, 43]])


def test_warnings_say_how_many_are_empty(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "narrows"):
        CountAutoencoder(3, **TINY | {"early_stopping": False}).fit(source(table()), **STREAM)
    messages = [record.message for record in caplog.records]
    assert messages == ["1 of 60 rows to train on have no counts", "1 of 30 features to train on have no counts"]
