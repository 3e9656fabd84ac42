"""How an estimator is trained: from a checked table to the network that the estimator then holds.

- If anything stops a fit, the estimator is as it was before, or it has the parameters of a whole epoch.
- Training that continues a network or a checkpoint needs the same shapes; otherwise it is an error.
- Nothing here reads what the user passed (`inputs` does), and all estimators are treated alike (see `protocol`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import Program, State, compile_plan, resolve
from ..plan.lowering import lower
from ..plan.spec import Corruption, LayerSpec, NetworkSpec
from ..random.weights import draw_seed
from ..rows.devices import rows_of
from ..training import Callback, Checkpoint, Options, SavedRun, Trainer, TrainingState
from ..training.callbacks import shown
from .feed import TrainingFeed, even_batch
from .network import Network
from .parameters import plain_parameters
from .protocol import Estimator
from .spec_of import DataFacts
from .start import Start
from .table import BLOCK_BYTES, Table, density, fingerprint, value_range

__all__ = ["identity_of", "rollback_on_error", "seed_of", "train"]

log = logging.getLogger("narrows")

_NOT_IDENTITY = ("n_threads", "verbose", "random_state", "backend")
"""Parameters that may change between the parts of a run. The seed and the resolved backend are compared instead."""


@contextlib.contextmanager
def rollback_on_error(estimator: Estimator) -> Iterator[None]:
    """Restore the estimator's attributes if the body raises before it has trained a network."""
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        if vars(estimator).get("_network") is before.get("_network"):
            vars(estimator).clear()
            vars(estimator).update(before)
        raise


def identity_of(
    estimator: Estimator, table: Table, validation: Table | None, checkpoint: Checkpoint, block_bytes: int
) -> dict[str, Any]:
    """What must be the same to resume from a checkpoint, except the seed."""
    params = {n: v for n, v in plain_parameters(estimator).items() if n not in _NOT_IDENTITY}
    streamed = not table.in_memory and table.loaded(block_bytes) is table
    return {
        **checkpoint.identity,
        "estimator": type(estimator).__name__,
        "params": params,
        "backend": resolve(estimator.backend),
        "data": fingerprint(table),
        "validation": None if validation is None else fingerprint(validation),
        "block_bytes": block_bytes if streamed else None,
        "batches": None if table.condition is None else estimator.batches_.tolist(),
        "continued": estimator._step if estimator.warm_start and estimator.__sklearn_is_fitted__() else 0,
    }


def seed_of(estimator: Estimator, saved: SavedRun | None) -> int:
    """The seed of a new run, or of the `saved` run that continues."""
    if saved is not None and estimator.random_state is None:
        return saved.seed
    return draw_seed(estimator.random_state)


