"""The estimators `RBM` and `DeepAutoencoder`: what they promise beyond what every estimator does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats
from scipy.special import logsumexp
from sklearn.neural_network import BernoulliRBM

import narrows
from estimator_cases import BACKEND, low_rank, same_rows
from narrows import RBM, DeepAutoencoder
from narrows.data import ArraySource
from narrows.datasets import load_digits
from narrows.errors import DivergenceError
from narrows.training import Callback, Checkpoint, Interrupted

SMALL: dict[str, Any] = {"backend": BACKEND, "n_threads": 1, "random_state": 0}
DEEP: dict[str, Any] = SMALL | {"hidden_layer_sizes": (16, 8), "max_iter": 3, "pretrain_max_iter": 3, "batch_size": 50}


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return (load_digits() / 16).astype(np.float32)[:600]


@pytest.fixture(scope="module")
def rbm(digits: np.ndarray) -> RBM:
    return RBM(20, max_iter=5, **SMALL).fit(digits)


# --- RBM --------------------------------------------------------------------------------------------------------------


def energy(rbm: RBM, v: np.ndarray, h: np.ndarray) -> np.ndarray:
    """E of every pair."""
    W, (b, c) = rbm.coefs_[0].astype(np.float64), (x.astype(np.float64) for x in rbm.intercepts_)
    return -(v @ W @ h.T) - (v @ c)[:, None] - (h @ b)[None]


@pytest.mark.parametrize("visible", ["bernoulli", "gaussian"])
def test_free_energy_is_the_sum_over_hidden_states(visible: str, digits: np.ndarray) -> None:
    X = digits[:, 20:28]
    rbm = RBM(6, visible=visible, max_iter=3, learning_rate_init=0.02, **SMALL).fit(X)
    h = np.array(list(itertools.product((0.0, 1.0), repeat=6)))
    expected = -logsumexp(-energy(rbm, X, h), axis=1)
    if visible == "gaussian":
        expected += (X**2).sum(axis=1) / 2 + (rbm.intercepts_[1] ** 2).sum() / 2
    np.testing.assert_allclose(rbm.free_energy(X), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rbm.score_samples(X), -rbm.free_energy(X))


def test_free_energy_of_gaussian_hidden_units(digits: np.ndarray) -> None:
    """The integral over h, up to a constant: by differences, of one hidden unit on a fine grid."""
    X = digits[:5, 20:28]
    rbm = RBM(1, hidden="gaussian", max_iter=3, learning_rate_init=0.01, **SMALL).fit(digits[:, 20:28])
    h = np.linspace(-30, 30, 20001)[:, None]
    expected = -logsumexp(-(energy(rbm, X, h) + (h[:, 0] ** 2 / 2)[None]), axis=1)
    found = rbm.free_energy(X)
    np.testing.assert_allclose(found - found[0], expected - expected[0], rtol=1e-4, atol=1e-5)


def test_free_energy_is_that_of_scikit_learn(rbm: RBM, digits: np.ndarray) -> None:
    other = BernoulliRBM(20)
    other.components_ = rbm.coefs_[0].T
    other.intercept_hidden_, other.intercept_visible_ = rbm.intercepts_
    np.testing.assert_allclose(rbm.free_energy(digits), other._free_energy(digits), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(rbm.transform(digits), other.transform(digits), rtol=1e-4, atol=1e-6)


def test_rows_and_forms_do_not_matter(rbm: RBM, digits: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rbm.free_energy(digits)
    assert whole.dtype == np.float32
    for i in (0, 7, 599):
        assert same_rows(rbm.free_energy(digits[i : i + 1]), whole[i])
    np.testing.assert_allclose(rbm.free_energy(sp.csr_array(digits)), whole, rtol=1e-5, atol=1e-4)
    monkeypatch.setattr("narrows.models.base.BLOCK_BYTES", 1 << 16)
    assert same_rows(rbm.free_energy(ArraySource(digits)), whole)


def test_labels_and_targets_are_ignored(rbm: RBM, digits: np.ndarray) -> None:
    again = RBM(20, max_iter=5, **SMALL).fit(digits, digits[:, :3])
    np.testing.assert_array_equal(again.coefs_[0], rbm.coefs_[0])
    assert again.score(digits, digits[:, :3]) == rbm.score(digits)


def test_all_epochs_are_run(digits: np.ndarray) -> None:
    rbm = RBM(4, max_iter=25, learning_rate_init=1e-9, **SMALL).fit(digits)
    assert rbm.n_iter_ == 25


@pytest.mark.parametrize("persistent", [False, True])
def test_learning(persistent: bool, digits: np.ndarray) -> None:
    """Data become more likely than noise, and are rebuilt better."""
    rbm = RBM(64, persistent=persistent, max_iter=20, **SMALL).fit(digits)
    noise = np.random.default_rng(0).permuted(digits, axis=1)
    assert rbm.score(digits) > rbm.score(noise) + 20
    assert rbm.history_["loss"][-1] < 0.85 * rbm.history_["loss"][0]
    errors = ((rbm.reconstruct(digits) - digits) ** 2).sum(axis=1).mean()
    assert errors < 0.9 * ((digits - digits.mean(axis=0)) ** 2).sum(axis=1).mean()


def test_first_epochs_have_their_momentum(digits: np.ndarray) -> None:
    def weights(**params: Any) -> np.ndarray:
        return RBM(4, max_iter=2, **(SMALL | params)).fit(digits).coefs_[0]

    base = weights(momentum=0.9, initial_momentum=0.3, momentum_epochs=5)
    np.testing.assert_array_equal(base, weights(momentum=0.3, momentum_epochs=0))
    np.testing.assert_array_equal(base, weights(momentum=0.3, momentum_epochs=1, initial_momentum=0.3))
    assert (base != weights(momentum=0.9, initial_momentum=0.3, momentum_epochs=1)).any()


def test_samples_are_those_of_the_model(digits: np.ndarray) -> None:
    """Of four binary units, each state as often as the sum over all says."""
    X = (digits[:, [10, 20, 28, 36]] > 0.4).astype(np.float32)
    rbm = RBM(3, max_iter=40, learning_rate_init=0.1, **SMALL).fit(X)
    v = np.array(list(itertools.product((0.0, 1.0), repeat=4)), np.float32)
    p = np.exp(-rbm.free_energy(v).astype(np.float64))
    found = rbm.sample(4000, 60, random_state=1, noise=True)
    assert set(np.unique(found)) == {0.0, 1.0}
    counts = np.bincount((found @ [8, 4, 2, 1]).astype(int), minlength=16)
    assert stats.chisquare(counts, 4000 * p / p.sum()).pvalue > 1e-3
    np.testing.assert_array_equal(rbm.sample(9, 5, random_state=1), rbm.sample(9, 5, random_state=1))
    means = rbm.sample(9, 5, random_state=1)
    assert ((means > 0) & (means < 1)).all()


def test_samples_do_not_depend_on_blocks(rbm: RBM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on blocks of rows nor on the number of steps whose random numbers are drawn at once."""
    whole = rbm.sample(50, 4, random_state=3)
    monkeypatch.setattr(type(rbm), "_block_rows", lambda self: 7)
    monkeypatch.setattr("narrows.models.rbm._DRAWN_VALUES", 1)
    assert same_rows(rbm.sample(50, 4, random_state=3), whole)


