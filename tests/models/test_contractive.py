"""ContractiveAutoencoder: it contracts, keeps its bits, and refuses what has no meaning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray

from estimator_cases import SMALL, low_rank
from narrows import Autoencoder, ContractiveAutoencoder, functional

Array = NDArray[Any]


def mean_norm(ae: Autoencoder, X: Array) -> float:
    n = ae.plan_.spec.latent
    names = [layer.activation.name.lower() for layer in ae.plan_.spec.layers[:n]]
    return functional.contractive_penalty(X, ae.coefs_[:n], ae.intercepts_[:n], names, grads=False).value


@pytest.mark.parametrize("hidden", [(), (8,), (8, 6)])
@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_a_contractive_autoencoder_contracts(hidden: tuple[int, ...], method: str) -> None:
    X = low_rank()
    params = SMALL | {"max_iter": 60, "learning_rate_init": 0.01, "activation": "tanh", "early_stopping": False}
    params |= {"hidden_layer_sizes": hidden, "contractive_method": method}
    free, held = (ContractiveAutoencoder(6, contractive=c, **params).fit(X) for c in (0, 1.0))
    assert "contractive" not in free.history_
    assert mean_norm(held, X) < 0.5 * mean_norm(free, X)
    history = held.history_
    np.testing.assert_allclose(history["penalty"], history["contractive"])
    if method == "exact":
        # Of the last epoch's steps, and of the network they led to
        assert history["contractive"][-1] == pytest.approx(mean_norm(held, X), rel=0.3)


def test_second_order() -> None:
    X = low_rank()
    params = SMALL | {"max_iter": 40, "hidden_layer_sizes": (7,), "activation": "softplus", "n_corruptions": 2}
    ae = ContractiveAutoencoder(4, contractive_hessian=2.0, **params).fit(X)
    parts = [np.array(ae.history_[name]) for name in ("contractive", "contractive_hessian")]
    np.testing.assert_allclose(ae.history_["penalty"], sum(parts))
    assert all((part > 0).all() for part in parts)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"contractive": -0.1}, r"contractive=-0.1 must be in \[0, inf\)"),
        ({"contractive_hessian": -1}, r"contractive_hessian=-1 must be in \[0, inf\)"),
        ({"contractive_method": "sampled"}, "contractive_method='sampled' must be one of exact, hutchinson"),
        ({"n_probes": 0}, "n_probes=0 must be at least 1"),
        ({"n_corruptions": 0}, "n_corruptions=0 must be at least 1"),
        ({"hessian_std": 0}, r"hessian_std=0 must be in \(0, inf\)"),
        ({"dropout": 0.2, "hidden_layer_sizes": (8,)}, "contractive=0.1, contractive_hessian=0.0 with dropout=0.2"),
        ({"hidden_layer_sizes": (9, 8, 7, 6)}, "at most 4 layers, not 5"),
    ],
)
def test_bad_parameters(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContractiveAutoencoder(2, **(SMALL | params)).fit(low_rank())


def test_dropout_in_the_decoder_alone_is_fine() -> None:
    ContractiveAutoencoder(2, decoder_layer_sizes=(6,), tied_weights=False, dropout=0.3, **SMALL).fit(low_rank())


def test_training_keeps_the_bits(cpp: str) -> None:
    X = np.random.default_rng(0).random((200, 40), dtype=np.float32)
    one, two, three = (
        ContractiveAutoencoder(5, hidden_layer_sizes=(70,), contractive_hessian=0.1, **(SMALL | {"n_threads": n})).fit(
            X
        )
        for n in (1, 2, 3)
    )
    for other in (two, three):
        assert all((u == v).all() for u, v in zip(one.coefs_, other.coefs_, strict=True))


def test_sparse_input_trains_as_dense() -> None:
    X = low_rank() * (np.random.default_rng(0).random((200, 12)) < 0.5)
    dense, sparse = (ContractiveAutoencoder(3, hidden_layer_sizes=(6,), **SMALL).fit(D) for D in (X, sp.csr_array(X)))
    np.testing.assert_allclose(dense.transform(X), sparse.transform(X), rtol=1e-5)
    assert dense.history_["contractive"] == pytest.approx(sparse.history_["contractive"], rel=1e-5)
