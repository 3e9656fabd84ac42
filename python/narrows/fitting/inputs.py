"""The arguments of an estimator's methods, checked and made a `Table`.

- Arrays come out finite, in float32 or float64, and CSR canonical. Whole numbers take the network's dtype.
- Arrays on a GPU come out as CuPy arrays there, other libraries' arrays on the CPU as NumPy arrays.
- Widths and feature names must be those of the fit, and values must lie in the domain of the loss.
- Labels of batches come out as numbers.
- A source's shape and names are checked here, its values when they are read.
- The caller's objects never change. The estimator changes only with `reset`, in the way of scikit-learn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import get_config
from sklearn.exceptions import DataConversionWarning
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data

from ..backends import resolve
from ..data.checks import check_finite, check_representable, warn_collapsed
from ..data.source import Source
from ..plan.losses import LOSSES
from ..plan.spec import Precision
from ..rows.arrays import check_numbers, placing
from ..rows.devices import check_together, copying, gpu_array, host_array, like, on_gpu
from ..rows.shifted import Shifted
from ..rows.sparse import sound_rows
from .conditions import condition_numbers, declared_labels, read_labels
from .protocol import Estimator
from .table import Table

__all__ = [
    "check_X",
    "check_codes",
    "encoding_table",
    "make_table",
    "read_condition",
    "rebuilding_table",
    "scoring_table",
    "training_table",
    "validation_table",
    "wants_frames",
]


def check_X(estimator: Estimator, X: Any, *, reset: bool, min_samples: int = 1, name: str = "X") -> Any:
    """X as a finite float array, a canonical CSR of floats, or a Source; Shifted rows stay as they are.

    `name` is the name of X in messages.
    """
    if isinstance(X, Shifted) and not reset and X.shape[1] == estimator.n_features_in_:
        return X
    X = estimator._flat_rows(host_array(X, name), name, reset)
    if isinstance(X, Source):
        with _calling(name):
            return _checked_source(estimator, X, reset, min_samples)
    dtype = _dtype_of(estimator, reset)
    if on_gpu(X):
        X = _gpu_rows(X, name, dtype, min_samples)
        _check_backend(estimator, name, X, trains=reset)
        with _calling(name):
            validate_data(estimator, X, reset=reset, skip_check_array=True)
    else:
        _check_kind(X, name)
        with _calling(name), placing(X, name):
            X = validate_data(
                estimator, X, reset=reset, accept_sparse="csr", ensure_min_samples=min_samples, **_LENIENT
            )
            X = X.astype(np.float64) if X.dtype == object else X
        given, X = X, sound_rows(X, name, dtype)
        if reset and dtype == np.float32:
            warn_collapsed(given, estimator._feature_names, name)
    check_finite(X, source=name, columns=estimator._feature_names)
    return X


def _dtype_of(estimator: Estimator, fits: bool = False) -> np.dtype[Any]:
    """The dtype of the network: of the fitted one, or of the one that is to be fitted."""
    network = None if fits else vars(estimator).get("_network")
    return Precision.of(estimator.precision).dtype if network is None else network.dtype


_LENIENT: dict[str, Any] = {"dtype": "numeric", "ensure_all_finite": False}
"""Arguments of scikit-learn's checks: `sound_rows` and `check_finite` then say more about dtypes and values."""


def _sound(X: Any, name: str, dtype: np.dtype[Any], *, columns: Any = None, sparse: bool = False) -> Any:
    """Rows besides X as finite sound rows (see `rows.sparse.sound_rows`), on their device."""
    if on_gpu(X):
        X = _gpu_rows(X, name, dtype)
    else:
        _check_kind(X, name)
        with placing(X, name):
            X = check_array(X, accept_sparse="csr" if sparse else False, input_name=name, **_LENIENT)
        X = sound_rows(X, name, dtype)
    check_finite(X, source=name, columns=columns)
    return X


