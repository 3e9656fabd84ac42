"""How an estimator is trained: from a checked table to the network that it then holds.

Promises: an estimator is fitted or it is not: whatever interrupts a fit, it holds either what it held before or the
parameters of a whole epoch. What goes on from a network, or from a checkpoint, is of the same shapes, or refused.
Never: reads what the user passed (`inputs` does), knows one estimator from another but by its methods.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..backends import Program, State, compile_plan, resolve
from ..plan.losses import LOSSES
from ..plan.lowering import lower
from ..plan.spec import Corruption, LayerSpec, NetworkSpec
from ..random.weights import draw_seed
from ..rows.devices import rows_of
from ..training import Callback, Checkpoint, EpochPrinter, Options, SavedRun, Trainer, TrainingState
from .feed import TrainingFeed, even_batch
from .network import Network
from .parameters import plain_parameters
from .spec_of import build_spec
from .table import BLOCK_BYTES, Table, density, fingerprint, value_range

if TYPE_CHECKING:
    from ..models.base import BaseAutoencoder

__all__ = ["identity_of", "seed_of", "train", "whole"]

log = logging.getLogger("narrows")

_NOT_IDENTITY = ("n_threads", "verbose", "random_state", "backend")
"""Parameters that may change between parts of a run; the seed and the backend used are compared instead."""


@contextlib.contextmanager
def whole(estimator: BaseAutoencoder) -> Iterator[None]:
    """Put the estimator back as it was if the body fails before it has trained a network."""
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        if vars(estimator).get("_network") is before.get("_network"):
            estimator.__dict__.clear()
            estimator.__dict__.update(before)
        raise


def identity_of(
    estimator: BaseAutoencoder, table: Table, held: Table | None, checkpoint: Checkpoint, block_bytes: int
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from, but for the seed."""
    params = {n: v for n, v in plain_parameters(estimator).items() if n not in _NOT_IDENTITY}
    streamed = not table.in_memory and table.loaded(block_bytes) is table
    return {
        **checkpoint.identity,
        "estimator": type(estimator).__name__,
        "params": params,
        "backend": resolve(estimator.backend),
        "data": fingerprint(table),
        "validation": None if held is None else fingerprint(held),
        "block_bytes": block_bytes if streamed else None,
        "batches": None if table.batch is None else estimator.batches_.tolist(),
        "continued": estimator._step if estimator.warm_start and estimator.__sklearn_is_fitted__() else 0,
    }


def seed_of(estimator: BaseAutoencoder, saved: SavedRun | None) -> int:
    """The seed of a run that begins, or of the `saved` one that goes on."""
    if saved is not None and estimator.random_state is None:
        return int(saved.identity["seed"])
    return draw_seed(estimator.random_state)


