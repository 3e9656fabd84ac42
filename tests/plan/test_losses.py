"""The records of the losses say what the documentation promises."""

from __future__ import annotations

import math

import pytest

from narrows.data.normalize import Normalizer
from narrows.plan.losses import LOSSES, Loss

COUNTS = {"poisson", "nb", "zinb"}


def test_every_loss_has_one_record() -> None:
    assert [info.loss for info in LOSSES.values()] == list(Loss)
    assert all(Loss[name.upper()].info is info for name, info in LOSSES.items())


def test_the_records_hold_the_documented_facts() -> None:
    named = {name for name, info in LOSSES.items() if info.likelihood}
    assert named == {"mse", "bce", "gaussian"} | COUNTS
    assert {name for name, info in LOSSES.items() if info.of_counts} == COUNTS
    assert {name for name, info in LOSSES.items() if info.whole} == COUNTS
    assert {name for name, info in LOSSES.items() if info.raw_counts} == {"multinomial"} | COUNTS
    assert {name for name, info in LOSSES.items() if info.dispersion} == {"nb", "zinb"}
    defaults = [info.link_names[0] for info in LOSSES.values()]
    assert defaults == ["linear", "sigmoid", "linear", "softmax", "linear", *["softmax"] * 3]
    assert LOSSES["bce"].link_names == ("sigmoid", "logistic", "softmax")
    assert LOSSES["multinomial"].link_names == ("softmax",)
    assert "softmax" not in LOSSES["gaussian"].link_names
    assert all(LOSSES[name].link_names == ("softmax", "exp") for name in COUNTS)
    ranges = {name: (info.low, info.high) for name, info in LOSSES.items() if info.low > -math.inf}
    assert ranges == {"bce": (0, 1), "multinomial": (0, math.inf), **dict.fromkeys(COUNTS, (0, math.inf))}


def test_a_normalizer_names_the_losses_it_knows() -> None:
    with pytest.raises(ValueError, match=r"loss='rmse' must be one of mse, bce, .*zinb"):
        Normalizer(loss="rmse").fit([[0.0], [1.0]])
