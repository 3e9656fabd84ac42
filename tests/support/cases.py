"""The shared cases: small networks that together use every op, activation, loss, penalty, and shape edge.

Promises: a case is data, the same on every machine; tests and benchmarks of every backend run these.
Never: imports a backend or asserts anything.
"""

from __future__ import annotations

from typing import Any

from narrows.plan.spec import Activation, Corruption, Loss, NetworkSpec, Precision, Solver
from networks import ELEMENTWISE, Case, allowed, boltzmann, conv, images, network

EDGES = (1, 5, 6, 7, 15, 16, 17, 31, 33, 47, 48, 49, 63, 64, 65)
"""Sizes on both sides of vector, register-tile and panel borders."""

CPU_PRECISIONS = tuple(precision for precision in Precision if precision is not Precision.TF32)

_SIZES = (7, 6, 3, 6, 7)
_A = Activation

PENALTIES: dict[str, dict[str, Any]] = {
    "activity_l1": {"activity_l1": 0.3},
    "activity_l1_weighted": {"activity_l1": 0.3, "weighted": True},
    "kl": {"kl_sparsity": 0.5, "sparsity_target": 0.2, "latent": _A.SIGMOID},
    "kl_weighted": {"kl_sparsity": 0.5, "sparsity_target": 0.2, "latent": _A.SIGMOID, "weighted": True},
    "alpha": {"alpha": 0.7},
    "weight_l1": {"weight_l1": 0.4},
    "all": {
        "activity_l1": 0.2, "kl_sparsity": 0.5, "alpha": 0.7, "weight_l1": 0.4, "clip_norm": 0.5,
        "dropout": 0.2, "latent": _A.SIGMOID, "weighted": True,
        "corruption": Corruption.GAUSSIAN, "corruption_level": 0.2,
    },
}  # fmt: skip

CONTRACTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied": True, "weighted": True},
    "all": {
        "tied": True, "alpha": 0.5, "weight_l1": 0.1, "activity_l1": 0.2, "kl_sparsity": 0.5, "solver": Solver.ADAMW,
        "corruption": Corruption.GAUSSIAN, "corruption_level": 0.2,
    },
    "clip": {"clip_norm": 0.5, "alpha": 0.3, "solver": Solver.SGD},
    "probes": {"contractive_probes": 3, "weighted": True, "tied": True},
    "hessian": {"contractive_hessian": 3.0, "n_corruptions": 2},
    "hessian-all": {
        "contractive_hessian": 3.0, "n_corruptions": 2, "hessian_std": 0.3, "tied": True, "alpha": 0.5,
        "corruption": Corruption.MASKING, "corruption_level": 0.2, "weighted": True, "contractive_probes": 2,
    },
    "hessian-clip": {"contractive": 0.0, "contractive_hessian": 5.0, "clip_norm": 0.5},
}  # fmt: skip

_POOLED = (conv(5, pool=2), conv(3, pool=2), conv(4, upsample=2), conv(2, upsample=2))
_STRIDED = (conv(4, strides=2), conv(6, strides=2), 5, 24, conv(4, shape=(2, 2, 6), strides=2, transposed=True),
            conv(3, strides=2, transposed=True))  # fmt: skip

