"""What every autoencoder estimator does: fit, apply, score, save; scikit-learn's conventions kept.

Promises: inputs are never changed, nor is global random state. A fit is whole or has not been (see `fitting`).
Never: arithmetic on data beyond averages; programs do that.

Reading order: `BaseAutoencoder`; `inputs` (what a method is given), `fitting` (how it is trained on), `network` (what
is held then), `files`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Self

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
    read_batch,
    rebuilding_table,
    scoring_table,
    training_table,
    validation_table,
    wants_frames,
)
from ..fitting.network import Network
from ..fitting.parameters import check_parameters
from ..fitting.run import identity_of, seed_of, train, whole
from ..fitting.spec_of import dense_layers
from ..fitting.start import begin_counts, initial_state
from ..fitting.table import BLOCK_BYTES, Table
from ..plan.losses import LOSSES
from ..plan.plan import Mode, Plan
from ..plan.spec import Corruption, LayerSpec, Loss, NetworkSpec, Precision
from ..rows.devices import to_host
from ..rows.shifted import dense
from ..training import Callback, Checkpoint, Options

__all__ = ["BaseAutoencoder"]


class BaseAutoencoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """The methods of all autoencoders; a subclass brings the parameters."""

    variational = False
    """Whether the code is a distribution, of which training draws."""
    counts_input = False
    """Whether X holds counts whatever there is to reconstruct."""
    _runs_to_the_end = False
    """Whether the training loss does not say when there is nothing more to learn."""
    _takes_batches = True
    """Whether the decoder can be told the batch of a row."""

    n_components: Any
    max_iter: Any
    batch_size: Any
    shuffle: Any
    solver: Any
    learning_rate: Any
    learning_rate_init: Any
    early_stopping: Any
    validation_fraction: Any
    n_iter_no_change: Any
    tol: Any
    warm_start: Any
    random_state: Any
    verbose: Any
    loss: Any
    precision: Any
    backend: Any
    n_threads: Any

    _network: Network
    _seed: int
    _step: int
    n_features_in_: int
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
        if (loss := LOSSES.get(getattr(self, "loss", ""))) and loss.of_counts:
            # Whole numbers from 0, which scikit-learn knows as categories.
            tags.input_tags.positive_only = tags.input_tags.categorical = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return "_network" in vars(self)

    def set_params(self, **params: Any) -> Self:
        """Set parameters of the estimator.

        Those of a fitted network are as trained, whatever is set, but for `backend` and `n_threads`, which belong to
        the machine: it runs on them from now on.

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

    # --- fitted attributes that are views of the network ----------------------------------------------------

    def _fitted_network(self) -> Network:
        if "_network" not in vars(self):
            raise AttributeError(f"this {type(self).__name__} is not fitted yet")
        return self._network

    @property
    def coefs_(self) -> list[NDArray[Any]]:
        """Weights of each layer, shape (n_in, n_out), read-only; tied ones are transposed views.

        After a fit with batches that of the decoder's first layer has a row for each component and one for each batch.
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
        callbacks: Sequence[Callback] = (),
        checkpoint: Checkpoint | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> Self:
        """Train the autoencoder.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)
            A source that does not fit into `block_bytes` is trained on block by block. CuPy's arrays and CSR, and what
            DLPack makes CuPy's, are trained on where they lie, by the backend "cuda".
        y : array, CSR, frame or Source of shape (n_samples, n_outputs), optional
            What to reconstruct, if not X itself: clean rows for noisy ones, fine ones for coarse ones. Such
            pairs bring their own noise: `corruption` is then not applied. One-dimensional y (class labels) is
            ignored.
        sample_weight : array of shape (n_samples,), optional
            Not negative; scaled to mean one over the rows trained on.
        batch : array-like of str or int, shape (n_samples,), or one label for all rows, optional
            Labels of the rows' batches: lists, arrays, columns of frames, categoricals. The decoder is told which batch
            a row is of, by an input for each batch beside the code (one-hot), so that the code need not tell it; the
            encoder is not. `batches_` holds the labels, sorted; what decodes then takes a `batch`, too. Not with tied
            weights, nor for convolutional and deep autoencoders and machines.
        X_val : as X, or a tuple (X_val, y_val) or (X_val, y_val, batch_val), optional
            Rows for ``history_["val_loss"]`` and early stopping, instead of holding some of X out. A tuple
            where y or batch is given, in the order of these; y_val is None if y is not given.
        callbacks : sequence of narrows.training.Callback
        checkpoint : narrows.training.Checkpoint, optional
            Save training under a path, and go on from there. Data in memory are recognised by a hash of their
            content, a source by its shape and dtype alone.
        block_bytes : int
            Bytes of a source that are in memory at once.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            A parameter or the data are not usable.
        DivergenceError
            The loss is not finite; if an epoch was completed, the estimator is fitted with its parameters.
        ResumeError
            The checkpoint belongs to another run, or is required and absent.
        """
        with whole(self):
            check_parameters(self)
            if not isinstance(checkpoint, Checkpoint | None):
                raise TypeError(f"checkpoint={checkpoint!r} must be a narrows.training.Checkpoint, of a path")
            for callback in callbacks:
                if not (hasattr(callback, "on_batch") and hasattr(callback, "on_epoch_end")):
                    raise TypeError(f"callbacks: {callback!r} must be a narrows.training.Callback")
            again = bool(self.warm_start) and self.__sklearn_is_fitted__()
            held_out = bool(self.early_stopping) and X_val is None
            min_samples = 2 if held_out else 1
            table = training_table(self, X, y, sample_weight, batch, reset=not again, min_samples=min_samples)
            held = None if X_val is None else validation_table(self, X_val, table)
            identity: dict[str, Any] = {}
            saved = None
            if checkpoint is not None:
                identity = identity_of(self, table, held, checkpoint, block_bytes)
                saved = checkpoint.read()
            seed = self._seed if again else seed_of(self, saved)
            if saved is not None:
                saved.check(identity | {"seed": seed})
            identity["seed"] = seed
            table = table.loaded(block_bytes)
            rows = np.arange(table.n_rows)
            validate = None
            if held_out:
                rows, held_rows = split_rows(table.n_rows, float(self.validation_fraction), seed)
                validate = validator(table, held_rows, block_bytes, self._row_losses)
            elif held is not None:
                validate = validator(held.loaded(block_bytes), None, block_bytes, self._row_losses)
            # The cosine schedule has its end built in: stopping before the rate has come down would waste it.
            to_the_end = self._runs_to_the_end or self.learning_rate == "cosine"
            options = Options(
                max_iter=int(self.max_iter),
                seed=seed,
                learning_rate=self.learning_rate,
                learning_rate_init=float(self.learning_rate_init),
                monitor="val_loss" if self.early_stopping else None if to_the_end else "loss",
                n_iter_no_change=int(self.n_iter_no_change),
                tol=float(self.tol),
                **self._first_epochs(),
            )
            train(
                self,
                table,
                rows,
                options,
                again=again,
                shuffle=self.shuffle,
                validate=validate,
                callbacks=callbacks,
                checkpoint=checkpoint,
                identity=identity,
                saved=saved,
                block_bytes=block_bytes,
            )
        return self

    def partial_fit(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None, *, batch: Any = None) -> Self:
        """Train for one pass over some rows, going on from the present parameters and optimiser state.

        There is no validation and the learning rate is `learning_rate_init`; the first call initialises. The optimiser
        starts afresh where its state is not kept: see `warm_start`.

        Parameters
        ----------
        X, y, sample_weight, batch
            As for `fit`. The first call says which batches there are: those of its labels or, of a pandas categorical,
            all of its categories, so that later calls may bring rows of the others.

        Returns
        -------
        self
        """
        with whole(self):
            check_parameters(self)
            again = self.__sklearn_is_fitted__()
            table = training_table(self, X, y, sample_weight, batch, reset=not again, declared=True)
            table = table.loaded(BLOCK_BYTES)
            options = Options(
                max_iter=1,
                seed=self._seed if again else seed_of(self, None),
                learning_rate_init=float(self.learning_rate_init),
                **self._first_epochs(),
            )
            train(self, table, np.arange(table.n_rows), options, again=again, shuffle=self.shuffle)
        return self

    def _first_epochs(self) -> dict[str, Any]:
        """What is otherwise in the first epochs of a network: fields of `training.Options`."""
        return {
            "kl_warmup": int(getattr(self, "kl_warmup", 0)),
            "initial_momentum": float(getattr(self, "initial_momentum", 0.0)),
            "momentum_epochs": int(getattr(self, "momentum_epochs", 0)),
        }

    def _first_state(
        self,
        spec: NetworkSpec,
        table: Table,
        rows: NDArray[np.int64],
        seed: int,
        block_bytes: int,
        stop: Callable[[], str | None] | None,
    ) -> State:
        """Parameters to begin with; `stop` is that of the checkpoint, if there is one.

        Counts begin with the means of their columns.
        """
        state = initial_state(spec, seed, Precision.of(self.precision).dtype)
        if spec.loss.info.of_counts:
            begin_counts(spec, state, table.totals(rows, block_bytes))
        return state

    def _layers(self, n_features: int, n_outputs: int) -> tuple[tuple[LayerSpec, ...], int]:
        """The network's layers, and how many of them are the encoder's."""
        return dense_layers(self, n_features, n_outputs)

    def _rows(self, X: Any, name: str = "X") -> Any:
        """X as rows of features, if it is something else."""
        return X

    def _corruption(self) -> Corruption | None:
        name = getattr(self, "corruption", None)
        return None if name is None else Corruption[name.upper()]

    # --- applying -------------------------------------------------------------------------------------------

    def transform(self, X: Any) -> NDArray[Any]:
        """Encode rows.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)

        Returns
        -------
        ndarray of shape (n_samples, n_components)
            Of X's dtype if that is float32 or float64, else float32. A CuPy array for X on a GPU, as from all methods
            that return rows, or as many numbers as X has columns.
        """
        check_is_fitted(self)
        codes = self._apply(encoding_table(self, X), Mode.ENCODE)
        # A frame, which set_output may ask for, is of the CPU.
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
        told = read_batch(self, batch, int(Z.shape[0]))
        return self._apply(Table(Z, batch=told, implicit=False), Mode.DECODE)

    def reconstruct(self, X: Any, *, batch: Any = None) -> NDArray[Any]:
        """Encode and decode rows.

        Parameters
        ----------
        X : array, CSR / CSC, data frame or Source of shape (n_samples, n_features)
        batch : array-like of shape (n_samples,), or one label for all rows, optional
            After a fit with batches, and only then: those of the rows. One label stands for all rows: what these would
            be in that batch.

        Returns
        -------
        ndarray of shape (n_samples, n_outputs)
            Dense, of X's dtype if that is float32 or float64, else float32.
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
            rebuilt = self._network.apply(part.X, Mode.RECONSTRUCT, batch=part.batch).astype(np.float64)
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
            Mean over the rows of the absolute derivative of the reconstruction by the latent.
        """
        from ..fitting.sensitivity import absolute_jacobian

        check_is_fitted(self)
        table, spec = rebuilding_table(self, X, batch), self._network.spec
        total = np.zeros((spec.n_components, spec.n_outputs))
        for part in table.blocks(self._block_rows()):
            codes = to_host(self._network.apply(part.X, Mode.ENCODE))
            total += absolute_jacobian(spec, self.coefs_, self.intercepts_, codes, part.batch)
        return total / table.n_rows

    def _apply(self, table: Table, mode: Mode) -> NDArray[Any]:
        dtype = np.dtype(table.X.dtype)
        network = self._network

        def run(block: Any, target: Any, batch: Any) -> NDArray[Any]:
            if mode is Mode.SCORE:
                goal = block if target is None else target
                return self._row_losses(network.apply, network.spec, block, goal, batch)[:, None]
            return network.apply(block, mode, batch=batch)

        if table.in_memory:
            return run(table.X, table.target, table.batch).astype(dtype, copy=False)
        out: NDArray[Any] | None = None
        at = 0
        for block, target, _, batch in table.blocks(max(1, BLOCK_BYTES // max(1, table.row_bytes))):
            part = run(block, target, batch)
            if out is None:
                out = np.empty((table.n_rows, part.shape[1]), dtype)
            out[at : at + len(part)] = part
            at += len(part)
        assert out is not None
        return out

    def _encodes(self, loss: Loss, *, separate_target: bool) -> Loss:
        """The loss for which rows must have a meaning to be encoded: squared error if they need none."""
        return loss if loss.info.of_counts and (self.counts_input or not separate_target) else Loss.MSE

    def _row_losses(
        self, apply: Callable[..., NDArray[Any]], spec: NetworkSpec, X: Any, target: Any, batch: Any
    ) -> NDArray[Any]:
        """The loss of each row, without penalties (see `data.RowLosses`)."""
        return apply(X, Mode.SCORE, target, batch)[:, 0]

    def _block_rows(self) -> int:
        """Rows for which a few dense float64 blocks of the widest layer fit into a block's bytes."""
        widest = max(max(layer.n_in, layer.n_out) for layer in self._network.spec.layers)
        return max(1, BLOCK_BYTES // (32 * widest))

    # --- files ----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted estimator to a model file, which `narrows.load` reads.

        The file holds parameters, never code, and is written whole or not at all. The optimiser's state is
        left out: a loaded estimator that is trained further starts its optimiser afresh.

        Parameters
        ----------
        path : path
            Conventionally ends in ``.safetensors``.

        Raises
        ------
        OutputError
            The file cannot be written.
        ValueError
            Parameters that the network depends on were set after the fit.
        """
        check_is_fitted(self)
        write_model(self, path)
