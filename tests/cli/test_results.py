"""The results of a run: complete and as written under ``_SUCCESS``, or made again; nothing stays of killed runs."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from cli_runs import SMALL, metrics, narrows, table
from narrows.cli import jobs
from narrows.data.source import _hash_path

RESULTS = ("model.safetensors", "latent.npy", "metrics.json", "history.jsonl")


def test_success_vouches_for_the_bytes_of_the_results(npy, tmp_path, capsys, monkeypatch):
    out, real = tmp_path / "o", jobs._finish
    args = ["fit", npy, "--out", out, *SMALL]
    assert narrows(*args) == 0
    assert subprocess.run(["sha256sum", "-c", "--strict", "_SUCCESS"], cwd=out, capture_output=True).returncode == 0
    codes = (out / "latent.npy").read_bytes()

    def finish(settings, estimator, given, table, run, *rest):
        assert not (out / "_SUCCESS").exists(), "no success while a result is made again"
        real(settings, estimator, given, table, run, *rest)

    monkeypatch.setattr(jobs, "_finish", finish)
    flip, cut = (lambda c: c[:-1] + bytes([c[-1] ^ 1])), (lambda c: c[:-1])
    for name, damage in zip(RESULTS, (flip, flip, cut, None), strict=True):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(damage(whole)) if damage else (out / name).unlink()
        capsys.readouterr()
        assert narrows(*args) == 0, name
        assert f"{name} is missing or damaged: writing it again" in capsys.readouterr().err
        assert (out / "latent.npy").read_bytes() == codes
        assert metrics(out)["status"] == "finished"
    monkeypatch.setattr(jobs, "_finish", None)  # nothing is made again
    assert narrows(*args) == 0
    (out / "_SUCCESS").write_text("")  # names no result
    assert narrows(*args) == 1


def test_a_new_run_begins_in_an_empty_folder(npy, tmp_path, monkeypatch):
    out = tmp_path / "o"
    args = ["fit", npy, "--out", out, *SMALL]
    assert narrows(*args) == 0
    (out / "notes.txt").write_text("mine")

    def train(*_):
        assert sorted(p.name for p in out.iterdir()) == ["checkpoints", "config.toml", "notes.txt", "run.log"]
        assert not list((out / "checkpoints").iterdir())
        raise MemoryError

    monkeypatch.setattr(jobs, "_train", train)
    assert narrows(*args, "--resume", "never") == 6


def test_leftovers_of_killed_runs_go_and_nothing_else(npy, tmp_path):
    out = tmp_path / "o"
    args = ["fit", npy, "--out", out, *SMALL]
    assert narrows(*args) == 0
    mark = "0123456789abcdef"
    ours = [f".{name}.{mark}.tmp" for name in (*RESULTS, "_SUCCESS", "config.toml", "run.log", "latent.h5ad")]
    ours.append(f"checkpoints/.last.safetensors.{mark}.tmp")
    foreign = [
        f".thesis.txt.{mark}.tmp",
        ".latent.npy.old.tmp",
        f".latent.npy.{mark[1:]}.tmp",
        f"latent.npy.{mark}.tmp",
    ]
    for name in ours + foreign:
        (out / name).write_text("x")
    (out / f".metrics.json.{mark[::-1]}.tmp").mkdir()
    (out / "_SUCCESS").unlink()
    assert narrows(*args) == 0
    assert not [name for name in ours if (out / name).exists()]
    assert all((out / name).exists() for name in foreign)
    assert (out / f".metrics.json.{mark[::-1]}.tmp").is_dir()


def test_the_digest_of_a_folder_knows_where_a_file_ends(tmp_path):
    """The bytes of two files are not those of one with the name of the second in it, nor of files cut elsewhere."""
    joined = [b"1" + name + end + b"2" for name in (b"", b"b") for end in (b"", b"\0", b"\0\0")]
    contents = [(b"1", b"2"), (b"12", b""), (b"", b"12"), *((one,) for one in joined)]
    digests, beside = set(), set()
    for i, parts in enumerate(contents):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name, content in zip("ab", parts, strict=False):
            (folder / name).write_bytes(content)
        digests.add(_hash_path(folder))
        beside.add(_hash_path(folder / "a", [folder / name for name in "ab"[1 : len(parts)]]))
        beside.add(_hash_path(tmp_path / "0" / "a", [folder / name for name in "ab"[: len(parts)]]))
    assert len(digests) == len(contents)
    assert len(beside) == 2 * len(contents)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["X", "obs/_index", "var/_index", "uns", "RuntimeError", "OSError"])
def test_a_file_of_hdf5_counts_only_if_it_holds_what_was_written(what, tmp_path, monkeypatch, line):
    """A disk that is full for a moment may leave zeros without an error, or an error of any type."""
    anndata, h5py = pytest.importorskip("anndata"), pytest.importorskip("h5py")
    data, out = tmp_path / "x.csv", tmp_path / "o"
    data.write_text("\n".join([",a,b,c,d", *(f"r{i}," + ",".join(map(str, row[:4])) for i, row in enumerate(table()))]))
    write = anndata.AnnData.write_h5ad

    def failing(adata, path, *args, **options):
        write(adata, path, *args, **options)
        if what == "RuntimeError":
            raise RuntimeError("Unspecified error in H5Dwrite")
        if what == "OSError":
            raise OSError(28, "Can't write data\n(No space left on device)")
        with h5py.File(path, "r+") as file:
            if what == "uns":
                del file["uns/narrows"]
            else:
                file[what][-1] = 0 if what == "X" else "lost"

    monkeypatch.setattr(anndata.AnnData, "write_h5ad", failing)
    assert narrows("fit", data, "--out", out, *SMALL) == 3
    assert f"cannot write {out}/latent.h5ad: " in line()
    assert not (out / "_SUCCESS").exists()
    assert not [p for p in out.rglob("*") if "latent" in p.name]
    monkeypatch.undo()
    assert narrows("fit", data, "--out", out, *SMALL) == 0
    assert anndata.read_h5ad(out / "latent.h5ad").obs_names[-1] == "r89"
    assert np.isfinite(anndata.read_h5ad(out / "latent.h5ad").X).all()
