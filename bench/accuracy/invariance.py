"""What penalties and corruption do to codes: MNIST, one layer of 1000 sigmoid units (Rifai et al., ICML 2011, table 1).

Promises: the last 10000 training images choose the strength of each penalty or corruption, and when fine-tuning stops.
Nothing uses the test images before the end. `real_data.py` runs this experiment.

Each autoencoder has tied weights, sigmoid outputs and the cross-entropy as loss. The autoencoders differ in one
parameter. Figures: the norm of the Jacobian of the codes of the test images, and the errors of two classifiers. One is
a logistic regression on the codes; the other is the encoder with a softmax layer, trained further together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from bench.data.images import Split
from narrows import Autoencoder
from narrows.backends import Hyper, compile_plan, resolve
from narrows.functional import contractive_penalty
from narrows.plan.lowering import lower
from narrows.plan.plan import Mode
from narrows.plan.spec import Activation, Data, LayerSpec, Loss, NetworkSpec

Floats = NDArray[np.float32]

MODEL: dict[str, Any] = {
    "n_components": 1000,
    "hidden_layer_sizes": (),
    "latent_activation": "sigmoid",
    "loss": "bce",
    "tied_weights": True,
    "max_iter": 15,
    "early_stopping": False,
    "learning_rate": "cosine",
    "learning_rate_init": 1e-3,
}
METHODS: dict[str, tuple[dict[str, Any], str, tuple[float, ...]]] = {
    "CAE": ({}, "contractive", (0.3, 1.0, 3.0)),
    "DAE, gaussian": ({"corruption": "gaussian"}, "corruption_level", (0.3, 0.5, 0.8)),
    "DAE, masking": ({"corruption": "masking"}, "corruption_level", (0.1, 0.25, 0.5)),
    "AE, weight decay": ({}, "alpha", (1.0, 3.0, 10.0)),
    "AE": ({}, "contractive", (0.0,)),
}
"""Fixed parameters of each method, the parameter to choose, and its candidates."""

HELD = 10_000
"""Number of training images, the last ones, that choose."""
INVERSE_STRENGTH = 0.1
"""C of the logistic regression."""
FINE_TUNING: dict[str, Any] = {"epochs": 20, "batch": 100, "learning_rate": 1e-3}


def jacobian_norm(model: Any, X: Floats) -> float:
    """Mean over rows of the Frobenius norm of d code / d input."""
    W, b = [np.asarray(model.coefs_[0])], [np.asarray(model.intercepts_[0])]
    squares = [contractive_penalty(x[None], W, b, "sigmoid", grads=False).value for x in X]
    return float(np.sqrt(squares).mean())


def linear_error(model: Any, data: Split, test: Split) -> float:
    """Share of test images that a logistic regression on the codes gets wrong."""
    classifier = LogisticRegression(C=INVERSE_STRENGTH, max_iter=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # all models get the same number of steps
        classifier.fit(model.transform(data.X), data.labels)
    return 1 - float(classifier.score(model.transform(test.X_held), test.labels_held))


def fine_tuned_error(model: Any, data: Split, test: Split, seed: int) -> dict[str, float]:
    """Share of wrong answers of the encoder with a softmax layer, trained together.

    Returns
    -------
    dict
        Of the first epoch with the least validation error: that error, the error on the test images, and its number.
    """
    n_in, n_code = model.coefs_[0].shape
    layers = (LayerSpec(n_in, n_code, Activation.SIGMOID), LayerSpec(n_code, 10, Activation.SOFTMAX))
    spec = NetworkSpec(layers, 1, loss=Loss.MULTINOMIAL, data=Data(separate_target=True))
    batch, epochs = FINE_TUNING["batch"], FINE_TUNING["epochs"]
    program = compile_plan(lower(spec, batch), resolve())
    first = {"W0": model.coefs_[0], "b0": model.intercepts_[0]}
    program.load(first | {"W1": np.zeros((n_code, 10)), "b1": np.zeros(10)})
    program.bind(data.X, np.eye(10, dtype=np.float32)[data.labels])
    generator = np.random.default_rng(seed)
    steps = -(-len(data.X) // batch)

    def error(X: Floats, labels: NDArray[np.uint8]) -> float:
        return float((program.apply(X, Mode.RECONSTRUCT).argmax(axis=1) != labels).mean())

    best = {"validation": 1.0, "test": 1.0, "epoch": 0}
    for epoch in range(epochs):
        rates = FINE_TUNING["learning_rate"] * (1 - np.arange(epoch * steps, (epoch + 1) * steps) / (epochs * steps))
        program.train(generator.permutation(len(data.X)), Hyper(seed, epoch * steps, rates))
        validation = error(data.X_held, data.labels_held)
        if validation < best["validation"]:
            best = {"validation": validation, "test": error(test.X_held, test.labels_held), "epoch": epoch + 1}
    program.close()
    return best


def measure(whole: Split, seeds: int, turn: Callable[[], AbstractContextManager[None]]) -> dict[str, Any]:
    """Choose the strength of each method with seed 0, then measure it with all seeds.

    Parameters
    ----------
    whole : Split
        MNIST, its test images held out.
    seeds : int
    turn : callable
        A context in which the autoencoders of one method are trained and measured.
    """
    cut = len(whole.X) - HELD
    data = Split(whole.X[:cut], whole.labels[:cut], whole.X[cut:], whole.labels[cut:])
    found: dict[str, Any] = {}
    for name, (fixed, parameter, candidates) in METHODS.items():

        def trial(level: float, seed: int, fixed: Any = fixed, parameter: str = parameter) -> tuple[Any, Any, float]:
            start = perf_counter()
            parameters = MODEL | fixed | {parameter: level}
            model = Autoencoder(**parameters, random_state=seed).fit(data.X)
            seconds = perf_counter() - start
            return model, fine_tuned_error(model, data, whole, seed), seconds

        runs = []
        with turn():
            tried = {level: trial(level, 0) for level in candidates}
            chosen = min(candidates, key=lambda level: tried[level][1]["validation"])
            for seed in range(seeds):
                model, tuned, seconds = trial(chosen, seed) if seed else tried[chosen]
                runs.append(
                    {
                        "jacobian_norm": jacobian_norm(model, whole.X_held),
                        "linear_error": linear_error(model, data, whole),
                        "fine_tuned_error": tuned["test"],
                        "validation_error": tuned["validation"],
                        "fine_tuned_epochs": tuned["epoch"],
                        "loss": -model.score(whole.X_held),
                        "seconds": seconds,
                    }
                )
        found[name] = {
            "parameter": parameter,
            "chosen": chosen,
            "validation_error": {str(level): tuned["validation"] for level, (_, tuned, _) in tried.items()},
            "runs": runs,
        }
        print(name, chosen, found[name]["validation_error"], *runs, sep="\n  ", flush=True)
    return {"model": MODEL, "fine_tuning": FINE_TUNING, "seeds": seeds, "methods": found}
