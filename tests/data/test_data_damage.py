"""Files that are missing, unknown, damaged, hostile or inconsistent: one line that names them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

import narrows.data as nd
from data_files import COUNTS, FORMATS, csr_parts, write_10x_folder, write_npy, write_npz, write_parts
from narrows.errors import DataError


def test_missing_and_unknown(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.csv: no such file or folder$"):
        nd.open(tmp_path / "absent.csv")
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder; bundled data sets: pbmc4k, digits"):
        nd.open("absent")
    for name in ("a.xyz", "noext", "a.npy.gz", "a.tar.gz"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(DataError, match=r"unknown extension .*; known: \.h5ad, \.zarr"):
            nd.open(tmp_path / name)
    with pytest.raises(DataError, match=r"unknown folder; known: \.zarr, 10x folder \(matrix\.mtx"):
        nd.open(tmp_path)
    (tmp_path / "empty.zarr").mkdir()
    pytest.importorskip("zarr")
    with pytest.raises(DataError, match=r"empty\.zarr"):
        nd.open(tmp_path / "empty.zarr")


DAMAGED = [name for name in FORMATS if "." in name and not name.endswith((".zarr", ".csv", ".txt", "parts.parquet"))]


@pytest.mark.parametrize("name", DAMAGED)
def test_truncated_files_are_data_errors(files, tmp_path, name):
    content = files(name).read_bytes()
    path = tmp_path / name
    for fraction in (0.0, 0.1, 0.5, 0.9, 1.0):
        length = min(int(fraction * len(content)), len(content) - (16 if len(content) > 1000 else 4))
        path.write_bytes(content[:length])
        with pytest.raises(DataError) as caught, nd.open(path) as source:
            source.read_rows(slice(None))
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_damaged_folders_of_parts(tmp_path):
    shapes = iter(range(100))

    def refused(match, **changed):
        folder = write_parts(tmp_path / f"{next(shapes)}", COUNTS)
        for name, content in changed.items():
            file = folder / f"{name}.npy"
            file.unlink()
            if isinstance(content, bytes):
                file.write_bytes(content)
            elif content is not None:
                np.save(file, content)
        with pytest.raises(DataError, match=match) as caught, nd.open(folder) as source:
            source.read_rows(slice(None))
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)

    parts = csr_parts(COUNTS)
    refused("indices.npy: missing", indices=None)
    refused("damaged", data=b"")
    refused("header says", data=(write_npy(tmp_path / "x.npy", parts["data"]).read_bytes())[:-4])
    refused("a 1-D array is expected", data=parts["data"][:, None])
    refused("two numbers are expected, rows and columns", shape=np.array([7]))
    refused("indptr has 8 entries; 9 rows need 10", shape=np.array([9, 5]))
    refused("values but", indices=parts["indices"][:-1])
    refused("outside 0..1", shape=np.array([7, 2]))
    with pytest.raises(DataError, match="no layers"):
        nd.open(write_parts(tmp_path / "layered", COUNTS), layer="x")


@pytest.mark.parametrize("name", [n for n in DAMAGED if n.endswith((".npy", ".npz", ".gz", ".mtx"))])
def test_flipped_bytes_never_escape_as_other_errors(files, tmp_path, name):
    content = bytearray(files(name).read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / name
    for at in rng.integers(0, len(content), 60):
        damaged = content.copy()
        damaged[at] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            with nd.open(path) as source:
                source.read_rows(slice(None))
        except (DataError, MemoryError):
            pass


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_objects_are_never_unpickled(tmp_path, kind):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path = tmp_path / f"a.{kind}"
    array = np.empty((2, 2), object)
    array[0, 0] = Bomb()
    np.save(path, array, allow_pickle=True) if kind == "npy" else np.savez(path, X=array)
    with pytest.raises(DataError, match="could run code"):
        nd.open(path)
    import pickle

    path.write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(DataError):
        nd.open(path)


def test_absurd_shapes_allocate_nothing(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**20)})
    (tmp_path / "a.npy").write_bytes(header.getvalue() + b"\0" * 64)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("X.npy", header.getvalue() + b"\0" * 64)
    with pytest.raises(DataError, match="192 bytes; its header says"):
        nd.open(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"X\.npy has 192 bytes, its shape"):
        nd.open(tmp_path / "a.npz")


def test_one_dimensional_and_empty_files(tmp_path):
    with pytest.raises(DataError, match=r"shape \(3,\), 1 dimension.*array.reshape\(-1, 1\)"):
        nd.open(write_npy(tmp_path / "a.npy", np.zeros(3)))
    with pytest.raises(DataError, match="empty"):
        nd.open(write_npy(tmp_path / "b.npy", np.zeros((0, 3))))
    with pytest.raises(DataError, match="empty"):
        nd.open(write_npz(tmp_path / "c.npz", **csr_parts(np.zeros((3, 0)))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": [0, 9, 1]}, "row 1 has column index 9, outside 0..2"),
        ({"indices": [0, -1, 1]}, "row 1 has column index -1"),
        ({"indptr": [0, 2, 1, 3]}, "indptr decreases at row 1"),
        ({"indptr": [0, 1, 2, 4]}, "indptr runs from 0 to 4, but 3 values are stored"),
        ({"indptr": [1, 1, 2, 3]}, "indptr runs from 1 to 3"),
        ({"indptr": [0, 3]}, "indptr has 2 entries; 3 rows need 4"),
        ({"data": [1.0, 2.0]}, "2 values but 3 column indices"),
        ({"indices": [0.0, 1.0, 2.0]}, "must be integers"),
    ],
)
@pytest.mark.parametrize("container", ["npz", "h5ad"])
def test_inconsistent_csr_parts_are_named(tmp_path, change, message, container):
    parts = {"data": [1.0, 2.0, 3.0], "indices": [0, 1, 2], "indptr": [0, 1, 2, 3]} | change
    path = tmp_path / f"a.{container}"
    if container == "npz":
        write_npz(path, shape=[3, 3], **parts)
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            group = file.create_group("X")
            group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", [3, 3]
            for key, value in parts.items():
                group[key] = value
    with pytest.raises(DataError, match=message), nd.open(path) as source:
        source.read_rows(slice(None))


def test_10x_folder_that_does_not_fit_together(tmp_path):
    path = write_10x_folder(tmp_path / "a", zipped=False)
    (path / "barcodes.tsv").write_text("x\ny\n")
    with pytest.raises(DataError, match="there are 5 features and 2 barcodes"):
        nd.open(path)
    (path / "barcodes.tsv").unlink()
    with pytest.raises(DataError, match=r"needs barcodes\.tsv .* beside matrix\.mtx"):
        nd.open(path)


def test_obs_that_is_absent_or_damaged(tmp_path):
    anndata, h5py = pytest.importorskip("anndata"), pytest.importorskip("h5py")
    adata = anndata.AnnData(np.ones((4, 2), np.float32))
    adata.obs["kind"] = np.array(["a", "b", "a", "b"])
    adata.obs["kind"] = adata.obs["kind"].astype("category")
    adata.write_h5ad(tmp_path / "x.h5ad")
    for change, message in (
        (lambda obs: obs["kind/codes"].__setitem__(2, 99), "obs/kind: damaged: row 2 has category 99 of 2"),
        (lambda obs: obs["kind/codes"].__setitem__(1, -2), "obs/kind: damaged: row 1 has category -2 of 2"),
        (lambda obs: obs["kind"].__delitem__("codes"), "damaged: obs/kind/codes is missing"),
        (lambda obs: obs["kind"].__delitem__("categories"), "obs/kind is stored as categorical, not as a column"),
        (lambda obs: obs.parent.__delitem__("obs"), "it has no obs"),
    ):
        (tmp_path / "y.h5ad").write_bytes((tmp_path / "x.h5ad").read_bytes())
        with h5py.File(tmp_path / "y.h5ad", "r+") as file:
            change(file["obs"])
        with pytest.raises(DataError, match=rf"y\.h5ad.*{message}"):
            nd.read_obs(tmp_path / "y.h5ad", "kind")
    (tmp_path / "y.h5ad").write_bytes((tmp_path / "x.h5ad").read_bytes()[:900])
    with pytest.raises(DataError, match=r"y\.h5ad"):
        nd.read_obs(tmp_path / "y.h5ad", "kind")
    with pytest.raises(FileNotFoundError, match="no such file"):
        nd.read_obs(tmp_path / "z.h5ad", "kind")
    np.save(tmp_path / "x.npy", np.ones((2, 2)))
    for path in (tmp_path / "x.npy", tmp_path, "pbmc4k"):
        with pytest.raises(DataError, match="this format has no column 'kind' of obs"):
            nd.read_obs(path, "kind")


def test_hdf5_that_is_neither_anndata_nor_10x(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["other"] = np.zeros((2, 2))
    with pytest.raises(DataError, match="neither an AnnData file"):
        nd.open(tmp_path / "a.h5")
