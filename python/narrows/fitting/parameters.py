"""What each parameter of an estimator may be, and what the parameters may be together.

Promises: a bad value is one line naming the parameter, the value and the choices; TypeError for a value of
the wrong type, ValueError for one out of range. Never: changes a parameter.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..plan.geometry import PADDINGS
from ..plan.losses import LOSSES, Loss, LossInfo
from ..plan.ops import JACOBIAN_LAYERS
from ..plan.spec import ACTIVATIONS, Activation, Corruption

__all__ = [
    "check_parameters",
    "decoder_sizes",
    "hidden_sizes",
    "output_activation",
    "pairs_by_layer",
    "plain_parameters",
]

Check = Callable[[str, Any], None]

UNITS = {"bernoulli": Activation.SIGMOID, "gaussian": Activation.LINEAR}
"""Stochastic units, and the activation that gives their means."""
CORRUPTIONS = {c.name.lower(): c for c in Corruption}
HIDDEN = tuple(name for name, a in ACTIVATIONS.items() if a not in (Activation.SOFTMAX, Activation.EXP))
OUTPUT = ("auto", *ACTIVATIONS)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)


def integer(low: int) -> Check:
    def check(name: str, value: Any) -> None:
        if not _is_integer(value):
            raise TypeError(f"{name}={value!r} must be an integer of at least {low}")
        if value < low:
            raise ValueError(f"{name}={value!r} must be at least {low}")

    return check


def real(interval: str, *, optional: bool = False) -> Check:
    """A number in an interval written as in mathematics: ``"[0, 1)"``; None too if `optional`."""
    low, high = (float(part) for part in interval[1:-1].split(","))
    or_none = " or None" if optional else ""

    def check(name: str, value: Any) -> None:
        if optional and value is None:
            return
        if not _is_real(value):
            raise TypeError(f"{name}={value!r} must be a number in {interval}{or_none}")
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):
            raise ValueError(f"{name}={value!r} must be in {interval}{or_none}")

    return check


def choice(options: Sequence[str], *, optional: bool = False) -> Check:
    listed = ", ".join((*options, "None") if optional else options)

    def check(name: str, value: Any) -> None:
        if optional and value is None:
            return
        if not isinstance(value, str):
            raise TypeError(f"{name}={value!r} must be one of {listed}")
        if value not in options:
            raise ValueError(f"{name}={value!r} must be one of {listed}")

    return check


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={value!r} must be True or False")


def row_order(name: str, value: Any) -> None:
    if not (isinstance(value, bool | np.bool_) or (isinstance(value, str) and value == "blocks")):
        raise TypeError(f"{name}={value!r} must be True, False or 'blocks'")


def verbosity(name: str, value: Any) -> None:
    if not isinstance(value, numbers.Integral | np.bool_) or value < 0:
        raise TypeError(f"{name}={value!r} must be 0 (silent) or 1 (one line per epoch)")


def sizes(name: str, value: Any) -> None:
    hidden_sizes(name, value)


def optional_sizes(name: str, value: Any) -> None:
    if value is not None:
        hidden_sizes(name, value)


def threads(name: str, value: Any) -> None:
    if value is not None:
        integer(1)(name, value)


def randomness(name: str, value: Any) -> None:
    if value is None or isinstance(value, np.random.RandomState | np.random.Generator):
        return
    if not _is_integer(value):
        raise TypeError(f"{name}={value!r} must be None, an integer, a RandomState or a Generator")
    if not 0 <= value < 2**64:
        raise ValueError(f"{name}={value!r} must be in [0, 2**64)")


def image_shape(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str) or not all(map(_is_integer, value)):
        raise TypeError(f"{name}={value!r} must be (height, width, channels), (length, channels) or None")
    if len(value) not in (2, 3) or any(n < 1 for n in value):
        raise ValueError(f"{name}={value!r} must be (height, width, channels), (length, channels) or None")


def filters(name: str, value: Any) -> None:
    if not hidden_sizes(name, value):
        raise ValueError(f"{name}={value!r} must have an item for each convolution, and one at least")


def steps(name: str, value: Any) -> None:
    """An integer, or an item for each layer: an integer or a pair."""
    wrong = f"{name}={value!r} must be a positive integer, or have an integer or a pair of them for each layer"
    items = [value] if _is_integer(value) else value
    if isinstance(items, str) or not isinstance(items, Sequence | np.ndarray):
        raise TypeError(wrong)
    for item in items:
        pair = [item] if _is_integer(item) else item
        if isinstance(pair, str) or not isinstance(pair, Sequence | np.ndarray) or not all(map(_is_integer, pair)):
            raise TypeError(wrong)
        if len(pair) not in (1, 2) or (pair is item and len(pair) != 2) or any(n < 1 for n in pair):
            raise ValueError(wrong)


CHECKS: Mapping[str, Check] = {
    "n_components": integer(1),
    "hidden_layer_sizes": sizes,
    "decoder_layer_sizes": optional_sizes,
    "activation": choice(HIDDEN),
    "latent_activation": choice(HIDDEN),
    "output_activation": choice(OUTPUT),
    "likelihood": choice([name for name, loss in LOSSES.items() if loss.of_counts]),
    "link": choice(("softmax", "exp")),
    "dispersion": choice(("gene", "gene-cell")),
    "loss": choice(tuple(LOSSES)),
    "huber_delta": real("(0, inf)"),
    "tied_weights": boolean,
    "corruption": choice(tuple(CORRUPTIONS), optional=True),
    "corruption_level": real("[0, inf)"),
    "dropout": real("[0, 1)"),
    "contractive": real("[0, inf)"),
    "contractive_method": choice(("exact", "hutchinson")),
    "n_probes": integer(1),
    "contractive_hessian": real("[0, inf)"),
    "n_corruptions": integer(1),
    "hessian_std": real("(0, inf)"),
    "activity_l1": real("[0, inf)"),
    "kl_sparsity": real("[0, inf)"),
    "sparsity_target": real("(0, 1)"),
    "sparse_decoder": choice(("auto", "gram", "dense")),
    "alpha": real("[0, inf)"),
    "weight_l1": real("[0, inf)"),
    "solver": choice(("sgd", "adam", "adamw")),
    "learning_rate_init": real("(0, inf)"),
    "momentum": real("[0, 1)"),
    "beta_1": real("[0, 1)"),
    "beta_2": real("[0, 1)"),
    "epsilon": real("(0, inf)"),
    "clip_norm": real("(0, inf)", optional=True),
    "learning_rate": choice(("constant", "cosine", "plateau")),
    "batch_size": integer(1),
    "max_iter": integer(1),
    "shuffle": row_order,
    "early_stopping": boolean,
    "validation_fraction": real("(0, 1)"),
    "n_iter_no_change": integer(1),
    "tol": real("[0, inf)"),
    "warm_start": boolean,
    "random_state": randomness,
    "verbose": verbosity,
    "precision": choice(("float32", "float64", "bfloat16", "tf32")),
    "n_threads": threads,
    "beta": real("[0, inf)"),
    "kl_warmup": integer(0),
    "decoder_variance": real("(0, inf)"),
    "image_shape": image_shape,
    "filters": filters,
    "kernel_size": steps,
    "strides": steps,
    "pooling": steps,
    "padding": choice(PADDINGS),
    "visible": choice(tuple(UNITS)),
    "hidden": choice(tuple(UNITS)),
    "n_gibbs": integer(1),
    "persistent": boolean,
    "sample_visible": boolean,
    "initial_momentum": real("[0, 1)"),
    "momentum_epochs": integer(0),
    "pretrain": choice(("rbm", "greedy"), optional=True),
    "pretrain_max_iter": integer(1),
    "pretrain_learning_rate": real("(0, inf)", optional=True),
    "pretrain_batch_size": integer(1),
    "pretrain_alpha": real("[0, inf)"),
}
"""`backend` is missing: `backends.resolve` judges it. An estimator need not have those from `beta` on."""


def pairs_by_layer(name: str, value: Any, n_layers: int, signal: bool) -> list[tuple[int, int]]:
    """Height and width for each layer, from an integer or an item for each layer; of a signal the height is 1."""
    items = [value] * n_layers if _is_integer(value) else list(value)
    if len(items) != n_layers:
        raise ValueError(f"{name}={value!r} has {len(items)} items, filters are {n_layers}")
    pairs = [(1 if signal else int(i), int(i)) if _is_integer(i) else (int(i[0]), int(i[1])) for i in items]
    if signal and any(height != 1 for height, _ in pairs):
        raise ValueError(f"{name}={value!r}: a signal has height 1")
    return pairs


def hidden_sizes(name: str, value: Any) -> tuple[int, ...]:
    """Widths of hidden layers from an integer or a sequence of them."""
    listed = [value] if _is_integer(value) else value
    if isinstance(listed, str) or not isinstance(listed, Sequence | np.ndarray):
        raise TypeError(f"{name}={value!r} must be a positive integer or a sequence of them")
    for size in listed:
        if not _is_integer(size):
            raise TypeError(f"{name}={value!r} must hold positive integers, not {size!r}")
        if size < 1:
            raise ValueError(f"{name}={value!r} must hold positive integers, not {size!r}")
    return tuple(int(size) for size in listed)


def decoder_sizes(estimator: Any) -> tuple[int, ...]:
    """Widths of the decoder's hidden layers: as given, or the encoder's in reverse."""
    hidden = hidden_sizes("hidden_layer_sizes", estimator.hidden_layer_sizes)
    if estimator.decoder_layer_sizes is None:
        return hidden[::-1]
    return hidden_sizes("decoder_layer_sizes", estimator.decoder_layer_sizes)


def output_activation(estimator: Any) -> Activation:
    """The output layer's activation, ``"auto"`` resolved."""
    name = estimator.output_activation
    return LOSSES[estimator.loss].links[0] if name == "auto" else ACTIVATIONS[name]