CONVOLUTIONS: dict[str, tuple[tuple[int, int, int], tuple[Any, ...], int, dict[str, Any]]] = {
    "pool": ((8, 8, 2), _POOLED, 2, {"activity_l1": 0.1, "alpha": 0.3}),
    "stride": ((8, 8, 3), _STRIDED, 3, {"hidden": _A.GELU, "weighted": True, "contractive": 0.0}),
    "signal": ((1, 12, 1), (conv(3, (1, 5), strides=(1, 2)), conv(2, (1, 3), pool=(1, 2)), 4, 12), 3,
               {"hidden": _A.SOFTPLUS, "solver": Solver.SGD}),
    "valid": ((9, 7, 2), (conv(4, padding="valid"), conv(3, (2, 3), strides=(2, 1), padding="valid"), 4,
                          9, conv(2, (7, 5), shape=(3, 3, 1), padding="valid", transposed=True)), 3,
              {"hidden": _A.ELU, "clip_norm": 0.5}),
    "all": ((6, 8, 1), (conv(17, pool=(2, 1)), conv(7, (4, 2), strides=(1, 2), pool=(3, 2)), 6, 48,
                        conv(5, (2, 4), shape=(1, 4, 12), upsample=(6, 1)), conv(1, 1, upsample=(1, 2))), 3,
            {"hidden": _A.SILU, "dropout": 0.2, "corruption": Corruption.GAUSSIAN, "corruption_level": 0.2,
             "weight_l1": 0.1, "alpha": 0.2, "loss": Loss.BCE, "output": _A.SIGMOID, "weighted": True}),
    "code": ((6, 6, 2), (conv(5, strides=3), conv(2, strides=3, transposed=True)), 1,
             {"code": _A.SIGMOID, "kl_sparsity": 0.5, "activity_l1": 0.1, "solver": Solver.ADAMW, "alpha": 0.2}),
    "gaussian": ((4, 4, 3), (conv(20, 3, pool=2), 6, 4, conv(3, shape=(2, 2, 1), upsample=2)), 2,
                 {"variational": True, "loss": Loss.GAUSSIAN, "hidden": _A.SIGMOID}),
    "contractive": ((8, 8, 3), _STRIDED, 3,
                    {"hidden": _A.SILU, "code": _A.SIGMOID, "weighted": True, "contractive": 5.0,
                     "contractive_probes": 2, "alpha": 0.2}),
    "contractive-pool": ((6, 8, 2), (conv(5, pool=(3, 2)), conv(17, (1, 3), pool=(2, 1)), 7, 68,
                                     conv(2, shape=(1, 4, 17), upsample=(6, 2))), 3,
                         {"contractive": 3.0, "contractive_probes": 3, "corruption": Corruption.GAUSSIAN,
                          "corruption_level": 0.2, "solver": Solver.ADAMW, "alpha": 0.3}),
    "contractive-code": ((6, 6, 2), (conv(3, pool=3), conv(2, upsample=3)), 1,
                         {"code": _A.GELU, "contractive": 2.0, "contractive_probes": 1, "activity_l1": 0.1,
                          "clip_norm": 0.5}),
    "contractive-back": ((1, 12, 1), (conv(3, (1, 4), pool=(1, 2)), conv(4, (1, 3), upsample=(1, 2)),
                                      conv(5, (1, 3), strides=(1, 3), transposed=True), 9, 6, 12), 5,
                         {"hidden": _A.SOFTPLUS, "contractive": 1.0, "contractive_probes": 2, "solver": Solver.SGD}),
}  # fmt: skip
"""Image, layers, layers of the encoder, and options of convolutional networks."""


def convolutional(name: str) -> NetworkSpec:
    shape, layers, latent, options = CONVOLUTIONS[name]
    return images(shape, *layers, latent=latent, **options)