def _checked_source(estimator: Estimator, X: Source, reset: bool, min_samples: int) -> Source:
    name = type(estimator).__name__
    if X.shape[0] < min_samples:
        raise ValueError(
            f"Found a source with {X.shape[0]} sample(s) while a minimum of {min_samples} is required by {name}."
        )
    names = None if X.var_names is None else np.asarray([str(n) for n in X.var_names], dtype=object)
    if reset:
        estimator.n_features_in_ = X.shape[1]
        vars(estimator).pop("feature_names_in_", None)
        if names is not None:
            estimator.feature_names_in_ = names
    elif X.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {X.shape[1]} features, but {name} is expecting {estimator.n_features_in_} features as input"
        )
    else:
        known = estimator._feature_names
        if known is not None and names is not None and not np.array_equal(known, names):
            at = int(np.argmax(known != names))
            raise ValueError(
                f"{X.name}: the feature names should match those of fit: column {at} is {names[at]!r}, "
                f"not {known[at]!r}"
            )
    return X


@contextlib.contextmanager
def _calling(name: str) -> Iterator[None]:
    """Put `name` before messages that speak of X, if the argument has another name."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if name == "X":
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: {error}") from None


def check_codes(estimator: Estimator, Z: Any) -> Any:
    """Z as a finite float array or a Source, with one column for each latent."""
    if not isinstance(Z, Source):
        if on_gpu(Z):
            _check_backend(estimator, "Z", Z)
        dtype = estimator._network.dtype
        Z = _sound(host_array(Z, "Z"), "Z", dtype)
        check_representable(Z, dtype, source="Z")
    if Z.shape[1] != estimator._network.spec.n_components:
        expected = estimator._network.spec.n_components
        raise ValueError(f"Z has {Z.shape[1]} columns, but {type(estimator).__name__} has {expected} components")
    return Z


def training_table(
    estimator: Estimator,
    X: Any,
    y: Any,
    sample_weight: ArrayLike | None,
    batch: Any,
    *,
    reset: bool,
    declared: bool = False,
    min_samples: int = 1,
) -> Table:
    """The arguments of `fit` as a table.

    With `reset` the estimator takes over the number and names of the features and the labels of batches. With
    `declared` it also takes over the categories of a categorical that no row has.
    """
    X = check_X(estimator, X, reset=reset, min_samples=min_samples)
    n_rows = int(X.shape[0])
    target, columns = _read_target(estimator, y, n_rows)
    weight = _read_weight(sample_weight, X)
    if reset:
        vars(estimator).pop("batches_", None)
        if batch is not None:
            known = np.unique(read_labels(batch, n_rows))
            further = declared_labels(batch) if declared else None
            estimator.batches_ = known if further is None else np.unique(further)
    return make_table(estimator, X, target, weight, read_condition(estimator, batch, n_rows), columns)


def make_table(
    estimator: Estimator,
    X: Any,
    target: Any,
    weight: NDArray[np.float64] | None,
    condition: NDArray[np.float32] | None = None,
    columns: Any = None,
    names: tuple[str, str] = ("X", "y"),
) -> Table:
    """A checked table to train on; `columns` names the target's columns, `names` X and the target in messages."""
    check_together(X, X if target is None else target, names[1])
    loss = LOSSES[estimator.loss].loss
    domain = loss if target is None else estimator._input_loss(loss, separate_target=True)
    dtype = Precision.of(estimator.precision).dtype
    known = estimator._feature_names
    table = Table(X, target, weight, condition, (domain, loss), (known, columns), names=names, dtype=dtype, warns=True)
    table.check()
    return table