def test_chains_are_saved_and_go_on(digits: np.ndarray, tmp_path: Path) -> None:
    params = SMALL | {"persistent": True, "warm_start": True, "momentum": 0.0, "initial_momentum": 0.0}
    whole = RBM(8, max_iter=4, **params).fit(digits)
    first = RBM(8, max_iter=2, **params).fit(digits)
    np.testing.assert_array_equal(RBM(8, max_iter=2, **params).fit(digits).fit(digits).coefs_[0], whole.coefs_[0])
    first.save(tmp_path / "m.safetensors")
    again = narrows.load(tmp_path / "m.safetensors")
    chain = again._network.state["chain"]
    assert chain.shape == (100, 8)
    np.testing.assert_array_equal(chain, first._network.state["chain"])
    assert (chain != 0.5).all()
    with pytest.raises(ValueError, match="0 persistent chains cannot continue from 100: keep batch_size"):
        first.set_params(persistent=False).fit(digits)


class _Cut(Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_epoch_end(self, progress: Any) -> bool | None:
        if progress.epoch == self.epochs:
            raise KeyboardInterrupt
        return None


@pytest.mark.parametrize("persistent", [False, True])
def test_a_resumed_fit_has_the_same_bits(persistent: bool, digits: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"

    def make() -> RBM:
        return RBM(8, persistent=persistent, max_iter=4, **SMALL)

    whole = make().fit(digits)
    with pytest.raises(KeyboardInterrupt):
        make().fit(digits, checkpoint=Checkpoint(path), callbacks=[_Cut(2)])
    resumed = make().fit(digits, checkpoint=Checkpoint(path, resume="require"))
    for name, value in whole._network.parameters.items():
        np.testing.assert_array_equal(resumed._network.state[name], value, err_msg=name)


@pytest.mark.parametrize("persistent", [False, True])
def test_threads_and_a_source_give_the_same_bits(persistent: bool, digits: np.ndarray) -> None:
    if BACKEND != "cpp":
        pytest.skip("promised by the C++ backend")
    params = {"max_iter": 2, "persistent": persistent} | SMALL
    one = RBM(70, **params).fit(digits)
    for other in (RBM(70, **(params | {"n_threads": 3})).fit(digits), RBM(70, **params).fit(ArraySource(digits))):
        np.testing.assert_array_equal(one.coefs_[0], other.coefs_[0])


@pytest.mark.parametrize(
    "call", ["fit", "partial_fit", "source", "transform", "transform source", "reconstruct", "free_energy", "score"]
)
def test_values_outside_0_1_are_refused(call: str, rbm: RBM, digits: np.ndarray) -> None:
    X = digits.copy()
    X[9, 2] = 1.5
    refused = {
        "fit": lambda: RBM(4, **SMALL).fit(X),
        "partial_fit": lambda: RBM(4, **SMALL).partial_fit(X),
        "source": lambda: RBM(4, **SMALL).fit(ArraySource(X), block_bytes=2000),
        "transform": lambda: rbm.transform(X),
        "transform source": lambda: rbm.transform(ArraySource(X)),
        "reconstruct": lambda: rbm.reconstruct(sp.csr_array(X)),
        "free_energy": lambda: rbm.free_energy(X),
        "score": lambda: rbm.score(X),
    }
    wanted = r"X: 1.5 in row 9, column 2; .*visible='bernoulli'\) needs values in \[0, 1\]"
    with pytest.raises(ValueError, match=wanted) as e:
        refused[call]()
    assert "\n" not in str(e.value)
    RBM(4, visible="gaussian", learning_rate_init=1e-3, max_iter=1, **SMALL).fit(X)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"visible": "poisson"}, ValueError, "visible='poisson' must be one of bernoulli, gaussian"),
        ({"hidden": 3}, TypeError, "hidden=3 must be one of bernoulli, gaussian"),
        ({"n_gibbs": 0}, ValueError, "n_gibbs=0 must be at least 1"),
        ({"persistent": "yes"}, TypeError, "persistent='yes' must be True or False"),
        ({"initial_momentum": 1.0}, ValueError, r"initial_momentum=1.0 must be in \[0, 1\)"),
    ],
)
def test_bad_parameters(params: dict[str, Any], error: type[Exception], message: str, digits: np.ndarray) -> None:
    with pytest.raises(error, match=message):
        RBM(4, **(SMALL | params)).fit(digits)