def check_parameters(estimator: Any) -> None:
    """Check every parameter of an estimator, those that a subclass fixes included, and their combinations."""
    convolutional = hasattr(estimator, "filters")
    for name, check in CHECKS.items():
        if name == "n_components" and convolutional and estimator.n_components is None:
            continue
        if hasattr(estimator, name):
            check(name, getattr(estimator, name))
    loss = LOSSES[estimator.loss]
    output = estimator.output_activation
    if output != "auto" and output not in loss.link_names:
        raise ValueError(
            f"output_activation={output!r} does not go with loss={estimator.loss!r}; "
            f"choose from auto, {', '.join(loss.link_names)}"
        )
    if estimator.variational and not loss.likelihood:
        raise ValueError(
            f"loss={estimator.loss!r} is not a likelihood, which a variational decoder needs; choose from "
            + ", ".join(name for name, known in LOSSES.items() if known.likelihood)
        )
    if estimator.variational and estimator.loss != "mse" and estimator.decoder_variance != 1.0:
        raise ValueError(
            f"decoder_variance={estimator.decoder_variance!r} is of the decoder of loss='mse': leave it at 1.0 with "
            f"loss={estimator.loss!r}"
        )
    if loss.of_counts:
        _check_counts(estimator, loss)
    level = estimator.corruption_level
    if estimator.corruption in ("masking", "salt_and_pepper") and level > 1:
        raise ValueError(
            f"corruption_level={level!r} must be in [0, 1]: a probability for corruption={estimator.corruption!r}"
        )
    if estimator.kl_sparsity > 0 and ACTIVATIONS[estimator.latent_activation] is not Activation.SIGMOID:
        raise ValueError(
            f"kl_sparsity needs latent_activation='sigmoid', whose outputs are rates, "
            f"not {estimator.latent_activation!r}"
        )
    hidden = hidden_sizes("hidden_layer_sizes", estimator.hidden_layer_sizes)
    if convolutional and estimator.image_shape is not None:
        n_features = int(np.prod(estimator.image_shape))
        estimator._layers(n_features, n_features)
    _check_contractive(estimator, hidden)
    if estimator.sparse_decoder == "gram" and (
        loss.loss is not Loss.MSE or output_activation(estimator) is not Activation.LINEAR or estimator.tied_weights
    ):
        raise ValueError(
            f"sparse_decoder='gram' needs loss='mse', a linear output and untied weights, not loss={estimator.loss!r}, "
            f"output_activation={estimator.output_activation!r}, tied_weights={estimator.tied_weights!r}"
        )
    if getattr(estimator, "pretrain", None) is not None:
        _check_pretraining(estimator, hidden)
    if estimator.tied_weights and decoder_sizes(estimator) != hidden[::-1]:
        raise ValueError(
            f"tied_weights=True needs a decoder that mirrors the encoder: decoder_layer_sizes="
            f"{estimator.decoder_layer_sizes!r} must be None or {hidden[::-1]!r}"
        )


