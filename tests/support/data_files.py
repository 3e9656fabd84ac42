"""One small table written in every format that is read, for the tests of data."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from scipy.io import mmwrite

COUNTS = np.random.default_rng(0).poisson(0.6, (7, 5)).astype(np.float32)
COUNTS[2] = 0  # an empty row
CELLS = [f"cell{i}" for i in range(7)]
GENES = [f"gene{j}" for j in range(5)]


def shared(relative: str) -> Path:
    """A file of the development data, or skip."""
    root = Path(os.environ.get("NARROWS_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path = root / relative
    if not path.exists():
        pytest.skip(f"{path} is absent; NARROWS_DATA names the folder of development data")
    return path


def dense(block) -> np.ndarray:
    return block.toarray() if hasattr(block, "toarray") else np.asarray(block)


def write_csv(path: Path, matrix, rows=None, columns=None, corner: str | None = "", quote: str = "") -> Path:
    """`corner` None leaves the corner cell out, as R does."""
    separator = next((s for ending, s in ((".tsv", "\t"), (".tab", "\t"), (".txt", " ")) if ending in path.name), ",")
    lines = []
    if columns is not None:
        head = [quote + c + quote for c in columns]
        lines.append(separator.join(([corner] if rows is not None and corner is not None else []) + head))
    for i, row in enumerate(matrix):
        name = [quote + rows[i] + quote] if rows is not None else []
        lines.append(separator.join(name + [f"{v:g}" for v in row]))
    text = "\n".join(lines) + "\n"
    pack = {".gz": gzip, ".bz2": bz2, ".xz": lzma}.get(path.suffix)
    path.write_bytes(text.encode() if pack is None else pack.compress(text.encode()))
    return path


def write_anndata(path: Path, X, **kwargs) -> Path:
    anndata = pytest.importorskip("anndata")
    adata = anndata.AnnData(X, **kwargs)
    adata.obs_names, adata.var_names = CELLS[: X.shape[0]], GENES[: X.shape[1]]
    adata.layers["doubled"] = X * 2
    if path.suffix == ".zarr":
        pytest.importorskip("zarr")
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata on its choice of zarr format
            adata.write_zarr(path)
    else:
        adata.write_h5ad(path)
    return path


def write_10x_h5(path: Path, *, version: int = 3, kinds: list[str] | None = None) -> Path:
    h5py = pytest.importorskip("h5py")
    X = sparse.csr_array(COUNTS.astype(np.int32))
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        group["data"], group["indices"], group["indptr"] = X.data, X.indices.astype(np.int64), X.indptr
        group["shape"] = [5, 7]
        group["barcodes"] = np.array(CELLS, "S")
        if version == 3:
            features = group.create_group("features")
            features["id"] = np.array([f"ENSG{j}" for j in range(5)], "S")
            features["name"] = np.array(GENES, "S")
            features["feature_type"] = np.array(kinds or ["Gene Expression"] * 5, "S")
        else:
            group["genes"], group["gene_names"] = np.array(GENES, "S"), np.array(GENES, "S")
    return path


def write_10x_folder(
    path: Path, *, zipped: bool = True, kinds: list[str] | None = None, prefix: str = "", factor: int = 1
) -> Path:
    path.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    mmwrite(buffer, sparse.coo_array(factor * COUNTS.T.astype(np.int64)))
    kinds = kinds or ["Gene Expression"] * 5
    tables = {
        "matrix.mtx": buffer.getvalue(),
        "features.tsv" if zipped else "genes.tsv": "".join(
            f"ENSG{j}\t{g}" + (f"\t{kinds[j]}\n" if zipped else "\n") for j, g in enumerate(GENES)
        ).encode(),
        "barcodes.tsv": "".join(f"{c}\n" for c in CELLS).encode(),
    }
    for end, content in tables.items():
        name = prefix + end
        (path / f"{name}.gz").write_bytes(gzip.compress(content)) if zipped else (path / name).write_bytes(content)
    return path


def write_npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def csr_parts(matrix):
    X = sparse.csr_array(matrix)
    return {"data": X.data, "indices": X.indices.astype(np.uint16), "indptr": X.indptr, "shape": X.shape}


def write_parts(path, matrix, **beside):
    path.mkdir()
    for name, array in (csr_parts(matrix) | beside).items():
        np.save(path / f"{name}.npy", array)
    return path


def write_sparse_npz(path, matrix):
    sparse.save_npz(path, matrix)
    return path


def write_npy(path, matrix):
    np.save(path, matrix)
    return path


def write_mtx(path, matrix):
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as stream:
        mmwrite(stream, matrix)
    return path


def write_parquet(path, named, parts=0):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame(COUNTS, CELLS if named else None, GENES)
    if not parts:
        frame.to_parquet(path)
    else:
        path.mkdir()
        for k, rows in enumerate(np.array_split(np.arange(7), parts)):
            frame.iloc[rows].to_parquet(path / f"part.{k + 8}.parquet")  # part.10 comes last
    return path


def write_zipped_zarr(path):
    import shutil

    folder = write_anndata(path.with_name("zipped.zarr"), sparse.csr_matrix(COUNTS))
    return Path(shutil.make_archive(str(path.with_suffix("")), "zip", folder))


def write_h5mu(path):
    h5py = pytest.importorskip("h5py")
    part = write_anndata(path.with_name("part.h5ad"), sparse.csr_matrix(COUNTS))
    with h5py.File(path, "w") as file, h5py.File(part) as inner:
        inner.copy(inner["/"], file, "mod/rna")
    return path


def write_loom(path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=COUNTS.T, chunks=(2, 3))
        file["layers/doubled"] = 2 * COUNTS.T
        file["row_attrs/Gene"], file["col_attrs/CellID"] = np.array(GENES, "S"), np.array(CELLS, "S")
    return path


# name of the file: (writer, genes_by_cells, sparse, names of cells, names of genes)
FORMATS = {
    "a.npy": (lambda p: write_npy(p, COUNTS), False, False, None, None),
    "fortran.npy": (lambda p: write_npy(p, np.asfortranarray(COUNTS)), False, False, None, None),
    "int.npy": (lambda p: write_npy(p, COUNTS.astype(np.int64)), False, False, None, None),
    "big.npy": (lambda p: write_npy(p, COUNTS.astype(">f4")), False, False, None, None),
    "turned.npy": (lambda p: write_npy(p, COUNTS.T), True, False, None, None),
    "a.npz": (lambda p: write_npz(p, counts=COUNTS, genes=GENES, obs_names=CELLS), False, False, CELLS, GENES),
    "turned.npz": (lambda p: write_npz(p, X=COUNTS.T, var_names=GENES), True, False, None, GENES),
    "parts.npz": (lambda p: write_npz(p, **csr_parts(COUNTS)), False, True, None, None),
    "turned_parts.npz": (lambda p: write_npz(p, **csr_parts(COUNTS.T)), True, True, None, None),
    "csr.npz": (lambda p: write_sparse_npz(p, sparse.csr_matrix(COUNTS)), False, True, None, None),
    "csc.npz": (lambda p: write_sparse_npz(p, sparse.csc_array(COUNTS)), False, True, None, None),
    "coo.npz": (lambda p: write_sparse_npz(p, sparse.coo_array(COUNTS)), False, True, None, None),
    "named.csv": (lambda p: write_csv(p, COUNTS, CELLS, GENES), False, False, CELLS, GENES),
    "quoted.csv": (lambda p: write_csv(p, COUNTS, CELLS, GENES, quote='"'), False, False, CELLS, GENES),
    "like_r.csv": (lambda p: write_csv(p, COUNTS, CELLS, GENES, corner=None), False, False, CELLS, GENES),
    "corner.tsv": (lambda p: write_csv(p, COUNTS, CELLS, GENES, corner="id"), False, False, CELLS, GENES),
    "header.csv": (lambda p: write_csv(p, COUNTS, None, GENES), False, False, None, GENES),
    "rows.csv": (lambda p: write_csv(p, COUNTS, CELLS), False, False, CELLS, None),
    "bare.tsv.gz": (lambda p: write_csv(p, COUNTS), False, False, None, None),
    "turned.csv.gz": (lambda p: write_csv(p, COUNTS.T, GENES, CELLS), True, False, CELLS, GENES),
    "blanks.txt": (lambda p: write_csv(p, COUNTS, CELLS, GENES, corner=None, quote='"'), False, False, CELLS, GENES),
    "named.tab.bz2": (lambda p: write_csv(p, COUNTS, CELLS, GENES, corner="id"), False, False, CELLS, GENES),
    "NAMED.CSV.xz": (lambda p: write_csv(p, COUNTS, CELLS, GENES), False, False, CELLS, GENES),
    "a.mtx": (lambda p: write_mtx(p, sparse.coo_array(COUNTS)), False, True, None, None),
    "a.mtx.gz": (lambda p: write_mtx(p, sparse.coo_array(COUNTS)), False, True, None, None),
    "array.mtx": (lambda p: write_mtx(p, COUNTS), False, False, None, None),
    "turned.mtx": (lambda p: write_mtx(p, sparse.coo_array(COUNTS.T)), True, True, None, None),
    "named.parquet": (lambda p: write_parquet(p, True), False, False, CELLS, GENES),
    "a.parquet": (lambda p: write_parquet(p, False), False, False, None, GENES),
    "parts.parquet": (lambda p: write_parquet(p, True, parts=3), False, False, CELLS, GENES),
    "csr.h5ad": (lambda p: write_anndata(p, sparse.csr_matrix(COUNTS)), False, True, CELLS, GENES),
    "csc.h5ad": (lambda p: write_anndata(p, sparse.csc_matrix(COUNTS)), False, True, CELLS, GENES),
    "dense.h5ad": (lambda p: write_anndata(p, COUNTS), False, False, CELLS, GENES),
    "csr.zarr": (lambda p: write_anndata(p, sparse.csr_matrix(COUNTS)), False, True, CELLS, GENES),
    "csc.zarr": (lambda p: write_anndata(p, sparse.csc_matrix(COUNTS)), False, True, CELLS, GENES),
    "dense.zarr": (lambda p: write_anndata(p, COUNTS), False, False, CELLS, GENES),
    "csr.zarr.zip": (write_zipped_zarr, False, True, CELLS, GENES),
    "csr.h5mu": (write_h5mu, False, True, CELLS, GENES),
    "dense.loom": (write_loom, False, False, CELLS, GENES),
    "v3.h5": (write_10x_h5, False, True, CELLS, GENES),
    "v2.h5": (lambda p: write_10x_h5(p, version=2), False, True, CELLS, GENES),
    "parts": (lambda p: write_parts(p, COUNTS, genes=GENES, obs_names=CELLS), False, True, CELLS, GENES),
    "turned_parts": (lambda p: write_parts(p, COUNTS.T, genes=GENES), True, True, None, GENES),
    "folder10x": (write_10x_folder, False, True, CELLS, GENES),
    "old10x": (lambda p: write_10x_folder(p, zipped=False), False, True, CELLS, GENES),
    "geo10x": (lambda p: write_10x_folder(p, prefix="GSM123_S1_"), False, True, CELLS, GENES),
}
