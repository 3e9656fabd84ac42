"""Every op at the sizes of real work: what ``bench/speed/test_ops.py`` times and `test_bench_smoke` finds complete."""

from __future__ import annotations

from narrows.plan.spec import Activation, Corruption, Loss, Solver
from networks import Case, boltzmann, conv, images, network

_A = Activation

_CONV_POOL = images(
    (28, 28, 1), conv(16, pool=2), conv(8, pool=2), conv(8), conv(16, upsample=2), conv(1, upsample=2), latent=2,
    hidden=_A.RELU, code=_A.RELU, output=_A.SIGMOID, loss=Loss.BCE,
)  # fmt: skip
_CONV_STRIDE = images(
    (28, 28, 1), conv(32, strides=2), conv(64, strides=2), 32, 3136,
    conv(32, shape=(7, 7, 64), strides=2, transposed=True), conv(1, strides=2, transposed=True), latent=3,
    hidden=_A.RELU, output=_A.SIGMOID, loss=Loss.BCE,
)  # fmt: skip

OP_CASES: tuple[Case, ...] = (
    Case(
        "images",
        network(
            (784, 256, 32, 256, 784), _A.GELU, _A.SIGMOID, _A.SIGMOID, loss=Loss.BCE, solver=Solver.ADAMW,
            corruption=Corruption.MASKING, corruption_level=0.3, dropout=0.2, activity_l1=1e-3, kl_sparsity=0.1,
            alpha=0.1, weight_l1=1e-3, clip_norm=1.0, weighted=True,
        ),
        batch=256,
        rows=256,
    ),
    Case(
        "genes",
        network(
            (2000, 128, 32, 128, 2000), _A.SILU, output=_A.SOFTMAX, loss=Loss.MULTINOMIAL, alpha=0.1,
            corruption=Corruption.GAUSSIAN, corruption_level=0.2,
        ),
        batch=256,
        rows=256,
    ),
    Case(
        "digits",
        network((784, 500, 40, 500, 784), output=_A.SIGMOID, loss=Loss.BCE, variational=True),
        batch=128,
        rows=128,
    ),
    Case(
        "counts",
        network(
            (2000, 128, 32, 128, 2000), output=_A.SOFTMAX, loss=Loss.NB, log_normalize=True, size_sum=2000.0,
            sparse_input=True,
        ),
        batch=256,
        rows=256,
    ),
    Case(
        "counts-inflated",
        network(
            (2000, 128, 32, 128, 2000), output=_A.EXP, loss=Loss.ZINB, cell_dispersion=True, size_sum=2000.0,
            log_normalize=True,
        ),
        batch=256,
        rows=256,
    ),
    Case(
        "counts-batches",
        network(
            (2000, 128, 10, 128, 2000), output=_A.SOFTMAX, loss=Loss.NB, log_normalize=True, size_sum=2000.0,
            sparse_input=True, variational=True, n_conditions=4,
        ),
        batch=256,
        rows=256,
    ),
    Case("readings", network((784, 128, 20, 128, 784), loss=Loss.GAUSSIAN, variational=True), batch=128, rows=128),
    Case(
        "contraction",
        network((784, 256, 32, 256, 784), _A.SIGMOID, _A.SIGMOID, _A.SIGMOID, loss=Loss.BCE, contractive=0.1,
            contractive_probes=2, contractive_hessian=0.1),
        batch=256,
        rows=256,
    ),
    Case(
        "contraction-1",
        network((784, 256, 784), latent=_A.SIGMOID, output=_A.SIGMOID, loss=Loss.BCE, contractive=0.1),
        batch=256,
        rows=256,
    ),
    Case(
        "cells",
        network(
            (2000, 128, 32, 128, 2000), _A.SILU, sparse_input=True, corruption=Corruption.MASKING,
            corruption_level=0.2, gram_decoder=True,
        ),
        batch=256,
        rows=256,
        density=0.07,
    ),
    Case(
        "cells-standardised",
        network((2000, 128, 32, 128, 2000), _A.SILU, sparse_input=True, gram_decoder=True, shifted=True),
        batch=256,
        rows=256,
        density=0.07,
    ),
    Case("machine", boltzmann(784, 500, alpha=0.02), batch=128, rows=128),
    Case("machine-chains", boltzmann(784, 500, n_chains=128), batch=128, rows=128),
    Case("conv-pool", _CONV_POOL, batch=128, rows=128),
    Case("conv-stride", _CONV_STRIDE, batch=128, rows=128),
    Case(
        "conv-pool-contraction",
        images(
            (28, 28, 1), conv(16, pool=2), conv(32, strides=2), 64, 784, latent=3, hidden=_A.SILU, output=_A.SIGMOID,
            loss=Loss.BCE, contractive=0.1, contractive_probes=1,
        ),
        batch=64,
        rows=64,
    ),
    Case("table", network((30, 16, 8, 16, 30), loss=Loss.HUBER, solver=Solver.SGD, tied=True), batch=128, rows=128),
)  # fmt: skip
"""Every op at the sizes of real work, where ``bench/speed/test_ops.py`` times it alone."""
