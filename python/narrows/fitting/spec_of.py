"""Facts of the data that a network depends on, and the choices that follow from them.

An estimator turns its parameters and `DataFacts` into a `NetworkSpec` with the help of these functions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..plan.spec import Data, Form, LayerSpec, NetworkSpec

__all__ = ["SPARSE_DENSITY", "DataFacts", "conditioned", "gram_pays", "with_sparse_forms"]

SPARSE_DENSITY = 0.15
"""Training works on sparse rows if at most this part of the data is stored: see ``docs/decisions/sparse-input.md``."""


@dataclass(frozen=True)
class DataFacts:
    """Facts of the data that a specification depends on.

    Attributes
    ----------
    n_features, n_outputs : int
        Columns of X and of the target.
    separate_target : bool
        Whether the target is not X itself.
    weighted : bool
        Whether rows have weights.
    shifted : bool
        Whether rows of X come as `Shifted`.
    density, target_density : float
        Part of X and of the target that is stored.
    batch_rows : int
        Rows of a step.
    n_conditions : int
        Batches on which the decoder is conditioned; 0 for none.
    """

    n_features: int
    n_outputs: int
    separate_target: bool = False
    weighted: bool = False
    shifted: bool = False
    density: float = 1.0
    target_density: float = 1.0
    batch_rows: int = 1
    n_conditions: int = 0

    @property
    def bound(self) -> Data:
        """The facts that the plan of the network holds."""
        return Data(self.separate_target, self.weighted, self.shifted, n_conditions=self.n_conditions)


def conditioned(layers: tuple[LayerSpec, ...], latent: int, n_conditions: int) -> tuple[LayerSpec, ...]:
    """The layers with one more input of the decoder for each condition."""
    first = layers[latent]
    wider = dataclasses.replace(first, n_in=first.n_in + n_conditions)
    return (*layers[:latent], wider, *layers[latent + 1 :])


def with_sparse_forms(spec: NetworkSpec, data: DataFacts, sparse_decoder: str) -> NetworkSpec:
    """The specification with the sparse forms of input and decoder that pay for these data.

    Raises
    ------
    ValueError
        ``sparse_decoder="gram"`` for dense targets.
    """
    if sparse_decoder == "gram" and data.target_density == 1:
        raise ValueError(
            f"sparse_decoder='gram' needs sparse {'y' if data.separate_target else 'X'} (CSR), and this one stores "
            "every value; sparse_decoder='auto' takes dense rows too"
        )
    gram = sparse_decoder == "gram" or (
        sparse_decoder == "auto"
        and data.target_density < 1
        and gram_pays(data.batch_rows, spec.layers[-1].n_in, data.target_density)
    )
    sparse = data.density <= SPARSE_DENSITY and spec.takes_sparse_input
    return dataclasses.replace(spec, form=Form(sparse, gram and spec.takes_gram_decoder))


def gram_pays(batch_rows: int, inner: int, density: float) -> bool:
    """Whether the squared error of a layer with `inner` inputs costs less in Gram form.

    The cost of each form is counted for one output, in multiply-adds of a dense product. Dense: three products and the
    passes over the array of outputs. Gram: two products with Gram matrices, and two with the nonzeros, whose
    multiply-adds cost six times as much. The factors are measured, see ``docs/decisions/sparse-squared-error.md``.
    """
    dense = batch_rows * (3 * inner + 96)
    gram = 2 * inner * inner + 12 * density * batch_rows * (inner + 16)
    return gram < dense
