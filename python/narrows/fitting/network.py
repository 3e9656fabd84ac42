"""The fitted network that an estimator holds and applies.

Several threads may call `Network.apply`; the results equal those of one thread.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import Program, State, compile_plan, resolve
from ..plan.lowering import lower
from ..plan.plan import FROM_CODES, Mode, Plan
from ..plan.spec import Activation, Form, Loss, NetworkSpec, Precision, Solver, Training, Update
from ..rows.shifted import Shifted, stored_rows
from ..rows.sparse import is_sparse

__all__ = ["Network"]


class Network:
    """A fitted network: its parameters, and programs that are compiled when first needed.

    Parameters
    ----------
    spec : NetworkSpec
        As trained.
    batch_rows : int
        Rows of a step, in training and when applied.
    state : dict of ndarray
        Parameters and, if known, optimiser state. The network owns them from now on.
    precision : {"float32", "float64", "bfloat16", "tf32"}
    requested : str
        The backend's name as passed to the estimator or to `run_on`.
    n_threads : int or None
    """

    def __init__(
        self,
        spec: NetworkSpec,
        batch_rows: int,
        state: State,
        *,
        precision: str,
        requested: str,
        n_threads: int | None,
    ) -> None:
        self.spec = spec
        self.batch_rows = batch_rows
        self.state = state
        self.precision = precision
        self.requested = requested
        self.n_threads = n_threads
        self._forget()

    def run_on(self, requested: str, n_threads: int | None) -> None:
        """From now on run on this backend, with this number of threads."""
        if (requested, n_threads) != (self.requested, self.n_threads):
            self.requested, self.n_threads = requested, n_threads
            self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        # The key says: sparse input, Gram decoder, shifted rows, X is its own target.
        self._programs: dict[tuple[bool, ...], Program] = {}
        self._plan: Plan | None = None
        self._decoder: Network | None = None
        self._backend: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Programs and locks belong to this process, and the chosen backend to this machine.
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        other = copy.copy(self)
        other.state = {name: array.copy() for name, array in self.state.items()}
        return other

    @property
    def backend(self) -> str:
        """The backend that runs the network here."""
        if self._backend is None:
            self._backend = resolve(self.requested)
        return self._backend

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of parameters and activations."""
        return Precision.of(self.precision).dtype

    @property
    def plan(self) -> Plan:
        """The plan of training."""
        if self._plan is None:
            self._plan = lower(self.spec, self.batch_rows)
        return self._plan

    @property
    def parameters(self) -> State:
        """Weights and biases by slot name."""
        return {slot.name: self.state[slot.name] for slot in self.plan.parameters}

    def coefs(self) -> list[NDArray[Any]]:
        """Read-only weights of every layer, shape (n_in, n_out); a tied layer has a transposed view. The weight of a
        convolution has shape (kernel height, kernel width, channels in, channels out).
        """
        weights: list[NDArray[Any]] = []
        for i, layer in enumerate(self.spec.layers):
            tied, conv = layer.tied_to, layer.convolution
            weights.append(self.state[f"W{i}"].view() if tied is None else self.state[f"W{tied}"].T)
            if conv is not None:
                weights[-1] = weights[-1].reshape(*conv.kernel, conv.shape[2], conv.filters)
            weights[-1].flags.writeable = False
        return weights

    def intercepts(self) -> list[NDArray[Any]]:
        """Read-only biases of every layer, shape (n_out,)."""
        biases = [self.state[f"b{i}"].reshape(-1) for i in range(len(self.spec.layers))]
        for bias in biases:
            bias.flags.writeable = False
        return biases

    def apply(self, X: Any, mode: Mode, target: Any = None, condition: Any = None) -> NDArray[Any]:
        """Run an inference mode over the rows of an array, CSR or Shifted.

        SCORE needs a target, which may be X; a Shifted target must be X. Modes that decode need the condition of each
        row, if the decoder is conditioned.
        """
        with self._lock:
            own = isinstance(target, Shifted)
            shifted = own or isinstance(X, Shifted)
            spec = _without_training(self.spec, shifted=shifted, separate_target=not own)
            # Only the format decides. If the density did, the last bits of a row could depend on other rows.
            sparse = is_sparse(stored_rows(X)) and mode not in FROM_CODES and spec.takes_sparse_input
            gram = is_sparse(stored_rows(target)) and spec.form.gram_decoder
            program = self._programs.get((sparse, gram, shifted, own))
            if program is None:
                program = compile_plan(
                    lower(dataclasses.replace(spec, form=Form(sparse, gram)), self.batch_rows),
                    self.backend,
                    # tf32 only exists on a GPU; elsewhere the model runs in float32.
                    precision="float32" if self.precision == "tf32" and self.backend != "cuda" else self.precision,
                    n_threads=self.n_threads,
                )
                program.load(self.parameters)
                self._programs[sparse, gram, shifted, own] = program
            return program.apply(X, mode, target, condition)

    def decoder_outputs(self, Z: Any, condition: Any = None) -> NDArray[Any]:
        """The outputs of the last layer for codes, before its activation; shape (n_rows, n_heads * n_outputs)."""
        with self._lock:
            if self._decoder is None:
                last = dataclasses.replace(self.spec.layers[-1], activation=Activation.LINEAR)
                spec = dataclasses.replace(
                    self.spec,
                    layers=(*self.spec.layers[:-1], last),
                    loss=Loss.MSE,
                    cell_dispersion=False,
                    log_normalize=False,
                    data=dataclasses.replace(self.spec.data, size_sum=1.0),
                )
                self._decoder = Network(
                    spec,
                    self.batch_rows,
                    self.parameters,
                    precision=self.precision,
                    requested=self.requested,
                    n_threads=self.n_threads,
                )
        return self._decoder.apply(Z, Mode.DECODE, condition=condition)


def _without_training(spec: NetworkSpec, *, shifted: bool, separate_target: bool) -> NetworkSpec:
    """The same network for these data, without what only training needs."""
    return dataclasses.replace(
        spec,
        training=Training(update=Update(Solver.SGD)),
        data=dataclasses.replace(spec.data, weighted=False, shifted=shifted, separate_target=separate_target),
    )