def validation_table(estimator: Estimator, X_val: Any, table: Table) -> Table:
    """The argument `X_val` of `fit` as a table; `table` is the training table."""
    if isinstance(X_val, tuple) and len(X_val) not in (2, 3):
        raise ValueError(f"X_val has {len(X_val)} parts; pass (X_val, y_val) or (X_val, y_val, batch_val)")
    X, y, batch = (*X_val, None)[:3] if isinstance(X_val, tuple) else (X_val, None, None)
    X = check_X(estimator, X, reset=False, name="X_val")
    check_together(table.X, X, "X_val")
    target, columns = _read_target(estimator, y, int(X.shape[0]), ("X_val", "y_val"))
    if (target is None) != (table.target is None):
        raise ValueError("X_val must be a pair (X_val, y_val) if, and only if, fit has a y to reconstruct")
    if target is not None and target.shape[1] != table.target.shape[1]:
        raise ValueError(f"y_val has {target.shape[1]} columns, y has {table.target.shape[1]}")
    if (batch is None) != (table.condition is None):
        raise ValueError(
            "X_val must be a tuple (X_val, y_val, batch_val) if, and only if, fit has a batch; y_val is None if "
            "fit has no y"
        )
    condition = read_condition(estimator, batch, int(X.shape[0]), "batch_val")
    found = make_table(estimator, X, target, None, condition, columns, ("X_val", "y_val"))
    # The network takes shifted rows only if it is trained on them.
    return dataclasses.replace(found, implicit=table.shifted)


def encoding_table(estimator: Estimator, X: Any) -> Table:
    """Rows to encode."""
    X, spec = check_X(estimator, X, reset=False), estimator._network.spec
    domain = estimator._input_loss(spec.loss, separate_target=not spec.log_normalize)
    columns = estimator._feature_names, None
    table = Table(X, domains=(domain, spec.loss), columns=columns, dtype=estimator._network.dtype)
    table.check()
    return table


def rebuilding_table(estimator: Estimator, X: Any, batch: Any) -> Table:
    """Rows to encode and to decode, with the conditions of the decoder."""
    table = encoding_table(estimator, X)
    return dataclasses.replace(table, condition=read_condition(estimator, batch, table.n_rows))


def read_condition(estimator: Estimator, batch: Any, n_rows: int, name: str = "batch") -> NDArray[np.float32] | None:
    """The number of each row's batch, shape (n_rows, 1); None if the decoder is not conditioned.

    Raises
    ------
    ValueError
        There are labels and the estimator was fitted without batches, or the other way round.
    """
    known = estimator._conditions
    if known is None:
        if batch is None:
            return None
        raise ValueError(
            f"{name} is given to a {type(estimator).__name__} that was fitted without batches: leave {name} out"
        )
    if batch is None:
        raise ValueError(
            f"this {type(estimator).__name__} was fitted with batches, and its output depends on them: give {name}, "
            "one label for each row or one label for all"
        )
    return condition_numbers(read_labels(batch, n_rows, name), known, n_rows, name)


def scoring_table(estimator: Estimator, X: Any, y: Any, batch: Any) -> Table:
    """Rows to score, with the target of their reconstruction if it is not X."""
    X = check_X(estimator, X, reset=False)
    spec = estimator._network.spec
    target, columns = _read_target(estimator, y, int(X.shape[0]))
    if target is None and spec.n_outputs != spec.n_features:
        raise ValueError(
            f"the reconstruction has {spec.n_outputs} columns and X has {spec.n_features}: pass the y to compare with"
        )
    if target is not None and target.shape[1] != spec.n_outputs:
        raise ValueError(f"y has {target.shape[1]} columns, but the reconstruction has {spec.n_outputs}")
    check_together(X, X if target is None else target, "y")
    domain = spec.loss if target is None else estimator._input_loss(spec.loss, separate_target=not spec.log_normalize)
    condition = read_condition(estimator, batch, int(X.shape[0]))
    names, dtype = (estimator._feature_names, columns), estimator._network.dtype
    table = Table(X, target, None, condition, (domain, spec.loss), names, dtype=dtype)
    table.check()
    return table


