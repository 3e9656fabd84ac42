"""What the modules of `fitting` ask of an estimator. `models.base.BaseAutoencoder` implements it.

An attribute that is not listed here is not used in `fitting`; mypy checks that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from ..backends import State
from ..plan.losses import Loss
from ..plan.spec import NetworkSpec
from .network import Network
from .spec_of import DataFacts
from .start import Start

__all__ = ["Estimator"]


class Estimator(Protocol):
    """An estimator as `fitting` sees it."""

    # Parameters. They are checked by `_constraints` before use.
    loss: Any
    batch_size: Any
    shuffle: Any
    random_state: Any
    warm_start: Any
    verbose: Any
    precision: Any
    backend: Any
    n_threads: Any

    # Fitted attributes. `fitting.run` sets them.
    n_features_in_: int
    feature_names_in_: NDArray[Any]
    batches_: NDArray[Any]
    n_iter_: int
    history_: dict[str, list[float]]
    loss_: float
    best_loss_: float
    metadata_: dict[str, Any]
    _network: Network
    _seed: int
    _step: int

    @property
    def _constraints(self) -> Mapping[str, Callable[[str, Any], None]]:
        """The check of each parameter, by name."""

    @property
    def _feature_names(self) -> NDArray[Any] | None:
        """`feature_names_in_`, or None if X had no names."""

    @property
    def _conditions(self) -> NDArray[Any] | None:
        """`batches_`, or None if the decoder is not conditioned on batches."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name."""

    def __sklearn_is_fitted__(self) -> bool:
        """Whether there is a `_network`."""

    def _check_together(self) -> None:
        """Raise ValueError for parameters that do not go together. Each one alone is known to be allowed."""

    def _check_conditioned(self) -> None:
        """Raise ValueError if the decoder cannot be conditioned on batches."""

    def _flat_rows(self, X: Any, name: str, learns: bool = False) -> Any:
        """X with one dimension for all features, if it has more; `learns` if X is to be fitted."""

    def _input_loss(self, loss: Loss, *, separate_target: bool) -> Loss:
        """The loss whose domain X must lie in; squared error if X may hold any number."""

    def _spec(self, data: DataFacts) -> NetworkSpec:
        """The network that the parameters describe, for data with these facts."""

    def _first_state(self, start: Start) -> State:
        """The parameters that training begins with."""