def train(
    estimator: Estimator,
    table: Table,
    rows: NDArray[np.int64],
    options: Options,
    *,
    again: bool,
    validate: Callable[[Program], float] | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: Checkpoint | None = None,
    identity: dict[str, Any] | None = None,
    saved: SavedRun | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> None:
    """Train on `rows` of `table`; the estimator keeps the result, also if training fails after an epoch.

    `again` continues the fitted network.
    """
    if table.weight is not None:
        total = float(rows_of(table.weight, rows).sum())
        if total <= 0:
            raise ValueError("sample_weight is zero for every row to train on")
        table = dataclasses.replace(table, weight=table.weight * (len(rows) / total))
    batch_rows = even_batch(len(rows), int(estimator.batch_size))
    spec = _spec(estimator, table, rows, batch_rows, block_bytes, again)
    if saved is not None:
        start, state = saved.state, saved.network
    elif again:
        network = estimator._network
        parameters = network.parameters
        same_solver = network.spec.training.update.solver is spec.training.update.solver
        state = dict(network.state) if same_solver else parameters
        # An optimiser that starts afresh counts its steps from 0, because it corrects its averages by that count.
        step = estimator._step if state.keys() != parameters.keys() else 0
        epoch = estimator.n_iter_
        start = TrainingState(epoch=epoch, first_epoch=epoch, step=step, first_step=step, history=estimator.history_)
    else:
        stop = None if checkpoint is None else checkpoint.stop
        first = Start(spec, table, rows, options.seed, block_bytes, stop)
        start, state = TrainingState(), estimator._first_state(first)
    feed = TrainingFeed(table, rows, batch_rows, options.seed, estimator.shuffle, block_bytes)
    program = compile_plan(
        lower(spec, batch_rows),
        resolve(estimator.backend),
        precision=estimator.precision,
        n_threads=estimator.n_threads,
    )
    if saved is not None:
        saved.check_fits(
            program.views(),
            first_epoch=estimator.n_iter_ if again else 0,
            first_steps=(0, estimator._step) if again else (0,),
            n_rows=feed.n_rows,
            n_steps=feed.n_steps,
            n_terms=len(program.plan.terms),
            max_iter=options.max_iter,
            keeps_best=options.monitor == "val_loss",
        )
    visible = shown(estimator.verbose)
    trainer = Trainer(
        program,
        feed,
        options,
        state=start,
        validate=validate,
        callbacks=[*visible, *callbacks],
        checkpoint=checkpoint,
        identity=identity,
        snapshot=partial(_snapshot, estimator, spec, batch_rows, again),
    )
    program.load(state)
    state.clear()  # The program has a copy. `saved` holds this dict too, but nobody reads it again.
    try:
        trainer.run()
    finally:
        for callback in visible:
            getattr(callback, "close", lambda: None)()
        trained = trainer.finish()
        if trained is not None:
            _adopt(estimator, trainer, trained, spec, batch_rows, again)


def _adopt(
    estimator: Estimator, trainer: Trainer, trained: State, spec: NetworkSpec, batch_rows: int, again: bool
) -> None:
    """Set the fitted attributes."""
    s = trainer.state
    estimator._network = Network(
        spec,
        batch_rows,
        trained,
        precision=estimator.precision,
        requested=estimator.backend,
        n_threads=estimator.n_threads,
    )
    estimator._seed = trainer.options.seed
    estimator._step = s.step
    estimator.n_iter_ = s.epoch
    estimator.history_ = {name: list(values) for name, values in s.history.items()}
    estimator.loss_ = s.history.get("loss", [math.nan])[-1]
    estimator.best_loss_ = s.best_loss
    if not again:
        estimator.metadata_ = {}


def _snapshot(estimator: Estimator, spec: NetworkSpec, batch_rows: int, again: bool, trainer: Trainer) -> Estimator:
    """The estimator with a copy of the parameters that training has reached."""
    copied: Estimator = object.__new__(type(estimator))
    vars(copied).update(vars(estimator))
    _adopt(copied, trainer, trainer.program.state(optimiser=False), spec, batch_rows, again)
    return copied


def _spec(
    estimator: Estimator, table: Table, rows: NDArray[np.int64], batch_rows: int, block_bytes: int, again: bool
) -> NetworkSpec:
    """The network for a table. If training continues, numbers taken from the data stay as in the first fit."""
    n_features = int(table.X.shape[1])
    target = table.target
    data = DataFacts(
        n_features=n_features,
        n_outputs=n_features if target is None else int(target.shape[1]),
        separate_target=target is not None,
        weighted=table.weight is not None,
        shifted=table.shifted,
        density=density(table.X),
        target_density=density(table.X) if target is None else density(target, implicit=False),
        batch_rows=batch_rows,
        n_conditions=0 if table.condition is None else len(estimator.batches_),
    )
    spec = estimator._spec(data)
    noise = spec.training.corruption
    if noise is not None and noise.kind is Corruption.SALT_AND_PEPPER:
        before = estimator._network.spec.training.corruption if again else None
        if before is not None and before.kind is noise.kind:
            low, high = before.low, before.high
        else:
            low, high = value_range(table, rows, block_bytes)
        noise = dataclasses.replace(noise, low=low, high=high)
        spec = dataclasses.replace(spec, training=dataclasses.replace(spec.training, corruption=noise))
    if spec.loss.info.of_counts:
        size_sum = estimator._network.spec.data.size_sum if again else _size_sum(table, rows, block_bytes)
        spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, size_sum=size_sum))
    if again:
        _check_continues(spec, estimator._network.spec)
    return spec


def _check_continues(spec: NetworkSpec, fitted: NetworkSpec) -> None:
    """Raise ValueError if training cannot continue with other parameters."""
    shapes, before = ([_shape(layer) for layer in s.layers] for s in (spec, fitted))
    if shapes != before or spec.latent != fitted.latent:
        raise ValueError(
            f"layers of shapes {[s[:2] for s in shapes]} cannot continue from {[s[:2] for s in before]}; "
            "fit with warm_start=False to start afresh"
        )
    if spec.n_chains != fitted.n_chains:
        raise ValueError(
            f"{spec.n_chains} persistent chains cannot continue from {fitted.n_chains}: keep batch_size and "
            "persistent, or fit with warm_start=False to start afresh"
        )


def _size_sum(table: Table, rows: NDArray[np.int64], block_bytes: int) -> float:
    """The sum of a row of counts with size factor 1; logs how many rows and columns are empty."""
    totals = table.totals(rows, block_bytes)
    for name, sums in (("rows", totals.rows), ("features", totals.columns)):
        if empty := int((sums == 0).sum()):
            log.warning("%d of %d %s to train on have no counts", empty, len(sums), name)
    return totals.size_sum


def _shape(layer: LayerSpec) -> tuple[Any, ...]:
    """What must stay the same for training to continue."""
    return layer.n_in, layer.n_out, layer.tied_to, layer.convolution
