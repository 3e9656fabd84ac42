"""Random AnnData objects, in files of every age: what is read equals what anndata reads."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from anndata_files import anndata, h5py, pandas, same, to_06, to_07

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = np.array(["a", "B", "ü", "x y", "", "nan", "T cell", "7", "0.5", "long" * 9])
PLAIN = np.array(["a", "B", "T cell", "7", "nan"])
TYPES = ("f4", "f8", "i1", "i4", "i8", "u2", "u4", "?")


def matrix(rng, shape):
    X = rng.poisson(0.7, shape) * rng.integers(1, 40)
    form = rng.choice(["dense", "csr", "csc"])
    X = X.astype(rng.choice([t for t in TYPES if form == "dense" or t != "?"]))
    return X if form == "dense" else getattr(sparse, f"{form}_matrix")(X)


def column(rng, n, old):
    words = PLAIN if old else WORDS
    kinds = ["number", "float", "bool", "text", "category", "category", *(() if old else ("nullable", "flag"))]
    match rng.choice(kinds):
        case "number":
            return rng.integers(0, 100, n).astype(rng.choice(TYPES[2:-1]))
        case "float":
            values = rng.normal(size=n).astype(rng.choice(TYPES[:2]))
            values[rng.random(n) < 0.2] = np.nan
            return values
        case "bool":
            return rng.random(n) < 0.5
        case "text":
            return rng.choice(words, n).astype(object)
        case "nullable":
            return pandas.arrays.IntegerArray(
                rng.integers(-9, 9, n).astype(rng.choice(TYPES[2:-1])), rng.random(n) < 0.3
            )
        case "flag":
            return pandas.arrays.BooleanArray(rng.random(n) < 0.5, rng.random(n) < 0.3)
    pool = [rng.permutation(words), rng.permutation(20), rng.permutation(20) / 4][rng.integers(3)]
    known = pool[: rng.integers(0, len(pool) + 1)]
    codes = rng.integers(-1, len(known), n) if len(known) else np.full(n, -1)
    return pandas.Categorical.from_codes(codes, known, ordered=not old and rng.random() < 0.3)


def draw(rng, old):
    """An object, and the layers to compare."""
    n, d = rng.integers(2, 12), rng.integers(2, 9)
    names = rng.permutation(["kind", "n", "a b", "sample", "ß", "index2", "X"])[: rng.integers(0, 6)]
    index = pandas.Index([f"{rng.choice(PLAIN)}{i}" for i in range(n)], dtype=object)
    if not old and rng.random() < 0.3:
        index.name = "cell"
    obs = pandas.DataFrame({str(name): column(rng, n, old) for name in names}, index=index)
    adata = anndata.AnnData(matrix(rng, (n, d)), obs=obs)
    adata.var_names = [f"g{j}" for j in range(d)]
    layers = [None]
    for name in ("counts", "log 1p")[: rng.integers(0, 3)]:
        adata.layers[name] = matrix(rng, (n, d))
        layers.append(name)
    if rng.random() < 0.5:
        more = anndata.AnnData(matrix(rng, (n, d + 3)), obs=obs)
        more.var_names = [f"r{j}" for j in range(d + 3)]
        adata.raw = more
        layers.append("raw")
    return adata, layers


def compare(seeds, folder):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        age = ["new", "new", "zarr2", "zarr3", "0.7", "0.6"][seed % 6]
        adata, layers = draw(rng, age == "0.6")
        path = folder / f"{seed}.{'zarr' if 'zarr' in age else 'h5ad'}"
        try:
            if "zarr" in age:
                import zarr

                with anndata.settings.override(zarr_write_format=int(age[-1])):
                    adata.write_zarr(path)
                assert zarr.open_group(str(path), mode="r").metadata.zarr_format == int(age[-1])
            else:
                adata.write_h5ad(path, compression=rng.choice(["gzip", None]))
                if age != "new":
                    with h5py.File(path, "r+") as file:
                        to_07(file) if age == "0.7" else to_06(file, vlen=rng.random() < 0.5)
            same(path, layers)
        except BaseException:
            print(f"seed {seed}, {age}: {adata.obs.dtypes.to_dict()}, layers {layers}")
            raise


def test_random_objects(tmp_path):
    compare(range(12), tmp_path)


@pytest.mark.slow
def test_many_random_objects(tmp_path):
    compare(range(12, 1500), tmp_path)
