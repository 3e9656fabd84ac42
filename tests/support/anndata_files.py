"""AnnData files of every age, written with h5py, and the comparison with anndata's own reading."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

import narrows.data as nd
from data_files import dense

anndata, h5py, pandas = (pytest.importorskip(name) for name in ("anndata", "h5py", "pandas"))


def text(values) -> np.ndarray:
    return np.array(list(values), dtype=h5py.string_dtype())


def same(path, layers=(None,)):
    """Compare names, columns and matrices with those that anndata reads; returns anndata's object."""
    theirs = anndata.read_zarr(path) if ".zarr" in path.name else anndata.read_h5ad(path)
    for layer in layers:
        expected, var = theirs.X if layer is None else theirs.layers.get(layer), theirs.var_names
        if layer == "raw" and "raw" not in theirs.layers:
            expected, var = theirs.raw.X, theirs.raw.var_names
        with nd.open(path, layer=layer) as ours:
            assert ours.is_sparse is sparse.issparse(expected)
            for rows in (slice(None), slice(1, 2), [ours.shape[0] - 1, 0]):
                found = dense(ours.read_rows(rows))
                np.testing.assert_array_equal(found, dense(expected[rows]).astype(found.dtype))
            assert ours.obs_names.tolist() == list(theirs.obs_names)
            assert ours.var_names.tolist() == list(var)
            assert list(ours.obs) == list(theirs.obs)
            for name in theirs.obs:
                same_column(ours.obs[name], theirs.obs[name])
    return theirs


def same_column(column, expected):
    name = expected.name
    assert column.missing.tolist() == expected.isna().tolist(), name
    known = ~column.missing
    values = [v.decode() if isinstance(v, bytes) else v for v in expected[known].tolist()]
    assert column.decoded()[known].tolist() == values, name
    assert isinstance(expected.dtype, pandas.CategoricalDtype) is (column.categories is not None), name
    if column.categories is not None:
        assert list(expected.cat.categories) == column.categories.tolist(), name
        assert expected.cat.ordered == column.ordered, name
    elif column.values.dtype.kind != "U":
        assert column.values.dtype.name == expected.dtype.name.lower().replace("boolean", "bool"), name
        assert isinstance(expected.dtype, np.dtype) is (column.mask is None), name


def to_07(file) -> None:
    """Rewrite the data frames of a file as anndata 0.7 did: version 0.1.0, codes refer to `__categories`."""
    for axis in ("obs", "var", "raw/var"):
        if axis not in file:
            continue
        frame = file[axis]
        frame.attrs["encoding-version"] = "0.1.0"
        for name in [n for n in frame if isinstance(frame[n], h5py.Group) and "codes" in frame[n]]:
            codes, categories = frame[name]["codes"][:], frame[name]["categories"][:]
            ordered = frame[name].attrs["ordered"]
            del frame[name]
            frame[f"__categories/{name}"] = text(categories) if categories.dtype == object else categories
            frame[f"__categories/{name}"].attrs["ordered"] = ordered
            frame[name] = codes
            frame[name].attrs["categories"] = frame[f"__categories/{name}"].ref


def to_06(file, *, vlen=True) -> None:
    """Rewrite a file as anndata 0.6 did: tables, categories in `uns`, `raw.X`, attributes of h5sparse."""
    for axis in ("obs", "var", "raw/var"):
        if axis not in file:
            continue
        frame, columns = file[axis], {}
        for name in [frame.attrs["_index"], *frame.attrs["column-order"]]:
            node = frame[name]
            if isinstance(node, h5py.Group):
                categories = node["categories"][:]
                if axis != "raw/var":
                    file[f"uns/{name}_categories"] = text(categories) if categories.dtype == object else categories
                node = node["codes"]
            columns["index" if name == "_index" else name] = node[:]
        rows = len(next(iter(columns.values())))
        kinds = [
            (n, h5py.string_dtype() if vlen else "S9") if v.dtype == object else (n, v.dtype)
            for n, v in columns.items()
        ]
        table = np.empty(rows, np.dtype(kinds))
        for name, values in columns.items():
            table[name] = values
        del file[axis]
        file[axis] = table
    for name in ("X", "raw/X", *(f"layers/{n}" for n in file.get("layers", ()))):
        if name in file and isinstance(file[name], h5py.Group):
            attrs = file[name].attrs
            attrs["h5sparse_format"], attrs["h5sparse_shape"] = attrs["encoding-type"][:3], attrs["shape"]
            for old in ("encoding-type", "encoding-version", "shape"):
                del attrs[old]
    if "raw" in file:
        for part in ("X", "var"):
            file.move(f"raw/{part}", f"raw.{part}")
        del file["raw"]
    for old in ("encoding-type", "encoding-version"):
        del file.attrs[old]