MODEL_CASES: tuple[Case, ...] = (
    # exp of exp of exp is no network
    *(Case(f"activation-{a.name}", network(_SIZES, a, a)) for a in ELEMENTWISE if a is not _A.EXP),
    Case("activation-EXP", network((7, 4, 7), latent=_A.EXP)),
    *(
        Case(
            f"loss-{loss.name}-{a.name}",
            network((7, 4, 7), output=a, loss=loss, huber_delta=0.7, log_normalize=loss.info.of_counts, size_sum=8.0),
        )
        for loss in Loss
        for a in Activation
        if allowed(loss, a)
    ),
    Case("tied", network(_SIZES, tied=True)),
    Case("tied-alpha", network(_SIZES, _A.GELU, tied=True, alpha=0.5, weight_l1=0.1)),
    *(Case(f"dropout-{a.name}", network(_SIZES, a, a, dropout=0.4)) for a in (_A.RELU, _A.SIGMOID, _A.GELU)),
    *(
        Case(
            f"corruption-{kind.name}",
            network((9, 4, 9), corruption=kind, corruption_level=0.3, corruption_range=(-0.5, 2.0)),
        )
        for kind in Corruption
    ),
    *(Case(f"penalty-{name}", network(_SIZES, **options)) for name, options in PENALTIES.items()),
    *(Case(f"activity-{a.name}", network((7, 4, 7), latent=a, activity_l1=0.3)) for a in ELEMENTWISE),
    *(Case(f"contractive-1-{a.name}", network((7, 4, 7), latent=a, contractive=0.6)) for a in ELEMENTWISE),
    *(Case(f"contractive-2-{a.name}", network(_SIZES, a, a, contractive=0.6)) for a in ELEMENTWISE if a is not _A.EXP),
    *(
        Case(
            f"contractive-{len(sizes) // 2}-{name}",
            network(sizes, a, _A.SIGMOID, **({"contractive": 2.0} | options)),
            batch=batch,
            rows=batch + 5,
        )
        for sizes, a, batch in (
            ((17, 9, 17), _A.TANH, 8),
            ((17, 33, 6, 33, 17), _A.SILU, 37),
            ((9, 18, 7, 5, 7, 18, 9), _A.GELU, 17),
            ((9, 8, 17, 7, 5, 7, 17, 8, 9), _A.SOFTPLUS, 9),
        )
        for name, options in CONTRACTIONS.items()
    ),
    *(
        Case(f"hessian-{a.name}", network(_SIZES if a is not _A.EXP else (7, 4, 7), a, a, contractive_hessian=0.5))
        for a in ELEMENTWISE
    ),
    Case("contractive-EXP", network(_SIZES, latent=_A.EXP, contractive=0.1)),
    Case("contractive-batch-1", network(_SIZES, contractive=1.0), batch=1, rows=3),
    # Several grains, several blocks of a grain, and blocks that end within a row
    Case("contractive-blocks", network((40, 130, 70, 130, 40), latent=_A.TANH, contractive=0.1), batch=19, rows=19),
    Case("kl-SILU", network(_SIZES, latent=_A.SIGMOID, hidden=_A.SILU, kl_sparsity=1.0)),
    *(Case(f"solver-{s.name}", network(_SIZES, solver=s, momentum=0.8, alpha=0.3)) for s in Solver),
    *(Case(f"clip-{s.name}", network(_SIZES, solver=s, clip_norm=0.1)) for s in Solver),
    Case("clip-decoupled", network(_SIZES, solver=Solver.ADAMW, alpha=0.3, clip_norm=0.1)),
    Case("clip-idle", network(_SIZES, clip_norm=1e3)),
    Case("weighted", network(_SIZES, weighted=True)),
    Case("weighted-bce", network(_SIZES, output=_A.SIGMOID, loss=Loss.BCE, weighted=True)),
    Case("target", network((7, 5, 3, 4, 11), separate_target=True)),
    Case(
        "target-all",
        network(
            (7, 5, 3, 4, 11),
            separate_target=True,
            weighted=True,
            corruption=Corruption.MASKING,
            corruption_level=0.3,
        ),
    ),
    Case("batch-1", network(_SIZES), batch=1, rows=3),
    Case("one-component", network((7, 6, 1, 6, 7))),
    Case("one-feature", network((1, 3, 1))),
    Case("short-batch", network(_SIZES, kl_sparsity=0.2, latent=_A.SIGMOID), batch=64, rows=5),
    Case("grains", network((130, 33, 130), clip_norm=0.2, alpha=0.1), batch=17, rows=40),
    Case("gaussian-weighted", network(_SIZES, loss=Loss.GAUSSIAN, weighted=True, solver=Solver.ADAMW, alpha=0.1)),
    *(
        Case(
            f"counts-{loss.name}-{link.name}-{'cell' if cell else 'gene'}",
            network(
                (37, 6, 3, 6, 37),
                output=link,
                loss=loss,
                cell_dispersion=cell,
                weighted=cell,
                log_normalize=True,
                size_sum=30.0,
            ),
            batch=19,
            rows=24,
        )
        for loss in (Loss.POISSON, Loss.NB, Loss.ZINB)
        for link in (_A.SOFTMAX, _A.EXP)
        for cell in ((False, True) if loss.info.dispersion else (False,))
    ),
    Case("counts-clip", network(_SIZES, output=_A.SOFTMAX, loss=Loss.NB, clip_norm=0.1, alpha=0.2, size_sum=5.0)),
    Case(
        "counts-target",
        network(
            (7, 5, 3, 4, 20),
            output=_A.EXP,
            loss=Loss.ZINB,
            separate_target=True,
            log_normalize=True,
            size_sum=40.0,
            solver=Solver.ADAMW,
            alpha=0.1,
            corruption=Corruption.MASKING,
            corruption_level=0.3,
        ),
    ),
    Case("counts-tied", network(_SIZES, output=_A.SOFTMAX, loss=Loss.NB, tied=True, solver=Solver.SGD)),
    Case("counts-variational", network(_SIZES, output=_A.SOFTMAX, loss=Loss.NB, variational=True, log_normalize=True)),
    Case(
        "counts-variational-all",
        network(
            (33, 6, 5, 6, 33),
            output=_A.EXP,
            loss=Loss.ZINB,
            variational=True,
            cell_dispersion=True,
            weighted=True,
            kl_weight=0.3,
            size_sum=20.0,
            clip_norm=0.5,
            dropout=0.2,
        ),
        batch=17,
    ),
    Case("counts-one", network((1, 3, 1), output=_A.EXP, loss=Loss.NB), batch=1, rows=3),
    Case("variational", network(_SIZES, variational=True)),
    Case("variational-bce", network(_SIZES, output=_A.SIGMOID, loss=Loss.BCE, variational=True, kl_weight=0.3)),
    Case("variational-gaussian", network(_SIZES, loss=Loss.GAUSSIAN, variational=True, kl_weight=2.0)),
    Case(
        "variational-all",
        network(
            (7, 6, 5, 6, 7),
            _A.GELU,
            variational=True,
            weighted=True,
            kl_weight=0.7,
            alpha=0.7,
            weight_l1=0.4,
            dropout=0.2,
            corruption=Corruption.GAUSSIAN,
            corruption_level=0.2,
            clip_norm=0.5,
            loss=Loss.GAUSSIAN,
        ),
    ),
    Case("variational-target", network((7, 5, 3, 4, 11), variational=True, separate_target=True, kl_weight=0.0)),
    *(
        Case(f"variational-{k}", network((9, k, 9), variational=True, solver=Solver.SGD), batch=17, rows=40)
        for k in (1, 8, 16, 17, 33)
    ),
    *(Case(f"convolution-{name}", convolutional(name), batch=17, rows=22) for name in CONVOLUTIONS),
    *(
        Case(
            f"convolution-{a.name}",
            images((4, 6, 2), conv(3), conv(3, pool=2), conv(2, upsample=2), latent=2, hidden=a, code=a),
        )
        for a in ELEMENTWISE
        if a is not _A.EXP
    ),
    Case("convolution-EXP", images((4, 4, 1), conv(2, pool=2), conv(1, upsample=2), latent=1, code=_A.EXP)),
    Case("convolution-EXP-2", images((4, 4, 1), conv(2), conv(1), latent=1, code=_A.EXP)),
)
"""Every feature of a model, small enough for finite differences (``grains`` apart: it has several grains)."""

BATCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise": {"corruption": Corruption.GAUSSIAN, "corruption_level": 0.2, "hidden": _A.SILU, "dropout": 0.2},
    "penalties": {"activity_l1": 0.2, "kl_sparsity": 0.5, "latent": _A.SIGMOID, "alpha": 0.7, "weight_l1": 0.4},
    "contractive": {"contractive": 0.5, "latent": _A.GELU, "alpha": 0.2, "solver": Solver.ADAMW},
    "clip": {"clip_norm": 0.3, "alpha": 0.2, "separate_target": True, "weighted": True, "solver": Solver.SGD},
    "variational": {"variational": True, "weighted": True, "kl_weight": 0.7},
    "variational-bce": {"variational": True, "loss": Loss.BCE, "output": _A.SIGMOID, "separate_target": True},
    "counts": {"loss": Loss.NB, "output": _A.SOFTMAX, "log_normalize": True, "size_sum": 8.0, "variational": True},
    "counts-sparse": {
        "loss": Loss.ZINB, "output": _A.EXP, "log_normalize": True, "size_sum": 8.0, "cell_dispersion": True,
        "sparse_input": True, "clip_norm": 0.5,
    },
    "gram": {"gram_decoder": True, "sparse_input": True},
    "gram-shifted": {"gram_decoder": True, "sparse_input": True, "shifted": True, "weighted": True},
    "gram-variational": {"gram_decoder": True, "variational": True, "weighted": True},
}  # fmt: skip
"""Options of networks whose decoder is conditioned on batches."""

