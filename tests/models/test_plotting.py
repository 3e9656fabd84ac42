"""The plotting functions: what they draw, and what they refuse."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import narrows
from narrows import plotting
from narrows.datasets import load_digits

pytest.importorskip("matplotlib")


def test_new_figures_are_those_of_pyplot():
    """So notebooks show them, once. Given axes, nothing new appears; nothing is shown."""
    from matplotlib import pyplot

    rng = np.random.default_rng(0)
    Z, images, labels = rng.normal(size=(40, 3)), rng.random((6, 16)), np.arange(40) % 2
    draws = [
        lambda **given: plotting.plot_loss({"loss": [2.0, 1.0], "val_loss": [2.0, 1.5]}, **given),
        lambda **given: plotting.plot_elbow([1, 2, 4], [3.0, 2.0, 1.9], [3.0, 2.5, 2.0], **given),
        lambda **given: plotting.plot_latent(Z, labels, **given),
        lambda **given: plotting.plot_feature_errors(rng.random(9), **given),
        lambda **given: plotting.plot_row_losses([0, 1, 2], [3, 1], [1, 3], **given),
        lambda **given: plotting.plot_sensitivity(rng.random((3, 9)), **given),
        lambda **given: plotting.plot_reconstructions(images, images, **given),
        lambda **given: plotting.plot_reconstructions(images, images, image_shape=(16,), **given),
        lambda **given: plotting.plot_filters(rng.normal(size=(16, 5)), **given),
        lambda **given: plotting.plot_latent_traversal(Decoder(), 2, image_shape=(4, 6), **given),
    ]
    for i, draw in enumerate(draws, start=1):
        ax = draw()
        assert len(pyplot.get_fignums()) == i
        assert pyplot.figure(pyplot.get_fignums()[-1]) is ax.figure
        own = plotting.new_figure().subplots()
        assert draw(ax=own) is own
        assert len(pyplot.get_fignums()) == i


def test_legends_hide_no_data():
    """They stand outside the axes, and below the title, also in figures with many or long entries."""
    for ax in (
        plotting.plot_loss({"loss": [3.0, 1.0], "val_loss": [3.0, 1.0]}),
        plotting.plot_elbow([1, 2, 4], [3.0, 2.0, 1.9], [3.0, 2.5, 2.0], baseline_name="a model without a code " * 2),
        plotting.plot_row_losses([0, 1, 2], [3, 1], [1, 3]),
        plotting.plot_feature_errors(np.arange(9.0)),
        plotting.plot_latent(np.eye(4)[:, :2], list("abcd")),
        plotting.plot_latent(np.eye(4)[:, :1], list("abcd")),
    ):
        ax.figure.canvas.draw()
        legend, inside, title = (part.get_window_extent() for part in (ax.get_legend(), ax, ax.title))
        width, height = ax.figure.canvas.get_width_height()
        assert legend.y0 >= inside.y1 - 1 or legend.x0 >= inside.x1 - 1
        assert not legend.overlaps(title)
        assert legend.x0 >= 0
        assert legend.x1 <= width + 1
        assert title.y1 <= height + 1


def test_plot_loss():
    ax = plotting.plot_loss({"loss": [3.0, 2.0, 1.5], "val_loss": [3.0, 1.0, None]})
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["training"].get_ydata()) == [3.0, 2.0, 1.5]
    assert "validation, best 1 (epoch 2)" in lines
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
        ({"latents": [30]}, "30 is outside 0..29"),
        ({"latents": [-1]}, "-1 is outside 0..29"),
        ({"latents": 0}, "latents=0"),
        ({}, "24 features are not a square image"),
        ({"image_shape": (5, 5)}, r"image_shape=\(5, 5\) does not fit rows of 24 features"),
        ({"image_shape": (3, 4, 2)}, "1, 3 or 4 channels"),
        ({"image_shape": (4, 6), "start": [0.0]}, r"start must have shape \(30,\), one value per latent"),
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


def test_plot_elbow():
    ax = plotting.plot_elbow([2, 8, 32], [3.0, 1.0, 0.9], [4.0, 2.0, None], elbow=8)
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["autoencoder"].get_xdata()) == [2, 8, 32]
    assert list(lines["PCA"].get_ydata())[:2] == [4.0, 2.0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["2", "8", "32"]
    assert any(t.get_text() == "elbow: 8" for t in ax.texts)
    assert plotting.plot_elbow([4], [1.0]).get_legend() is None
    for arguments, message in (
        (([2, 4], [1.0]), "autoencoder has 1 values for 2 numbers"),
        (([2, 4], [1.0, 2.0], [1.0]), "PCA has 1 values for 2 numbers"),
        (([], []), "n_components"),
        (([0, 2], [1.0, 2.0]), "n_components"),
    ):
        with pytest.raises(ValueError, match=message):
            plotting.plot_elbow(*arguments)
    with pytest.raises(ValueError, match="elbow=3"):
        plotting.plot_elbow([2, 4], [1.0, 2.0], elbow=3)


def test_plot_sensitivity():
    table = np.zeros((3, 50))
    table[0, 7], table[2, 9], table[1, 3], table[0, 5] = 5.0, 4.0, 3.0, 1.0
    ax = plotting.plot_sensitivity(table, [f"gene{i}" for i in range(50)], top=4)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["gene7", "gene5", "gene3", "gene9"], "by latent, then size"
    np.testing.assert_array_equal(np.asarray(ax.images[0].get_array()), table[:, [7, 5, 3, 9]].T)
    assert len(plotting.plot_sensitivity(np.ones((100, 60)), top=60).get_yticks()) == 0
    for arguments, message in (
        ((np.zeros(3),), "table of latents"),
        ((table, ["a"]), "names has 1 entries for 50"),
        ((table, None, 0), "top"),
    ):
        with pytest.raises(ValueError, match=message):
            plotting.plot_sensitivity(*arguments)


def test_plot_reconstructions_as_images():
    X = np.random.default_rng(0).random((9, 24))
    ax = plotting.plot_reconstructions(X, X / 2, noisy=X + 1, image_shape=(4, 6), n=3)
    canvas = np.asarray(ax.images[0].get_array())
    assert canvas.shape == (3 * 4 + 2, 3 * 6 + 2)
    np.testing.assert_array_equal(canvas[0:4, 7:13].ravel(), X[1])
    np.testing.assert_array_equal(canvas[5:9, 0:6].ravel(), X[0] + 1)
    np.testing.assert_array_equal(canvas[10:14, 14:20].ravel(), X[2] / 2)
    assert ax.images[0].get_clim() == (X[:3].min(), X[:3].max()), "the scale is that of the originals"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["original", "noisy", "reconstruction"]
    colour = X[:, :12].reshape(9, 2, 2, 3)
    ax = plotting.plot_reconstructions(colour, colour.reshape(9, 12), n=20)  # 4-D images; their decoder gives rows
    assert np.asarray(ax.images[0].get_array()).shape == (2 * 2 + 1, 9 * 2 + 8, 3)
    square = plotting.plot_reconstructions(X[:, :16], X[:, :16])
    assert np.asarray(square.images[0].get_array()).shape == (9, 9 * 4 + 8)


def test_plot_reconstructions_as_signals():
    X = np.random.default_rng(0).normal(size=(5, 30))
    ax = plotting.plot_reconstructions(X, X + 1, n=2)  # 30 features make no square
    original, rebuilt = ax.lines[0].get_ydata(), ax.lines[2].get_ydata()
    np.testing.assert_allclose(rebuilt - original, 1.0)
    np.testing.assert_allclose(np.diff(original), np.diff(X[0]))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["original", "reconstruction"]
    ax = plotting.plot_reconstructions(X[:, :25], X[:, :25], noisy=X[:, :25], image_shape=(25,))
    assert len(ax.lines) == 15
    for arguments, message in (
        ((X, X[:3]), r"reconstruction has shape \(3, 30\), originals has shape \(5, 30\)"),
        ((X, X[:, :3]), "reconstruction has shape"),
        ((X[0], X[0]), "originals must be"),
    ):
        with pytest.raises(ValueError, match=message):
            plotting.plot_reconstructions(*arguments)
    for options, message in (
        ({"n": 0}, "n=0"),
        ({"image_shape": (29,)}, r"image_shape=\(29,\)"),
        ({"image_shape": (5, 5)}, r"image_shape=\(5, 5\)"),
        ({"noisy": X[:, 1:]}, "noisy has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            plotting.plot_reconstructions(X, X, **options)


def test_plot_filters():
    W = np.outer(np.linspace(-1, 1, 24), [1.0, 5.0, 0.5])
    ax = plotting.plot_filters(W, image_shape=(4, 6), n=2)
    canvas = np.asarray(ax.images[0].get_array())
    first = canvas[:4, :6].ravel()
    np.testing.assert_allclose(first, 0.5 + 0.5 * W[:, 1] / 5)  # the largest first, on a scale of its own
    assert ax.get_title() == "2 of 3 filters"
    ae = narrows.Autoencoder(4, hidden_layer_sizes=(), max_iter=1, random_state=0).fit(load_digits())
    assert plotting.plot_filters(ae).get_title() == "Filters of the first layer"
    np.testing.assert_array_equal(
        np.asarray(plotting.plot_filters(ae.coefs_[0]).images[0].get_array()),
        np.asarray(plotting.plot_filters(ae).images[0].get_array()),
    )
    for arguments, message in (((np.zeros(3),), "one column per unit"), ((np.zeros((24, 2)),), "not a square image")):
        with pytest.raises(ValueError, match=message):
            plotting.plot_filters(*arguments)
    with pytest.raises(ValueError, match="n=0"):
        plotting.plot_filters(W, image_shape=(4, 6), n=0)


def test_plot_filters_of_convolutions():
    """A filter has the shape of the kernel; channels are colours, or lines of images; zero is in the middle."""
    rng = np.random.default_rng(0)
    small = {"filters": (5, 2), "strides": 1, "max_iter": 1, "random_state": 0}
    ae = narrows.ConvAutoencoder(2, kernel_size=3, **small).fit(rng.random((20, 6, 6)))
    K = ae.coefs_[0]  # (3, 3, 1, 5)
    ax = plotting.plot_filters(ae)
    canvas = np.asarray(ax.images[0].get_array())
    order = np.argsort(-(K**2).sum(axis=(0, 1, 2)))
    assert canvas.shape == (2 * 3 + 1, 3 * 3 + 2)
    for at, i in enumerate(order):
        top, left = 4 * (at // 3), 4 * (at % 3)
        image = canvas[top : top + 3, left : left + 3]
        np.testing.assert_allclose(image, 0.5 + 0.5 * K[:, :, 0, i] / np.abs(K[..., i]).max(), rtol=1e-6)
    assert ax.get_title() == "Filters of the first convolution"

    colour = rng.normal(size=(4, 3, 3, 2))
    largest = int((colour**2).sum(axis=(0, 1, 2)).argmax())
    ax = plotting.plot_filters(colour, n=1)
    scaled = colour[..., largest] / np.abs(colour[..., largest]).max()
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array()), 0.5 + 0.5 * scaled)
    assert ax.get_title() == "1 of 2 filters"

    several = rng.normal(size=(3, 3, 4, 1))  # not transparency
    ax = plotting.plot_filters(several)
    canvas = np.asarray(ax.images[0].get_array())
    assert canvas.shape == (4 * 3 + 3, 3)
    np.testing.assert_allclose(canvas[8:11], 0.5 + 0.5 * several[:, :, 2, 0] / np.abs(several).max())
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "2", "3"]

    signal = narrows.ConvAutoencoder(2, image_shape=(12, 2), kernel_size=5, **small).fit(rng.random((20, 12, 2)))
    K = signal.coefs_[0][0]  # (5, 2, 5)
    i = int((K**2).sum(axis=(0, 1)).argmax())
    canvas = np.asarray(plotting.plot_filters(signal).images[0].get_array())
    np.testing.assert_allclose(canvas[:2, :5], 0.5 + 0.5 * K[:, :, i].T / np.abs(K[:, :, i]).max(), rtol=1e-6)

    with pytest.raises(
        ValueError, match=r"image_shape=\(6, 6\): filters of a convolution have the shape of its kernel"
    ):
        plotting.plot_filters(ae, image_shape=(6, 6))
    with pytest.raises(ValueError, match="or be those of a convolution in 4 dimensions"):
        plotting.plot_filters(np.zeros((2, 2, 2)))


def test_traversals_of_a_convolutional_model_know_the_shape_of_its_images():
    X = np.random.default_rng(0).random((20, 4, 6, 3))
    ae = narrows.ConvAutoencoder(2, filters=3, max_iter=1, random_state=0).fit(X)
    canvas = np.asarray(plotting.plot_latent_traversal(ae, 1, n_steps=5).images[0].get_array())
    assert canvas.shape == (4, 5 * 6 + 4, 3)


def test_given_axes_are_used_and_pyplot_is_left_alone():
    rows = np.ones((2, 9))
    for draw in (
        lambda ax: plotting.plot_loss({"loss": [1.0, 2.0]}, ax),
        lambda ax: plotting.plot_feature_errors([1.0, 2.0], ax=ax),
        lambda ax: plotting.plot_elbow([1, 2], [2.0, 1.0], ax=ax),
        lambda ax: plotting.plot_sensitivity(rows, ax=ax),
        lambda ax: plotting.plot_filters(rows.T, ax=ax),
        lambda ax: plotting.plot_reconstructions(rows, rows, ax=ax),
        lambda ax: plotting.plot_reconstructions(rows[:, :8], rows[:, :8], ax=ax),
    ):
        ax = plotting.new_figure().subplots()
        assert draw(ax) is ax
        ax.figure.canvas.draw()
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_numbers_of_rows_are_whole_numbers():
    ticks = plotting.plot_row_losses([0, 1, 2], [2, 1], [1, 2]).get_yticks()
    assert (ticks == ticks.round()).all()
