"""The report page and the MultiQC table."""

from __future__ import annotations

import base64
import json
import re
import shlex
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from narrows import cli, plotting
from narrows.cli import figures, report
from narrows.errors import DataError
from pages import Page

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished fit of named, labelled data whose names try to break out of the page."""
    home = tmp_path_factory.mktemp("report") / "<u>&run"
    home.mkdir()
    rng = np.random.default_rng(0)
    labels = np.repeat(["T <cell>", "B $x$", "_NK"], 30)
    centres = 4.0 * (labels[:, None] == np.unique(labels)[[0, 1, 2] * 3])
    X = (centres + rng.normal(size=(90, 9))).astype(np.float32)
    names = np.array([f"<i>gene{i}</i>" for i in range(9)])
    np.savez(home / "x.npz", X=X, labels=labels, obs_names=[f"c{i}" for i in range(90)], var_names=names)
    out = home / "run"
    args = ["--components", "3", "--hidden", "8", "--epochs", "5", "--threads", "1", "--quiet"]
    assert cli.main(["fit", str(home / "x.npz"), "--out", str(out), *args]) == 0
    return out


def test_page_is_whole_and_self_contained(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.links == []
    assert "script" not in page.tags
    assert re.search(r"https?://", text) is None
    assert len(page.images) == 4
    for image in page.images:
        svg = base64.b64decode(image.split(",", 1)[1])
        assert ET.fromstring(svg).tag.endswith("svg")
        assert b"<dc:date>" not in svg
    metrics = json.loads((folder / "metrics.json").read_text())
    for shown in (
        f"{metrics['mse_per_feature']:.4g}",
        metrics["input_sha256"],
        "90 × 9",
        "components",
        "Autoencoder",
    ):
        assert shown in page.text
    assert "labels of the data" in page.text
    assert "<u>" not in text  # the path of the data is text, not markup


def test_figures_are_readable_on_a_dark_page(folder):
    """Each colour of a figure has a contrast of 3 on the page's dark paper, if need be through its dark twin."""

    def luminance(colour):
        c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    text = (folder / "report.html").read_text()
    (paper,) = re.findall(r"prefers-color-scheme: dark\) \{[^}]*--paper: (#\w+)", text)
    assert "color-scheme: light dark" in text
    for image in Page(text).images:
        svg = base64.b64decode(image.split(",", 1)[1]).decode()
        rules = dict(re.findall(r'\[style\*="(\w+: #\w+)"\]\{\w+:(#\w+) !important\}', svg))
        assert rules["fill: #ffffff"] == paper
        drawn = set(re.findall(r"(?:fill|stroke): #\w+", svg.partition("</style>")[2]))
        assert len(drawn) > 2
        for use in drawn - {"fill: #ffffff"}:
            ratio = (luminance(rules.get(use, use[-7:])) + 0.05) / (luminance(paper) + 0.05)
            assert ratio > (1.4 if use.endswith("#e3e6e9") else 3), use  # the grid is faint
        assert not re.search(r"<text|<rect[^>]*#fff", svg)


def test_tiles_break_between_words(folder):
    """A long class name breaks before its last word."""
    tiles = report._tiles(json.loads((folder / "metrics.json").read_text()) | {"estimator": "VariationalAutoencoder"})
    assert "Variational\u200bAutoencoder" in [note for _, _, note in tiles]
    text = (folder / "report.html").read_text()
    assert re.findall(r"\.tile \* \{ overflow-wrap: ([\w-]+)", text) == ["break-word"]


def test_report_again_is_the_same_page(folder):
    first = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    assert cli.main(["report", str(folder)]) == 0
    again = (folder / "report.html").read_text()
    # Only what is known at the very end differs: time, memory and bytes written.
    drop = re.compile(r'<div class="tile">.*?</div>|<tr><th scope="row">bytes out.*?</tr>\n', re.S)
    assert drop.sub("", first) == drop.sub("", again)


def test_report_without_the_data_has_no_colours(folder):
    data = folder.parent / "x.npz"
    kept = data.read_bytes()
    data.unlink()
    try:
        report.build(folder)
        assert "labels of the data" not in Page((folder / "report.html").read_text()).text
    finally:
        data.write_bytes(kept)


def test_unfinished_or_damaged_runs_are_errors(folder, tmp_path):
    with pytest.raises(DataError, match="has no metrics"):
        report.build(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        report.build(tmp_path)
    (tmp_path / "metrics.json").write_text('{"status": "interrupted"}')
    with pytest.raises(DataError, match="not finished"):
        report.build(tmp_path)


def test_multiqc_table(folder):
    content = json.loads((folder / "narrows_mqc.json").read_text())
    assert content["id"] == "narrows"
    assert content["plot_type"] == "table"
    metrics = json.loads((folder / "metrics.json").read_text())
    row = content["data"]["run"]
    assert row["baseline_pca_loss"] == metrics["baseline_pca_loss"]
    assert row.keys() == content["headers"].keys()


def test_many_points_stay_small(folder):
    points = np.random.default_rng(0).normal(size=(20_000, 2))
    ax = plotting.plot_latent(points, ax=plotting.new_figure().subplots())
    assert len(figures._svg(ax.figure)) < 1_000_000


def test_page_of_counts(tmp_path):
    """What a model of counts is shown by: nothing of squared errors."""
    import scipy.sparse as sp

    X = np.random.default_rng(0).poisson(1.5, (120, 12)).astype(np.float32)
    X[4] = 0
    sp.save_npz(tmp_path / "x.npz", sp.csr_matrix(X))
    out = tmp_path / "run"
    args = ["--components", "2", "--hidden", "8", "--epochs", "3", "--threads", "1", "--quiet", "--estimator", "count"]
    assert cli.main(["fit", str(tmp_path / "x.npz"), "--out", str(out), *args]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    page = Page((out / "report.html").read_text())
    assert len(page.images) == 4
    for shown in (
        f"{metrics['held_out_nll_per_row']:.5g}",
        f"{metrics['held_out_nll_per_count']:.4f}",
        f"baseline {metrics['held_out_baseline_nll_per_row']:.5g}",
        "counts; 1 empty rows",
        "each feature's share",
        "negative binomial",
    ):
        assert shown in page.text
    assert "quared error" not in page.text
    row = json.loads((out / "narrows_mqc.json").read_text())["data"]["run"]
    assert row["held_out_nll_per_row"] == metrics["held_out_nll_per_row"]
    assert cli.main(["report", str(out)]) == 0
    assert Page((out / "report.html").read_text()).images == page.images


def test_the_command_can_be_pasted_into_a_shell(folder):
    m = json.loads((folder / "metrics.json").read_text())
    argv = ["narrows", "fit", "my data.csv", "--out", "it's"]
    assert shlex.split(report._facts(m | {"argv": argv})["command"]) == argv


def test_one_of_a_thing_has_no_plural(folder):
    m = json.loads((folder / "metrics.json").read_text())
    notes = [report._tiles(m | {"n_threads": n})[-1][-1] for n in (1, 2)]
    assert [note.split(", ")[1] for note in notes] == ["1 thread", "2 threads"]


def test_large_numbers_of_parameters_have_commas(folder):
    m = json.loads((folder / "metrics.json").read_text())
    assert report._facts(m | {"n_parameters": 522480})["n parameters"] == "522,480"