def _read_target(estimator: Estimator, y: Any, n_rows: int, names: tuple[str, str] = ("X", "y")) -> tuple[Any, Any]:
    """The target y and the names of its columns, if it is a frame; None for no y, or for class labels.

    `names` are the names of X and y in messages.
    """
    if y is None:
        return None, None
    name = names[1]
    y = estimator._flat_rows(host_array(y, name), name)
    shape = y.shape if hasattr(y, "shape") else np.asarray(y).shape
    if len(shape) == 1:
        return None, None
    columns = getattr(y, "columns", None)
    if len(shape) == 2 and shape[1] == 1 and estimator.n_features_in_ > 1:
        warnings.warn(
            f"{name} has shape {tuple(shape)} and is what the network reconstructs, one column: pass class labels in "
            f"one dimension, {name}.ravel(), which are ignored",
            DataConversionWarning,
            stacklevel=2,
        )
    if not isinstance(y, Source):
        y = _sound(y, name, _dtype_of(estimator), columns=columns, sparse=True)
    if y.shape[0] != n_rows:
        raise ValueError(f"{name} has {y.shape[0]} rows, but {names[0]} has {n_rows}")
    return y, columns


def _read_weight(sample_weight: Any, X: Any) -> NDArray[np.float64] | None:
    """Weights of the rows, in float64, on the device of X."""
    if sample_weight is None:
        return None
    n_rows = int(X.shape[0])
    weight: NDArray[np.float64] = like(host_array(sample_weight, "sample_weight"), X, np.float64)
    if weight.shape != (n_rows,):
        raise ValueError(f"sample_weight has shape {weight.shape}, but X has {n_rows} rows: pass shape ({n_rows},)")
    usable = np.isfinite(weight) & (weight >= 0)
    if not usable.all():
        at = int(usable.argmin())
        raise ValueError(f"sample_weight: {float(weight[at]):g} at row {at} is negative or not finite")
    return weight


def wants_frames(estimator: Estimator) -> bool:
    """Whether `set_output`, or scikit-learn's configuration, makes `transform` return data frames."""
    chosen = getattr(estimator, "_sklearn_output_config", {}).get("transform", get_config()["transform_output"])
    return bool(chosen != "default")


def _gpu_rows(X: Any, name: str, dtype: np.dtype[Any], min_samples: int = 1) -> Any:
    """An array on a GPU, checked; messages are those of scikit-learn for arrays on the CPU."""
    X = gpu_array(X, name)
    if X.ndim != 2:
        raise ValueError(f"{name}: expected 2D array, got {X.ndim}D array instead: shape {tuple(X.shape)}")
    if X.dtype.kind not in "biuf":
        raise ValueError(f"{name}: numbers expected, got dtype {X.dtype}")
    for n, least, what in ((X.shape[0], min_samples, "sample(s)"), (X.shape[1], 1, "feature(s)")):
        if n < least:
            raise ValueError(
                f"Found array with {n} {what} (shape={tuple(X.shape)}) while a minimum of {least} is required."
            )
    with copying():
        return sound_rows(X, name, dtype)


def _check_backend(estimator: Estimator, name: str, X: Any, *, trains: bool = False) -> None:
    """Raise TypeError for rows on a GPU if the estimator's network runs on the CPU."""
    network = None if trains else vars(estimator).get("_network")
    backend = resolve(estimator.backend, announce=False) if network is None else network.backend
    if backend != "cuda":
        raise TypeError(
            f"{name} is on a GPU and {type(estimator).__name__} runs on backend={backend!r}: pass "
            f"cupy.asnumpy({name}), or fit with backend='cuda'"
        )


def _check_kind(X: Any, name: str) -> None:
    """Raise for objects that scikit-learn would misread, and say what to pass."""
    if isinstance(X, str | os.PathLike):
        raise TypeError(f"{name} is a path: pass narrows.data.open({name})")
    if hasattr(X, "obs_names") and hasattr(X, "var_names") and hasattr(X, "X"):
        raise TypeError(
            f"{name} is an AnnData: pass its X, or narrows.data.as_source of it (of its file if it is backed), or "
            "use narrows.scanpy.autoencoder"
        )
    check_numbers(X, name)
