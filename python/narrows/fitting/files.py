"""Estimators as model files.

- A loaded estimator gives the same bits as the saved one.
- A file with a class, parameters or shapes that this version does not know is a `ModelFileError`.
- A file holds no code and no pickle.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from ..backends import BACKENDS
from ..data.normalize import Normalizer
from ..errors import DataError, ModelFileError
from ..machine import thread_count
from ..persistence import load_tensors, save_tensors
from ..plan.spec import NetworkSpec
from .network import Network
from .parameters import check_parameters, plain_parameters
from .protocol import Estimator
from .spec_of import DataFacts

__all__ = ["read_model", "stored_normalizer", "stored_source", "write_model"]

_PARTS = {"class", "params", "fitted", "network", "feature_names", "history", "metadata"}
_SHAPE = {
    "batch", "n_outputs", "corruption_range", "separate_target", "weighted", "library", "gram_decoder", "batches",
    "image_shape",
}  # fmt: skip
"""The parts of a model file, and the facts of its network. The oldest files lack the last three."""

E = TypeVar("E", bound=Estimator)

_NUMBERS = {"n_features_in_": int, "n_iter_": int, "loss_": float, "best_loss_": float, "_seed": int}


def write_model(estimator: Estimator, path: str | os.PathLike[str]) -> None:
    """Write a fitted estimator; see `BaseAutoencoder.save`."""
    network = estimator._network
    _check_as_trained(estimator)
    names = estimator._feature_names
    fitted = {name: kind(getattr(estimator, name)) for name, kind in _NUMBERS.items()}
    meta = {
        "class": type(estimator).__name__,
        "params": plain_parameters(estimator),
        "fitted": fitted,
        "network": {
            "batch": network.batch_rows,
            "n_outputs": network.spec.n_outputs,
            "corruption_range": _corruption_range(network.spec),
            "separate_target": network.spec.data.separate_target,
            "weighted": network.spec.data.weighted,
            "library": network.spec.data.size_sum,
            "gram_decoder": network.spec.form.gram_decoder,
            "batches": estimator.batches_.tolist() if network.spec.data.n_conditions else None,
            "image_shape": vars(estimator).get("image_shape_"),
        },
        "feature_names": None if names is None else [str(name) for name in names],
        "history": estimator.history_,
        "metadata": estimator.metadata_,
    }
    save_tensors(path, network.parameters, meta, kind="model")


def _check_as_trained(estimator: Estimator) -> None:
    """Raise ValueError if parameters that were set after the fit describe another network."""
    check_parameters(estimator)
    spec = estimator._network.spec
    data = DataFacts(
        estimator.n_features_in_,
        spec.n_outputs,
        separate_target=spec.data.separate_target,
        weighted=spec.data.weighted,
        target_density=0.0,
        n_conditions=spec.data.n_conditions,
    )
    if _function(estimator._spec(data)) != _function(spec):
        raise ValueError("parameters that were set after the fit change the network: fit again, or set them back")


def _corruption_range(spec: NetworkSpec) -> tuple[float, float]:
    """The values that salt-and-pepper noise sets; from 0 to 1 if the network has no noise."""
    noise = spec.training.corruption
    return (0.0, 1.0) if noise is None else (float(noise.low), float(noise.high))


def _function(spec: NetworkSpec) -> tuple[Any, ...]:
    """What codes, reconstructions and losses depend on, besides the weights and numbers taken from the data."""
    layers = tuple(dataclasses.replace(layer, dropout=0.0) for layer in spec.layers)
    names = "latent", "loss", "huber_delta", "variational", "cell_dispersion", "log_normalize"
    return layers, *(getattr(spec, name) for name in names)


def stored_normalizer(estimator: Estimator) -> Normalizer:
    """The normalisation that a model file came with; the identity for a model saved from Python without one."""
    state, n_features = estimator.metadata_.get("normalizer"), int(estimator.n_features_in_)
    normalizer = Normalizer.identity(n_features) if state is None else Normalizer.from_dict(state)
    if normalizer.n_features_ != n_features:
        raise DataError(f"the stored normalisation is for {normalizer.n_features_} features, not {n_features}")
    return normalizer


def stored_source(estimator: Estimator) -> dict[str, Any]:
    """The layer, other names and column roles of the data that a fit read, as far as the model file has them."""
    facts = estimator.metadata_.get("source")
    if not isinstance(facts, dict):
        return {}
    return {k: v for k, v in facts.items() if isinstance(v, dict if k == "roles" else str)}


def read_model(path: str | os.PathLike[str], classes: Mapping[str, Callable[..., E]]) -> E:
    """Read an estimator of one of the named `classes`; see `narrows.load`."""
    tensors, meta = load_tensors(path, kind="model")
    try:
        return _restored(tensors, meta, classes)
    except ModelFileError as error:
        raise ModelFileError(f"{os.fspath(path)}: {error}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelFileError(f"{os.fspath(path)}: not a model that this version can read ({text})") from error


def _restored(tensors: Mapping[str, Any], meta: Mapping[str, Any], classes: Mapping[str, Callable[..., E]]) -> E:
    cls = classes.get(meta["class"])
    if cls is None:
        raise ModelFileError(f"holds an unknown estimator {meta['class']!r}; known: {', '.join(classes)}")
    estimator = cls(**meta["params"])
    check_parameters(estimator)
    if estimator.backend not in ("auto", *BACKENDS):
        raise ModelFileError(f"backend is {estimator.backend!r}")
    if estimator.n_threads is not None:
        thread_count(estimator.n_threads)
    fitted, shape = meta["fitted"], meta["network"]
    if not isinstance(fitted, dict) or not isinstance(shape, dict):
        raise ModelFileError("fitted and network must be tables")
    if meta.keys() != _PARTS or not shape.keys() <= _SHAPE:
        raise ModelFileError(f"it has the parts {sorted(meta)} and {sorted(shape)}")
    if fitted.keys() != _NUMBERS.keys():
        raise ModelFileError(f"fitted attributes {sorted(fitted)} instead of {sorted(_NUMBERS)}")
    for name, kind in _NUMBERS.items():
        value = fitted[name]
        finite = (
            name == "best_loss_" or (kind is int and 0 <= value < 2**64) or (kind is float and math.isfinite(value))
        )
        if type(value) is not kind or not finite or value != value:
            raise ModelFileError(f"{name} is {fitted[name]!r}")
    sizes = {
        "batch": shape["batch"],
        "n_outputs": shape["n_outputs"],
        "n_features_in_": fitted["n_features_in_"],
    }
    for name, size in sizes.items():
        if type(size) is not int or not 1 <= size < 2**31:
            raise ModelFileError(f"{name} is {size!r}")
    low, high = shape["corruption_range"]
    if not all(type(x) is float and math.isfinite(x) for x in (low, high)) or low > high:
        raise ModelFileError(f"corruption_range is {shape['corruption_range']!r}")
    for name in ("separate_target", "weighted", "gram_decoder"):
        if type(shape.get(name, False)) is not bool:
            raise ModelFileError(f"{name} is {shape[name]!r}")
    size_sum = shape["library"]
    if type(size_sum) is not float or not 0 < size_sum < np.inf:
        raise ModelFileError(f"library is {size_sum!r}")
    # The oldest model files have neither entry.
    gram, labels = bool(shape.get("gram_decoder", False)), _labels(shape.get("batches"))
    data = DataFacts(
        fitted["n_features_in_"],
        shape["n_outputs"],
        separate_target=bool(shape["separate_target"]),
        weighted=bool(shape["weighted"]),
        target_density=0.0,
        n_conditions=0 if labels is None else len(labels),
    )
    if "image_shape" in meta["params"]:
        # In the oldest files rows without a shape are signals.
        sizes_of = shape.get("image_shape", meta["params"]["image_shape"]) or (fitted["n_features_in_"], 1)
        if any(type(n) is not int or n < 1 for n in sizes_of) or math.prod(sizes_of) != fitted["n_features_in_"]:
            raise ModelFileError(f"image_shape is {sizes_of!r}")
        vars(estimator)["image_shape_"] = tuple(sizes_of)
    spec = estimator._spec(data)
    if gram and not spec.takes_gram_decoder:
        raise ModelFileError("gram_decoder is set, but this network cannot have a Gram decoder")
    noise = spec.training.corruption
    if noise is not None:
        noise = dataclasses.replace(noise, low=float(low), high=float(high))
    spec = dataclasses.replace(
        spec,
        training=dataclasses.replace(spec.training, corruption=noise),
        data=dataclasses.replace(spec.data, size_sum=size_sum),
        form=dataclasses.replace(spec.form, gram_decoder=gram),
    )
    expected = spec.parameter_shapes
    found = {name: array.shape for name, array in tensors.items()}
    if found != expected:
        name = min(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        raise ModelFileError(f"tensor {name} has shape {found.get(name)}, but the parameters need {expected.get(name)}")
    for name, array in tensors.items():
        if array.dtype not in (np.float32, np.float64) or not np.isfinite(array).all():
            raise ModelFileError(f"tensor {name} must hold finite floating-point numbers")
    vars(estimator).update(fitted)
    if labels is not None:
        estimator.batches_ = labels
    names = meta["feature_names"]
    if names is not None:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ModelFileError("feature_names must be a list of strings")
        if len(names) != fitted["n_features_in_"]:
            raise ModelFileError(f"{len(names)} feature names for {fitted['n_features_in_']} features")
        estimator.feature_names_in_ = np.asarray(names, dtype=object)
    history = meta["history"]
    if not all(
        isinstance(v, list) and len(v) == fitted["n_iter_"] and all(type(x) is float for x in v)
        for v in history.values()
    ):
        raise ModelFileError("the history does not have one value for each epoch")
    estimator.history_ = dict(history)
    if not isinstance(meta["metadata"], dict):
        raise ModelFileError("metadata must be a table")
    estimator.metadata_ = meta["metadata"]
    estimator._step = 0
    estimator._network = Network(
        spec,
        shape["batch"],
        dict(tensors),
        precision=estimator.precision,
        requested=estimator.backend,
        n_threads=estimator.n_threads,
    )
    return estimator


def _labels(labels: Any) -> np.ndarray[Any, Any] | None:
    """Labels of batches; they must be sorted and unique, as after a fit."""
    if labels is None:
        return None
    kinds = {type(label) for label in labels} if isinstance(labels, list) else set()
    if kinds not in ({str}, {int}) or labels != sorted(set(labels)):
        raise ModelFileError("batches must be unique, sorted strings or integers")
    return np.array(labels, str if kinds == {str} else np.int64)
