"""The report page, the MultiQC table and the plotting functions."""

from __future__ import annotations

import base64
import json
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from narrows import cli, plotting
from narrows.cli import report
from narrows.errors import DataError

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Checks that tags close, and gathers text, images and everything that points elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.tags, self.text = [], [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                (self.images if value.startswith("data:image/svg+xml;base64,") else self.links).append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


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
    with pytest.raises(DataError, match="holds no metrics"):
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
    ax = plotting.plot_latent(np.random.default_rng(0).normal(size=(20_000, 2)))
    assert len(report._svg(ax.figure)) < 1_000_000


def test_plot_loss():
    ax = plotting.plot_loss({"loss": [3.0, 2.0, 1.5], "val_loss": [3.0, 1.0, None]})
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["training"].get_ydata()) == [3.0, 2.0, 1.5]
    assert any("epoch 2" in t.get_text() for t in ax.texts)
    assert plotting.plot_loss({"loss": [1000.0, 1.0]}).get_yscale() == "log"
    assert plotting.plot_loss({"loss": [2.0, np.nan]}).get_yscale() == "linear"
    with pytest.raises(TypeError, match="history"):
        plotting.plot_loss([1, 2])


def test_plot_latent():
    codes = np.random.default_rng(0).normal(size=(200, 5)) * [1, 9, 1, 5, 1]
    ax = plotting.plot_latent(codes)
    drawn = np.asarray(ax.collections[0].get_offsets())
    variance = np.linalg.eigvalsh(np.cov(codes.T))[::-1][:2]
    np.testing.assert_allclose(drawn.var(axis=0, ddof=1), variance, rtol=1e-6)  # the leading axes
    np.testing.assert_allclose(
        np.asarray(plotting.plot_latent(codes[:, :2]).collections[0].get_offsets()), codes[:, :2]
    )
    labels = np.arange(200) % 11
    ax = plotting.plot_latent(codes, labels)
    assert len(ax.collections) == 11
    looks = {(tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes()) for c in ax.collections}
    assert len(looks) == 11  # colours repeat after eight, marks tell them apart
    assert len(plotting.plot_latent(codes, np.arange(200) % 60).get_legend().get_texts()) == 24
    assert len(plotting.plot_latent(codes, np.linspace(0, 1, 200)).figure.axes) == 2  # with a colour bar
    assert len(plotting.plot_latent(codes[:, :1], labels % 2).get_legend().get_texts()) == 2
    for bad in (np.zeros(3), np.zeros((0, 2))):
        with pytest.raises(ValueError, match="codes"):
            plotting.plot_latent(bad)
    with pytest.raises(ValueError, match="labels"):
        plotting.plot_latent(codes, labels[:-1])


class Decoder:
    """Images of four by six pixels, of which each latent lights one; the last ones do nothing."""

    n_components = 30

    def inverse_transform(self, Z):
        return np.tanh(Z[:, :24])


def test_plot_latent_traversal():
    ax = plotting.plot_latent_traversal(Decoder(), [5, 29], image_shape=(4, 6), n_steps=5, span=2.0)
    canvas = np.asarray(ax.images[0].get_array())
    assert canvas.shape == (2 * 4 + 1, 5 * 6 + 4)
    cells = [canvas[0:4, 7 * j : 7 * j + 6].reshape(-1) for j in range(5)]
    for cell, value in zip(cells, (-2, -1, 0, 1, 2), strict=True):
        np.testing.assert_allclose(cell, np.where(np.arange(24) == 5, np.tanh(value), 0), atol=1e-12)
    assert (np.nan_to_num(canvas[5:]) == 0).all()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["5", "29"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["-2", "-1", "0", "+1", "+2"]
    assert ax.get_xlabel() == "value of the latent"
    start = np.arange(30.0)
    ax = plotting.plot_latent_traversal(Decoder(), 3, image_shape=(4, 6), start=start)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "2"], "where the images change most"
    assert ax.get_xlabel() == "change of the latent"
    own = plotting.new_figure().subplots()
    assert plotting.plot_latent_traversal(Decoder(), 1, image_shape=(4, 2, 3), ax=own) is own
    assert np.asarray(own.images[0].get_array()).shape == (4, 11 * 2 + 10, 3)
    assert len(plotting.plot_latent_traversal(Decoder(), 1, image_shape=(4, 6), n_steps=41).get_xticks()) <= 11
    for arguments, message in (
        ({"latents": [30]}, "no latent 30; n_components=30"),
        ({"latents": [-1]}, "no latent -1"),
        ({"latents": 0}, "latents=0"),
        ({}, "24 features make no square image"),
        ({"image_shape": (5, 5)}, r"image_shape=\(5, 5\) does not hold the 24 features"),
        ({"image_shape": (3, 4, 2)}, "1, 3 or 4 channels"),
        ({"image_shape": (4, 6), "start": [0.0]}, r"start has shape \(1,\), expected \(30,\)"),
        ({"image_shape": (4, 6), "span": 0}, "span=0 must be positive"),
        ({"image_shape": (4, 6), "n_steps": 1}, "n_steps=1"),
    ):
        with pytest.raises(ValueError, match=message):
            plotting.plot_latent_traversal(Decoder(), **arguments)


def test_plot_feature_errors():
    errors = np.array([0.1, 5.0, 0.3, np.nan, 2.0])
    ax = plotting.plot_feature_errors(errors, list("abcde"), top=3)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "e", "c"]
    assert [p.get_width() for p in ax.patches] == [5.0, 2.0, 0.3]
    assert plotting.plot_feature_errors(errors, mean=0.5).lines[0].get_xdata()[0] == 0.5
    for options in ({"names": ["a"]}, {"top": 0}):
        with pytest.raises(ValueError, match=r"names|top"):
            plotting.plot_feature_errors(errors, **options)


def test_given_axes_are_used_and_pyplot_is_left_alone():
    figure = plotting.new_figure()
    ax = figure.subplots()
    assert plotting.plot_loss({"loss": [1.0, 2.0]}, ax) is ax
    assert plotting.plot_feature_errors([1.0, 2.0], ax=ax) is ax
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