BATCH_CASES: tuple[Case, ...] = (
    *(
        Case(f"batches-{name}-{len(sizes)}-{n}", network(sizes, n_conditions=n, **options), batch=17, rows=40)
        for name, options in BATCHES.items()
        for sizes, n in (((11, 5, 11), 3), ((7, 6, 3, 6, 7), 2))
    ),
    # Codes and batches on both sides of the borders of vectors and of tiles; input gradients as transposed products
    *(
        Case(
            f"batches-{m}x{k}x{n}-{b}",
            network((k, n, k), latent=a, n_conditions=b, **options),
            batch=m,
            rows=m,
        )
        for m, k, n, b, a, options in (
            (1, 1, 1, 1, _A.LINEAR, {}), (5, 9, 15, 1, _A.RELU, {}), (6, 17, 16, 1, _A.TANH, {}),
            (7, 33, 17, 15, _A.GELU, {}), (13, 16, 16, 16, _A.SIGMOID, {}), (17, 40, 1, 130, _A.TANH, {}),
            (33, 65, 70, 3, _A.GELU, {}), (64, 129, 144, 17, _A.TANH, {}),
            (5, 97, 129, 3, _A.TANH, {"gram_decoder": True}), (33, 95, 64, 65, _A.GELU, {"gram_decoder": True}),
        )
    ),
)  # fmt: skip
"""Networks whose decoder is conditioned on batches."""

SHAPE_CASES: tuple[Case, ...] = tuple(
    Case(f"shape-{m}x{k}x{n}{'-tied' * tied}", network((k, n, k), latent=a, tied=tied), batch=m, rows=m)
    for i, s in enumerate(EDGES)
    for m, k, n in ((s, EDGES[-1 - i], 7), (EDGES[i - 5], s, EDGES[i - 9]), (17, 33, s))
    for tied, a in (((i % 2 == 1), _A.RELU if i % 3 else _A.GELU),)
)
"""Products at the edges of tiles, as two-layer networks: encoding is one dense op."""

TURNED_CASES: tuple[Case, ...] = tuple(
    Case(f"turned-{m}x{k}x{n}{'-tied' * tied}", network((k, n, k), latent=a, tied=tied), batch=m, rows=m)
    for i, (m, n) in enumerate(((32, 64), (33, 95), (47, 96), (48, 97), (63, 143), (64, 144), (65, 145), (129, 289)))
    for k, tied, a in ((EDGES[-1 - i], i % 2 == 1, _A.TANH if i % 3 else _A.GELU),)
)
"""Few rows for the inputs of the decoder: its input gradient is computed as a transposed product."""