def train(
    estimator: BaseAutoencoder,
    table: Table,
    rows: NDArray[np.int64],
    options: Options,
    *,
    again: bool,
    shuffle: bool | str,
    validate: Callable[[Program], float] | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: Checkpoint | None = None,
    identity: dict[str, Any] | None = None,
    saved: SavedRun | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> None:
    """Run a trainer over `rows` of `table` and take what it leaves, also when it fails."""
    if table.weight is not None:
        total = float(rows_of(table.weight, rows).sum())
        if total <= 0:
            raise ValueError("sample_weight is zero for every row that would be trained on")
        table = dataclasses.replace(table, weight=table.weight * (len(rows) / total))
    spec = _spec(estimator, table, rows, block_bytes, again)
    batch = even_batch(len(rows), int(estimator.batch_size))
    if saved is not None:
        start, state = saved.state, saved.network
    elif again:
        network = estimator._network
        parameters = network.parameters
        state = dict(network.state) if network.spec.solver is spec.solver else parameters
        # An optimiser that starts afresh counts its steps anew, by which it corrects its averages.
        step = estimator._step if state.keys() != parameters.keys() else 0
        epoch = estimator.n_iter_
        start = TrainingState(epoch=epoch, first_epoch=epoch, step=step, first_step=step, history=estimator.history_)
    else:
        stop = None if checkpoint is None else checkpoint.stop
        start, state = TrainingState(), estimator._first_state(spec, table, rows, options.seed, block_bytes, stop)
    feed = TrainingFeed(table, rows, batch, options.seed, shuffle, block_bytes)
    program = compile_plan(
        lower(spec, batch), resolve(estimator.backend), precision=estimator.precision, n_threads=estimator.n_threads
    )
    trainer = Trainer(
        program,
        feed,
        options,
        state=start,
        validate=validate,
        callbacks=[*([EpochPrinter()] if estimator.verbose else []), *callbacks],
        checkpoint=checkpoint,
        identity=identity,
    )
    program.load(state)
    state.clear()  # The program has it now. A saved run, which holds it too, is not read again.
    try:
        trainer.run()
    finally:
        trained = trainer.finish()
        if trained is not None:
            _adopt(estimator, trainer, trained, spec, batch, again)


def _adopt(
    estimator: BaseAutoencoder, trainer: Trainer, trained: State, spec: NetworkSpec, batch: int, again: bool
) -> None:
    """Make the estimator one that is fitted."""
    s = trainer.state
    estimator._network = Network(
        spec,
        batch,
        trained,
        precision=estimator.precision,
        requested=estimator.backend,
        n_threads=estimator.n_threads,
    )
    estimator._seed = trainer.options.seed
    estimator._step = s.step
    estimator.n_iter_ = s.epoch
    estimator.history_ = {name: list(values) for name, values in s.history.items()}
    estimator.loss_ = s.history["loss"][-1]
    estimator.best_loss_ = s.best_loss
    if not again:
        estimator.metadata_ = {}


def _spec(
    estimator: BaseAutoencoder, table: Table, rows: NDArray[np.int64], block_bytes: int, again: bool
) -> NetworkSpec:
    """The network for a table; one that goes on has the numbers that the fitted one took from its data."""
    n_features = int(table.X.shape[1])
    n_outputs = n_features if table.target is None else int(table.target.shape[1])
    low_high = (0.0, 1.0)
    if estimator._corruption() is Corruption.SALT_AND_PEPPER and table.target is None:
        known = again and estimator._network.spec.corruption is Corruption.SALT_AND_PEPPER
        low_high = estimator._network.spec.corruption_range if known else value_range(table, rows, block_bytes)
    library = 1.0
    if LOSSES[estimator.loss].of_counts:
        library = estimator._network.spec.library if again else _library(estimator, table, rows, block_bytes)
    spec = build_spec(
        estimator,
        n_features,
        n_outputs,
        corruption_range=low_high,
        separate_target=table.target is not None,
        weighted=table.weight is not None,
        density=density(table.X),
        shifted=table.shifted,
        library=library,
        target_density=density(table.X) if table.target is None else density(table.target, implicit=False),
        batch=even_batch(len(rows), int(estimator.batch_size)),
        n_batches=0 if table.batch is None else len(estimator.batches_),
    )
    if again:
        shapes = [_shape(layer) for layer in spec.layers]
        fitted = [_shape(layer) for layer in estimator._network.spec.layers]
        if shapes != fitted or spec.latent != estimator._network.spec.latent:
            raise ValueError(
                f"layers of shapes {[s[:2] for s in shapes]} cannot go on from "
                f"{[s[:2] for s in fitted]}; "
                "fit with warm_start=False to start afresh"
            )
        if spec.n_chains != estimator._network.spec.n_chains:
            raise ValueError(
                f"{spec.n_chains} persistent chains cannot go on from {estimator._network.spec.n_chains}: keep "
                "batch_size and persistent, or fit with warm_start=False to start afresh"
            )
    return spec


def _library(estimator: BaseAutoencoder, table: Table, rows: NDArray[np.int64], block_bytes: int) -> float:
    """The sum of a row of counts whose size factor is 1; says how many rows and columns hold nothing."""
    totals = table.totals(rows, block_bytes)
    for name, sums in (("rows", totals.rows), ("features", totals.columns)):
        if empty := int((sums == 0).sum()):
            log.warning("%d of %d %s to train on have no counts", empty, len(sums), name)
    return totals.library


def _shape(layer: LayerSpec) -> tuple[Any, ...]:
    """What must stay for training to go on."""
    return layer.n_in, layer.n_out, layer.tied_to, layer.convolution