def _check_counts(estimator: Any, loss: LossInfo) -> None:
    """What likelihoods of counts ask of an estimator."""
    several = loss.heads > 1 or (loss.dispersion and getattr(estimator, "dispersion", "gene") == "gene-cell")
    given = f"loss={estimator.loss!r}" + ("" if loss.heads > 1 else ", dispersion='gene-cell'")
    if several and estimator.tied_weights:
        raise ValueError(f"{given}: the output layer has several numbers for each feature: set tied_weights=False")
    if several and hasattr(estimator, "filters"):
        raise ValueError(f"{given} is for dense output layers, not for convolutions; 'poisson' and 'nb' take them")
    if estimator.corruption == "salt_and_pepper":
        raise ValueError(f"corruption='salt_and_pepper' has no meaning for counts, loss={estimator.loss!r}")


def _check_pretraining(estimator: Any, hidden: tuple[int, ...]) -> None:
    """What `DeepAutoencoder` asks of its layers."""
    if decoder_sizes(estimator) != hidden[::-1]:
        raise ValueError(
            f"pretrain={estimator.pretrain!r} needs a decoder that mirrors the encoder: decoder_layer_sizes="
            f"{estimator.decoder_layer_sizes!r} must be None or {hidden[::-1]!r}"
        )
    activation, latent, output = pretrained_activations(estimator)
    if estimator.pretrain == "rbm" and (
        (hidden and activation is not Activation.SIGMOID) or not {latent, output} <= {*UNITS.values()}
    ):
        raise ValueError(
            f"pretrain='rbm' needs activation='sigmoid' (not {estimator.activation!r}), latent_activation 'linear' or "
            f"'sigmoid' (not {estimator.latent_activation!r}) and an output that is linear or sigmoid (not "
            f"{output.name.lower()!r}); pretrain='greedy' takes any"
        )