BOLTZMANN_CASES: tuple[Case, ...] = (
    *(
        Case(f"boltzmann-{visible}{hidden}{n_chains}", boltzmann(9, 6, visible, hidden, n_chains=n_chains), rows=21)
        for visible in "bg"
        for hidden in "bg"
        for n_chains in (0, 11)
    ),
    Case("boltzmann-means", boltzmann(9, 6, sample_visible=False, weighted=True, alpha=0.3)),
    Case("boltzmann-3", boltzmann(9, 6, n_gibbs=3, weighted=True, weight_l1=0.1, momentum=0.5)),
    Case("boltzmann-3-chains", boltzmann(9, 6, n_gibbs=3, weighted=True, n_chains=8, solver=Solver.ADAM)),
    Case("boltzmann-clip", boltzmann(9, 6, "g", n_chains=8, clip_norm=0.1, alpha=0.2)),
    Case("boltzmann-clip-adamw", boltzmann(9, 6, clip_norm=0.1, alpha=0.2, solver=Solver.ADAMW)),
    *(
        Case(f"boltzmann-{m}x{k}x{n}", boltzmann(k, n, visible, n_chains=chains * m), batch=m, rows=m)
        for visible, chains, m, k, n in (
            ("b", 0, 17, 33, 65),
            ("g", 1, 40, 129, 48),
            ("b", 1, 65, 64, 17),
            ("b", 2, 1, 1, 1),
        )
    ),
)
"""Restricted Boltzmann machines, whose gradients are estimates and the derivatives of nothing."""

SPARSE: dict[str, dict[str, Any]] = {
    "plain": {},
    "masking": {"corruption": Corruption.MASKING, "corruption_level": 0.3, "solver": Solver.SGD},
    "tied": {"tied": True, "weighted": True, "weight_l1": 0.2, "solver": Solver.ADAMW, "alpha": 0.3},
    "target": {"separate_target": True, "clip_norm": 0.3, "alpha": 0.2},
    "contractive": {"contractive": 0.5, "latent": _A.TANH, "alpha": 0.2, "weight_l1": 0.1},
    "counts": {"loss": Loss.NB, "output": _A.SOFTMAX, "log_normalize": True, "size_sum": 20.0},
    "counts-all": {
        "loss": Loss.ZINB, "output": _A.EXP, "log_normalize": True, "size_sum": 20.0, "cell_dispersion": True,
        "corruption": Corruption.MASKING, "corruption_level": 0.3, "weighted": True, "clip_norm": 0.3,
        "separate_target": True,
    },
    "all": {
        "loss": Loss.GAUSSIAN, "variational": True, "corruption": Corruption.MASKING, "corruption_level": 0.2,
        "hidden": _A.SILU, "dropout": 0.2, "alpha": 0.7, "weighted": True,
    },
}  # fmt: skip
"""Options of networks with a sparse input."""

SPARSE_CASES: tuple[Case, ...] = (
    *(Case(f"sparse-{a.name}", network((9, 4, 9), latent=a, sparse_input=True)) for a in ELEMENTWISE),
    *(
        Case(f"sparse-{name}-{len(sizes)}", network(sizes, sparse_input=True, **options), batch=17, rows=40)
        for name, options in SPARSE.items()
        for sizes in ((23, 6, 23), (130, 33, 5, 33, 130))
    ),
    # On both sides of the blocks of columns and of the panels of outputs, nearly empty and full
    *(
        Case(f"sparse-{m}x{k}x{n}", network((k, n, k), sparse_input=True, alpha=0.1), batch=m, rows=m, density=density)
        for m, k, n, density in (
            (1, 1, 1, 1.0), (1, 96, 128, 0.5), (5, 97, 129, 0.05), (33, 95, 64, 1.0), (65, 193, 65, 0.01),
            (12, 400, 257, 0.1), (40, 191, 16, 0.9),
        )
    ),
)  # fmt: skip
"""Networks with a sparse input."""

GRAM: dict[str, dict[str, Any]] = {
    "plain": {"sparse_input": True},
    "masking": {"sparse_input": True, "corruption": Corruption.MASKING, "corruption_level": 0.3, "solver": Solver.SGD},
    "weighted": {"weighted": True, "weight_l1": 0.2, "solver": Solver.ADAMW, "alpha": 0.3},
    "noise": {"corruption": Corruption.GAUSSIAN, "corruption_level": 0.2, "hidden": _A.SILU, "dropout": 0.2},
    "target": {"separate_target": True, "sparse_input": True, "clip_norm": 0.3, "alpha": 0.2, "solver": Solver.SGD},
    "contractive": {"contractive": 0.5, "latent": _A.TANH, "alpha": 0.2, "weight_l1": 0.1, "sparse_input": True},
    "variational": {"variational": True, "sparse_input": True, "weighted": True, "alpha": 0.3},
    "variational-target": {"variational": True, "separate_target": True, "weight_l1": 0.1},
}
"""Options of networks with a decoder in Gram form."""

