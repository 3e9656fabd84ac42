"""Model files of an earlier version load, and the models give the same results.

`saved/` holds a small model of each estimator, written by version 0.1.0 at commit ee4f600 on a CPU with AVX-512, and in
``expected.npz`` five rows of its data with their codes and reconstructions. New versions never write these files again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import narrows
from narrows.backends import cpp, probe
from narrows.models import ESTIMATORS

SAVED = Path(__file__).parent / "saved"
MODELS = sorted(path.stem for path in SAVED.glob("*.safetensors"))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_an_earlier_version_gives_the_same_results(name: str) -> None:
    expected = np.load(SAVED / "expected.npz")
    X, codes, rebuilt = (expected[f"{name}.{part}"] for part in ("X", "codes", "rebuilt"))
    model: Any = narrows.load(SAVED / f"{name}.safetensors")
    labels = {"batch": np.array(["a", "b", "a", "b", "a"])} if name == "count" else {}
    for backend in (b for b in ("cpp", "numba", "reference") if probe(b).ok):
        model.set_params(backend=backend)
        found = model.transform(X), model.reconstruct(X, **labels)
        for got, wanted in zip(found, (codes, rebuilt), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5, err_msg=f"{name} on {backend}")
        if backend == "cpp" and cpp.isa() in ("avx2", "avx512", "avx512bf16"):
            same = [got.tobytes() == wanted.tobytes() for got, wanted in zip(found, (codes, rebuilt), strict=True)]
            assert all(same), f"{name}: the native backend gives other bits"


def test_each_estimator_of_that_version_has_a_model() -> None:
    classes = {type(narrows.load(SAVED / f"{name}.safetensors")).__name__ for name in MODELS}
    assert classes <= set(ESTIMATORS)
    assert len(classes) == len(MODELS) == 10
