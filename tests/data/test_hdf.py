"""HDF5 and zarr: layouts of every age as anndata reads them, links that leave a file, and messages."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

import narrows.data as nd
from anndata_files import same, text
from data_files import CELLS, COUNTS, GENES, dense, write_10x_folder, write_10x_h5, write_anndata, write_parts
from narrows.errors import DataError

anndata, h5py, pandas = (pytest.importorskip(name) for name in ("anndata", "h5py", "pandas"))
pytestmark = pytest.mark.filterwarnings("ignore")


def read_all(path, **options):
    with nd.open(path, **options) as source:
        return dense(source.read_rows(slice(None)))


def digest(path):
    with nd.open(path, follow_links=True) as source:
        return source.sha256()


def write_07(root):
    """The layout of anndata 0.7: data frames of version 0.1.0, whose codes refer to `__categories`."""
    root["X"] = COUNTS
    for axis, names in (("obs", CELLS), ("var", GENES)):
        frame = root.create_group(axis)
        frame.attrs["encoding-type"], frame.attrs["encoding-version"] = "dataframe", "0.1.0"
        frame.attrs["_index"] = "names"
        frame["names"] = text(names)
    obs = root["obs"]
    obs.attrs["column-order"] = text(["sample", "stage", "n"])
    obs.create_group("__categories")
    for name, codes, known in (("sample", [0, 1, 0, -1, 1, 0, 1], ["b", "a"]), ("stage", [2, 0, 1, 0, 0, 1, 2], "xyz")):
        obs[f"__categories/{name}"] = text(list(known))
        obs[f"__categories/{name}"].attrs["ordered"] = name == "stage"
        obs[name] = np.array(codes, np.int8)
        obs[name].attrs["categories"] = obs[f"__categories/{name}"].ref
    obs["n"] = np.arange(7)
    root["var"].attrs["column-order"] = np.zeros(0)


def write_06(root, *, sparse_X=True):
    """The layout of anndata 0.6: tables, categories in `uns`, `raw.X`, and attributes of h5sparse."""
    X = sparse.csr_matrix(COUNTS)
    for name, matrix, kind in (("X", X, "csr"), ("raw.X", sparse.csc_matrix(2 * COUNTS), "csc")):
        group = root.create_group(name)
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = kind, matrix.shape
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(matrix, part)
    rows = list(zip(CELLS, [0, 1, 0, -1, 1, 0, 1], [b"k"] * 7, range(7), [0] * 7, strict=True))
    fields = [("index", "S9"), ("sample", "i1"), ("name", "S3"), ("n", "i4"), ("single", "i1")]
    root["obs"] = np.array([(name.encode(), *rest) for name, *rest in rows], fields)
    root["var"] = root["raw.var"] = np.array([(name.encode(),) for name in GENES], [("index", "S9")])
    root["uns/sample_categories"] = np.array([b"x", b"y"])
    root["uns/single_categories"] = np.array([b"one"])
    root["uns/n_categories"] = np.array([b"too", b"few"])  # not of this column: its numbers are larger


def test_old_layouts_are_read_as_anndata_reads_them(tmp_path):
    for write, missing in ((write_07, 3), (write_06, 3)):
        path = tmp_path / f"{write.__name__}.h5ad"
        with h5py.File(path, "w") as file:
            write(file)
        theirs = same(path)
        assert theirs.obs["sample"].dtype == "category"
        with pytest.raises(DataError, match=f"column 'sample' of obs has a missing value in row {missing}$"):
            nd.read_obs(path, "sample")
    np.testing.assert_array_equal(read_all(path, layer="raw"), theirs.raw.X.toarray())
    np.testing.assert_array_equal(nd.read_obs(path, "single"), ["one"] * 7)
    with nd.open(path, layer="raw") as source:
        assert source.var_names.tolist() == list(theirs.raw.var_names)


def test_old_zarr_layouts(tmp_path):
    zarr = pytest.importorskip("zarr")
    root = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=2)
    for axis, names in (("obs", CELLS), ("var", GENES)):
        frame = root.create_group(axis)
        frame.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.1.0", "_index": "i"})
        frame.attrs["column-order"] = ["sample"] if axis == "obs" else []
        frame.create_array("i", data=np.array(names, "S9"))
    obs = root["obs"]
    root.create_array("X", data=COUNTS)
    obs.create_group("__categories").create_array("sample", data=np.array(["x", "y"], "U1")).attrs["ordered"] = True
    obs.create_array("sample", data=np.array([0, 1, 0, -1, 1, 0, 1], np.int8)).attrs["categories"] = (
        "__categories/sample"
    )
    column = nd.open(tmp_path / "a.zarr").obs["sample"]
    assert column.ordered
    assert column.decoded()[[0, 1]].tolist() == ["x", "y"]
    assert column.missing.tolist() == [False, False, False, True, False, False, False]


def test_attributes_of_other_languages_are_bytes(tmp_path):
    path = write_anndata(tmp_path / "a.h5ad", sparse.csr_matrix(COUNTS), obs=pandas.DataFrame({"a": range(7)}))
    with h5py.File(path, "r+") as file:
        file["X"].attrs["encoding-type"] = np.bytes_(b"csr_matrix")
        file["obs"].attrs["_index"] = np.bytes_(b"_index")
        file["obs"].attrs["column-order"] = np.array([b"a"])
    np.testing.assert_array_equal(read_all(path), COUNTS)
    np.testing.assert_array_equal(nd.read_obs(path, "a"), range(7))


# --- what leaves the file


def refused(path, message, **options):
    with pytest.raises(DataError, match=message) as caught, nd.open(path, **options) as source:
        source.read_rows(slice(None))
    assert "follow_links=True" in str(caught.value)
    assert str(path) in str(caught.value)


def outside(tmp_path, values=COUNTS):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["deep/values"] = values
        file["through"] = h5py.SoftLink("/deep/values")
        file["again"] = h5py.ExternalLink("third.h5", "/deep/values")
    with h5py.File(tmp_path / "third.h5", "w") as file:
        file["deep/values"] = values


def linked(file, kind, tmp_path):
    if kind == "external storage":
        (tmp_path / "raw.bin").write_bytes(COUNTS.tobytes())
        file.create_dataset("X", COUNTS.shape, "f4", external=[(str(tmp_path / "raw.bin"), 0, COUNTS.nbytes)])
    elif kind == "virtual":
        layout = h5py.VirtualLayout(COUNTS.shape, "f4")
        layout[:] = h5py.VirtualSource("other.h5", "again", COUNTS.shape)
        file.create_virtual_dataset("X", layout)
    elif kind == "soft":
        file["elsewhere"] = h5py.ExternalLink("other.h5", "/through")
        file["X"] = h5py.SoftLink("elsewhere")
    else:
        file["X"] = h5py.ExternalLink("other.h5", "/again" if kind == "chain" else "/deep/values")


@pytest.mark.parametrize("kind", ["external", "chain", "soft", "virtual", "external storage"])
def test_hdf5_that_leaves_the_file_is_refused_or_counts_for_its_identity(tmp_path, kind):
    outside(tmp_path)
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w") as file:
        linked(file, kind, tmp_path)
    target = "raw.bin" if kind == "external storage" else "other.h5"
    refused(path, f"(X|elsewhere) (is a link to|is stored in|shows) another file, .*{target}")
    np.testing.assert_array_equal(read_all(path, follow_links=True), COUNTS)
    first = digest(path)
    assert first == digest(path)
    if kind == "external storage":
        (tmp_path / "raw.bin").write_bytes((COUNTS + 1).tobytes())
    else:
        outside(tmp_path, COUNTS + 1)
    np.testing.assert_array_equal(read_all(path, follow_links=True), COUNTS + 1)
    assert digest(path) != first
    for name in ("raw.bin", "other.h5", "third.h5"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(DataError, match="which is missing"):
        nd.open(path, follow_links=True)


def test_links_inside_the_file_are_followed_and_circles_end(tmp_path):
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w") as file:
        file["store/values"] = COUNTS
        layout = h5py.VirtualLayout(COUNTS.shape, "f4")
        layout[:] = h5py.VirtualSource(".", "/store/values", COUNTS.shape)
        file.create_virtual_dataset("store/shown", layout)
        file["X"] = h5py.SoftLink("/store/shown")
        file["layers/a"] = h5py.SoftLink("/layers/b")
        file["layers/b"] = h5py.SoftLink("a")
        file["layers/self"] = h5py.ExternalLink("a.h5ad", "/store/values")
    np.testing.assert_array_equal(read_all(path), COUNTS)
    np.testing.assert_array_equal(read_all(path, layer="self"), COUNTS)
    with pytest.raises(DataError, match="go in a circle"):
        nd.open(path, layer="a")


def test_every_part_of_a_matrix_and_of_obs_is_guarded(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_bytes(b"root:x:0:0:root:/root:/bin/bash\n" * 9)
    for part in ("X/data", "X/indices", "X/indptr", "obs/_index", "var/_index", "obs/kind", "obs", "X"):
        path = write_anndata(
            tmp_path / f"{part.replace('/', '_')}.h5ad",
            sparse.csr_matrix(COUNTS),
            obs=pandas.DataFrame({"kind": pandas.Categorical(list("abababa"))}),
        )
        with h5py.File(path, "r+") as file:
            old = file[part]
            length = len(old) if isinstance(old, h5py.Dataset) else 7
            del file[part]
            file.create_dataset(part, (length,), "u1", external=[(str(secret), 0, length)])
        refused_obs = part == "obs/kind"
        if refused_obs:
            with pytest.raises(DataError, match=r"kind is stored in another file, .*secret\.txt"):
                nd.read_obs(path, "kind")
            np.testing.assert_array_equal(read_all(path), COUNTS)
        else:
            refused(path, rf"{part} is stored in another file, .*secret\.txt")


@pytest.mark.parametrize("kind", ["zarr", "10x", "parts"])
def test_symbolic_links_out_of_a_folder(tmp_path, kind):
    if kind == "zarr":
        pytest.importorskip("zarr")
        path = write_anndata(tmp_path / "a.zarr", COUNTS)
        moved = path / "X"
    elif kind == "10x":
        path = write_10x_folder(tmp_path / "a", zipped=False)
        moved = path / "barcodes.tsv"
    else:
        path = write_parts(tmp_path / "a", COUNTS)
        moved = path / "data.npy"
    (tmp_path / "named").symlink_to(path)
    plain = nd.open(path).sha256()
    assert nd.open(tmp_path / "named").sha256() == plain  # the user names this link
    (path / "inside").symlink_to(moved)
    np.testing.assert_array_equal(read_all(path), COUNTS)
    (path / "inside").unlink()
    assert nd.open(path).sha256() == plain
    target = tmp_path / f"elsewhere{moved.suffix}"
    moved.rename(target)
    moved.symlink_to(os.path.relpath(target, path))
    refused(path, f"{moved.name} is a link to another file, ../{target.name}")
    np.testing.assert_array_equal(read_all(path, follow_links=True), COUNTS)
    first = nd.open(path, follow_links=True).sha256()
    for file in [target] if target.is_file() else [p for p in target.rglob("*") if p.is_file()]:
        file.write_bytes(file.read_bytes() + b" ")
    digests = [nd.source._hash_path(path) for _ in range(2)]
    assert digests[0] == digests[1] != first
    if target.is_dir():
        (target / "up").symlink_to(tmp_path)  # a circle
        assert nd.source._hash_path(path) != digests[0]


# --- messages


def test_messages_name_what_is_missing_and_what_there_is(tmp_path):
    adata = anndata.AnnData(sparse.csr_matrix(COUNTS), obs=pandas.DataFrame({"sample_id": range(7), "kind": range(7)}))
    adata.layers["counts"] = adata.X
    adata.write_h5ad(tmp_path / "a.H5AD")
    path = tmp_path / "a.H5AD"

    def says(message, call=nd.open, at=path, **options):
        with pytest.raises(DataError, match=message) as caught:
            call(at, **options)
        assert str(at) in str(caught.value)
        assert "\n" not in str(caught.value)

    says("no layer 'Count'; the file has 'counts', 'X'; did you mean 'counts'", layer="Count")
    says("no column 'sampleid'; it has 'sample_id', 'kind'; did you mean 'sample_id'", nd.read_obs, column="sampleid")
    says("it has no modalities; drop modality='rna'", modality="rna")
    with h5py.File(path, "r+") as file:
        del file["obs/_index"]
    says("obs has no index: its index '_index' is missing")
    with h5py.File(path, "r+") as file:
        del file["obs"].attrs["_index"]
    says("obs has no index: it lacks the attribute _index")
    with h5py.File(path, "r+") as file:
        del file["obs"]
        file["raw/X"] = file["X"]
        del file["X"], file["layers"]
    says("it has no X; choose a layer with layer=NAME: raw$")
    np.testing.assert_array_equal(read_all(path, layer="raw"), COUNTS)
    for name, values, message in (
        ("X", np.array([[b"a"]]), r"X: numbers expected, got dtype \|S1"),
        ("X", np.ones((2, 2), complex), "X: numbers expected, got dtype complex128"),
        ("X", np.ones(3), r"X: the matrix must have 2 dimensions, it has shape \(3,\)"),
        ("layers/x", np.array([[b"a"]]), "no X; choose a layer with layer=NAME: x"),
    ):
        with h5py.File(path, "w") as file:
            file[name] = values
        says(message)
    says(r"layers/x: numbers expected, got dtype \|S1", layer="x")


def test_two_genomes(tmp_path):
    path = write_10x_h5(tmp_path / "a.h5", version=2)
    with h5py.File(path, "r+") as file:
        file.copy("GRCh38", "mm10")
        file["mm10/data"][:] *= 2
    with pytest.raises(DataError, match="it has 2 genomes; choose one with layer=NAME: GRCh38, mm10"):
        nd.open(path)
    np.testing.assert_array_equal(read_all(path, layer="mm10"), 2 * COUNTS)
    with pytest.raises(DataError, match="no genome 'mm1'; the file has 'GRCh38', 'mm10'; did you mean 'mm10'"):
        nd.open(path, layer="mm1")


# --- zipped zarr, MuData, loom


@pytest.mark.parametrize("inside", ["", "a.zarr"])
def test_zipped_zarr(tmp_path, inside):
    pytest.importorskip("zarr")
    import shutil

    path = write_anndata(tmp_path / "z" / "a.zarr" if inside else tmp_path / "a.zarr", sparse.csr_matrix(COUNTS))
    zipped = Path(shutil.make_archive(str(tmp_path / "b.zarr"), "zip", path.parent if inside else path))
    assert zipped.name == "b.zarr.zip"
    with nd.open(zipped) as source:
        np.testing.assert_array_equal(dense(source.read_rows([3, 1])), COUNTS[[3, 1]])
        assert source.obs_names.tolist() == CELLS
    np.testing.assert_array_equal(read_all(zipped, layer="doubled"), 2 * COUNTS)
    shutil.make_archive(str(tmp_path / "c.zarr"), "zip", write_parts(tmp_path / "parts", COUNTS))
    with pytest.raises(DataError, match=r"c\.zarr\.zip: it must hold one zarr group, .*; it has 0"):
        nd.open(tmp_path / "c.zarr.zip")


def test_mudata(tmp_path):
    write_anndata(tmp_path / "rna.h5ad", sparse.csr_matrix(COUNTS), obs=pandas.DataFrame({"own": range(7)}))
    write_anndata(tmp_path / "atac.h5ad", 2 * COUNTS[:4])
    path = tmp_path / "a.h5mu"
    with h5py.File(path, "w") as file:
        for name in ("rna", "atac"):
            with h5py.File(tmp_path / f"{name}.h5ad") as part:
                part.copy(part["/"], file, f"mod/{name}")
        with h5py.File(tmp_path / "rna.h5ad") as part:
            part.copy("obs", file, "obs")
        del file["obs/own"]
        file["obs/shared"] = text([f"s{i}" for i in range(7)])
        file["obs"].attrs["column-order"] = ["shared"]
        file["obsmap/rna"] = np.arange(1, 8)
        file["obsmap/atac"] = np.array([0, 2, 0, 1, 3, 0, 4])  # rows 3, 1, 4 and 6 of all cells
    with pytest.raises(DataError, match="2 modalities; choose one with modality=NAME: 'atac', 'rna'"):
        nd.open(path)
    with pytest.raises(DataError, match="no modality 'RNA'; the file has 'atac', 'rna'; did you mean 'rna'"):
        nd.open(path, modality="RNA")
    np.testing.assert_array_equal(read_all(path, modality="rna"), COUNTS)
    np.testing.assert_array_equal(read_all(path, modality="atac", layer="doubled"), 4 * COUNTS[:4])
    with nd.open(path, modality="rna") as source:
        assert list(source.obs) == ["own", "shared"]
    assert nd.read_obs(path, "shared", modality="atac").tolist() == ["s3", "s1", "s4", "s6"]
    assert nd.read_obs(path, "own", modality="rna").tolist() == list(range(7))
    with h5py.File(path, "r+") as file:
        del file["mod/atac"]
    np.testing.assert_array_equal(read_all(path), COUNTS)  # the only one


def test_loom(tmp_path):
    path = tmp_path / "a.loom"
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=COUNTS.T, chunks=(2, 3))
        file["layers/spliced"] = 2 * COUNTS.T
        file["row_attrs/Gene"], file["col_attrs/CellID"] = text(GENES), text(CELLS)
        file["col_attrs/sample"], file["col_attrs/pcs"] = text(list("abababa")), np.zeros((7, 2))
        file["row_graphs"] = file.create_group("col_graphs")
    with nd.open(path) as source:
        assert source.shape == COUNTS.shape
        assert source.obs_names.tolist() == CELLS
        assert source.var_names.tolist() == GENES
        assert list(source.obs) == ["sample"]
        for rows in (slice(None), [5, 0], [2, 2, 6], slice(3, 3)):
            np.testing.assert_array_equal(source.read_rows(rows), COUNTS[rows])
    np.testing.assert_array_equal(read_all(path, layer="spliced"), 2 * COUNTS)
    assert nd.read_obs(path, "sample").tolist() == list("abababa")
    with pytest.raises(DataError, match="no layer 'unspliced'; the file has 'spliced'; did you mean 'spliced'"):
        nd.open(path, layer="unspliced")
