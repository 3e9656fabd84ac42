"""From an estimator's parameters to the specification of its network.

Promises: the same parameters and data give the same specification.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from ..plan.losses import LOSSES
from ..plan.spec import ACTIVATIONS, LayerSpec, NetworkSpec, Solver
from .parameters import CORRUPTIONS, check_takes_batches, decoder_sizes, hidden_sizes, output_activation

__all__ = ["SPARSE_DENSITY", "build_spec", "dense_layers"]

SPARSE_DENSITY = 0.15
"""Training works on sparse rows if at most this part of the data is stored: measured, see ``docs/architecture.md``."""


def build_spec(
    estimator: Any,
    n_features: int,
    n_outputs: int,
    *,
    corruption_range: tuple[float, float] = (0.0, 1.0),
    separate_target: bool = False,
    weighted: bool = False,
    density: float = 1.0,
    shifted: bool = False,
    library: float = 1.0,
    target_density: float = 1.0,
    batch: int = 1,
    n_batches: int = 0,
) -> NetworkSpec:
    """The network that an estimator's (checked) parameters describe, for batches of `batch` rows of data of which the
    part `density` is stored (less a shift, if `shifted`), and of targets of which the part `target_density` is.

    Raises
    ------
    ValueError
        If the weights are tied and the target's width is not the input's, images do not fit the layers, a decoder
        in Gram form is asked for dense targets, or a decoder cannot be told batches.
    """
    e = estimator
    layers, latent = e._layers(n_features, n_outputs)
    if n_batches:
        check_takes_batches(e)
        first = layers[latent]
        told = dataclasses.replace(first, n_in=first.n_in + n_batches)
        layers = (*layers[:latent], told, *layers[latent + 1 :])
    loss = LOSSES[e.loss]
    cell_dispersion = loss.dispersion and getattr(e, "dispersion", "gene") == "gene-cell"
    heads = loss.heads + cell_dispersion
    if heads > 1:
        layers = (*layers[:-1], dataclasses.replace(layers[-1], n_out=heads * layers[-1].n_out))
    # With a target of its own the noise is in the pairs.
    corruption = None if e.corruption is None or separate_target else CORRUPTIONS[e.corruption]
    spec = NetworkSpec(
        layers=layers,
        latent=latent,
        loss=loss.loss,
        huber_delta=float(e.huber_delta),
        corruption=corruption,
        corruption_level=float(e.corruption_level) if corruption is not None else 0.0,
        corruption_range=corruption_range,
        activity_l1=float(e.activity_l1),
        kl_sparsity=float(e.kl_sparsity),
        sparsity_target=float(e.sparsity_target),
        contractive=float(e.contractive),
        contractive_probes=int(e.n_probes) if e.contractive_method == "hutchinson" else 0,
        contractive_hessian=float(e.contractive_hessian),
        hessian_std=float(e.hessian_std),
        n_corruptions=int(e.n_corruptions),
        alpha=float(e.alpha),
        weight_l1=float(e.weight_l1),
        solver=Solver[e.solver.upper()],
        momentum=float(e.momentum),
        beta_1=float(e.beta_1),
        beta_2=float(e.beta_2),
        epsilon=float(e.epsilon),
        clip_norm=None if e.clip_norm is None else float(e.clip_norm),
        separate_target=separate_target,
        weighted=weighted,
        variational=e.variational,
        kl_weight=kl_weight(e) if e.variational else 1.0,
        n_gibbs=int(getattr(e, "n_gibbs", 0)),
        n_chains=int(e.batch_size) if getattr(e, "persistent", False) else 0,
        sample_visible=bool(getattr(e, "sample_visible", True)),
        cell_dispersion=cell_dispersion,
        # A target of its own says nothing of what X is.
        log_normalize=loss.of_counts and (e.counts_input or not separate_target),
        library=library,
        shifted=shifted,
        n_batches=n_batches,
    )
    if e.sparse_decoder == "gram" and target_density == 1:
        raise ValueError(
            f"sparse_decoder='gram' needs sparse {'y' if separate_target else 'X'} (CSR), of which not all is stored; "
            "'auto' takes dense rows, too"
        )
    gram = e.sparse_decoder == "gram" or (
        e.sparse_decoder == "auto" and target_density < 1 and gram_pays(batch, layers[-1].n_in, target_density)
    )
    return dataclasses.replace(
        spec,
        sparse_input=density <= SPARSE_DENSITY and spec.takes_sparse_input,
        gram_decoder=gram and spec.takes_gram_decoder,
    )


def gram_pays(batch: int, inner: int, density: float) -> bool:
    """Whether the squared error of a layer with `inner` inputs costs less in Gram form.

    Both are counted for each output, in multiply-adds of a dense product: three products and the passes over the array
    of outputs; or two products with Gram matrices and two with the nonzeros, whose multiply-adds cost six times as
    much. Measured, see ``docs/architecture.md``.
    """
    dense = batch * (3 * inner + 96)
    gram = 2 * inner * inner + 12 * density * batch * (inner + 16)
    return gram < dense


def dense_layers(e: Any, n_features: int, n_outputs: int) -> tuple[tuple[LayerSpec, ...], int]:
    """The layers of an estimator that has dense ones alone, and how many of them are the encoder's."""
    hidden, decoder = hidden_sizes("hidden_layer_sizes", e.hidden_layer_sizes), decoder_sizes(e)
    if e.tied_weights and n_outputs != n_features:
        raise ValueError(f"tied_weights=True needs a target as wide as X: {n_outputs} columns of y, {n_features} of X")
    latent = len(hidden) + 1
    widths = (n_features, *hidden, int(e.n_components), *decoder, n_outputs)
    last = len(widths) - 2
    layers = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        named = e.latent_activation if i == latent - 1 else e.activation
        between = i not in (latent - 1, last)
        layers.append(
            LayerSpec(
                n_in,
                # Means and log-variances.
                2 * n_out if e.variational and i == latent - 1 else n_out,
                output_activation(e) if i == last else ACTIVATIONS[named],
                dropout=float(e.dropout) if between else 0.0,
                tied_to=last - i if e.tied_weights and i >= latent else None,
            )
        )
    return tuple(layers), latent


def kl_weight(estimator: Any) -> float:
    """What the divergence weighs beside the loss of a variational estimator, in the loss's units.

    Minus the log-likelihood of a Gaussian decoder of variance v is the squared error over 2 v, and a constant: there,
    the sum of it and beta times the divergence is minimised as squared error + 2 v beta divergence.
    """
    scale = 2 * float(estimator.decoder_variance) if estimator.loss == "mse" else 1.0
    return scale * float(estimator.beta)
