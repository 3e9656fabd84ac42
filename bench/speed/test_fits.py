"""Whole fits of the standard cases on every backend: ``pytest bench/speed/test_fits.py``.

A fit includes all that a user waits for: checks, lowering, compilation, epochs with shuffling and validation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import narrows
from narrows.benchmark import BATCHES, CASES, Case

EPOCHS = 2


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_fit(benchmark: Any, case: Case, backend: str) -> None:
    # The fit holds out a tenth of the rows.
    X = np.random.default_rng(0).random((BATCHES * case.batch * 10 // 9, case.widths[0]), dtype=np.float32)
    model = estimator(case, backend)
    benchmark.pedantic(model.fit, (X,), rounds=3, warmup_rounds=1)
    assert model.plan_.spec == case.spec, "another network was timed"
    assert model.n_iter_ == EPOCHS
    benchmark.extra_info |= {"epochs": EPOCHS, "rows": len(X)}
    if benchmark.stats:
        benchmark.extra_info["examples_per_s"] = EPOCHS * len(X) / benchmark.stats["median"]


def estimator(case: Case, backend: str) -> narrows.Autoencoder:
    middle = len(case.widths) // 2
    return narrows.Autoencoder(
        case.widths[middle],
        hidden_layer_sizes=case.widths[1:middle],
        latent_activation="relu",
        loss=case.loss.name.lower(),
        batch_size=case.batch,
        max_iter=EPOCHS,
        backend=backend,
        random_state=0,
    )