GRAM_CASES: tuple[Case, ...] = (
    *(Case(f"gram-{a.name}", network((9, 4, 9), latent=a, gram_decoder=True)) for a in ELEMENTWISE),
    *(
        Case(f"gram-{name}-{len(sizes)}", network(sizes, gram_decoder=True, **options), batch=17, rows=40)
        for name, options in GRAM.items()
        for sizes in ((23, 6, 23), (130, 33, 5, 33, 130))
    ),
    # On both sides of the blocks of columns and of rows, of panels and of the sums that are taken in double
    *(
        Case(
            f"gram-{m}x{k}x{n}", network((k, n, k), gram_decoder=True, alpha=0.1), batch=m, rows=m, density=density
        )
        for m, k, n, density in (
            (1, 1, 1, 1.0), (1, 96, 128, 0.5), (5, 97, 129, 0.05), (33, 95, 64, 1.0), (65, 193, 65, 0.01),
            (12, 400, 257, 0.1), (40, 191, 16, 0.9), (257, 769, 5, 0.05), (300, 1300, 6, 0.02),
        )
    ),
)  # fmt: skip
"""Networks with a decoder in Gram form."""

SHIFTED: dict[str, dict[str, Any]] = {
    "plain": {"sparse_input": True},
    "gram": {"sparse_input": True, "gram_decoder": True},
    "gram-all": {
        "sparse_input": True, "gram_decoder": True, "weighted": True, "alpha": 0.3, "weight_l1": 0.1,
        "solver": Solver.SGD, "dropout": 0.2, "hidden": _A.SILU,
    },
    "clip": {"sparse_input": True, "gram_decoder": True, "clip_norm": 0.3, "alpha": 0.2, "solver": Solver.ADAMW},
    "target": {"sparse_input": True, "gram_decoder": True, "separate_target": True},
    "tied": {"sparse_input": True, "tied": True, "weighted": True, "weight_l1": 0.2, "solver": Solver.ADAMW},
    "contractive": {"sparse_input": True, "contractive": 0.5, "latent": _A.TANH, "alpha": 0.2},
    "huber": {"sparse_input": True, "loss": Loss.HUBER, "huber_delta": 0.7, "output": _A.TANH},
    "variational": {"sparse_input": True, "variational": True, "weighted": True, "gram_decoder": True},
    "gaussian": {"sparse_input": True, "variational": True, "loss": Loss.GAUSSIAN},
    "masking": {"corruption": Corruption.MASKING, "corruption_level": 0.3, "gram_decoder": True},
    "dense": {"contractive_hessian": 0.5, "n_corruptions": 2},
}  # fmt: skip
"""Options of networks with shifted rows."""

SHIFTED_CASES: tuple[Case, ...] = (
    *(
        Case(f"shifted-{name}-{len(sizes)}", network(sizes, shifted=True, **options), batch=17, rows=40)
        for name, options in SHIFTED.items()
        for sizes in ((23, 6, 23), (130, 33, 5, 33, 130))
    ),
    *(
        Case(
            f"shifted-{m}x{k}x{n}", network((k, n, k), shifted=True, sparse_input=True, gram_decoder=i % 2 == 1),
            batch=m, rows=m, density=density,
        )
        for i, (m, k, n, density) in enumerate((
            (1, 1, 1, 1.0), (1, 192, 128, 0.5), (5, 193, 129, 0.05), (33, 95, 64, 1.0), (65, 385, 65, 0.01),
            (12, 400, 257, 0.1), (40, 191, 16, 0.9),
        ))
    ),
)  # fmt: skip
"""Networks with shifted sparse rows."""

CASES = (
    MODEL_CASES + SHAPE_CASES + TURNED_CASES + BOLTZMANN_CASES + SPARSE_CASES + GRAM_CASES + SHIFTED_CASES + BATCH_CASES
)
