"""`BaseAutoencoder`: what every estimator does: fit, apply, score, save, with scikit-learn's conventions.

- Inputs and global random state never change.
- A failed fit leaves the estimator as it was, or fitted with the parameters of a whole epoch (see `fitting.run`).
- Programs do the arithmetic on data; this module only averages.

A subclass brings its parameters, their checks (`_constraints`, `_check_together`), and its network (`_spec`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from ..backends import State
from ..fitting.feed import split_rows, validator
from ..fitting.files import write_model
from ..fitting.inputs import (
    check_codes,
    encoding_table,
    read_condition,
    rebuilding_table,
    scoring_table,
    training_table,
    validation_table,
    wants_frames,
)
from ..fitting.network import Network
from ..fitting.parameters import (
    Check,
    boolean,
    check_parameters,
    choice,
    integer,
    randomness,
    real,
    row_order,
    verbosity,
)
from ..fitting.run import identity_of, rollback_on_error, seed_of, train
from ..fitting.spec_of import DataFacts
from ..fitting.start import Start, initial_state
from ..fitting.table import BLOCK_BYTES, Table
from ..plan.losses import LOSSES, Loss
from ..plan.plan import Mode, Plan
from ..plan.spec import NetworkSpec, Precision
from ..rows.devices import to_host
from ..rows.shifted import dense
from ..training import Callback, Checkpoint, Options, Progress
from ..training.callbacks import as_callbacks

__all__ = ["BaseAutoencoder"]


class BaseAutoencoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """The methods of all estimators, and the checks of the parameters that all of them have."""

    variational = False
    """Whether the code is a distribution; training draws from it."""
    counts_input = False
    """Whether X holds counts even if there is a separate target."""

    _rebuilds_y = True
    """Whether `fit` takes a y to reconstruct; if not, y is ignored."""

    _constraints: ClassVar[dict[str, Check]] = {
        "n_components": integer(1),
        "alpha": real("[0, inf)"),
        "weight_l1": real("[0, inf)"),
        "learning_rate_init": real("(0, inf)"),
        "momentum": real("[0, 1)"),
        "learning_rate": choice(("constant", "cosine", "plateau")),
        "batch_size": integer(1),
        "max_iter": integer(1),
        "shuffle": row_order,
        "warm_start": boolean,
        "random_state": randomness,
        "verbose": verbosity,
        "precision": choice(("float32", "float64", "bfloat16", "tf32")),
        "n_threads": integer(1, optional=True),
    }
    """The check of each parameter. `backends.resolve` checks `backend`."""

    n_components: Any
    alpha: Any
    weight_l1: Any
    learning_rate_init: Any
    momentum: Any
    learning_rate: Any
    batch_size: Any
    max_iter: Any
    shuffle: Any
    warm_start: Any
    random_state: Any
    verbose: Any
    precision: Any
    backend: Any
    n_threads: Any
    loss: Any

    _network: Network
    _seed: int
    _step: int
    n_features_in_: int
    feature_names_in_: NDArray[Any]
    n_iter_: int
    history_: dict[str, list[float]]
    loss_: float
    best_loss_: float
    metadata_: dict[str, Any]
    batches_: NDArray[Any]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        loss = LOSSES.get(self.loss) if isinstance(self.loss, str) else None
        if loss is not None and loss.of_counts:
            # scikit-learn knows whole numbers from 0 as categories.
            tags.input_tags.positive_only = tags.input_tags.categorical = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return "_network" in vars(self)

    def set_params(self, **params: Any) -> Self:
        """Set parameters of the estimator.

        A fitted network keeps the parameters that it was trained with. Only `backend` and `n_threads` take effect at
        once: the network runs with them from now on.

        Parameters
        ----------
        **params
            By name.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            There is no such parameter.
        """
        super().set_params(**params)
        if self.__sklearn_is_fitted__():
            self._network.run_on(self.backend, self.n_threads)
        return self

    # --- what a subclass brings (see fitting.protocol) ------------------------------------------------------

    def _check_together(self) -> None:
        """Raise ValueError for parameters that do not go together."""

    def _check_conditioned(self) -> None:
        """Raise ValueError if the decoder cannot be conditioned on batches."""
        raise ValueError(f"the decoder of {type(self).__name__} cannot be conditioned on batches: leave batch out")

    def _spec(self, data: DataFacts) -> NetworkSpec:
        """The network that the parameters describe, for data with these facts."""
        raise NotImplementedError

    def _flat_rows(self, X: Any, name: str, learns: bool = False) -> Any:
        """X with one dimension for all features, if it has more; `learns` if X is to be fitted."""
        return X

    def _input_loss(self, loss: Loss, *, separate_target: bool) -> Loss:
        """The loss whose domain X must lie in; squared error if X may hold any number."""
        return loss if loss.info.of_counts and (self.counts_input or not separate_target) else Loss.MSE

    def _validation_part(self) -> float | None:
        """The part of the rows that `fit` holds out for validation; None for no rows."""
        return None

    def _options(self, seed: int) -> Options:
        """How `fit` trains."""
        return Options(
            max_iter=int(self.max_iter),
            seed=seed,
            learning_rate=self.learning_rate,
            learning_rate_init=float(self.learning_rate_init),
        )

    def _first_state(self, start: Start) -> State:
        """The parameters that training begins with."""
        return initial_state(start.spec, start.seed, Precision.of(self.precision).dtype)

    def _row_losses(
        self, apply: Callable[..., NDArray[Any]], spec: NetworkSpec, X: Any, target: Any, condition: Any
    ) -> NDArray[Any]:
        """The loss of each row, without penalties (see `fitting.feed.RowLosses`)."""
        return apply(X, Mode.SCORE, target, condition)[:, 0]

    # --- fitted attributes ----------------------------------------------------------------------------------

    @property
    def _feature_names(self) -> NDArray[Any] | None:
        """`feature_names_in_`, or None if X had no names."""
        return vars(self).get("feature_names_in_")

    @property
    def _conditions(self) -> NDArray[Any] | None:
        """`batches_`, or None if the decoder is not conditioned on batches."""
        return vars(self).get("batches_")

    def _fitted_network(self) -> Network:
        if "_network" not in vars(self):
            raise AttributeError(f"this {type(self).__name__} is not fitted yet")
        return self._network

    @property
    def coefs_(self) -> list[NDArray[Any]]:
        """Weights of each layer, shape (n_in, n_out), read-only; tied ones are transposed views.

        After a fit with batches the decoder's first weight has one row for each component and one for each batch.
        """
        return self._fitted_network().coefs()

    @property
    def intercepts_(self) -> list[NDArray[Any]]:
        """Biases of each layer, shape (n_out,), read-only."""
        return self._fitted_network().intercepts()

    @property
    def backend_(self) -> str:
        """Name of the backend that runs the network."""
        return self._fitted_network().backend

    @property
    def plan_(self) -> Plan:
        """The plan that was trained."""
        return self._fitted_network().plan

    @property
    def _n_features_out(self) -> int:
        return self._network.spec.n_components

    # --- fitting --------------------------------------------------------------------------------------------

    def fit(
        self,
        X: Any,
        y: Any = None,
        *,
        sample_weight: ArrayLike | None = None,
        batch: Any = None,
        X_val: Any = None,
        callbacks: Sequence[Callback | Callable[[Progress], Any]] = (),
        checkpoint: Checkpoint | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> Self:
        """Train the autoencoder.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)
            A source that does not fit into `block_bytes` is trained on block by block. Arrays on a GPU (CuPy arrays
            and CSR, or arrays that CuPy takes by DLPack) stay there; they need the backend "cuda".
        y : array, CSR, frame or Source of shape (n_samples, n_outputs), optional
            What to reconstruct, if it is not X itself: for example clean rows for noisy ones. `corruption` is then not
            applied. One-dimensional y (class labels) is ignored.
        sample_weight : array of shape (n_samples,), optional
            Not negative; scaled to mean one over the training rows.
        batch : array-like of str or int, shape (n_samples,), or one label for all rows, optional
            The label of each row's batch, from a list, an array, a column of a frame or a categorical. The decoder is
            conditioned on it: it gets one more input for each batch (one-hot), so the code need not hold the batch. The
            encoder does not see it. `batches_` holds the sorted labels; methods that decode then take a `batch` too.
            Not with tied weights, and not for convolutional and deep autoencoders and RBMs.
        X_val : as X, or a tuple (X_val, y_val) or (X_val, y_val, batch_val), optional
            Rows for ``history_["val_loss"]`` and early stopping, in place of rows of X. Give a tuple if y or batch is
            given; y_val is None if y is not given.
        callbacks : sequence of narrows.training.Callback or functions
            A function gets the `narrows.training.Progress` after each epoch; if it returns True, training ends.
            ``progress.model`` is the estimator at that moment.
        checkpoint : narrows.training.Checkpoint, optional
            Save the training under a path, and resume from there. Data in memory are recognised by a hash of their
            content, a source by its shape and dtype only.
        block_bytes : int
            Bytes of a source that are in memory at once.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            A parameter or the data cannot be used.
        DivergenceError
            The loss is not finite. If one epoch was completed, the estimator is fitted with its parameters.
        ResumeError
            The checkpoint belongs to another run, or it is required and does not exist.
        """
        with rollback_on_error(self):
            check_parameters(self)
            if not isinstance(checkpoint, Checkpoint | None):
                raise TypeError(f"checkpoint={checkpoint!r} must be a narrows.training.Checkpoint")
            followers = as_callbacks(callbacks)
            again = bool(self.warm_start) and self.__sklearn_is_fitted__()
            part = self._validation_part() if X_val is None else None
            min_samples = 1 if part is None else 2
            y = y if self._rebuilds_y else None
            table = training_table(self, X, y, sample_weight, batch, reset=not again, min_samples=min_samples)
            validation = None if X_val is None else validation_table(self, X_val, table)
            identity: dict[str, Any] = {}
            saved = None
            if checkpoint is not None:
                identity = identity_of(self, table, validation, checkpoint, block_bytes)
                saved = checkpoint.read()
            seed = self._seed if again else seed_of(self, saved)
            if saved is not None:
                saved.check(identity | {"seed": seed})
            identity["seed"] = seed
            table = table.loaded(block_bytes)
            rows = np.arange(table.n_rows)
            validate = None
            if part is not None:
                rows, held_rows = split_rows(table.n_rows, part, seed)
                validate = validator(table, held_rows, block_bytes, self._row_losses)
            elif validation is not None:
                validate = validator(validation.loaded(block_bytes), None, block_bytes, self._row_losses)
            train(
                self,
                table,
                rows,
                self._options(seed),
                again=again,
                validate=validate,
                callbacks=followers,
                checkpoint=checkpoint,
                identity=identity,
                saved=saved,
                block_bytes=block_bytes,
            )
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None, *, batch: Any = None) -> Self:
        """Train for one pass over some rows, from the present parameters and optimiser state.

        There is no validation, and the learning rate is `learning_rate_init`. The first call initialises the network.
        The optimiser starts afresh where its state is not kept: see `warm_start`.

        Parameters
        ----------
        X, y, sample_weight, batch
            As for `fit`. The labels of the first call are the batches. If they are a pandas categorical, all its
            categories are, so that later calls may bring rows of other batches.

        Returns
        -------
        self
        """
        with rollback_on_error(self):
            check_parameters(self)
            again = self.__sklearn_is_fitted__()
            y = y if self._rebuilds_y else None
            table = training_table(self, X, y, sample_weight, batch, reset=not again, declared=True)
            table = table.loaded(BLOCK_BYTES)
            options = self._options(self._seed if again else seed_of(self, None))
            options = dataclasses.replace(options, max_iter=1, learning_rate="constant", monitor=None)
            train(self, table, np.arange(table.n_rows), options, again=again)
        return self

    # --- applying -------------------------------------------------------------------------------------------

    def transform(self, X: Any) -> NDArray[Any]:
        """Encode rows.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_components)
            Of X's dtype if that is float32 or float64, else the network's. All methods that return one number for each
            row or feature return a CuPy array if X is on a GPU.
        """
        check_is_fitted(self)
        codes = self._apply(encoding_table(self, X), Mode.ENCODE)
        # set_output may ask for a frame, and frames are on the CPU.
        return to_host(codes) if wants_frames(self) else codes

    def inverse_transform(self, Z: Any, *, batch: Any = None) -> NDArray[Any]:
        """Decode latent codes.

        Parameters
        ----------
        Z : array, data frame or Source of shape (n_samples, n_components)
        batch : array-like of shape (n_samples,), or one label for all rows, optional
            As for `reconstruct`.

        Returns
        -------
        ndarray of shape (n_samples, n_outputs)
        """
        check_is_fitted(self)
        Z = check_codes(self, Z)
        condition = read_condition(self, batch, int(Z.shape[0]))
        table = Table(Z, condition=condition, implicit=False, dtype=self._network.dtype)
        return self._apply(table, Mode.DECODE)

    def reconstruct(self, X: Any, *, batch: Any = None) -> NDArray[Any]:
        """Encode and decode rows.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)
        batch : array-like of shape (n_samples,), or one label for all rows, optional
            The batch of each row. Required after a fit with batches, and only then. One label for all rows gives what
            the rows would be in that batch.

        Returns
        -------
        ndarray of shape (n_samples, n_outputs)
            Dense, of X's dtype if that is float32 or float64, else the network's.
        """
        check_is_fitted(self)
        return self._apply(rebuilding_table(self, X, batch), Mode.RECONSTRUCT)

    def score_samples(self, X: Any, y: Any = None, *, batch: Any = None) -> NDArray[Any]:
        """Minus the loss of each row, a sum over its features without penalties: higher is better.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)
        y : the same, of shape (n_samples, n_outputs), optional
            What to compare the reconstruction with; X itself by default. Needed after a fit with a y of another width.
            One-dimensional y is ignored.
        batch : array-like of shape (n_samples,), or one label for all rows, optional
            As for `reconstruct`.

        Returns
        -------
        ndarray of shape (n_samples,)
        """
        check_is_fitted(self)
        return -self._apply(scoring_table(self, X, y, batch), Mode.SCORE)[:, 0]

    def score(self, X: Any, y: Any = None, *, batch: Any = None) -> float:
        """Minus the mean loss of the rows: higher is better.

        Parameters
        ----------
        X, y, batch
            As for `score_samples`.
        """
        return float(self.score_samples(X, y, batch=batch).mean(dtype=np.float64))

    def feature_errors(self, X: Any, y: Any = None, *, batch: Any = None) -> NDArray[np.float64]:
        """Mean squared error of the reconstruction of each feature.

        Parameters
        ----------
        X, y, batch
            As for `score_samples`.

        Returns
        -------
        ndarray of float64, shape (n_outputs,)
        """
        check_is_fitted(self)
        table = scoring_table(self, X, y, batch)
        total: Any = 0.0
        for part in table.blocks(self._block_rows()):
            wanted = part.X if part.target is None else part.target
            rebuilt = self._network.apply(part.X, Mode.RECONSTRUCT, condition=part.condition).astype(np.float64)
            total = total + ((rebuilt - dense(wanted)) ** 2).sum(axis=0)
        mean: NDArray[np.float64] = total / table.n_rows
        return mean

    def latent_sensitivity(self, X: Any, *, batch: Any = None) -> NDArray[np.float64]:
        """How much each latent moves each feature.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)
        batch : array-like of shape (n_samples,), or one label for all rows, optional
            As for `reconstruct`.

        Returns
        -------
        ndarray of float64, shape (n_components, n_outputs)
            The absolute derivative of the reconstruction by the latent, averaged over the rows.
        """
        from ..fitting.sensitivity import absolute_jacobian

        check_is_fitted(self)
        table, spec = rebuilding_table(self, X, batch), self._network.spec
        total = np.zeros((spec.n_components, spec.n_outputs))
        for part in table.blocks(self._block_rows()):
            codes = to_host(self._network.apply(part.X, Mode.ENCODE))
            total += absolute_jacobian(spec, self.coefs_, self.intercepts_, codes, part.condition)
        return total / table.n_rows

    def _apply(self, table: Table, mode: Mode) -> NDArray[Any]:
        dtype = table.result_dtype
        network = self._network

        def run(block: Any, target: Any, condition: Any) -> NDArray[Any]:
            if mode is Mode.SCORE:
                wanted = block if target is None else target
                return self._row_losses(network.apply, network.spec, block, wanted, condition)[:, None]
            return network.apply(block, mode, condition=condition)

        if table.in_memory:
            return run(table.X, table.target, table.condition).astype(dtype, copy=False)
        out: NDArray[Any] | None = None
        at = 0
        for block, target, _, condition in table.blocks(max(1, BLOCK_BYTES // max(1, table.row_bytes))):
            part = run(block, target, condition)
            if out is None:
                out = np.empty((table.n_rows, part.shape[1]), dtype)
            out[at : at + len(part)] = part
            at += len(part)
        assert out is not None
        return out

    def _block_rows(self) -> int:
        """Rows for which a few dense float64 blocks of the widest layer fit into a block's bytes."""
        widest = max(max(layer.n_in, layer.n_out) for layer in self._network.spec.layers)
        return max(1, BLOCK_BYTES // (32 * widest))

    # --- files ----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator to a model file, which `narrows.load` reads.

        The file holds parameters, never code. It is written completely or not at all. It does not hold the state of the
        optimiser: a loaded estimator that is trained further starts its optimiser afresh.

        Parameters
        ----------
        path : path
            Conventionally ends in ``.safetensors``.

        Raises
        ------
        OutputError
            The file cannot be written.
        ValueError
            Parameters that change the network were set after the fit.
        """
        check_is_fitted(self)
        write_model(self, path)
