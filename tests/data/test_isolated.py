"""Files read in a child process: the same data, and one line if the child hangs, crashes or lies."""

from __future__ import annotations

import os

import numpy as np
import pytest

import narrows.data as nd
from data_files import CELLS, COUNTS, GENES, dense, write_anndata, write_csv
from narrows._process import own_signals
from narrows.data import isolated
from narrows.errors import DataError

anndata, h5py, pandas = (pytest.importorskip(name) for name in ("anndata", "h5py", "pandas"))
pytestmark = pytest.mark.filterwarnings("ignore")

BEFORE = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from narrows.data.child import serve; "


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_child_gives_the_same_data(tmp_path, monkeypatch, caplog):
    from scipy import sparse

    obs = pandas.DataFrame(
        {"kind": pandas.Categorical(list("abababa"), ordered=True), "n": pandas.array([1, None] * 3 + [2], "Int32")}
    )
    np.savez(tmp_path / "bytes.npz", X=COUNTS.astype(np.uint8), obs_names=CELLS, var_names=GENES)
    monkeypatch.setattr(isolated, "PIECE_BYTES", 100)  # several questions for a block
    for path, options in (
        (write_anndata(tmp_path / "csc.h5ad", sparse.csc_matrix(COUNTS), obs=obs), {"layer": "doubled"}),
        (write_anndata(tmp_path / "dense.h5ad", COUNTS, obs=obs), {}),
        (write_csv(tmp_path / "a.csv", COUNTS, CELLS, GENES), {}),
        (tmp_path / "bytes.npz", {}),
    ):
        caplog.set_level("INFO", logger="narrows")
        with nd.open(path, **options) as plain, nd.open(path, untrusted=True, **options) as source:
            child = source._child._process.pid
            for fact in ("shape", "dtype", "stored_dtype", "nnz", "holds_floats", "roles", "image_shape"):
                assert getattr(source, fact) == getattr(plain, fact)
            assert source.obs_names.tolist() == CELLS
            assert source.var_names.tolist() == GENES
            assert source.sha256() == plain.sha256()
            for number in own_signals():  # they are for the parent
                os.kill(child, number)
            for rows in (slice(None), slice(2, 2), [5, 0, 5], slice(6, None)):
                block = source.read_rows(rows)
                assert block.dtype == plain.read_rows(rows).dtype
                np.testing.assert_array_equal(dense(block), dense(plain.read_rows(rows)))
            assert list(source.obs) == list(plain.obs)
            for name in plain.obs:
                for part in ("values", "mask", "categories", "ordered"):
                    np.testing.assert_array_equal(getattr(source.obs[name], part), getattr(plain.obs[name], part))
        assert not alive(child)
        for name in source.obs:
            with pytest.raises(ValueError, match="this source is closed"):
                source.obs[name]
    assert caplog.text.count("converted to CSR in memory") == 2  # what the child logs is logged
    assert nd.read_obs(tmp_path / "dense.h5ad", "kind", untrusted=True).tolist() == list("abababa")
    for call, message in (
        (lambda: nd.read_obs(tmp_path / "dense.h5ad", "kin", untrusted=True), "no column 'kin'; .* mean 'kind'"),
        (lambda: nd.read_obs(tmp_path / "dense.h5ad", "n", untrusted=True), "missing value in row 1"),
        (lambda: nd.open(tmp_path / "dense.h5ad", layer="double", untrusted=True), "no layer 'double'.*'doubled'"),
    ):
        with pytest.raises(DataError, match=message):
            call()


def test_opening_a_large_file_or_folder_may_take_longer(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(isolated._Child, "ask", lambda self, seconds, **request: given.append(seconds) or 1 / 0)
    monkeypatch.setattr(isolated, "BYTES_PER_SECOND", 1.0)
    for name, array in (("data", np.ones(3)), ("indices", np.arange(3)), ("indptr", [0, 3]), ("shape", [1, 3])):
        np.save(tmp_path / f"{name}.npy", array)
    for path in (tmp_path, tmp_path / "data.npy"):
        with pytest.raises(DataError, match="division by zero"):
            nd.open(path, untrusted=True)
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert given == [isolated.SECONDS + sum(sizes), isolated.SECONDS + (tmp_path / "data.npy").stat().st_size]


def test_a_child_that_hangs_crashes_or_lies_is_one_line(tmp_path, monkeypatch):
    path = write_anndata(tmp_path / "a.h5ad", COUNTS)
    opening = "import narrows.data.readers as m; m.open = "
    reading = "import narrows.data.hdf as m; m.DenseDiskSource._slice = "
    sending = "import narrows.data.child as m, numpy as np; send = m._send; m._send = lambda out, answer, arrays: "
    for code, message in (
        (f"{reading} lambda *a, **k: __import__('time').sleep(60)", "did not answer within 2 seconds"),
        (f"{reading} lambda *a, **k: __import__('os').kill(__import__('os').getpid(), 11)", "crashed .SIGSEGV"),
        (f"{opening} lambda *a, **k: __import__('os')._exit(3)", "crashed .exit code 3"),
        (f"{reading} lambda *a, **k: print('x', flush=True) or 1 / 0", "division by zero"),
        (f"{sending} send(out, answer, [np.ones((2, 2))] * len(arrays))", r"obs_names has shape \(2,\)"),
        (f"{sending} send(out, answer, arrays if 'parts' in answer else [np.ones((2, 2))])", "came as float64 .2, 2"),
        (f"{sending} send(out, [], arrays)", "gave an answer that makes no sense"),
    ):
        monkeypatch.setattr(isolated, "_CHILD", f"{BEFORE}{code}; serve()")
        monkeypatch.setattr(isolated, "SECONDS", 2.0 if "sleep" in code else 60.0)
        with pytest.raises(DataError, match=message) as caught, nd.open(path, untrusted=True) as source:
            source.read_rows(slice(None))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