def pretrained_activations(estimator: Any) -> tuple[Activation, Activation, Activation]:
    """Those of the hidden layers, the latents and the output."""
    hidden, latent = (ACTIVATIONS[name] for name in (estimator.activation, estimator.latent_activation))
    return hidden, latent, output_activation(estimator)


def _check_contractive(estimator: Any, hidden: tuple[int, ...]) -> None:
    """What the contractive penalties ask of the encoder."""
    exact = estimator.contractive_hessian > 0 or (estimator.contractive > 0 and estimator.contractive_method == "exact")
    convolutions = hidden_sizes("filters", getattr(estimator, "filters", ()))
    depth = len(convolutions) + len(hidden) + (estimator.n_components is not None)
    given = f"contractive={estimator.contractive!r}, contractive_hessian={estimator.contractive_hessian!r}"
    if (exact or estimator.contractive > 0) and estimator.dropout > 0 and depth > 1:
        raise ValueError(
            f"{given} with dropout={estimator.dropout!r} and hidden_layer_sizes={estimator.hidden_layer_sizes!r}: the "
            "penalty is of an encoder that drops nothing; set dropout=0"
            + (" or hidden_layer_sizes=()" if not convolutions else "")
        )
    if exact and convolutions:
        raise ValueError(
            f"{given}, filters={estimator.filters!r}: contractive_method='exact' is for dense encoders, not for "
            "convolutions; contractive_method='hutchinson' takes them"
        )
    if exact and depth > JACOBIAN_LAYERS:
        raise ValueError(
            f"{given}: the exact penalty is for encoders of up to {JACOBIAN_LAYERS} layers, not {depth} "
            f"(hidden_layer_sizes={estimator.hidden_layer_sizes!r}); contractive_method='hutchinson' takes any number"
        )


def _plain_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(_plain_tuple(i) if isinstance(i, list | tuple | np.ndarray) else int(i) for i in value)


def check_takes_batches(estimator: Any) -> None:
    """Raise ValueError if the decoder of a (checked) estimator cannot be told the batches of rows."""
    if not estimator._takes_batches or estimator.tied_weights:
        why = " with tied_weights=True: set it to False, or" if estimator._takes_batches else ":"
        raise ValueError(f"the decoder of {type(estimator).__name__} cannot be told batches{why} leave batch out")


def plain_parameters(estimator: Any) -> dict[str, Any]:
    """The parameters as JSON-able values; a generator becomes None, because its draw is not a parameter."""
    plain: dict[str, Any] = {}
    for name, value in estimator.get_params(deep=False).items():
        if isinstance(value, np.random.RandomState | np.random.Generator):
            value = None
        elif isinstance(value, np.generic):
            value = value.item()
        elif isinstance(value, list | tuple | np.ndarray):
            value = _plain_tuple(value)
        plain[name] = value
    return plain