# --- DeepAutoencoder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_machines_are_unrolled(tied: bool, digits: np.ndarray) -> None:
    """With a learning rate of nothing, the whole is what its layers were, one by one."""
    deep = DeepAutoencoder(
        3, loss="bce", tied_weights=tied, early_stopping=False, **(DEEP | {"learning_rate_init": 1e-12, "max_iter": 1})
    ).fit(digits)
    shapes = [(64, 16), (16, 8), (8, 3)]
    assert [W.shape for W in deep.coefs_] == [*shapes, *(s[::-1] for s in shapes[::-1])]
    codes, machines = digits, []
    for i, (hidden, rate) in enumerate((("bernoulli", 0.1), ("bernoulli", 0.1), ("gaussian", 0.001))):
        machine = RBM(
            shapes[i][1],
            hidden=hidden,
            learning_rate_init=rate,
            alpha=0.02,
            sample_visible=False,
            max_iter=3,
            **(SMALL | {"random_state": 1 + i}),
        ).fit(codes)
        codes = machine.transform(codes)
        machines.append(machine)
    for i, machine in enumerate(machines):
        np.testing.assert_allclose(deep.coefs_[i], machine.coefs_[0], atol=1e-5)
        np.testing.assert_allclose(deep.coefs_[5 - i], machine.coefs_[0].T, atol=1e-5)
        np.testing.assert_allclose(deep.intercepts_[i], machine.intercepts_[0], atol=1e-5)
        np.testing.assert_allclose(deep.intercepts_[5 - i], machine.intercepts_[1], atol=1e-5)
        assert deep.pretrain_history_[i]["loss"] == pytest.approx(machine.history_["loss"], rel=1e-6)
    np.testing.assert_allclose(deep.transform(digits), codes, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pretrain", ["rbm", "greedy"])
def test_pretraining_helps(pretrain: str, digits: np.ndarray) -> None:
    """After as many epochs of the whole, a deep network of sigmoids has learned more."""
    params = DEEP | {"loss": "bce", "max_iter": 10, "early_stopping": False, "hidden_layer_sizes": (64, 32, 16)}
    none = DeepAutoencoder(8, pretrain=None, **params).fit(digits)
    rate = 0.03 if pretrain == "greedy" else None
    params |= {"pretrain_max_iter": 15, "pretrain_learning_rate": rate}
    some = DeepAutoencoder(8, pretrain=pretrain, **params).fit(digits)
    assert some.history_["loss"][0] < none.history_["loss"][0]
    assert some.score(digits) > none.score(digits) + 1
    assert len(some.pretrain_history_) == 4
    assert len(some.pretrain_history_[0]["loss"]) == 15


@pytest.mark.parametrize(
    "params",
    [
        {"pretrain": "greedy", "corruption": "masking", "corruption_level": 0.3},
        {"pretrain": "greedy", "tied_weights": True, "activation": "relu"},
        {"pretrain": "greedy", "loss": "gaussian", "activation": "gelu", "solver": "sgd"},
        {"pretrain": "greedy", "loss": "multinomial", "hidden_layer_sizes": ()},
        {"hidden_layer_sizes": (), "loss": "bce"},
        {"latent_activation": "sigmoid", "precision": "float64"},
        {"hidden_layer_sizes": 8, "precision": "bfloat16"},
    ],
    ids=str,
)
def test_any_layers(params: dict[str, Any], digits: np.ndarray) -> None:
    deep = DeepAutoencoder(3, **(DEEP | params)).fit(digits)
    assert np.isfinite(deep.transform(digits)).all()
    again = DeepAutoencoder(3, **(DEEP | params)).fit(digits)
    assert (deep.transform(digits) == again.transform(digits)).all()


@pytest.mark.parametrize("pretrain", ["rbm", "greedy"])
def test_blocks_of_codes(pretrain: str, digits: np.ndarray) -> None:
    """Codes that do not fit are made block by block; what is learned is as good."""
    params = DEEP | {"loss": "bce", "pretrain": pretrain, "max_iter": 10}
    whole = DeepAutoencoder(3, **params).fit(digits)
    source = DeepAutoencoder(3, **params).fit(ArraySource(digits))
    assert (source.transform(digits) == whole.transform(digits)).all()
    blocks = DeepAutoencoder(3, **params).fit(ArraySource(digits), block_bytes=8000)
    assert blocks.score(digits) == pytest.approx(whole.score(digits), rel=0.1)
    csr = DeepAutoencoder(3, **params).fit(sp.csr_array(digits))
    assert csr.score(digits) == pytest.approx(whole.score(digits), rel=0.02)


def test_weights_and_pairs(digits: np.ndarray) -> None:
    weight = np.r_[np.ones(300), np.zeros(300)]
    other = np.r_[digits[:300], 1 - digits[300:]]
    a, b = (
        DeepAutoencoder(3, loss="bce", **DEEP).fit(D, sample_weight=weight, X_val=digits[:50]) for D in (digits, other)
    )
    assert (a.transform(digits) == b.transform(digits)).all()
    noisy = np.clip(digits + np.random.default_rng(0).normal(0, 0.2, digits.shape), 0, 1).astype(np.float32)
    for pretrain in ("rbm", "greedy"):
        DeepAutoencoder(3, loss="bce", pretrain=pretrain, **DEEP).fit(noisy, digits)
    with pytest.raises(ValueError, match="needs a target as wide as X: y has 64 columns, X has 32"):
        DeepAutoencoder(3, loss="bce", **DEEP).fit(digits[:, :32], digits)
    DeepAutoencoder(3, loss="bce", pretrain="greedy", **DEEP).fit(digits[:, :32], digits)


def test_going_on_does_not_pretrain_again(digits: np.ndarray) -> None:
    deep = DeepAutoencoder(3, loss="bce", warm_start=True, early_stopping=False, **DEEP).fit(digits)
    history, before = deep.pretrain_history_, deep.score(digits)
    deep.fit(digits)
    assert deep.pretrain_history_ is history
    assert deep.n_iter_ == 6
    assert deep.score(digits) > before


def test_stopped_and_resumed(digits: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    whole = DeepAutoencoder(3, loss="bce", **DEEP).fit(digits)
    with pytest.raises(Interrupted, match="wall time"):
        DeepAutoencoder(3, loss="bce", **DEEP).fit(digits, checkpoint=Checkpoint(path, stop=lambda: "wall time"))
    assert not path.exists(), "nothing to go on from while layers are pretrained"
    with pytest.raises(KeyboardInterrupt):
        DeepAutoencoder(3, loss="bce", **DEEP).fit(digits, checkpoint=Checkpoint(path), callbacks=[_Cut(1)])
    resumed = DeepAutoencoder(3, loss="bce", **DEEP).fit(digits, checkpoint=Checkpoint(path, resume="require"))
    assert (resumed.transform(digits) == whole.transform(digits)).all()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"pretrain": "magic"}, "pretrain='magic' must be one of rbm, greedy, None"),
        ({"activation": "relu"}, "pretrain='rbm' needs activation='sigmoid' \\(not 'relu'\\)"),
        ({"latent_activation": "tanh"}, "latent_activation 'linear' or 'sigmoid' \\(not 'tanh'\\)"),
        ({"loss": "multinomial"}, "an output that is linear or sigmoid \\(not 'softmax'\\)"),
        ({"decoder_layer_sizes": (4,)}, r"decoder_layer_sizes=\(4,\) must be None or \(8, 16\)"),
        ({"pretrain_max_iter": 0}, "pretrain_max_iter=0"),
        ({"loss": "mse", "output_activation": "sigmoid"}, r"in row 0, column 2; .*visible='bernoulli'"),
    ],
)
def test_refused(params: dict[str, Any], message: str, digits: np.ndarray) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        DeepAutoencoder(3, **(DEEP | params)).fit(16 * digits)
    assert "\n" not in str(raised.value)


def test_divergence_names_the_layer() -> None:
    wild = DEEP | {"hidden_layer_sizes": (), "pretrain_learning_rate": 1e6, "pretrain_max_iter": 20}
    with pytest.raises(DivergenceError, match="pretraining layer 1 of 1, pretrain_learning_rate=1e"):
        DeepAutoencoder(2, **wild).fit(low_rank())
